"""Components of expression against brute force: Moran's I by its definition, PCA of weighted standardised values."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from sklearn.decomposition import PCA

from spatialfm._data import _components
from spatialfm._data._components import spatial_components, transition_matrix


def knn(xy, k=5):
    n = len(xy)
    near = cKDTree(xy).query(xy, k=min(k, n - 1) + 1)[1][:, 1:].reshape(-1)
    graph = sp.csr_matrix((np.ones(len(near)), (np.repeat(np.arange(n), len(near) // n), near)), shape=(n, n))
    return ((graph + graph.T) != 0).astype(np.float32).tocsr()


def tissue(n=200, f=40, seed=0):
    """Logged counts that follow waves across the tissue, with a variance of their own each; and the tissue graph."""
    rng = np.random.default_rng(seed)
    xy = rng.random((n, 2))
    wave = np.sin(xy @ rng.normal(0, 6, (2, f)) + rng.uniform(0, 6, f)) * np.linspace(0.3, 2, f)
    return np.log1p(rng.poisson(np.exp(wave))).astype(np.float32), knn(xy)


def by_hand(x, graph, k):
    """Scores and loadings without their sign, Moran's I, and the features that are used; all dense and in float64."""
    x, graph = np.asarray(x, float), graph.toarray().astype(float)
    n = len(x)
    varies = x.std(0) > 0
    detected = (x != 0).mean(0)
    ranked = sorted(np.flatnonzero(varies), key=lambda j: (-detected[j], j))
    used = np.array([j for j in range(x.shape[1]) if varies[j] and (detected[j] >= 0.02 or j in ranked[:50])])
    z = x[:, used]
    z = z / z.std(0)
    z = np.where(z == 0, 0, np.clip(z, z.mean(0) - 10, z.mean(0) + 10))
    z = z - z.mean(0)
    near = np.array([graph[i] / graph[i].sum() if graph[i].any() else np.eye(n)[i] for i in range(n)])
    moran = np.array([n / near.sum() * (v @ near @ v) / (v @ v) for v in z.T])
    weight = np.maximum(moran, 0) ** 0.25
    pca = PCA(k, svd_solver="full").fit(z * weight)
    scores = pca.transform(z * weight)
    size = np.sqrt(k / (scores**2).sum(1).mean())
    return scores * size, (weight * pca.components_).T * size, moran, used


def assert_same_up_to_sign(a, b, atol):
    assert a.shape == b.shape
    sign = np.where((a * b).sum(0) < 0, -1, 1)
    np.testing.assert_allclose(a, b * sign, atol=atol)


def convert(x, form):
    kind, _, dtype = form.partition("-")
    x = x.astype(dtype or np.float32)
    return {"dense": np.asarray, "csr": sp.csr_matrix, "csc": sp.csc_matrix, "array": sp.csr_array}[kind](x)


