"""The command: files in, files out, and errors of the user in one line."""

from __future__ import annotations

import subprocess
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import spatialfm as sfm
from spatialfm.__main__ import main
from spatialfm._settings import warn


@pytest.fixture
def tissue(tmp_path):
    rng = np.random.default_rng(0)
    adata = ad.AnnData(
        rng.poisson(2, (60, 8)).astype(np.float32),
        obs=pd.DataFrame({"slide": np.repeat(["a", "b"], 30)}, index=[f"c{i}" for i in range(60)]),
        obsm={"spatial": rng.uniform(0, 100, (60, 2))},
    )
    adata.write_h5ad(tmp_path / "in.h5ad")
    return adata


def test_command_writes_what_the_function_writes(tissue, tmp_path):
    command = [sys.executable, "-m", "spatialfm", "embed", "in.h5ad", "out.h5ad"]
    command += ["--library-key", "slide", "--device", "cpu", "--quiet"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout == ""
    # Old versions of numcodecs warn when they are imported.
    assert [line for line in result.stderr.splitlines() if "crc32c" not in line] == []
    written = ad.read_h5ad(tmp_path / "out.h5ad")
    sfm.tl.embed(tissue, library_key="slide", device="cpu")
    for key in ("X_niche", "X_state"):
        np.testing.assert_allclose(written.obsm[key], tissue.obsm[key], atol=1e-5)
    np.testing.assert_array_equal(written.X, tissue.X)
    assert written.uns["embeddings"]["X_niche"]["params"]["library_key"] == "slide"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.h5ad", "out.h5ad"]


def test_version():
    result = subprocess.run(
        [sys.executable, "-m", "spatialfm", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout == f"spatialfm {sfm.__version__}\n"


def test_zarr_and_overwriting(tissue, tmp_path, capsys):
    source, target = tmp_path / "in.h5ad", tmp_path / "out.zarr"
    main(["embed", str(source), str(target), "--key-added", "first"])
    main(["embed", str(target), str(target), "--key-added", "second", "--force"])
    assert {"X_first_niche", "X_first_state", "X_second_niche", "X_second_state"} <= set(ad.read_zarr(target).obsm)
    main(["embed", str(target), str(source), "--force"])
    assert "X_niche" in ad.read_h5ad(source).obsm
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.h5ad", "out.zarr"]
    assert "embed: 60 cells" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")  # of spatialdata
def test_spatialdata_store(tissue, tmp_path, capsys):
    """A store stands for its table, and the folder of a table for itself."""
    spatialdata = pytest.importorskip("spatialdata")
    from spatialdata.models import ShapesModel, TableModel

    def table():
        adata = tissue.copy()
        adata.obs["region"], adata.obs["instance"] = pd.Categorical(["cells"] * 60), np.arange(60)
        return TableModel.parse(adata, region="cells", region_key="region", instance_key="instance")

    shapes = ShapesModel.parse(tissue.obsm["spatial"], geometry=0, radius=5.0, index=np.arange(60))
    one, two = tmp_path / "one.zarr", tmp_path / "two.zarr"
    spatialdata.SpatialData(shapes={"cells": shapes}, tables={"table": table()}).write(one)
    spatialdata.SpatialData(shapes={"cells": shapes}, tables={"a": table(), "b": table()}).write(two)
    sfm.tl.embed(tissue, device="cpu")
    for source in (one, one / "tables" / "table", two / "tables" / "b"):
        main(["embed", str(source), str(tmp_path / "out.h5ad"), "--device", "cpu", "--force"])
        found = ad.read_h5ad(tmp_path / "out.h5ad").obsm["X_niche"]
        np.testing.assert_allclose(found, tissue.obsm["X_niche"], atol=1e-5)
    sdata = spatialdata.read_zarr(one)
    sfm.tl.embed(sdata, device="cpu")
    np.testing.assert_allclose(sdata["table"].obsm["X_niche"], tissue.obsm["X_niche"], atol=1e-5)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["embed", str(two), str(tmp_path / "other.h5ad")])
    assert "SpatialData store with 2 tables; name one of them" in capsys.readouterr().err


def test_warnings_are_one_line(tissue, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sfm.tl, "embed", lambda *_, **__: warn("a guess of %d", 3))
    main(["embed", str(tmp_path / "in.h5ad"), str(tmp_path / "out.h5ad")])
    assert capsys.readouterr().err == "warning: a guess of 3\n"


def test_only_given_options_are_passed_on(tissue, tmp_path, monkeypatch):
    """A model refuses options that it does not read, so no default may reach it."""
    passed = {}
    monkeypatch.setattr(sfm.tl, "embed", lambda _adata, model, **options: passed.update({model: options}))
    files = [str(tmp_path / "in.h5ad"), str(tmp_path / "out.h5ad"), "--force"]
    main(["embed", *files])
    main(["embed", *files, "--model", "heist", "--groupby", "slide", "--dtype", "float32"])
    assert passed == {"heist-niche": {}, "heist": {"groupby": "slide", "dtype": "float32"}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.h5ad", "out.h5ad"], "there is no file"),
        (["in.h5ad", "out.csv"], "does not end in .h5ad or .zarr"),
        (["in.h5ad", "in.h5ad"], "pass --force"),
        (["in.h5ad", "no/out.h5ad"], "there is no folder"),
        (["in.h5ad", "folder.h5ad", "--force"], "is a folder, which a .h5ad is not"),
        (["broken.h5ad", "out.h5ad"], "cannot be read as an AnnData"),
        (["in.h5ad", "out.h5ad", "--library-key", "mouse"], "library_key='mouse' is not a column of adata.obs"),
        (["in.h5ad", "out.h5ad", "--model", "heest"], "heest"),
        (["in.h5ad", "out.h5ad", "--device", "tpu"], "device='tpu'"),
        (["in.h5ad", "out.h5ad", "--image", "slide.jpg"], "does not read it"),
        (["in.h5ad", "out.h5ad", "--key-added", "a/b"], "key_added='a/b' contains"),
    ],
)
def test_errors_are_one_line(tissue, tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "broken.h5ad").write_bytes(b"no HDF5")
    (tmp_path / "folder.h5ad").mkdir()
    monkeypatch.chdir(tmp_path)
    before = (tmp_path / "in.h5ad").read_bytes()
    with pytest.raises(SystemExit) as stop:
        main(["embed", *arguments])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert message in printed
    assert (tmp_path / "in.h5ad").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.h5ad", "folder.h5ad", "in.h5ad"]


def test_a_failed_write_leaves_the_old_file(tissue, tmp_path, monkeypatch):
    target = tmp_path / "out.h5ad"
    target.write_bytes(b"old")

    def fail(self, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(ad.AnnData, "write_h5ad", fail)
    with pytest.raises(SystemExit):
        main(["embed", str(tmp_path / "in.h5ad"), str(target), "--force", "--quiet"])
    assert target.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.h5ad", "out.h5ad"]
