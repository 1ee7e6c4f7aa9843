"""Pretraining: the loop learns, is reproducible, continues after an interruption, and names slides that fail."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch

import spatialfm as sfm
from spatialfm.models import HEISTConfig
from spatialfm.train import _fabric, pretrain
from spatialfm.train._heist import HEISTRecipe


def logged(out):
    """Rows of all logs; if a step occurs twice, the later row."""
    logs = sorted((out / "logs").glob("version_*/metrics.csv"))
    rows = pd.concat([pd.read_csv(log) for log in logs]).drop_duplicates("step", keep="last")
    return rows.set_index("step").sort_index().sort_index(axis=1)


def test_learns_saves_and_repeats(slide, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = {**small, "max_steps": 60, "validate_every": 20, "learning_rate": 2e-3}
    first = pretrain({"brain": slide}, "run", **arguments)
    curve = first.record["curve"]
    assert curve[-1]["held_out_loss"] < curve[0]["held_out_loss"]
    assert first.record["data"][0]["license"].startswith("MIT")
    assert first.record["data"][0]["cells"] == 500
    back = sfm.models.load("run")
    assert back.record["curve"] == curve
    assert back.record["arguments"] == first.record["arguments"]
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {
        "last.ckpt",
        "logs",
        "model.safetensors",
        "record.json",
    }
    rows = logged(tmp_path / "run")
    assert list(rows.index) == [10, 20, 30, 40, 50, 60]
    assert rows.loc[60, "held_out_loss"] == curve[-1]["held_out_loss"]

    torch.manual_seed(1)  # the global generator is neither used nor changed
    state = torch.get_rng_state()
    again = pretrain({"brain": slide[np.random.default_rng(0).permutation(500)].copy()}, **arguments)
    assert [row["loss"] for row in again.record["curve"]] == pytest.approx([row["loss"] for row in curve], rel=1e-4)
    assert torch.equal(torch.get_rng_state(), state)
    other = pretrain({"brain": slide}, **{**arguments, "rng": 1, "max_steps": 20})
    assert other.record["curve"][0]["loss"] != pytest.approx(curve[0]["loss"], rel=1e-3)
    adata = slide.copy()
    sfm.tl.embed(adata, back)
    assert np.isfinite(adata.obsm["X_heist"]).all()


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning")
def test_files_folders_and_technologies(slide, other_slide, small, tmp_path):
    """Files of both formats, different panels, counts and intensities."""
    proteins = other_slide[:, :14].copy()
    proteins.X = np.random.default_rng(0).gamma(2.0, 300.0, proteins.shape).astype(np.float32)
    sfm.pp.grn(proteins, groupby="kind")
    (tmp_path / "data").mkdir()
    slide.write_h5ad(tmp_path / "data" / "one.h5ad")
    other_slide.write_zarr(tmp_path / "data" / "two.zarr")
    proteins.write_h5ad(tmp_path / "proteins.h5ad")
    paths = [tmp_path / "data", tmp_path / "proteins.h5ad"]
    model = pretrain(paths, **small, max_steps=12, dtype="bfloat16")
    assert [(s["name"], s["cells"], s["genes"]) for s in model.record["data"]] == [
        ("one", 500, 40),
        ("two", 350, 40),
        ("proteins", 350, 14),
    ]
    assert np.isfinite(model.record["held_out_loss"])


def breaking(step, change):
    """``HEISTRecipe.losses`` that applies ``change`` to the loss of one training step."""
    original = HEISTRecipe.losses
    steps = 0

    def losses(self, model, batch, generator):
        nonlocal steps
        parts = original(self, model, batch, generator)
        steps += model.training
        return {**parts, "loss": change(parts["loss"])} if steps == step and model.training else parts

    return losses


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(slide, small, tmp_path, monkeypatch):
    arguments = {**small, "max_steps": 14, "checkpoint_every": 5, "log_every": 1}
    whole = pretrain({"brain": slide}, tmp_path / "whole", **arguments)
    for name, change, match in [
        ("loss", lambda loss: loss * torch.nan, r"slide 'brain': not finite: .*'loss': nan"),
        # The loss is finite, its gradient is not.
        ("gradient", lambda loss: loss + (loss * 0).sqrt(), r"slide 'brain': not finite: .*norm of the gradient"),
    ]:
        out = tmp_path / name
        with monkeypatch.context() as patch:
            patch.setattr(HEISTRecipe, "losses", breaking(8, change))
            with pytest.raises(ValueError, match=match):
                pretrain({"brain": slide}, out, **arguments)
        assert not (out / "model.safetensors").exists()
        assert torch.load(out / "last.ckpt", weights_only=True)["progress"]["step"] == 5
        assert list(logged(out).index) == list(range(1, 8))  # also the steps after the checkpoint
        continued = pretrain({"brain": slide}, out, **arguments)
        assert continued.record["curve"] == [
            {**row, "minutes": continued.record["curve"][k]["minutes"]} for k, row in enumerate(whole.record["curve"])
        ]
        assert sfm.models.fingerprint(continued) == sfm.models.fingerprint(whole)
        pd.testing.assert_frame_equal(logged(out), logged(tmp_path / "whole"), check_exact=True)


def test_a_broken_slide_is_named(slide, small, tmp_path):
    location, value, lost = slide.copy(), slide.copy(), slide.copy()
    location.obsm["spatial"][0] = np.nan
    value.X[3, 4] = np.nan
    del lost.obsm["spatial"]
    (tmp_path / "torn.h5ad").write_bytes(b"no file of any kind")
    (tmp_path / "empty").mkdir()
    slides = {
        "location": (location, "slide 'location': .*NaN or infinite coordinates for 1"),
        "value": (value, "slide 'value': .*1 NaN or infinite values"),
        "lost": (lost, r"slide 'lost': obsm\['spatial'\] is missing"),
        "torn": (tmp_path / "torn.h5ad", "slide 'torn': "),
        "tiny": (slide[:40].copy(), "slide 'tiny': it has 40 cells; at least 49"),
        "gone": (tmp_path / "gone.h5ad", "slide 'gone': .*does not exist"),
        "text": (tmp_path / "empty", "slide 'text': .*ends in neither .h5ad nor .zarr"),
    }
    for name, (broken, match) in slides.items():
        with pytest.raises(ValueError, match=match):
            pretrain({"good": slide, name: broken}, tmp_path / "out", max_steps=1, **small)
        assert not (tmp_path / "out" / "last.ckpt").exists()
    with pytest.raises(ValueError, match=r"the folder .*empty' has no [.]h5ad or [.]zarr files"):
        pretrain(tmp_path / "empty")
    (tmp_path / "torn.zarr").mkdir()
    with pytest.raises(ValueError, match="would both be called 'torn'"):
        pretrain(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"mask": 1.5}, "mask must be between 0 and 1, got 1.5"),
        ({"max_steps": 0}, "max_steps must be an integer of at least 1, got 0"),
        ({"patience": 2.5}, "patience must be an integer"),
        ({"dropout": 1}, "dropout must be at least 0 and below 1"),
        ({"held_out": 1.0}, "held_out must be names of slides or a share"),
        ({"held_out": ["lungs", "a"]}, r"held_out has a slide 'lungs' .*\['lung', 'a'\]"),
        ({"held_out": ["a", "lung"]}, "leaves no slide to train on"),
        ({"learning_rate": 0}, "learning_rate must be a number above 0"),
        ({"max_minutes": "5"}, "max_minutes must be a number above 0, got '5'"),
        ({"rotate": "no"}, "rotate must be True or False, got 'no'"),
        ({"device": "toaster"}, "device='toaster'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"strategy": "fsdp"}, "strategy='fsdp' is not known"),
        ({"architecture": "none"}, "architecture='none' is not known"),
        (
            {"architecture": "heist-niche", "mask": 0.2},
            "mask= is an option of 'heist'; 'heist-niche' does not have it",
        ),
        ({"architecture": "heist-niche", "dropout": 0.1}, "dropout= is an option of 'heist' and 'hibio'"),
        ({"masc": 0.2}, "there is no option masc="),
    ],
)
def test_arguments_are_checked(slide, arguments, match):
    with pytest.raises(ValueError, match=match):
        pretrain({"a": slide, "lung": slide}, **arguments)


def test_several_processes_need_a_script(slide, monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with pytest.raises(ValueError, match="devices=2 cannot start from a notebook"):
        pretrain({"a": slide}, devices=2)


def test_no_slides():
    with pytest.raises(ValueError, match="slides is empty"):
        pretrain({})


def test_a_missing_lightning_is_named(slide, monkeypatch):
    monkeypatch.setattr(_fabric, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "spatialfm\[train\]"'):
        pretrain({"a": slide})


def test_import_is_light():
    code = "import sys, spatialfm.train; print(*{'lightning', 'torch', 'anndata'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []


def test_any_logger(slide, small, tmp_path, capfd):
    from lightning.fabric.loggers import Logger
    from lightning.pytorch.loggers import CSVLogger

    class Collect(Logger):
        name, version = "collect", 0

        def __init__(self):
            self.rows, self.ended = {}, None

        def log_metrics(self, metrics, step=None):
            self.rows[step] = metrics

        def log_hyperparams(self, params):
            pass

        def finalize(self, status):
            self.ended = status

    one, two = Collect(), CSVLogger(tmp_path / "mine", name="of_the_trainer")
    with sfm.settings.override(verbosity=1):
        pretrain({"a": slide}, tmp_path, **small, max_steps=6, log_every=2, logger=[one, two])
    written = pd.read_csv(tmp_path / "mine" / "of_the_trainer" / "version_0" / "metrics.csv")
    assert written["loss"].tolist() == pytest.approx([row["loss"] for row in one.rows.values()])
    assert list(one.rows) == [2, 4, 6]
    assert {"loss", "contrastive", "expression", "learning_rate", "gradient_norm", "held_out_loss"} <= set(one.rows[6])
    assert one.ended == "success"
    assert not (tmp_path / "logs").exists()
    assert capfd.readouterr() == ("", "")  # Lightning prints nothing


def test_checkpoints_of_other_runs_are_refused_and_run_no_code(slide, other_slide, small, tmp_path):
    arguments = {**small, "max_steps": 6, "checkpoint_every": 3}
    model = pretrain({"a": slide}, tmp_path, **arguments)
    checkpoint = (tmp_path / "last.ckpt").read_bytes()
    for slides, changed, match in [
        ({"a": slide}, {"max_steps": 9}, "max_steps=6 became 9"),
        ({"a": slide}, {"config": HEISTConfig(width=32, heads=2, layers=2, pe_dim=16)}, "config="),
        ({"a": other_slide}, {}, "slide a="),
        ({"a": slide, "b": other_slide}, {}, "slide b=None became"),
    ]:
        with pytest.raises(ValueError, match=match):
            pretrain(slides, tmp_path, **{**arguments, **changed})
    assert (tmp_path / "last.ckpt").read_bytes() == checkpoint
    finished = pretrain({"a": slide}, tmp_path, **arguments, log_every=1)
    assert sfm.models.fingerprint(finished) == sfm.models.fingerprint(model)
    restarted = pretrain({"a": slide}, tmp_path, **{**arguments, "max_steps": 3}, resume=False)
    assert restarted.record["curve"][-1]["step"] == 3

    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "trapped"),))

    for content in (pickle.dumps({"run": Trap()}), b"torn", checkpoint[: len(checkpoint) // 2]):
        (tmp_path / "last.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match="not a checkpoint of a training run, or is damaged; pass resume=False"):
            pretrain({"a": slide}, tmp_path, **arguments)
    torch.save({"run": Trap()}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="not a checkpoint of a training run, or is damaged"):
        pretrain({"a": slide}, tmp_path, **arguments)
    assert not (tmp_path / "trapped").exists()


def test_a_killed_run_continues_to_the_same_losses(slide, small, write_run, tmp_path):
    """Checkpoints are written nearly all the time, so the process is likely to be killed while writing one."""
    more = {"max_steps": 120, "validate_every": 25, "checkpoint_every": 1, "log_every": 1, "patience": 100}
    path = write_run(tmp_path, **more)
    command = [sys.executable, "-m", "spatialfm.train", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    checkpoint = tmp_path / "run" / "last.ckpt"
    # Importing the libraries may take half a minute on a busy machine.
    give_up = time.monotonic() + 300
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    at = torch.load(checkpoint, weights_only=True)["progress"]["step"]
    assert 1 <= at < 120
    assert not (tmp_path / "run" / "model.safetensors").exists()
    resumed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"continuing from step {at}" in resumed.stderr

    whole = pretrain({"brain": slide}, tmp_path / "whole", **small, **more)
    pd.testing.assert_frame_equal(logged(tmp_path / "run"), logged(tmp_path / "whole"), check_exact=True)
    assert list(logged(tmp_path / "run").index) == list(range(1, 121))
    assert sfm.models.fingerprint(sfm.models.load(tmp_path / "run")) == sfm.models.fingerprint(whole)
