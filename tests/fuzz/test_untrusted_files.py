"""Untrusted models, images and stores cannot run code, or write files outside their folder."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import stat
import struct

import numpy as np
import pytest
import torch
from fuzzing.tissue import make_tissue

import spatialfm as sfm
from spatialfm.models import HEISTNiche


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def sprung(tmp_path):
    return tmp_path / "sprung"


@pytest.fixture
def trap(sprung):
    content = pickle.dumps(Trap(sprung))
    pickle.loads(content)
    assert sprung.exists()
    sprung.rmdir()
    return content


def in_torch(path, sprung):
    torch.save({"model_state_dict": {}, "args": Trap(sprung)}, path)


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_models_run_no_code(name, kind, tmp_path, trap, sprung):
    path = tmp_path / name
    path.write_bytes(trap) if kind == "pickle" else in_torch(path, sprung)
    for given in (path, tmp_path):
        with pytest.raises((ValueError, FileNotFoundError)):
            sfm.models.load(given)
    adata = make_tissue()
    with pytest.raises(ValueError, match=r"was not loaded|neither a safetensors file nor"):
        sfm.tl.embed(adata, path, library_key="sample")
    assert not sprung.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_towers_run_no_code(tmp_path, trap, sprung):
    pytest.importorskip("transformers")
    (tmp_path / "tower.py").write_text(f"import os; os.mkdir({str(sprung)!r})")
    config = {"model_type": "tower", "auto_map": {"AutoConfig": "tower.Config", "AutoModel": "tower.Model"}}
    for known in ({}, {"model_type": "vit", "auto_map": {"AutoModel": "tower.Model"}}):
        (tmp_path / "config.json").write_text(json.dumps({**config, **known}))
        (tmp_path / "pytorch_model.bin").write_bytes(trap)
        with pytest.raises((ValueError, OSError, ImportError, pickle.UnpicklingError)):
            sfm.models.load_tower(tmp_path)
    assert not sprung.exists()


@pytest.mark.parametrize(
    "name", ["hf-hub:../..", "hf-hub:../../etc/passwd", "hf-hub:a/b@../../..", "hf-hub:/a/b", "hf-hub:..", "../weights"]
)
def test_names_of_models_cannot_leave_the_cache(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with sfm.settings.override(cache_dir=tmp_path / "a" / "cache"), pytest.raises((ValueError, OSError, ImportError)):
        sfm.models.load(name)
    outside = [
        path for path in tmp_path.rglob("*") if path != tmp_path / "a" and not path.is_relative_to(tmp_path / "a/cache")
    ]
    assert outside == []


def test_models_are_saved_in_their_folder(tmp_path):
    model = HEISTNiche()
    model.name = "../../elsewhere"
    model.record = {"name": "../x", "license": "../y"}
    sfm.models.save(model, tmp_path / "a" / "b")
    assert {path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*") if path.is_file()} == {("a", "b")}
    assert sfm.models.load(tmp_path / "a" / "b").name == "../../elsewhere"


@pytest.mark.parametrize("size", [2**62, 10**12, 10**9])
def test_a_header_that_declares_more_than_the_file_holds(size, tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
    with pytest.raises(ValueError, match="damaged"):
        sfm.models.load(path)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 60\n(sprung) (w) file\nshowpage\n%%EOF\n"


def test_images_run_no_program(tmp_path, monkeypatch, sprung):
    """PostScript is a programming language."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\n/bin/mkdir -p '{sprung}'\n")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name in ("slide.eps", "slide.png", "slide.tif"):
        (tmp_path / name).write_bytes(POSTSCRIPT)
        with pytest.raises(ValueError, match=name):
            sfm.pp.patches(make_tissue()[:20].copy(), tmp_path / name, size_px=10, scale=1.0)[:]
    assert not sprung.exists()


def test_stores_run_no_code(tmp_path, trap, sprung):
    """Format 2 of zarr has a filter that unpickles data."""
    path = tmp_path / "patches.zarr"
    sfm.pp.patches(make_tissue(), library_key="sample", size_px=10, out_px=8, out=path)
    attributes = json.loads((path / "zarr.json").read_text())["attributes"]
    shutil.rmtree(path)
    path.mkdir()
    (path / ".zgroup").write_text(json.dumps({"zarr_format": 2}))
    (path / ".zattrs").write_text(json.dumps(attributes))
    for array in ("coordinates", "slide", "patches", "blank"):
        (path / array).mkdir()
        described = {
            "zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "compressor": None, "fill_value": None,
            "order": "C", "filters": [{"id": "pickle", "protocol": 5}],
        }  # fmt: skip
        (path / array / ".zarray").write_text(json.dumps(described))
        (path / array / "0").write_bytes(trap)
    with pytest.raises((ValueError, TypeError, KeyError)):
        sfm.pp.TissuePatches.read(path)[:]
    assert not sprung.exists()


def test_names_in_uns_are_not_used_as_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adata = make_tissue()
    adata.obs["sample"] = adata.obs["sample"].cat.rename_categories({"s1": "../../s1", "s2": "/s2"})
    adata.uns["spatial"] = dict.fromkeys(adata.obs["sample"].cat.categories, adata.uns["spatial"]["s3"])
    sfm.pp.patches(adata, library_key="sample", size_px=10, out_px=8, out=tmp_path / "a" / "patches.zarr")
    assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")} == {"a"}
    assert np.asarray(sfm.pp.TissuePatches.read(tmp_path / "a" / "patches.zarr")[:1]).shape[1:] == (8, 8, 3)
