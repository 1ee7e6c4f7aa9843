from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import spatialfm as sfm
from spatialfm._data import _expression
from spatialfm._data._adata import get_matrix
from spatialfm._data._expression import (
    check_finite,
    find_unmeasured,
    hash_cells,
    log_normalize,
    read_values,
    recognise,
    value_kind,
)

CONTAINERS = [np.asarray, np.asfortranarray, sp.csr_matrix, sp.csc_matrix, sp.csr_array]


def counts(n=300, g=40, seed=0):
    return np.random.default_rng(seed).poisson(np.random.default_rng(1).gamma(0.4, 2.0, g), (n, g)).astype(np.float32)


def examples():
    rng = np.random.default_rng(2)
    x = counts()
    x[3] = 0
    total = np.maximum(x.sum(axis=1, keepdims=True), 1)
    volume = rng.uniform(50, 500, (len(x), 1)).astype(np.float32)
    yield "counts", "counts", x
    yield "one cell a million counts", "counts", np.where(np.arange(len(x))[:, None] == 5, 1e6, x)
    yield "to 10,000", "normalized", x / total * 1e4
    yield "to one", "normalized", x / total
    yield "by volume, tiny", "normalized", x / volume / 1000
    yield "log1p", "log", np.log1p(x / total * 1e4)
    yield "log1p of 100", "log", np.log1p(x / total * 100)
    yield "log2", "log", np.log2(1 + x / total * 1e6)
    yield "log10", "log", np.log10(1 + x / total * 1e6)
    yield "log1p of some genes", "log", np.log1p(x / total * 1e4)[:, 5:25]
    yield "arcsinh intensities", "log", np.arcsinh(rng.lognormal(3, 1, x.shape) / 5)
    yield "intensities", "intensity", rng.lognormal(6, 1, x.shape)
    yield "compensated intensities", "intensity", rng.normal(200, 400, x.shape)
    yield "one -1", "counts", np.where(np.arange(x.size).reshape(x.shape) == 7, -1, x)
    yield "less a background", "counts", x - 0.25
    yield "less a background by cell", "counts", x - 0.1 * x.mean(axis=1, keepdims=True)
    yield "less a background by gene", "counts", x - 0.1 * x.mean(axis=0)
    yield "root", "log", np.sqrt(x)
    yield "root of a million", "log", np.sqrt(x / total * 1e6)
    yield "many counts of each", "counts", rng.poisson(40 * rng.lognormal(0, 0.8, (len(x), 1)), (len(x), 16))
    whole = np.rint(rng.lognormal(6, 1, x.shape) - 200)
    yield "whole intensities", "intensity", whole
    yield "whole intensities cut at zero", "intensity", np.maximum(whole, 0)
    yield "intensities cut at zero", "intensity", np.maximum(rng.lognormal(6, 1, x.shape) - 200, 0)
    yield "centred counts", "scaled", x - x.mean(axis=0)
    yield "z-scores", "scaled", (x - x.mean(axis=0)) / (x.std(axis=0) + 1e-3)
    spiked = rng.normal(size=x.shape)
    spiked[0, 0] = 300
    yield "z-scores of a rare gene", "scaled", spiked


@pytest.mark.parametrize(("kind", "x"), [pytest.param(k, x, id=name) for name, k, x in examples()])
@pytest.mark.parametrize("container", CONTAINERS)
def test_kind(kind, x, container):
    assert value_kind(container(x)) == kind
    assert value_kind(container(x[np.random.default_rng(3).permutation(len(x))])) == kind


def test_kind_of_integers_and_of_nothing():
    x = counts().astype(np.uint8)
    assert value_kind(x) == value_kind(sp.csr_matrix(x)) == "counts"
    assert value_kind(np.zeros((0, 4))) == value_kind(sp.csr_matrix((5, 4))) == "counts"


def test_kind_from_a_sample(monkeypatch):
    whole = [(value_kind(x), kind) for _, kind, x in examples()]
    monkeypatch.setattr(_expression, "_MAX_CELLS", 100)
    monkeypatch.setattr(_expression, "_CHUNK", 64)
    assert whole == [(value_kind(x), kind) for _, kind, x in examples()]


def test_kind_of_bundled_tissue():
    assert value_kind(sfm.datasets.merfish_mouse_brain().X) == "normalized"  # at most 0.22, and not logged


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("container", CONTAINERS)
def test_not_finite(bad, container):
    x = counts()
    x[2, 3] = bad
    for check in (check_finite, value_kind):
        with pytest.raises(ValueError, match="holds 1 NaN or infinite"):
            check(container(x))


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_log_normalize_counts(container, dtype):
    x = counts().astype(dtype)
    x[4] = 0
    given_x = container(x)
    expected = np.log1p(x / np.maximum(x.sum(axis=1, keepdims=True), 1) * 1e4)
    y = log_normalize(given_x, "counts")
    assert sp.issparse(y) == sp.issparse(given_x)
    assert y.dtype == np.float32
    dense = y.toarray() if sp.issparse(y) else y
    np.testing.assert_allclose(dense, expected, rtol=1e-5)
    assert not dense[4].any()
    np.testing.assert_array_equal(given_x.toarray() if sp.issparse(given_x) else given_x, x)
    np.testing.assert_array_equal(dense, np.asarray(log_normalize(np.asarray(x), "normalized")))


