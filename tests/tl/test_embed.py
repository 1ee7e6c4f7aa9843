"""tl.embed: what it writes, what it does not depend on, what it refuses."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import spatialfm as sfm
from spatialfm.models import HEIST, HEISTConfig


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return HEIST(HEISTConfig(width=16, heads=2, layers=3, pe_dim=16)).eval()


def make(n=300, g=24, seed=0, *, kind="counts"):
    rng = np.random.default_rng(seed)
    group = rng.integers(3, size=n)
    mean = np.exp(rng.normal(size=(3, g)))
    x = rng.poisson(mean[group] * 2).astype(np.float32)
    if kind == "intensity":
        x = (rng.gamma(2.0, 200.0, size=(n, g)) * mean[group] - 100).astype(np.float32)
    obs = pd.DataFrame(
        {"slide": np.where(np.arange(n) < n // 2, "a", "b"), "type": group.astype(str)},
        index=[f"cell{i}" for i in range(n)],
    )
    adata = ad.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"gene{i}" for i in range(g)]))
    adata.obsm["spatial"] = rng.random((n, 2)) * [1000, 600]
    return adata


@pytest.fixture(scope="module")
def embedded(model):
    return sfm.tl.embed(make(), model, library_key="slide", context_size=64, copy=True)


def test_writes_what_it_promises(embedded, model):
    n = embedded.n_obs
    assert embedded.obsm["X_heist"].shape == (n, 32)
    assert embedded.obsm["X_heist"].dtype == np.float32
    blocks = embedded.uns["heist"]["blocks"]
    for half in ("cell", "gene"):
        start, stop = blocks[half]
        np.testing.assert_array_equal(embedded.obsm["X_heist"][:, start:stop], embedded.obsm[f"X_heist_{half}"])
    assert embedded.uns["heist"]["sha256"] == sfm.models.fingerprint(model)
    assert embedded.uns["heist"]["genes"]["n_used"] == 24
    assert {"spatial_connectivities", "spatial_distances"} <= set(embedded.obsp)
    assert {"grn", "spatial_neighbors"} <= set(embedded.uns)
    np.testing.assert_array_equal(embedded.X, make().X)


def test_one_context_is_a_plain_call_of_the_model(model):
    """The oracle: encode() on the whole slide, called by hand."""
    adata = make(80)
    sfm.tl.embed(adata, model)
    genes = list(adata.uns["grn"]["genes"])
    x = torch.tensor(np.log1p(adata.X / adata.X.sum(1, keepdims=True) * 1e4))[:, adata.var_names.get_indexer(genes)]
    xy = adata.obsm["spatial"]
    coords = torch.tensor((xy - xy.mean(0)) / xy.std(0), dtype=torch.float32)
    names = list(adata.uns["grn"]["names"])
    networks = [torch.tensor(np.stack(adata.uns["grn"]["groups"][str(k)].nonzero())).long() for k in range(len(names))]
    group = torch.tensor([names.index(v) for v in adata.obs["grn_group"]])
    edges = torch.tensor(np.stack(adata.obsp["spatial_connectivities"].nonzero())).long()
    with torch.no_grad():
        h, g = model.encode(coords, edges, x, networks, group)
    np.testing.assert_allclose(adata.obsm["X_heist_cell"], h.numpy(), atol=2e-3)
    np.testing.assert_allclose(adata.obsm["X_heist_gene"], g.mean(1).numpy(), atol=2e-3)


@pytest.mark.parametrize("change", ["rows", "batch", "sparse", "csc", "backed", "view", "float64"])
def test_result_does_not_depend_on(change, embedded, model, tmp_path):
    adata = make()
    expected = embedded.obsm["X_heist"]
    batch_size = None
    if change == "rows":
        order = np.random.default_rng(3).permutation(adata.n_obs)
        adata, expected = adata[order].copy(), expected[order]
    elif change == "batch":
        batch_size = 1
    elif change == "sparse":
        adata.X = sp.csr_matrix(adata.X)
    elif change == "csc":
        adata.X = sp.csc_matrix(adata.X)
    elif change == "float64":
        adata.X = adata.X.astype(np.float64)
    elif change == "view":
        adata = ad.concat([adata, adata[:5]], index_unique="-")[:300]
    elif change == "backed":
        adata.write_h5ad(tmp_path / "a.h5ad")
        adata = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    sfm.tl.embed(adata, model, library_key="slide", context_size=64, batch_size=batch_size)
    np.testing.assert_allclose(adata.obsm["X_heist"], expected, atol=1e-3)
    if change == "backed":
        adata.file.close()


def test_slides_never_see_each_other(model):
    adata = make()
    sfm.tl.embed(adata, model, library_key="slide", context_size=64)
    moved = make()
    second = (moved.obs["slide"] == "b").to_numpy()
    moved.obsm["spatial"][second] = moved.obsm["spatial"][second][::-1]
    moved.uns["grn"], moved.obs["grn_group"] = adata.uns["grn"], adata.obs["grn_group"]
    sfm.tl.embed(moved, model, library_key="slide", context_size=64)
    np.testing.assert_array_equal(moved.obsm["X_heist"][~second], adata.obsm["X_heist"][~second])
    assert np.abs(moved.obsm["X_heist"][second] - adata.obsm["X_heist"][second]).max() > 0.01


def test_stored_graphs_are_used(model):
    adata = make()
    sfm.pp.spatial_neighbors(adata, method="knn", n_neighbors=3, library_key="slide")
    sfm.pp.grn(adata, groupby="type")
    stored = adata.obsp["spatial_connectivities"].copy()
    sfm.tl.embed(adata, model, library_key="slide")
    assert "grn_group" not in adata.obs
    assert adata.uns["heist"]["params"]["groupby"] == "type"
    assert (adata.obsp["spatial_connectivities"] != stored).nnz == 0


def test_kinds_of_values(model):
    counts = make()
    logged = make()
    logged.X = np.log1p(logged.X / logged.X.sum(1, keepdims=True) * 1e4)
    logged.layers["raw"] = counts.X.copy()
    for adata, layer, preprocess in ((logged, None, False), (logged.copy(), "raw", True)):
        sfm.tl.embed(adata, model, library_key="slide", context_size=64, layer=layer, preprocess=preprocess)
    proteins = make(g=14, kind="intensity")
    sfm.tl.embed(proteins, model)
    assert proteins.uns["heist"]["params"]["values"] == "intensity"
    assert np.isfinite(proteins.obsm["X_heist"]).all()


def test_round_trip(embedded, tmp_path):
    embedded.write_h5ad(tmp_path / "a.h5ad")
    back = ad.read_h5ad(tmp_path / "a.h5ad")
    np.testing.assert_array_equal(back.obsm["X_heist"], embedded.obsm["X_heist"])
    assert list(back.uns["heist"]["blocks"]["gene"]) == embedded.uns["heist"]["blocks"]["gene"]
    assert back.uns["heist"]["params"] == embedded.uns["heist"]["params"]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_very_few_cells(model, n):
    adata = make(300)[:n].copy()
    sfm.tl.embed(adata, model, groupby=None)
    assert np.isfinite(adata.obsm["X_heist"]).all()


@pytest.mark.parametrize(
    ("change", "arguments", "error", "match"),
    [
        ("nan_xy", {}, ValueError, "NaN or infinite coordinates for 1 of 300"),
        ("nan_x", {}, ValueError, "1 NaN or infinite values"),
        ("3d", {}, ValueError, "3 columns"),
        (None, {"basis": "where"}, KeyError, "obsm\\['where'\\] is missing"),
        (None, {"layer": "raw"}, KeyError, "layer='raw'"),
        (None, {"library_key": "donor"}, KeyError, "library_key='donor'"),
        (None, {"groupby": "celltype"}, KeyError, "groupby='celltype'"),
        (None, {"device": "toaster"}, ValueError, "toaster"),
        (None, {"dtype": "int8"}, ValueError, "dtype='int8'"),
        (None, {"batch_size": 0}, ValueError, "batch_size must be a positive integer"),
        (None, {"context_size": 0}, ValueError, "context_size must be a positive integer"),
        ("across", {"library_key": "slide"}, ValueError, "edges between slides"),
        ("grn", {"groupby": "type"}, ValueError, "uns\\['grn'\\] holds networks of groupby='grn_group'"),
    ],
)
def test_bad_input_leaves_adata_as_it_was(model, change, arguments, error, match):
    adata = make()
    if change == "nan_xy":
        adata.obsm["spatial"][3, 0] = np.nan
    elif change == "nan_x":
        adata.X[3, 0] = np.nan
    elif change == "3d":
        adata.obsm["spatial"] = np.random.default_rng(0).random((300, 3))
    elif change == "across":
        sfm.pp.spatial_neighbors(adata)
    elif change == "grn":
        sfm.pp.grn(adata)
    before = {name: set(getattr(adata, name)) for name in ("obs", "obsm", "obsp", "uns", "layers")}
    with pytest.raises(error, match=match):
        sfm.tl.embed(adata, model, **arguments)
    assert {name: set(getattr(adata, name)) for name in before} == before


def test_unknown_model():
    with pytest.raises(FileNotFoundError, match="no model 'hiest'"):
        sfm.tl.embed(make(), "hiest")


def test_bundled_weights_on_proteins():
    adata = make(60, 14, kind="intensity")
    sfm.tl.embed(adata, groupby=None)
    assert adata.obsm["X_heist"].shape == (60, 256)
    assert np.isfinite(adata.obsm["X_heist"]).all()


@pytest.mark.slow
def test_bundled_model_on_a_real_tissue():
    """Rows, batches, threads and precision play no part at the published size either, where ten layers amplify rounding."""
    adata = sfm.datasets.merfish_mouse_brain()
    sfm.tl.embed(adata, library_key="mouse_id")
    expected = adata.obsm["X_heist"]

    def cosines(other):
        a, b = expected, other.obsm["X_heist"][other.obs_names.get_indexer(adata.obs_names)]
        return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)

    shuffled = sfm.datasets.merfish_mouse_brain()
    shuffled = shuffled[np.random.default_rng(0).permutation(adata.n_obs)].copy()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sfm.tl.embed(shuffled, library_key="mouse_id", batch_size=3)
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(
        shuffled.obs["grn_group"][adata.obs_names].astype(str), adata.obs["grn_group"].astype(str)
    )
    assert cosines(shuffled).min() > 0.9999
    low = sfm.datasets.merfish_mouse_brain()
    sfm.tl.embed(low, library_key="mouse_id", dtype="bfloat16")
    assert cosines(low).mean() > 0.99
