"""Loading and saving of models."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import spatialfm as sfm
from spatialfm.models import HEIST, HEISTConfig, _registry, fingerprint, load, save

DATA = Path(__file__).parent / "data"
WEIGHTS = Path(sfm.models.__file__).parent / "weights"


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = HEIST(HEISTConfig(width=16, heads=2, layers=2, pe_dim=16, cross=False, gene_pe="geometric"))
    model.name, model.record = "mine", {"data": [{"name": "a"}]}
    return model.eval()


def change_metadata(folder, **changes):
    """Rewrite the file of a model with changed metadata; None removes an entry."""
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), **changes}
    save_file(load_file(path), path, metadata={key: value for key, value in metadata.items() if value is not None})


def card(folder):
    """Front matter and body of a model card, and the cells of each table by its title."""
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    front = {key: json.loads(v) if v[0] in '["' else v for key, v in (line.split(": ") for line in front.splitlines())}
    tables = {}
    for section in body.split("\n## ")[1:]:
        lines = [line for line in section.splitlines() if line.startswith("|") and not line.startswith("|-")]
        tables[section.splitlines()[0]] = [[cell.strip() for cell in line[1:-1].split(" | ")] for line in lines]
    return front, body, tables


def test_round_trip(model, tmp_path):
    save(model, tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors", str(tmp_path)):
        back = load(path)
        assert back.config == model.config
        assert back.name == "mine"
        assert back.record["data"] == [{"name": "a"}]
        assert not back.training
        assert fingerprint(back) == fingerprint(model)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_halves_the_file(model, tmp_path, dtype):
    save(model, tmp_path / "full")
    save(model, tmp_path / "half", dtype=dtype)
    full, half = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half"))
    assert half < 0.6 * full + 4000
    for a, b in zip(load(tmp_path / "half").parameters(), model.parameters(), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b.detach(), atol=1e-6, rtol=2**-8)


def test_bundled():
    model = load("heist")
    assert model.config == HEISTConfig()
    assert model.record["data"]
    assert all("license" in entry for entry in model.record["data"])
    assert fingerprint(model) == model.record["sha256"]


def test_published_checkpoint_is_recognised_by_content(tmp_path):
    shutil.copy(DATA / "heist_small" / "checkpoint.pth", tmp_path / "weights.bin")
    assert load(tmp_path / "weights.bin").config == HEISTConfig(width=32, heads=4, layers=3, pe_dim=16)


def test_changed_weights_are_refused(model, tmp_path):
    save(model, tmp_path)
    path = tmp_path / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    state["norm.bias"] += 1e-3
    save_file(state, path, metadata=metadata)
    with pytest.raises(ValueError, match="do not match their checksum"):
        load(path)
    del state["norm.bias"]
    save_file(state, path, metadata=metadata)
    with pytest.raises(ValueError, match="weights and config do not fit"):
        load(path)
    save_file(state, path)
    with pytest.raises(ValueError, match=r"not written by sfm.models.save"):
        load(path)


def test_damaged_and_missing_files(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00garbage")
    with pytest.raises(ValueError, match="is damaged"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no model 'nothing': it is neither one of \[.*'heist'.*\]"):
        load("nothing")


def test_a_model_that_diverged_is_not_saved(model, tmp_path):
    with torch.no_grad():
        model.norm.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"not finite in float32: \['norm.bias'\]"):
        save(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="dtype='int8'"):
        save(model, tmp_path / "x", dtype="int8")


def test_record_is_plain_json(model, tmp_path):
    save(model, tmp_path)
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["sha256"] == fingerprint(model)


def test_available_matches_the_bundled_files_without_loading_them(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(_registry, "safe_open", None)  # `load` reads weights with it
        patch.setattr(torch.nn.Module, "__init__", None)
        table = sfm.models.available()
    assert isinstance(table, pd.DataFrame)
    assert set(table.index) == {path.parent.name for path in WEIGHTS.glob("*/model.safetensors")}
    for name, row in table.iterrows():
        model = load(name)
        assert model.name == name
        assert row["sha256"] == fingerprint(model)
        assert row["n_parameters"] == sum(value.numel() for value in model.state_dict().values())
        assert row["file_mb"] == pytest.approx((WEIGHTS / name / "model.safetensors").stat().st_size / 1e6, abs=0.05)
        cells = sum(slide["cells"] for slide in model.record["data"])
        assert row["trained_on"].startswith(f"{cells:,} cells of {len(model.record['data'])} slides: ")
        assert all(slide["tissue"] in row["trained_on"] for slide in model.record["data"])


@pytest.mark.parametrize("name", [path.parent.name for path in WEIGHTS.glob("*/model.safetensors")])
def test_cards_of_bundled_models_are_current(name, tmp_path):
    save(load(name), tmp_path)
    assert (WEIGHTS / name / "README.md").read_text() == (tmp_path / "README.md").read_text()


def test_card_shows_the_record(model, tmp_path):
    model.record = {
        "data": [
            {"name": "a", "cells": 1200, "genes": 30, "tissue": "liver", "technology": "CODEX", "license": "CC0"},
            {"name": "b|c", "cells": 34, "genes": 5, "tissue": "liver", "technology": "CODEX", "citation": "A\nB 2020"},
        ],
        "arguments": {"mask": 0.2},
        "held_out_loss": 0.12345,
        "curve": [{"step": 1}],
        "license": "mit",
    }
    save(model, tmp_path)
    front, body, tables = card(tmp_path)
    assert front["license"] == "mit"
    assert front["library_name"] == "spatialfm"
    assert "heist" in front["tags"]
    assert "# mine\n" in body
    assert "Trained on 1,234 cells of 2 slides: liver (CODEX)." in body
    assert tables["Training data"] == [
        ["name", "tissue", "technology", "cells", "genes", "license", "citation"],
        ["a", "liver", "CODEX", "1,200", "30", "CC0", ""],
        ["b\\|c", "liver", "CODEX", "34", "5", "", "A B 2020"],
    ]
    assert tables["Training"][1:] == [["held out loss", "0.1235"]]
    assert tables["Arguments"][1:] == [["mask", "0.2"]]
    assert dict(tables["Config"][1:])["width"] == "16"
    weights = dict(tables["Weights"][1:])
    assert weights["licence"] == "mit"
    assert weights["parameters"] == f"{sum(p.numel() for p in model.parameters()):,}"
    assert fingerprint(model) in weights.values()


def test_a_licence_is_kept_by_later_saves(model, tmp_path):
    save(model, tmp_path / "a")
    front, _, tables = card(tmp_path / "a")
    assert "license" not in front
    assert dict(tables["Weights"][1:])["licence"] == "not stated"
    save(model, tmp_path / "b", license="cc-by-4.0")
    assert "license" not in model.record
    save(load(tmp_path / "b"), tmp_path / "c")
    assert card(tmp_path / "c")[0]["license"] == "cc-by-4.0"


def test_a_model_without_a_record_has_a_card(model, tmp_path):
    model.record = {}
    save(model, tmp_path)
    assert set(card(tmp_path)[2]) == {"Use", "Weights", "Config"}


def test_a_readme_written_by_hand_is_kept(model, tmp_path):
    (tmp_path / "README.md").write_text("# My project\n")
    save(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My project\n"
    (tmp_path / "README.md").unlink()
    save(model, tmp_path)
    model.name = "another"
    save(model, tmp_path)
    assert "# another\n" in (tmp_path / "README.md").read_text()


def test_files_of_another_version(model, tmp_path):
    save(model, tmp_path)
    advice = rf"which spatialfm {version('spatialfm')} does not know.*pip install --upgrade spatialfm"
    config = json.loads(json.dumps(vars(model.config)))
    for changes, found in (
        ({"format_version": "2"}, "format version 2"),
        ({"architecture": "heist-two"}, "architecture 'heist-two'"),
        ({"config": json.dumps({**config, "rotary": True})}, r"\['rotary'\] in its HEISTConfig"),
    ):
        save(model, tmp_path)
        change_metadata(tmp_path, **changes)
        with pytest.raises(ValueError, match=f"{found}.*{advice}"):
            load(tmp_path)
    save(model, tmp_path)
    change_metadata(tmp_path, format_version=None)  # as files were written before versions existed
    assert fingerprint(load(tmp_path)) == fingerprint(model)


def test_bad_metadata(model, tmp_path):
    for changes, found in (
        ({"config": "{"}, "config is damaged"),
        ({"config": None}, "config is damaged"),
        ({"config": json.dumps({"width": 15, "heads": 2})}, "config is not valid: width=15 must be a multiple"),
        ({"config": "[]"}, "weights and config do not fit"),
        ({"config": "5"}, "config is damaged"),
        ({"sha256": None}, "do not match their checksum"),
    ):
        save(model, tmp_path)
        change_metadata(tmp_path, **changes)
        with pytest.raises(ValueError, match=found):
            load(tmp_path)


def test_a_damaged_record(model, tmp_path):
    save(model, tmp_path)
    for text in ("{", "[]", "[" * 100_000):
        (tmp_path / "record.json").write_text(text)
        with pytest.raises(ValueError, match=r"record.json is damaged"):
            load(tmp_path)
    (tmp_path / "record.json").unlink()
    assert load(tmp_path).record == {}


@dataclass(frozen=True)
class OtherConfig:
    size: int = 3


class Other(torch.nn.Module):
    """A minimal architecture."""

    def __init__(self, config):
        super().__init__()
        self.config, self.name, self.record = config, "other", {}
        self.linear = torch.nn.Linear(config.size, config.size)


def test_another_architecture_needs_one_entry(tmp_path, monkeypatch):
    model = Other(OtherConfig(size=5))
    with pytest.raises(TypeError, match=r"cannot save a Other.*\['HEIST'"):
        save(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    monkeypatch.setitem(_registry.ARCHITECTURES, "other", (Other, OtherConfig))
    save(model, tmp_path)
    back = load(tmp_path)
    assert type(back) is Other
    assert back.config == OtherConfig(size=5)
    assert fingerprint(back) == fingerprint(model)
    assert "other" in card(tmp_path)[0]["tags"]


# --- interrupted saving -----------------------------------------------------------------------------


def failing(monkeypatch, at):
    """Make the ``at``-th call that writes to the disk fail, as on a full disk; returns the number of calls left."""
    calls = {"left": at}

    def wrap(owner, name):
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            calls["left"] -= 1
            if calls["left"] == 0:
                raise OSError(28, "No space left on device")
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    wrap(_registry, "save_file")
    for name in ("write_text", "replace", "chmod"):
        wrap(Path, name)
    wrap(_registry.os, "fsync")
    return calls


@pytest.mark.parametrize("at", range(1, 11))
def test_saving_that_fails_leaves_a_model_that_loads(model, tmp_path, at):
    """The old model until the new weights are in place, then the new model with its own record; never a mixture."""
    save(model, tmp_path)
    old = fingerprint(model)
    other = HEIST(HEISTConfig(width=32, heads=2, layers=1, pe_dim=16)).eval()
    other.name, other.record = "other", {"data": [{"name": "b"}]}
    with pytest.MonkeyPatch.context() as patch:
        calls = failing(patch, at)
        with pytest.raises(OSError, match="No space left"):
            save(other, tmp_path)
        assert calls["left"] <= 0
    back = load(tmp_path)
    assert (fingerprint(back), back.name, back.record["data"]) in (
        (old, "mine", [{"name": "a"}]),
        (fingerprint(other), "other", [{"name": "b"}]),
    )
    assert back.record["sha256"] == fingerprint(back)
    assert not list(tmp_path.glob(".saving-*"))
    if at < 9:
        assert fingerprint(back) == old
    save(other, tmp_path)
    assert load(tmp_path).record == {**other.record, "sha256": fingerprint(other)}


def test_saving_that_is_killed_leaves_a_model_that_loads(model, tmp_path):
    """A killed process cannot clean up: its temporary files stay in the folder, and are not read."""
    save(model, tmp_path)
    code = f"""