@pytest.mark.parametrize("kind", ["log", "scaled"])
@pytest.mark.parametrize("container", [np.asarray, sp.csr_matrix])
def test_log_normalize_copies(kind, container):
    x = container(counts())
    y = log_normalize(x, kind)
    assert not np.shares_memory(x.data if sp.issparse(x) else x, y.data if sp.issparse(y) else y)
    assert abs(x - y).max() == 0


def test_log_normalize_intensity():
    x = np.random.default_rng(0).normal(200, 400, (50, 4))
    x[:, 1] = 0
    expected = np.arcsinh(x / np.maximum(np.median(np.abs(x), axis=0), 1e-3))
    np.testing.assert_allclose(log_normalize(x, "intensity"), expected, rtol=1e-5)
    np.testing.assert_allclose(log_normalize(sp.csr_matrix(x), "intensity"), expected, rtol=1e-5)
    np.testing.assert_allclose(log_normalize(x, "intensity", scale=np.ones(4)), np.arcsinh(x), rtol=1e-5)


@settings(deadline=None, max_examples=50)
@given(arrays(np.int16, st.tuples(st.integers(1, 12), st.integers(1, 4)), elements=st.integers(-1, 2)), st.randoms())
def test_hash_is_of_the_content(x, random):
    hashes = hash_cells(x)
    for container in CONTAINERS:
        for dtype in (np.int16, np.float32, np.float64):
            np.testing.assert_array_equal(hash_cells(container(x.astype(dtype))), hashes)
    order = random.sample(range(len(x)), len(x))
    np.testing.assert_array_equal(hash_cells(x[order]), hashes[order])
    same = (x[:, None] == x[None]).all(axis=2)
    np.testing.assert_array_equal(hashes[:, None] == hashes[None], same)
    np.testing.assert_array_equal(hash_cells(-1.0 * (x == 0)), hash_cells(-1.0 * (x == 0) + 0.0))  # -0.0 is 0.0


def of_tissue(name):
    """Transformations of a bundled tissue, and the scaling that each needs: logarithm, arcsinh or none."""
    adata = getattr(sfm.datasets, name)()
    rows = np.random.default_rng(1).permutation(adata.n_obs)[:1200]
    x = adata.X[rows]
    x = (x.toarray() if sp.issparse(x) else np.asarray(x)).astype(np.float64)[:, :2000]
    if name == "codex_mouse_spleen":
        cut = np.maximum(x, 0)
        yield from (("intensity", v) for v in (x, np.rint(x), cut, np.rint(cut), np.rint(cut)[:, :10], cut + 0.25))
        yield from (("none", v) for v in (np.arcsinh(x / 150), np.arcsinh(cut / 5), np.log1p(np.rint(cut))))
        yield "none", (x - x.mean(axis=0)) / x.std(axis=0)
        return
    if name == "merfish_mouse_brain":
        yield "logged", x
        smallest = np.where(x > 0, x, np.inf).min(axis=1, keepdims=True)
        x = np.rint(x / np.where(np.isfinite(smallest), smallest, 1))
    x = x[:, x.any(axis=0)]
    total = np.maximum(x.sum(axis=1, keepdims=True), 1)
    million, log = x / total * 1e6, np.log1p(x / total * 1e4)
    yield from (
        ("logged", v) for v in (x, x[:, :30], x / total, million, np.rint(million), x / total * np.median(total))
    )
    yield from (("logged", v) for v in (x - 0.05, x - 0.1 * x.mean(axis=0), np.where(x == x.max(), -1, x)))
    yield from (
        ("none", v) for v in (log, log[:, :30], np.log2(1 + million), np.log1p(x), np.sqrt(x), np.sqrt(million))
    )
    z = (log - log.mean(axis=0)) / np.maximum(log.std(axis=0), 1e-9)
    yield from (("none", v) for v in (z, np.clip(z, -10, 10), z[np.argsort(z[:, 0])[:400]]))


@pytest.mark.parametrize(
    "name", ["codex_mouse_spleen", "her2_breast_tumour", "merfish_mouse_brain", "visium_human_dlpfc"]
)
def test_kinds_of_transformed_tissue(name):
    scaling = {"counts": "logged", "normalized": "logged", "intensity": "intensity", "log": "none", "scaled": "none"}
    for k, (wanted, x) in enumerate(of_tissue(name)):
        kind, other = recognise(x)
        assert (scaling[kind], other) == (wanted, None), k
        assert recognise(x.astype(np.float32)) == (kind, other), k


