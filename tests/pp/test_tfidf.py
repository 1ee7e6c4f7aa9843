"""pp.tfidf beside scikit-learn's TfidfTransformer."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.feature_extraction.text import TfidfTransformer

import spatialfm as sfm

TF = ("log", "linear")


def spots(n=80, g=30, seed=0):
    """Counts of genes from ubiquitous to rare on two slides, with an empty spot and an empty gene."""
    rng = np.random.default_rng(seed)
    x = rng.poisson(rng.gamma(2.0, 10.0 ** np.linspace(1, -2, g), (n, g))).astype(np.float32)
    x[3], x[:, 7] = 0, 0
    obs = pd.DataFrame({"slide": np.where(np.arange(n) < 25, "a", "b")}, index=[f"s{i}" for i in range(n)])
    return ad.AnnData(sp.csr_matrix(x), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(g)]))


def dense(x):
    return x.toarray() if sp.issparse(x) else np.asarray(x)


def oracle(counts, tf):
    """scikit-learn's weights of counts, and its idf."""
    x = sp.csr_matrix(counts, dtype=np.float64)
    if tf == "log":
        x = sp.csr_matrix(np.log1p(1e4 * x.toarray() / np.maximum(x.sum(axis=1).A, 1)))
    model = TfidfTransformer().fit(x)
    return model.transform(x).toarray(), model.idf_


def assert_equal(a, b):
    for name in ("indptr", "indices", "data"):
        np.testing.assert_array_equal(getattr(a.layers["tfidf"], name), getattr(b.layers["tfidf"], name))
    pd.testing.assert_series_equal(a.var["tfidf_idf"], b.var["tfidf_idf"])


@pytest.mark.parametrize("tf", TF)
def test_equals_scikit_learn(tf):
    adata = spots()
    before = adata.X.toarray()
    assert sfm.pp.tfidf(adata, tf=tf) is None
    weights, idf = oracle(adata.X, tf)
    layer = adata.layers["tfidf"]
    assert isinstance(layer, sp.csr_matrix)
    assert layer.dtype == np.float32
    np.testing.assert_allclose(layer.toarray(), weights, rtol=1e-5)
    np.testing.assert_allclose(adata.var["tfidf_idf"], idf)
    assert adata.uns["tfidf"] == {"params": {"tf": tf, "layer": "", "library_key": ""}, "values": "counts"}
    # Written out once more, without scikit-learn.
    df = (dense(adata.X) > 0).sum(axis=0)
    np.testing.assert_allclose(adata.var["tfidf_idf"], np.log((1 + 80) / (1 + df)) + 1)
    lengths = np.linalg.norm(layer.toarray().astype(float), axis=1)
    np.testing.assert_allclose(np.delete(lengths, 3), 1, atol=1e-6)
    assert lengths[3] == 0
    np.testing.assert_array_equal(adata.X.toarray(), before)


