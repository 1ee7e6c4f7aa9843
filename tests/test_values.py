"""Functions that read expression: panels that differ, repeated entries, backgrounds, genes in raw, lazy files."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import spatialfm as sfm


@pytest.fixture(scope="module")
def brain():
    """A part of the brain in counts, on two slides."""
    whole = sfm.datasets.merfish_mouse_brain()
    rows = np.flatnonzero(
        np.linalg.norm(whole.obsm["spatial"] - np.median(whole.obsm["spatial"], axis=0), axis=1) < 900
    )
    adata = whole[rows[:900]].copy()
    x = adata.X.toarray().astype(np.float64)
    smallest = np.where(x > 0, x, np.inf).min(axis=1, keepdims=True)
    adata.X = sp.csr_matrix(np.rint(x / np.where(np.isfinite(smallest), smallest, 1)).astype(np.float32))
    half = pd.Categorical(np.where(np.arange(adata.n_obs) % 2, "a", "b"))
    adata.obsm["spatial"] = adata.obsm["spatial"] + np.where(half == "a", 1e5, 0)[:, None]
    adata.obs = adata.obs[["celltype"]].assign(slide=half)
    adata.uns, adata.obsp = {}, {}
    return adata


def measured(adata):
    """Three genes that most cells have."""
    return list(adata.var_names[np.argsort(-adata.X.getnnz(axis=0), kind="stable")[:3]])


CALLS = {
    "embed": lambda a: sfm.tl.embed(a, library_key="slide", key_added="x"),
    "grn": lambda a: sfm.pp.grn(a, library_key="slide", key_added="x"),
    "regions": lambda a: sfm.pp.regions(a, use_rep=None, library_key="slide", key_added="x"),
    "evaluate": lambda a: sfm.tl.evaluate(
        a, "celltype", use_rep="X_own", baselines=("pca",), library_key="slide", n_bootstrap=10, split="blocks",
        key_added="x",
    ),
}  # fmt: skip


def results(adata):
    found = {f"obsm {k}": np.asarray(v) for k, v in adata.obsm.items() if k.startswith("X_x")}
    found |= {f"obs {k}": adata.obs[k].to_numpy() for k in adata.obs if k.startswith("x")}
    entry = adata.uns.get("x", {})
    if "groups" in entry:
        found |= {f"network {k}": m.toarray() for k, m in entry["groups"].items()} | {"genes": np.array(entry["genes"])}
    if "scores" in entry:
        found["scores"] = entry["scores"]["value"].to_numpy()
    assert found
    return found


def same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for key, value in a.items():
        if value.dtype.kind == "f":
            np.testing.assert_allclose(value, b[key], err_msg=key, **tolerance)
        else:
            assert (pd.Series(value).astype(str) == pd.Series(b[key]).astype(str)).all(), key


def ready(adata):
    adata = adata.copy()
    adata.obsm["X_own"] = np.random.default_rng(0).normal(size=(adata.n_obs, 3)).astype(np.float32)
    return adata


@pytest.mark.parametrize("empty", [0, np.nan])
@pytest.mark.parametrize("name", list(CALLS))
def test_panels_that_differ_are_read_on_what_they_share(name, empty, brain):
    lost = measured(brain)
    joined, shared = ready(brain), ready(brain[:, ~brain.var_names.isin(lost)])
    x = joined.X.toarray()
    x[np.ix_(joined.obs["slide"] == "a", joined.var_names.isin(lost))] = empty
    joined.X = sp.csr_matrix(x)
    with pytest.warns(UserWarning, match=r"3 features \(.*\) are zero or missing in all cells of slides 'a' \(3\)"):
        CALLS[name](joined)
    CALLS[name](shared)
    same(results(joined), results(shared), rtol=1e-6)


@pytest.mark.parametrize("name", list(CALLS))
@pytest.mark.parametrize("change", ["repeated", "csr_array", "background", "dask"])
def test_the_same_in_any_form(name, change, brain):
    plain, other = ready(brain), ready(brain)
    x = other.X
    if change == "repeated":
        other.X = sp.csr_matrix((np.repeat(x.data / 2, 2), np.repeat(x.indices, 2), 2 * x.indptr), shape=x.shape)
    elif change == "csr_array":
        other.X = sp.csr_array(x)
    elif change == "dask":
        da = pytest.importorskip("dask.array")
        other.X = da.from_array(x.toarray(), chunks=(300, 200)).map_blocks(sp.csr_matrix)
    else:
        plain.X = x.toarray()
        other.X = x.toarray()
        at = np.argwhere(other.X == 0)[7]
        other.X[tuple(at)] = -1
    before = None if change == "dask" else other.X.copy()
    CALLS[name](plain)
    CALLS[name](other)
    if name != "grn" or change != "background":  # networks are of the values as they stand
        same(results(plain), results(other), rtol=1e-5, atol=1e-6)
    if before is not None and sp.issparse(before):
        np.testing.assert_array_equal(other.X.data, before.data)
        np.testing.assert_array_equal(other.X.indices, before.indices)


def test_genes_that_a_slide_lacks_are_imputed_there_and_tell_nothing(brain):
    lost = measured(brain)
    joined = brain.copy()
    x = joined.X.toarray()
    x[np.ix_(joined.obs["slide"] == "a", joined.var_names.isin(lost))] = 0
    joined.X = sp.csr_matrix(x)
    # Named as NaN, they are the same.
    as_nan = joined.copy()
    x[np.ix_(joined.obs["slide"] == "a", joined.var_names.isin(lost))] = np.nan
    as_nan.X = sp.csr_matrix(x)
    with pytest.warns(UserWarning, match="3 genes .* not measured there, and predicted there"):
        sfm.tl.impute(joined, library_key="slide")
    sfm.tl.impute(as_nan, library_key="slide")
    assert set(joined.uns["imputed"]["genes"]) == set(lost)
    np.testing.assert_allclose(joined.layers["imputed"].toarray(), as_nan.layers["imputed"].toarray(), rtol=1e-6)


def test_transferred_labels_come_from_what_both_measured(brain):
    lost = measured(brain)
    a, b = (brain[brain.obs["slide"] == s].copy() for s in "ab")
    shared = ~brain.var_names.isin(lost)
    plain, few = a[:, shared].copy(), b[:, shared].copy()
    x = a.X.toarray()
    x[:, ~shared] = 0
    a.X = x
    with pytest.warns(UserWarning, match=r"3 features .* of slides 'adata' \(3\)"):
        sfm.tl.annotate(a, b, groupby="celltype", n_folds=2)
    assert a.uns["annotation"]["params"]["values"] == "counts"
    sfm.tl.annotate(plain, few, groupby="celltype", n_folds=2)
    np.testing.assert_allclose(
        a.obsm["annotation_probabilities"], plain.obsm["annotation_probabilities"], rtol=1e-3, atol=1e-4
    )


def test_a_layer_of_counts_is_scored_as_x_is():
    rng = np.random.default_rng(0)
    depth = rng.lognormal(0, 0.8, 400)
    genes = [
        "TNF",
        "NFKBIA",
        "IL6",
        "CXCL2",
        "JUNB",
        "FOS",
        "CCL2",
        "ICAM1",
        "EGR1",
        "ATF3",
        "GAPDH",
        "ACTB",
        "CD3E",
        "KRT8",
    ]
    adata = ad.AnnData(rng.poisson(40 * depth[:, None], (400, len(genes))).astype(np.float32))
    adata.var_names = genes
    adata.layers["counts"] = adata.X.copy()
    sfm.pp.pathways(adata, layer="counts")
    assert adata.uns["pathways"]["params"]["values"] == "counts"
    score = adata.obsm["pathways"]["HALLMARK_TNFA_SIGNALING_VIA_NFKB"]
    assert abs(np.corrcoef(score, np.log(depth))[0, 1]) < 0.4
    plain = sfm.pp.pathways(adata, copy=True)
    np.testing.assert_allclose(score, plain.obsm["pathways"]["HALLMARK_TNFA_SIGNALING_VIA_NFKB"], rtol=1e-6)


def test_features_left_out_are_named_with_the_reason(brain):
    rare = brain.copy()
    x = rare.X.toarray()
    x[:, :3], x[5, :2] = 0, 1
    rare.X = sp.csr_matrix(x)
    sfm.tl.embed(rare, library_key="slide", key_added="x")
    genes = rare.uns["embeddings"]["X_x_niche"]["genes"]
    reasons = dict(zip(genes["left_out"], genes["left_out_reasons"], strict=True))
    a, b, c = rare.var_names[:3]
    assert reasons[a] == reasons[b] == "found in less than 0.02 of the cells (min_detected)"
    assert reasons[c] == "the same in all cells"
    assert set(genes["names"]) | set(reasons) == set(rare.var_names)
    assert rare.uns["embeddings"]["X_x_niche"]["params"]["min_detected"] == 0.02
    sfm.tl.embed(rare, library_key="slide", key_added="x", min_detected=0)
    assert list(rare.uns["embeddings"]["X_x_niche"]["genes"]["left_out"]) == [c]
    with pytest.raises(ValueError, match="min_detected must be a share of the cells, from 0 to 1, got 2"):
        sfm.tl.embed(rare, min_detected=2)


def test_errors_point_at_raw(brain):
    adata = brain.copy()
    adata.raw = adata.copy()
    gene = adata.var_names[0]
    adata = adata[:, 1:].copy()
    adata.X = (adata.X.toarray() - adata.X.toarray().mean(axis=0)) / 2
    with pytest.raises(ValueError, match=r"scaled values.*adata\.raw\.to_adata\(\)"):
        sfm.pp.tfidf(adata)
    with pytest.raises(KeyError, match=rf"adata\.raw holds '{gene}'"):
        sfm.tl.impute(adata, gene)


def test_opened_lazily(brain, tmp_path):
    pytest.importorskip("xarray")
    pytest.importorskip("dask")
    brain.write_h5ad(tmp_path / "a.h5ad")
    lazy = ad.experimental.read_lazy(tmp_path / "a.h5ad")
    read = brain.copy()
    for adata in (lazy, read):
        CALLS["embed"](adata)
        sfm.pp.tfidf(adata)
    same(results(lazy), results(read), rtol=1e-6)
    np.testing.assert_array_equal(lazy.layers["tfidf"].toarray(), read.layers["tfidf"].toarray())
