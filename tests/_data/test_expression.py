from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import spatialfm as sfm
from spatialfm._data import _expression
from spatialfm._data._expression import check_finite, hash_cells, log_normalize, value_kind

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