import os, signal
from pathlib import Path
from spatialfm.models import HEIST, HEISTConfig, save
import spatialfm.models._registry as registry
registry.Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
save(HEIST(HEISTConfig(width=16, heads=2, layers=1, pe_dim=16)), {str(tmp_path)!r})
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == -signal.SIGKILL
    back = load(tmp_path)
    assert fingerprint(back) == fingerprint(model)
    assert back.record["data"] == [{"name": "a"}]


def test_a_record_of_other_weights_is_not_used(model, tmp_path):
    save(model, tmp_path)
    change_metadata(tmp_path, record=None)  # as in files of older versions
    record = json.loads((tmp_path / "record.json").read_text())
    assert load(tmp_path).record == record
    (tmp_path / "record.json").write_text(json.dumps({**record, "sha256": "0" * 64}))
    assert load(tmp_path).record == {}


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("heist", {"width": 1 << 17, "heads": 1, "layers": 2}),
        ("heist", {"width": 1 << 40, "heads": 1, "layers": 2}),
        ("heist", {"layers": 10**9}),
        ("heist-niche", {"blocks": 10**9}),
        ("heist-niche", {"width": 1 << 18}),
        ("hibio", {"width": 1 << 18}),
        ("hibio", {"n_features": 1 << 36}),
    ],
)
def test_a_config_of_gigabytes_is_refused(architecture, config, tmp_path):
    """A file of some bytes whose config needs 64 GiB or more is refused before memory is allocated."""
    path = tmp_path / "model.safetensors"
    metadata = {"architecture": architecture, "config": json.dumps(config), "format_version": "1"}
    save_file({f"w{k}": torch.zeros(1) for k in range(40)}, path, metadata=metadata)
    with pytest.raises(ValueError, match="weights and config do not fit"):
        load(path)


