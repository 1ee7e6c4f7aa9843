"""The TOML file that describes a run."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from spatialfm.models import HEISTConfig
from spatialfm.train import __main__ as command
from spatialfm.train import pretrain
from spatialfm.train._config import read_config
from spatialfm.train._heist import HEISTRecipe

DOCS = Path(__file__).parents[2] / "docs"


def write(folder, text):
    path = folder / "run.toml"
    path.write_text(text)
    return path


def test_sections_group_and_paths_are_relative_to_the_file(tmp_path):
    arguments = read_config(
        write(
            tmp_path,
            """
            slides = ["data", "more/a.h5ad"]
            out = "runs/first"
            [model]
            architecture = "heist"
            [config]
            width = 64
            [anything]
            max_steps = 10
            held_out = ["a"]
            """,
        )
    )
    assert arguments == {
        "slides": [tmp_path / "data", tmp_path / "more/a.h5ad"],
        "out": tmp_path / "runs/first",
        "architecture": "heist",
        "config": {"width": 64},
        "max_steps": 10,
        "held_out": ["a"],
    }
    named = read_config(write(tmp_path, 'out = "o"\n[slides]\nbrain = "x.zarr"\nlung = "/data/y.h5ad"'))
    assert named["slides"] == {"brain": tmp_path / "x.zarr", "lung": Path("/data/y.h5ad")}
    assert read_config(write(tmp_path, 'slides = "data"\nout = "o"'))["slides"] == [tmp_path / "data"]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('slides = "d"\nout = "o"\nmax_step = 3', r"run.toml: unknown key 'max_step'; did you mean 'max_steps'\?"),
        (
            'slides = "d"\nout = "o"\n[training]\nlearning_rat = 3',
            r"section \[training\]: unknown key 'learning_rat'; .*'learning_rate'",
        ),
        ('slides = "d"\nout = "o"\nrng = 1\n[training]\nrng = 2', "'rng' occurs twice"),
        ('slides = "d"', "'out' is missing"),
        ('out = "d"', "'slides' is missing"),
        ("slides = [", "is not valid TOML"),
    ],
)
def test_mistakes_are_named(tmp_path, text, match):
    with pytest.raises(ValueError, match=match):
        read_config(write(tmp_path, text))


def test_the_command_prints_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", str(tmp_path / "none.toml")])
    with pytest.raises(SystemExit, match=r"error: .*none.toml"):
        command.main()
    monkeypatch.setattr(sys, "argv", ["train", str(write(tmp_path, 'slides = "nothing.h5ad"\nout = "o"'))])
    with pytest.raises(SystemExit, match=r"error: slide 'nothing': .* does not exist"):
        command.main()


def test_the_example_of_the_documentation(tmp_path):
    """Its lines are the defaults, and its comments are valid arguments."""
    example = re.search(r"```toml\n(.*?)```", (DOCS / "pretraining.md").read_text("utf-8"), flags=re.DOTALL)[1]
    arguments = read_config(write(tmp_path, example))
    defaults = {name: p.default for name, p in inspect.signature(pretrain).parameters.items()}
    defaults |= {f.name: f.default for f in fields(HEISTRecipe)} | HEISTRecipe.defaults | {"architecture": "heist"}
    config = HEISTConfig(**arguments.pop("config"))
    assert config == HEISTConfig()
    given = {name: value for name, value in arguments.items() if name not in ("slides", "out")}
    assert given == {name: defaults[name] for name in given}
    everything = read_config(write(tmp_path, re.sub(r"^# ", "", example, flags=re.MULTILINE)))
    assert set(everything) >= {*given, "library_key", "layer", "max_minutes", "device", "dtype"}