@settings(deadline=None, max_examples=60)
@given(
    arrays(np.int64, st.tuples(st.integers(1, 12), st.integers(1, 8)), elements=st.integers(0, 50)),
    st.sampled_from(TF),
    st.sampled_from([np.asarray, sp.csr_matrix, sp.csc_matrix, sp.csr_array]),
    st.sampled_from([np.int64, np.float32, np.float64]),
)
def test_any_counts_in_any_form(counts, tf, form, dtype):
    adata = ad.AnnData(form(counts.astype(dtype)))
    sfm.pp.tfidf(adata, tf=tf)
    weights, idf = oracle(counts, tf)
    np.testing.assert_allclose(adata.layers["tfidf"].toarray(), weights, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(adata.var["tfidf_idf"], idf)
    assert adata.layers["tfidf"].nnz == np.count_nonzero(counts)


def test_stored_zeros_and_duplicates_are_no_genes():
    adata = spots()
    expected = sfm.pp.tfidf(adata, copy=True)
    x = adata.X.tocoo()
    row, col, data = np.r_[x.row, x.row, 3], np.r_[x.col, x.col, 7], np.r_[x.data * 2, -x.data, 0]
    order = np.argsort(row, kind="stable")
    indptr = np.r_[0, np.cumsum(np.bincount(row, minlength=80))]
    adata.X = sp.csr_matrix((data[order], col[order], indptr), shape=x.shape)
    adata.X.data = np.abs(adata.X.data)  # 2x and x at one place: three times the counts
    stored = adata.X.data.copy()
    sfm.pp.tfidf(adata)
    np.testing.assert_allclose(adata.layers["tfidf"].toarray(), expected.layers["tfidf"].toarray(), rtol=1e-5)
    assert adata.layers["tfidf"].nnz == expected.layers["tfidf"].nnz
    np.testing.assert_array_equal(adata.X.data, stored)


@pytest.mark.parametrize("tf", TF)
@pytest.mark.parametrize("kind", ["normalized", "log"])
def test_same_from_counts_normalised_and_logged(tf, kind, messages):
    adata = spots(n=200)[np.arange(200) != 3].copy()  # scanpy warns of an empty spot
    expected = sfm.pp.tfidf(adata, tf=tf, copy=True)
    changed = adata.copy()
    sc.pp.normalize_total(changed, target_sum=1e4)
    if kind == "log":
        sc.pp.log1p(changed)
    sfm.pp.tfidf(changed, tf=tf)
    assert changed.uns["tfidf"]["values"] == kind
    np.testing.assert_allclose(
        changed.layers["tfidf"].toarray(), expected.layers["tfidf"].toarray(), rtol=1e-4, atol=1e-7
    )
    line = messages()[-1]
    assert f"adata.X taken as {kind}" in line
    assert ("expm1" in line) == (kind == "log")


def test_one_weight_a_gene_from_all_slides():
    adata = spots()
    sfm.pp.tfidf(adata, library_key="slide")
    x, slide = dense(adata.X), adata.obs["slide"].to_numpy()
    x_log = oracle(x, "log")[0] / oracle(x, "log")[1]
    for g in range(adata.n_vars):
        shares = [(x[slide == s, g] > 0).mean() for s in ("a", "b")]
        shares = [share for share in shares if share > 0] or [0.0]
        idf = np.log((1 + 80) / (1 + 80 * np.mean(shares))) + 1
        assert adata.var["tfidf_idf"].iloc[g] == pytest.approx(idf)
    expected = x_log * adata.var["tfidf_idf"].to_numpy()
    expected /= np.maximum(np.linalg.norm(expected, axis=1, keepdims=True), 1e-12)
    np.testing.assert_allclose(adata.layers["tfidf"].toarray(), expected, rtol=1e-4, atol=1e-7)
    assert adata.uns["tfidf"]["params"]["library_key"] == "slide"


def test_slides_of_one_size_count_alike():
    """With as many spots on each slide and every gene on both, slides change nothing; neither does a single slide."""
    adata = spots()
    adata.obs["half"] = np.where(np.arange(80) % 2, "a", "b")
    adata.obs["one"] = "a"
    found = sfm.pp.tfidf(adata, copy=True)
    on_both = (dense(adata.X[::2]) > 0).any(axis=0) & (dense(adata.X[1::2]) > 0).any(axis=0)
    assert on_both.sum() > 20
    for key, genes in (("half", on_both), ("one", slice(None))):
        other = sfm.pp.tfidf(adata, library_key=key, copy=True)
        np.testing.assert_allclose(other.var["tfidf_idf"][genes], found.var["tfidf_idf"][genes], rtol=1e-12)


def test_gene_that_one_slide_did_not_measure():
    adata = spots()
    adata.X = dense(adata.X)
    adata.X[adata.obs["slide"] == "a", 0] = 0
    others = sfm.pp.tfidf(adata[:, 1:].copy(), library_key="slide", copy=True)
    with pytest.warns(UserWarning, match=rf"1 features \({adata.var_names[0]}\) are zero or missing.*'a' \(1\)"):
        sfm.pp.tfidf(adata, library_key="slide")
    assert adata.var["tfidf_idf"].iloc[0] == 0
    assert not adata.layers["tfidf"][:, [0]].nnz
    np.testing.assert_array_equal(adata.layers["tfidf"][:, 1:].toarray(), others.layers["tfidf"].toarray())
    joint = sfm.pp.tfidf(adata, copy=True)
    assert joint.var["tfidf_idf"].iloc[0] > 1.3


@pytest.mark.parametrize("library_key", [None, "slide"])
def test_row_order(library_key):
    adata = spots()
    order = np.random.default_rng(1).permutation(adata.n_obs)
    shuffled = adata[order].copy()
    sfm.pp.tfidf(shuffled, library_key=library_key)
    sfm.pp.tfidf(adata, library_key=library_key)
    assert_equal(shuffled, adata[order].copy())


def test_dense_is_cut_into_blocks(monkeypatch):
    adata = spots()
    expected = sfm.pp.tfidf(adata, copy=True)
    adata.X = np.asfortranarray(dense(adata.X))
    monkeypatch.setattr("spatialfm.pp._tfidf._BLOCK_BYTES", 4 * 30 * 7)
    sfm.pp.tfidf(adata)
    assert_equal(adata, expected)


def test_sparse_is_never_dense(monkeypatch):
    """A matrix of 300 billion entries, 20,000 of them stored."""
    n, g = 1_000_000, 300_000
    rng = np.random.default_rng(0)
    x = sp.csr_matrix(
        (np.ones(20_000, np.float32), (rng.integers(n, size=20_000), rng.integers(g, size=20_000))), (n, g)
    )
    adata = ad.AnnData(
        obs=pd.DataFrame(index=pd.RangeIndex(n).astype(str)), var=pd.DataFrame(index=pd.RangeIndex(g).astype(str))
    )
    adata.layers["counts"] = x
    sfm.pp.tfidf(adata, layer="counts")
    assert adata.layers["tfidf"].nnz == x.nnz


def test_copy_view_layer_and_names():
    adata = spots()
    expected = sfm.pp.tfidf(adata, copy=True)
    assert "tfidf" not in adata.layers
    assert not len(adata.var.columns)
    adata.layers["counts"], adata.X = adata.X, np.full(adata.shape, np.nan)
    sfm.pp.tfidf(adata, layer="counts", key_added="w")
    assert set(adata.var) == {"w_idf"}
    assert adata.uns["w"]["params"]["layer"] == "counts"
    assert (adata.layers["w"] != expected.layers["tfidf"]).nnz == 0

    adata = spots()
    view = adata[:40]
    sfm.pp.tfidf(view)
    assert_equal(view, sfm.pp.tfidf(adata[:40].copy(), copy=True))
    assert not view.is_view
    assert "tfidf" not in adata.layers


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix, dense], ids=["csr", "csc", "dense"])
def test_backed(tmp_path, form):
    adata = spots()
    expected = sfm.pp.tfidf(adata, copy=True)
    adata.X = form(adata.X)
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    sfm.pp.tfidf(backed)
    assert_equal(backed, expected)
    backed.file.close()


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_round_trip(tmp_path, suffix):
    adata = spots()
    sfm.pp.tfidf(adata, library_key="slide")
    path = tmp_path / f"a.{suffix}"
    getattr(adata, f"write_{suffix}")(path)
    back = getattr(ad, f"read_{suffix}")(path)
    assert_equal(back, adata)
    assert back.uns["tfidf"] == adata.uns["tfidf"]


