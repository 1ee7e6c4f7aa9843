"""Models by name, folder and file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spatialfm.models import HEIST, HEISTConfig, fingerprint, load, save

DATA = Path(__file__).parent / "data"


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = HEIST(HEISTConfig(width=16, heads=2, layers=2, pe_dim=16, cross=False, gene_pe="geometric"))
    model.name, model.record = "mine", {"data": [{"name": "a"}]}
    return model.eval()


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


def test_published_checkpoint_is_found_by_content(tmp_path):
    shutil.copy(DATA / "heist_small" / "checkpoint.pth", tmp_path / "weights.bin")
    assert load(tmp_path / "weights.bin").config == HEISTConfig(width=32, heads=4, layers=3, pe_dim=16)


def test_changed_weights_are_noticed(model, tmp_path):
    save(model, tmp_path)
    path = tmp_path / "model.safetensors"
    from safetensors import safe_open

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


def test_damaged_and_absent(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00garbage")
    with pytest.raises(ValueError, match="is damaged"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no model 'nothing': it is neither one of \['heist'\]"):
        load("nothing")


def test_a_model_that_diverged_is_not_saved(model, tmp_path):
    with torch.no_grad():
        model.norm.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"not finite as float32: \['norm.bias'\]"):
        save(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="dtype='int8'"):
        save(model, tmp_path / "x", dtype="int8")


def test_record_is_plain_json(model, tmp_path):
    save(model, tmp_path)
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["sha256"] == fingerprint(model)