FORMS = ["dense", "dense-float64", "dense-int64", "csr", "csr-int32", "csc", "csc-float64", "array"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n", "f"), [(200, 40), (200, 14), (60, 150)])
def test_equal_to_brute_force(form, n, f):
    x, graph = tissue(n, f)
    if "int" in form:
        x = np.round(3 * x)
    k = min(12, f - 1)
    found = spatial_components(convert(x, form), graph, n_components=k)
    scores, loadings, moran, used = by_hand(x, graph, k)
    np.testing.assert_array_equal(found.features, used)
    np.testing.assert_allclose(found.autocorrelation, moran, atol=1e-5)
    assert_same_up_to_sign(found.scores, scores, 2e-3)
    assert_same_up_to_sign(found.axes.loadings, loadings, 2e-3)
    # As the classes promise: order, size, sign, and how loadings and scores hang together.
    assert found.scores.dtype == np.float32
    assert (np.diff(found.scores.var(0)) < 1e-6).all()
    assert np.square(found.scores).sum(1).mean() == pytest.approx(k, rel=1e-4)
    assert ((found.scores.astype(float) ** 3).sum(0) >= 0).all()
    values = found.values.toarray() if sp.issparse(found.values) else found.values
    np.testing.assert_allclose(values.mean(0), found.axes.mean, atol=1e-5)
    np.testing.assert_allclose((values - found.axes.mean) @ found.axes.loadings, found.scores, atol=1e-4)


@pytest.mark.parametrize("form", ["dense", "csr"])
@pytest.mark.parametrize(("n", "f"), [(80, 300), (120, 60)])
def test_lanczos_iterations_find_what_the_exact_way_finds(form, n, f, monkeypatch):
    x, graph = tissue(n, f)
    exact = spatial_components(convert(x, form), graph, n_components=8)
    monkeypatch.setattr(_components, "_MAX_EXACT", 10)
    found = spatial_components(convert(x, form), graph, n_components=8)
    np.testing.assert_allclose(found.scores, exact.scores, atol=2e-3)
    np.testing.assert_allclose(found.axes.loadings, exact.axes.loadings, atol=2e-3)


def test_thousands_of_features():
    x, graph = tissue(90, 2300)
    found = spatial_components(sp.csr_matrix(x), graph, n_components=6)
    assert_same_up_to_sign(found.scores, by_hand(x, graph, 6)[0], 5e-3)


@pytest.mark.parametrize("form", ["dense", "csr", "csc"])
def test_result_does_not_depend_on_blocks_of_features(form, monkeypatch):
    x, graph = tissue()
    expected = spatial_components(convert(x, form), graph)
    monkeypatch.setattr(_components, "_BLOCK", 7 * len(x))
    found = spatial_components(convert(x, form), graph)
    for field in fields(found):
        a, b = (getattr(c, field.name) for c in (found, expected))
        if isinstance(a, dict):
            a, b = ([np.concatenate(list(v.values()))] for v in (a, b))
        pairs = zip(a, b, strict=True) if isinstance(a, tuple | list) else [(a, b)]
        for pair in pairs:
            np.testing.assert_allclose(*(m.toarray() if sp.issparse(m) else m for m in pair), atol=1e-6)


@pytest.mark.parametrize("form", ["dense", "csr"])
@pytest.mark.parametrize("f", [14, 41])
def test_a_part_of_the_features_gives_scores_of_the_whole(form, f):
    x, graph = tissue(f=f)
    found = spatial_components(convert(x, form), graph)
    every = np.ones(len(found.features), bool)
    np.testing.assert_allclose(found.project(every), found.scores, atol=1e-4)
    half = np.random.default_rng(1).permutation(f) < f // 2
    first, second = found.project(half), found.project(~half)
    assert first.dtype == np.float32
    np.testing.assert_allclose(half.mean() * first + (~half).mean() * second, found.scores, atol=1e-4)
    # The first half knows nothing of the second.
    changed = convert(np.where(~half, 0, x), form)
    values = changed if form == "dense" else changed.tocsr()
    spread = x.std(0)
    values = values / spread if form == "dense" else values @ sp.diags(1 / spread)
    found.values = values.astype(np.float32)
    np.testing.assert_allclose(found.project(half), first, atol=1e-4)
    assert (found.project(~every) == 0).all()


@pytest.mark.parametrize("form", ["dense", "csr", "csc"])
def test_features_that_say_nothing(form):
    x, graph = tissue(n=300, f=70)
    x[:, 3] = 0
    x[:, 4] = 1.7
    x[:, 60:] = 0
    x[5:10, 60] = 1  # in 1.7 % of the cells: left out, as 50 others are in more
    x[5:11, 61] = 1  # in 2 %
    found = spatial_components(convert(x, form), graph, n_components=10)
    assert found.features.tolist() == [*range(3), *range(5, 60), 61]
    np.testing.assert_array_equal(found.features, by_hand(x, graph, 10)[3])
    assert_same_up_to_sign(found.scores, by_hand(x, graph, 10)[0], 2e-3)
    few = spatial_components(convert(x[:, 50:], form), graph, n_components=5)
    assert few.features.tolist() == [*range(10), 10, 11]


@pytest.mark.parametrize("form", ["csr", "csc"])
def test_negative_values_outliers_and_stored_zeros(form):
    x, graph = tissue(n=400)
    x[:, :5] -= 0.7
    x[7, 0], x[8, 1], x[9, 2] = -200, 500, 40
    x[:, 6] = 5 + 0.1 * x[:, 6]
    x[3, 6] = 0  # further below the mean than any value may be: what is not stored cannot be cut off
    dense = spatial_components(x, graph, n_components=6)
    matrix = convert(x, form)
    rows, columns = np.where(x == 0)
    stored = matrix.tocoo()
    stored = sp.coo_matrix(
        (np.r_[stored.data, np.zeros(50)], (np.r_[stored.row, rows[:50]], np.r_[stored.col, columns[:50]])), x.shape
    ).asformat(form)
    for sparse in (matrix, stored.astype(np.float32)):
        before = sparse.copy()
        found = spatial_components(sparse, graph, n_components=6)
        np.testing.assert_allclose(found.scores, dense.scores, atol=1e-3)
        np.testing.assert_allclose(found.values.toarray(), dense.values, atol=1e-4)
        # Neither is the matrix changed.
        for part in ("data", "indices", "indptr"):
            np.testing.assert_array_equal(getattr(sparse, part), getattr(before, part))
    assert np.abs(dense.values - dense.axes.mean).max() < 20
    assert_same_up_to_sign(dense.scores, by_hand(x, graph, 6)[0], 2e-3)


def test_order_of_rows_and_features():
    x, graph = tissue()
    found = spatial_components(x, graph)
    again = spatial_components(x, graph)
    np.testing.assert_array_equal(found.scores, again.scores)
    rng = np.random.default_rng(4)
    rows, columns = rng.permutation(len(x)), rng.permutation(x.shape[1])
    turned = spatial_components(x[rows][:, columns], graph[rows][:, rows])
    np.testing.assert_allclose(turned.scores, found.scores[rows], atol=2e-3)
    np.testing.assert_allclose(turned.autocorrelation, found.autocorrelation[columns], atol=1e-5)


def test_a_cell_without_neighbours_is_its_own():
    graph = sp.csr_matrix(np.array([[0, 2, 1, 0], [2, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], np.float32))
    expected = [[0, 0.5, 0.5, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(transition_matrix(graph).toarray(), expected)
    x, graph = tissue()
    graph = graph.tolil()
    graph[[3, 9]] = 0
    graph[:, [3, 9]] = 0
    graph = graph.tocsr()
    graph.eliminate_zeros()
    found = spatial_components(x, graph, n_components=6)
    scores, _, moran, _ = by_hand(x, graph, 6)
    np.testing.assert_allclose(found.autocorrelation, moran, atol=1e-5)
    assert_same_up_to_sign(found.scores, scores, 2e-3)


def test_where_nothing_is_shared_by_neighbours_all_weigh_the_same():
    # A ring whose neighbours are opposites: Moran's I is -1.
    n = 40
    ring = sp.csr_matrix(np.roll(np.eye(n), 1, 0) + np.roll(np.eye(n), -1, 0), dtype=np.float32)
    x = np.stack([(-1.0) ** np.arange(n), (-1.0) ** np.arange(n) * np.arange(n)], 1)
    found = spatial_components(x, ring, n_components=2)
    assert (found.autocorrelation < 0).all()
    z = (x - x.mean(0)) / x.std(0)
    assert_same_up_to_sign(found.axes.loadings / np.linalg.norm(found.axes.loadings), PCA(1).fit(z).components_.T, 1e-4)


@pytest.mark.parametrize("make", [np.asarray, sp.csr_matrix, sp.csc_matrix])
def test_nothing_varies(make):
    graph = sp.csr_matrix((5, 5), dtype=np.float32)
    with pytest.raises(ValueError, match="none of the 3 features varies between the 5 cells"):
        spatial_components(make(np.full((5, 3), 2.0)), graph)
    with pytest.raises(ValueError, match="none of the 3 features varies between the 1 cells"):
        spatial_components(make(np.arange(3.0)[None]), graph[:1, :1])


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(2, 6),
    f=st.integers(1, 6),
    k=st.integers(1, 8),
    exact=st.booleans(),
    form=st.sampled_from(["dense", "csr", "csc"]),
    seed=st.integers(0, 99),
)
def test_next_to_nothing(n, f, k, exact, form, seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(-2, 3, (n, f)).astype(np.float32)
    x[0, 0] = x[1, 0] + 1
    graph = knn(rng.random((n, 2)), 2) if seed % 3 else sp.csr_matrix((n, n), dtype=np.float32)
    limit, _components._MAX_EXACT = _components._MAX_EXACT, 2000 if exact else 1
    try:
        found = spatial_components(convert(x, form), graph, n_components=k)
    finally:
        _components._MAX_EXACT = limit
    n_used = len(found.features)
    assert found.scores.shape[1] == found.axes.loadings.shape[1] <= min(k, max(1, n_used - 1), n - 1)
    assert found.scores.shape[1] >= 1
    assert np.isfinite(found.scores).all()
    np.testing.assert_allclose(found.project(np.ones(n_used, bool)), found.scores, atol=1e-3)


def test_components_beyond_the_rank_are_zero():
    """With few different cells, rounding is no component, and the order of the cells does not matter."""
    rng = np.random.default_rng(0)
    xy, few = rng.uniform(0, 10, (90, 2)), rng.poisson(2, (10, 40)).astype(np.float32)
    which = rng.integers(10, size=90)
    graph = knn(xy)
    found = spatial_components(few[which], graph)
    assert found.scores.shape[1] == 32
    assert (found.scores.std(axis=0) > 0).sum() <= 9
    order = rng.permutation(90)
    again = spatial_components(few[which][order], graph[order][:, order].tocsr())
    assert_same_up_to_sign(again.scores, found.scores[order], 1e-4)