def test_a_header_of_gigabytes_is_refused(tmp_path):
    entry = {"dtype": "F32", "shape": [1 << 32], "data_offsets": [0, 4 << 32]}
    header = json.dumps({"w": entry}).encode()
    path = tmp_path / "model.safetensors"
    for length in (len(header), 1 << 40):
        path.write_bytes(length.to_bytes(8, "little") + header + bytes(64))
        with pytest.raises(ValueError, match="is damaged"):
            load(path)


@pytest.mark.parametrize("name", ["heist", "heist-niche", "hibio", DATA / "heist_small" / "checkpoint.pth"])
def test_loading_leaves_the_random_state(name):
    before = torch.random.get_rng_state()
    loaded = load(name)
    sfm.models.load_tower()
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in loaded.parameters())


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (5, "got 5"),
        (None, "got None"),
        (HEIST, "got the class HEIST, not a model of it"),
        (torch.nn.Linear(2, 2), "got a Linear, which is not one of the architectures of spatialfm"),
        (HEIST(HEISTConfig(width=16, heads=2, layers=1, pe_dim=16)), "got a HEIST, which is loaded already"),
    ],
)
def test_values_that_are_not_names(given, found):
    with pytest.raises(TypeError, match=rf"name_or_path must be one of \['heist-niche', .*{found}"):
        load(given)
    with pytest.raises(TypeError, match="tower must be 'efficientnet-lite0'"):
        sfm.models.load_tower(given)


