from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial import Delaunay
from scipy.spatial.distance import cdist

from spatialfm.pp._spatial_neighbors import neighbor_graph

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

METHODS: dict[str, dict[str, Any]] = {
    "delaunay": {},
    "knn": {"n_neighbors": 4},
    "radius": {"radius": 0.12},
    "grid": {"n_neighbors": 6},
}
sizes = st.integers(1, 60)
dims = st.sampled_from([2, 3])
# A coarse grid of values makes ties, duplicates and cells on one line common.
values = st.integers(0, 6).map(float) | st.integers(-50_000, 50_000).map(lambda v: v / 1000)
clouds = st.tuples(sizes, dims).flatmap(lambda shape: arrays(np.float64, shape, elements=values))
slow = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much], max_examples=60
)


def random_points(n: int, dims: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, dims))


def make(xy: np.ndarray, **obs: Any) -> ad.AnnData:
    names = [f"cell{i}" for i in range(len(xy))]
    return ad.AnnData(X=np.ones((len(xy), 1), np.float32), obs=pd.DataFrame(obs, index=names), obsm={"spatial": xy})


def edges(graph: csr_matrix) -> set[tuple[int, int]]:
    rows = np.repeat(np.arange(graph.shape[0]), np.diff(graph.indptr))
    return set(zip(rows.tolist(), graph.indices.tolist(), strict=True))


def plain_delaunay(xy: np.ndarray) -> set[tuple[int, int]]:
    starts, columns = Delaunay(xy).vertex_neighbor_vertices
    return set(zip(np.repeat(np.arange(len(xy)), np.diff(starts)).tolist(), columns.tolist(), strict=True))


def check_form(connectivities: csr_matrix, distances: csr_matrix, xy: np.ndarray) -> None:
    """What holds for every graph: format, ones, no diagonal, no edge twice, exact lengths."""
    for graph in (connectivities, distances):
        assert graph.format == "csr"
        assert graph.dtype == np.float32
        assert graph.shape == (len(xy), len(xy))
    assert edges(connectivities) == edges(distances)
    assert len(edges(connectivities)) == connectivities.nnz
    assert not np.shares_memory(connectivities.indices, distances.indices)
    assert (connectivities.data == 1).all()
    rows = np.repeat(np.arange(len(xy)), np.diff(distances.indptr))
    assert (rows != distances.indices).all()
    np.testing.assert_array_equal(distances.indices, connectivities.indices)
    expected = np.linalg.norm(xy[rows] - xy[distances.indices], axis=1)
    np.testing.assert_allclose(distances.data, expected, rtol=1e-6)


def relabelled(found: set[tuple[int, int]], order: np.ndarray) -> set[tuple[int, int]]:
    return {(int(order[i]), int(order[j])) for i, j in found}


@slow
@given(clouds, st.data())
def test_knn_is_brute_force(xy, data):
    assume(len(xy) > 1)
    k = data.draw(st.integers(1, len(xy) - 1))
    connectivities, distances = neighbor_graph(xy, method="knn", n_neighbors=k)
    check_form(connectivities, distances, xy)
    assert (np.diff(connectivities.indptr) == k).all()
    everything = cdist(xy, xy)
    np.fill_diagonal(everything, np.inf)
    np.testing.assert_allclose(
        np.sort(distances.data.reshape(-1, k), axis=1), np.sort(everything, axis=1)[:, :k], rtol=1e-6, atol=1e-12
    )


@slow
@given(clouds, st.floats(0.1, 60) | st.integers(1, 6).map(float))
def test_radius_is_brute_force(xy, radius):
    connectivities, distances = neighbor_graph(xy, method="radius", radius=radius)
    check_form(connectivities, distances, xy)
    everything = np.sqrt(sum((axis[:, None] - axis[None]) ** 2 for axis in xy.T))
    np.fill_diagonal(everything, np.inf)
    assert edges(connectivities) == set(zip(*(a.tolist() for a in np.nonzero(everything <= radius)), strict=True))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("n", [5, 40, 700])
def test_delaunay_is_plain_scipy(n, dims):
    xy = random_points(n, dims) * 1000 + 5000
    connectivities, distances = neighbor_graph(xy, max_edge=np.inf)
    check_form(connectivities, distances, xy)
    assert edges(connectivities) == plain_delaunay(xy)