def test_a_close_call_is_a_warning():
    rng = np.random.default_rng(0)
    eight_bit = np.clip(np.rint(rng.gamma(1.5, 20, (500, 12))), 0, 255)
    adata = ad.AnnData(eight_bit.astype(np.uint8))
    with pytest.warns(UserWarning, match=r"X is taken to hold .* values=.*intensity"):
        read_values(adata)
    assert read_values(adata, values="intensity").kind == "intensity"
    with pytest.raises(ValueError, match=r"values='raw' is not known; choose from \['auto', 'counts'"):
        read_values(adata, values="raw")


def repeated(x):
    """As csr with each entry in two parts."""
    x = sp.csr_matrix(x)
    return sp.csr_matrix((np.repeat(x.data / 2, 2), np.repeat(x.indices, 2), 2 * x.indptr), shape=x.shape)


def lazily(x):
    import dask.array as da

    return da.from_array(x, chunks=(100, 40))


@pytest.mark.parametrize(
    "form",
    [
        *(
            np.asarray,
            np.asfortranarray,
            np.ma.masked_array,
            lazily,
            repeated,
            sp.csr_matrix,
            sp.csc_matrix,
            sp.csr_array,
        ),
        *(lambda x, t=t: x.astype(t) for t in (object, np.float16, np.longdouble, np.uint64, ">f4")),
    ],
)
def test_every_container_is_read_alike(form):
    x = counts()
    given_x = form(x)
    adata = ad.AnnData(counts())
    adata.layers["own"] = given_x
    read = get_matrix(adata, "own")
    assert isinstance(read, sp.csr_matrix if sp.issparse(given_x) else np.ndarray)
    stored = read.data if sp.issparse(read) else read
    assert stored.dtype in (np.float32, np.float64, np.uint64)
    assert stored.dtype.isnative
    assert not stored.flags.writeable
    if sp.issparse(read):
        assert read.has_canonical_format
        assert read.data.all()
    np.testing.assert_array_equal(read.toarray() if sp.issparse(read) else read, x)
    np.testing.assert_array_equal(hash_cells(read), hash_cells(x))


def test_masked_is_missing():
    adata = ad.AnnData(counts())
    adata.layers["own"] = np.ma.masked_array(counts(), counts() == 3)
    np.testing.assert_array_equal(np.isnan(get_matrix(adata, "own")), counts() == 3)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda x: x + 1j, "dtype complex"),
        (lambda x: x.astype(str), "dtype <U"),
        (lambda x: np.where(x > 3, "many", x.astype(object)), "'many' among them is no number"),
        (lambda x: x * 1e30, "out of the range of float32"),
        (lambda x: x.astype(np.float64) * 1e-200, "out of the range of float32"),
        (
            lambda x: np.where(x == 2, np.nan, x),
            r"NaN or infinite values, in \d+ features \(0, .*library_key=.*Zeros in their place",
        ),
    ],
)
def test_what_is_no_expression_is_refused_by_name(bad, message):
    adata = ad.AnnData(counts())
    adata.layers["own"] = bad(counts())
    with pytest.raises(ValueError, match=rf"layers\['own'\] (has|holds) .*{message}"):
        read_values(adata, "own")


@pytest.mark.parametrize("empty", [0, np.nan])
@pytest.mark.parametrize("container", [np.asarray, sp.csr_matrix])
def test_features_that_a_slide_lacks_are_left_out(empty, container):
    x = counts(400, seed=3)
    slides = [("a", np.arange(0, 400, 2)), ("b", np.arange(1, 400, 2))]
    common = np.flatnonzero((x > 0).mean(axis=0) > 0.3)[:5]
    x[np.ix_(slides[1][1], common)] = empty
    adata = ad.AnnData(container(x))
    with pytest.warns(UserWarning, match=r"5 features .* of slides 'b' \(5\), though other slides have them"):
        read = read_values(adata, slides=slides)
    assert read.unmeasured == [str(k) for k in common]
    np.testing.assert_array_equal(read.features, np.setdiff1d(np.arange(40), common))
    # One slide alone tells nothing.
    if not empty:
        assert not read_values(adata).unmeasured


def test_rare_features_are_not_lacking():
    rng = np.random.default_rng(0)
    for share in (0.002, 0.01, 0.02):
        x = sp.random(2000, 5000, share / 4, format="csr", rng=rng, data_rvs=np.ones)
        slides = [(str(k), np.flatnonzero(np.arange(2000) % 4 == k)) for k in range(4)]
        assert not find_unmeasured([(x, slides)]).any()


def test_spots_off_the_tissue():
    adata = ad.AnnData(counts())
    adata.obs["in_tissue"] = (np.arange(300) > 30).astype(int)
    with pytest.warns(UserWarning, match="31 of 300 spots lie off the tissue"):
        read_values(adata)
    adata.obs["in_tissue"] = 1
    read_values(adata)