PUBLISHED = HEIST(HEISTConfig(width=16, heads=2, layers=1, pe_dim=16))
CALLS = {
    "embed": (lambda a, model: sfm.tl.embed(a, model), {}),
    "impute": (
        lambda a, model: sfm.tl.impute(a, ["g0"], model=model),
        {"heist": "'heist' cannot embed cells from any part"},
    ),
    "predict_expression": (
        lambda a, model: sfm.tl.predict_expression(a, model=model),
        {
            "heist": r"'heist' reads no histology \(it is a HEIST\); use model='hibio'",
            "heist-niche": "reads no histology",
        },
    ),
    "attention": (
        lambda a, model: sfm.tl.attention(a, model=model),
        {"heist-niche": "'heist-niche' has no attention.*use model='heist'"},
    ),
    "ligand_receptor": (
        lambda a, model: sfm.tl.ligand_receptor(a, "label", model=model),
        {"hibio": "'hibio' has no embedding of single genes in single cells"},
    ),
    "fine_tune": (lambda a, model: sfm.tl.fine_tune(a, model), {"hibio": "'hibio' cannot be fine-tuned"}),
    "annotate": (
        lambda a, model: sfm.tl.annotate(a, groupby="label", model=model, method="fine_tune"),
        {"heist": "'heist' cannot be trained on labels", PUBLISHED: "cannot be trained on labels"},
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_unsuitable_models_are_named(name):
    """Every function names the model that it cannot use, and the models that it can."""
    rng = np.random.default_rng(0)
    adata = ad.AnnData(rng.poisson(2, (40, 12)).astype(np.float32), obsm={"spatial": rng.uniform(0, 10, (40, 2))})
    adata.var_names = [f"g{k}" for k in range(12)]
    adata.obs["label"] = pd.Categorical(["a", "b"] * 15 + [None] * 10)
    if name == "ligand_receptor":
        adata.obs["label"] = ["a", "b"] * 20
    call, others = CALLS[name]
    for given in (5, HEIST, torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=r"model(= is| must be) .*(5|HEIST|Linear)"):
            call(adata, given)
    for given, found in others.items():
        with pytest.raises(ValueError, match=found):
            call(adata, given)
    with pytest.raises(FileNotFoundError, match="no model 'hiest'"):
        call(adata, "hiest")
    assert not adata.uns