def test_all_empty(messages):
    adata = ad.AnnData(sp.csr_matrix((4, 3), dtype=np.float32))
    sfm.pp.tfidf(adata)
    assert "4 of 4 spots are empty" in messages()[-1]
    assert adata.layers["tfidf"].nnz == 0
    np.testing.assert_allclose(adata.var["tfidf_idf"], np.log(5) + 1)


def test_what_is_everywhere_fades():
    """A gene of many counts in every spot falls behind one of few counts in few spots."""
    x = np.zeros((100, 60))
    x[:, 0], x[:, 1:] = 60, np.random.default_rng(0).poisson(0.6, (100, 59))
    x[:5, 1], x[5:, 1] = 5, 0
    adata = ad.AnnData(x)
    sfm.pp.tfidf(adata)
    weights = adata.layers["tfidf"].toarray()
    assert (x[:5, 0] > 10 * x[:5, 1]).all()
    assert (weights[:5, 1] > weights[:5, 0]).all()


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (lambda x: x - x.mean(axis=0), {}, ValueError, "scaled values.*layer="),
        (lambda x: 1e3 + 30 * np.random.default_rng(0).normal(size=x.shape), {}, ValueError, "intensities"),
        (lambda x: -100.5 * x, {}, ValueError, "adata.X holds"),
        (lambda x: np.where(x > 50, np.nan, x), {}, ValueError, "NaN"),
        (lambda x: x, {"tf": "sqrt"}, ValueError, "tf='sqrt'.*'log', 'linear'"),
        (lambda x: x, {"layer": "tfidf"}, ValueError, "overwritten"),
        (lambda x: x, {"layer": "counts"}, KeyError, "counts"),
        (lambda x: x, {"library_key": "batch"}, KeyError, "batch"),
        (lambda x: x[:0], {}, ValueError, "0 spots"),
    ],
)
def test_errors_leave_adata_as_it_was(change, options, error, message):
    x = change(dense(spots().X))
    adata = ad.AnnData(x.copy())
    with pytest.raises(error, match=message):
        sfm.pp.tfidf(adata, **options)
    np.testing.assert_array_equal(adata.X, x)
    assert not [k for k in adata.layers if k is not None]
    assert not len(adata.var.columns)
    assert not adata.uns
