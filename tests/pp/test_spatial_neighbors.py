from __future__ import annotations

import sys
import warnings
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.sparse.csgraph import connected_components
from scipy.spatial import Delaunay
from scipy.spatial.distance import cdist

import spatialfm as sfm
from spatialfm.pp import _spatial_neighbors as module
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


@pytest.fixture(scope="module")
def sq() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("squidpy")


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


def on_empty_circle(xy: np.ndarray, i: int, j: int, *, of_every: bool = False) -> bool:
    """Whether i, j is an edge of a Delaunay triangulation, or of every one: brute force in exact arithmetic."""
    points = np.array([[Fraction(float(v)) for v in p] for p in xy])
    middle, along = (points[i] + points[j]) / 2, points[j] - points[i]
    others = np.delete(points, [i, j], axis=0) - middle
    # The circle's centre is middle + t * across; each other point bounds t from one side.
    power, side = (others**2).sum(axis=1) - (along**2).sum() / 4, 2 * others @ np.array([-along[1], along[0]])
    high = min((p / s for p, s in zip(power, side, strict=True) if s > 0), default=np.inf)
    low = max((p / s for p, s in zip(power, side, strict=True) if s < 0), default=-np.inf)
    if of_every:
        return bool(low < high and (power[side == 0] > 0).all())
    return bool(low <= high and (power[side == 0] >= 0).all())


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


@slow
@given(clouds)
def test_delaunay_of_awkward_points(xy):
    """With ties, duplicates and cells on a line, edges have an empty circle and the graph is connected."""
    connectivities, distances = neighbor_graph(xy, max_edge=np.inf)
    check_form(connectivities, distances, xy)
    found = edges(connectivities)
    assert found == {(j, i) for i, j in found}
    n_parts, _ = connected_components(connectivities, directed=False)
    assert n_parts == 1
    # Nearest neighbours are Delaunay neighbours.
    lengths = cdist(xy, xy)
    np.fill_diagonal(lengths, np.inf)
    if len(xy) > 1:
        shortest = np.array([distances[i].data.min() for i in range(len(xy))])
        np.testing.assert_allclose(shortest, lengths.min(axis=1), rtol=1e-6, atol=1e-12)
    # Cells at one place: joined to each other, and with the same neighbours.
    neighbors = [{*row.indices.tolist(), i} for i, row in enumerate(connectivities)]
    for i, j in zip(*np.nonzero(lengths == 0), strict=True):
        assert neighbors[i] == neighbors[j]
    order = np.random.default_rng(0).permutation(len(xy))
    if len(np.unique(xy, axis=0)) == len(xy):
        again, _ = neighbor_graph(xy[order], max_edge=np.inf)
        assert relabelled(edges(again), order) == found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("width", [5, 9, 30])
def test_edges_are_those_of_every_triangulation(seed, width):
    """On sets full of ties, two cells are joined if a circle passes through them and through no other cell."""
    xy = np.unique(np.random.default_rng(seed).integers(0, width, (40, 2)), axis=0).astype(float)
    found = edges(neighbor_graph(xy, max_edge=np.inf)[0])
    pairs = [(i, j) for i in range(len(xy)) for j in range(i)]
    assert {(i, j) for i, j in found if i > j} == {(i, j) for i, j in pairs if on_empty_circle(xy, i, j, of_every=True)}


CLOUDS = {
    "even": lambda rng: rng.random((4000, 2)),
    "offset": lambda rng: rng.random((4000, 2)) * 3000 + 1e6,
    "clusters": lambda rng: rng.random((20, 2))[rng.integers(0, 20, 4000)] + rng.normal(size=(4000, 2)) * 0.01,
    "gap": lambda rng: rng.random((4000, 2)) + np.array([[3.0, 0.0]]) * (np.arange(4000) % 2)[:, None],
    "band": lambda rng: rng.random((4000, 2)) * np.array([1000, 1]),
    "stray": lambda rng: np.vstack([rng.random((3999, 2)), [[500.0, -20.0]]]),
    "tails": lambda rng: rng.standard_t(2, (4000, 2)),
}


@pytest.mark.parametrize("tile_size", [40, 300, 1500])
@pytest.mark.parametrize("cloud", CLOUDS)
def test_tiles_are_plain_scipy(monkeypatch, cloud, tile_size):
    xy = CLOUDS[cloud](np.random.default_rng(1))
    monkeypatch.setattr(module, "TILE_SIZE", tile_size)
    found = edges(neighbor_graph(xy, max_edge=np.inf, n_jobs=2)[0])
    plain = plain_delaunay(xy - np.median(xy, axis=0))
    assert len(found) == len(plain)
    # Where the two differ it is because a cell far away costs the plain one digits.
    assert len(found - plain) <= 4
    assert all(on_empty_circle(xy, i, j) for i, j in found - plain)
    assert not any(on_empty_circle(xy, i, j) for i, j in plain - found)


def test_most_points_are_settled_by_tiles(monkeypatch):
    """The last triangulation is what tiles save: it must stay small."""
    seen = []
    monkeypatch.setattr(module, "Delaunay", lambda xy: seen.append(len(xy)) or Delaunay(xy))
    monkeypatch.setattr(module, "TILE_SIZE", 2000)
    neighbor_graph(random_points(20_000))
    assert len(seen) > 5
    assert max(seen) < 4000


square = np.stack(np.meshgrid(np.arange(40.0), np.arange(30.0)), axis=-1).reshape(-1, 2)
hexagonal = square * [1, 3**0.5 / 2] + np.stack([square[:, 1] % 2 / 2, 0 * square[:, 1]], axis=1)


holes = np.random.default_rng(3).random(len(square)) < 0.85
LATTICES = {
    "square": square,
    "rectangular": square * [1, 1.7],
    "hexagonal": hexagonal,
    "holes": square[holes],
    "holes in hexagonal": hexagonal[holes],
    "ring": np.stack([np.cos(np.arange(24) * np.pi / 12), np.sin(np.arange(24) * np.pi / 12)], axis=1),
}
TURNS = {
    "mirrored": lambda xy: xy * [-1, 1],
    "by a quarter": lambda xy: np.stack([-xy[:, 1], xy[:, 0]], axis=1),
    "by an angle": lambda xy: xy @ np.array([[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]),
    "in pixels": lambda xy: xy / 0.2737,
    "tenths, moved": lambda xy: xy * 0.1 + 1234.7,
    "far from the origin": lambda xy: xy + 1e7,
    "float32": lambda xy: (xy * 8 / 0.2737 + 20_000).astype(np.float32),
    "rounding errors": lambda xy: xy + np.random.default_rng(0).normal(0, 1e-13, xy.shape),
}


@pytest.mark.parametrize("tile_size", [50, 300, 10_000])
@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("lattice", LATTICES)
def test_a_lattice_is_the_same_however_it_lies(monkeypatch, lattice, turn, tile_size):
    xy = LATTICES[lattice]
    expected = edges(neighbor_graph(xy)[0])
    monkeypatch.setattr(module, "TILE_SIZE", tile_size)
    turned = TURNS[turn](xy)
    if turn == "float32" and lattice not in ("square", "rectangular", "holes"):
        # Nothing tells rounding to float32 from scatter where ties are rare.
        return
    assert edges(neighbor_graph(turned)[0]) == expected
    order = np.random.default_rng(0).permutation(len(xy))
    assert relabelled(edges(neighbor_graph(turned[order])[0]), order) == expected
    if lattice == "square":
        assert expected == edges(neighbor_graph(xy, method="grid", n_neighbors=4)[0])


def test_a_few_ties_do_not_make_a_lattice():
    """Edges of scattered cells are those of the triangulation, also for float32 and for integer coordinates."""
    xy = random_points(5000) * 1000
    for rounded in (xy.astype(np.float32), np.round(xy * 1000)):
        found, plain = edges(neighbor_graph(rounded, max_edge=np.inf)[0]), plain_delaunay(rounded.astype(float))
        assert found == plain


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("method", ["delaunay", "knn", "radius"])
def test_row_order_and_threads(monkeypatch, method, dims):
    monkeypatch.setattr(module, "TILE_SIZE", 100)
    xy = random_points(500, dims)
    connectivities, distances = neighbor_graph(xy, method=method, **METHODS[method], n_jobs=1)
    order = np.random.default_rng(1).permutation(len(xy))
    for rows, n_jobs in [(order, 1), (np.arange(500), 2), (order, 5)]:
        again = neighbor_graph(xy[rows], method=method, **METHODS[method], n_jobs=n_jobs)
        back = np.argsort(rows)
        for one, other in zip((connectivities, distances), again, strict=True):
            assert (abs(one - other[back][:, back])).nnz == 0


def test_lines_and_few_cells():
    line = np.array([[2.0, 2.0], [0.0, 0.0], [5.0, 5.0], [1.0, 1.0]])
    for xy in (line, np.c_[line, 3 * line[:, 0]], line * [1, 0], line * [0, 1]):
        assert edges(neighbor_graph(xy, max_edge=np.inf)[0]) == {(1, 3), (3, 1), (3, 0), (0, 3), (0, 2), (2, 0)}
    assert edges(neighbor_graph(line[:2])[0]) == {(0, 1), (1, 0)}
    assert neighbor_graph(line[:1])[0].shape == (1, 1)
    assert neighbor_graph(line[:1])[0].nnz == 0
    for method in ("radius", "grid"):
        assert neighbor_graph(line[:1], method=method, radius=1.0 if method == "radius" else None)[0].nnz == 0


def test_flat_3d_is_2d():
    xy = random_points(200)
    flat = edges(neighbor_graph(xy, max_edge=np.inf)[0])
    assert edges(neighbor_graph(np.c_[xy, np.full(200, 7.0)], max_edge=np.inf)[0]) == flat
    assert edges(neighbor_graph(np.c_[xy, xy @ [1, 0]] / [2**0.5, 1, 2**0.5], max_edge=np.inf)[0]) == flat


def test_duplicates():
    xy = random_points(300)
    adata = make(np.vstack([xy, xy[:2], xy[:1]]))
    sfm.pp.spatial_neighbors(adata, max_edge=np.inf)
    found, once = edges(adata.obsp["spatial_connectivities"]), edges(neighbor_graph(xy, max_edge=np.inf)[0])
    assert {(i, j) for i, j in found if max(i, j) < 300} == once
    twin = {300: 0, 301: 1, 302: 0}
    place = [twin.get(i, i) for i in range(303)]
    assert found == {
        (i, j)
        for i in range(303)
        for j in range(303)
        if i != j and (place[i] == place[j] or (place[i], place[j]) in once)
    }
    # The zero is stored, and stays through a file.
    assert adata.obsp["spatial_distances"].nnz == adata.obsp["spatial_connectivities"].nnz
    with pytest.raises(ValueError, match=r"1500 cells of the slide are at the same location \[0.0, 0.0\]"):
        neighbor_graph(np.vstack([xy, np.zeros((1500, 2))]))
    # Nearer than qhull can tell apart.
    near = np.vstack([xy * 1000, xy[:1] * 1000 + 1e-12])
    assert (300, 0) in edges(neighbor_graph(near)[0])


def test_cell_far_away_is_refused():
    xy = np.vstack([random_points(3000), [[1e9, 0.0]]])
    with pytest.raises(
        ValueError, match=r"too wide .* drop cells far from the tissue, such as the one at \[1000000000.0, 0.0\]"
    ):
        neighbor_graph(xy)
    assert neighbor_graph(xy, method="knn")[0].nnz == 6 * 3001


def test_max_edge():
    xy = np.vstack([random_points(400), random_points(400, seed=1) + np.array([[5.0, 0.0]])])
    everything = neighbor_graph(xy, max_edge=np.inf)[1]
    limit = 5 * np.median(everything.data)
    adata = make(xy)
    sfm.pp.spatial_neighbors(adata)
    distances = adata.obsp["spatial_distances"]
    np.testing.assert_allclose(adata.uns["spatial_neighbors"]["params"]["max_edge"], [limit])
    assert distances.nnz == (everything.data <= limit).sum() < everything.nnz
    assert distances[:400, 400:].nnz == 0
    for method in ("knn", "radius", "delaunay"):
        cut, full = (
            neighbor_graph(xy, method=method, radius=0.1 if method == "radius" else None, max_edge=m)[1]
            for m in (0.05, np.inf)
        )
        full.data[full.data > 0.05] = 0
        full.eliminate_zeros()
        assert edges(cut) == edges(full)


@pytest.mark.parametrize(("lattice", "n_neighbors"), [(square, 4), (square, 8), (hexagonal, 6)])
@pytest.mark.parametrize("jitter", [0, 0.02])
def test_grid(lattice, n_neighbors, jitter):
    rng = np.random.default_rng(0)
    keep = rng.random(len(lattice)) < 0.8
    xy = (lattice + rng.uniform(-jitter, jitter, lattice.shape))[keep] * 100 + 3000
    connectivities, distances = neighbor_graph(xy, method="grid", n_neighbors=n_neighbors)
    check_form(connectivities, distances, xy)
    limit = {4: 1.1, 6: 1.1, 8: 1.5}[n_neighbors]
    lengths = cdist(lattice[keep], lattice[keep])
    np.fill_diagonal(lengths, np.inf)
    np.testing.assert_array_equal(connectivities.toarray(), lengths < limit)


def test_grid_refuses_what_is_no_lattice():
    with pytest.raises(ValueError, match="no such lattice"):
        neighbor_graph(hexagonal, method="grid", n_neighbors=4)
    with pytest.raises(ValueError, match="give library_key="):
        neighbor_graph(np.vstack([square, square]), method="grid", n_neighbors=4)
    with pytest.warns(UserWarning, match="have n_neighbors=6 neighbours"):
        neighbor_graph(square, method="grid", n_neighbors=6)


@pytest.mark.parametrize("method", METHODS)
def test_slides(method):
    xy = hexagonal if method == "grid" else random_points(1200)
    slide = np.random.default_rng(0).permutation(np.repeat(["b", "a/1", "c"], 400))
    if method == "grid":
        slide = np.where(xy[:, 0] < 10, "b", np.where(xy[:, 0] < 25, "a/1", "c"))
    adata = make(xy, slide=pd.Categorical(slide, categories=["c", "b", "empty", "a/1"]))
    sfm.pp.spatial_neighbors(adata, method=method, **METHODS[method], library_key="slide")
    for name in ("a/1", "b", "c"):
        rows = np.flatnonzero(slide == name)
        alone = neighbor_graph(xy[rows], method=method, **METHODS[method])
        for graph, expected in zip(("connectivities", "distances"), alone, strict=True):
            block = adata.obsp[f"spatial_{graph}"][rows]
            assert block.nnz == expected.nnz
            assert (block[:, rows] != expected).nnz == 0
    assert adata.uns["spatial_neighbors"]["params"]["library_key"] == "slide"
    with sfm.settings.override(n_jobs=1):
        again = sfm.pp.spatial_neighbors(adata, method=method, **METHODS[method], library_key="slide", copy=True)
    assert (again.obsp["spatial_distances"] != adata.obsp["spatial_distances"]).nnz == 0


@pytest.mark.parametrize("method", METHODS)
def test_edges_are_those_of_squidpy(sq, method):
    xy = hexagonal if method == "grid" else random_points(2000)
    slide = pd.Categorical(np.where(np.arange(len(xy)) % 3 == 0, "a", "b"))
    adata = make(xy, slide=slide)
    theirs = {
        "delaunay": sq.gr.spatial_neighbors_delaunay,
        "knn": sq.gr.spatial_neighbors_knn,
        "radius": sq.gr.spatial_neighbors_radius,
        "grid": sq.gr.spatial_neighbors_grid,
    }[method]
    arguments = {"n_neighs" if k == "n_neighbors" else k: v for k, v in METHODS[method].items()}
    for library_key in (None, "slide") if method != "grid" else (None,):
        theirs(adata, library_key=library_key, key_added="squidpy", **arguments)
        sfm.pp.spatial_neighbors(adata, method=method, max_edge=np.inf, library_key=library_key, **METHODS[method])
        assert adata.uns["spatial_neighbors"].keys() == adata.uns["squidpy_neighbors"].keys()
        assert edges(adata.obsp["spatial_connectivities"]) == edges(adata.obsp["squidpy_connectivities"].tocsr())
        if method != "grid":  # squidpy writes ones there
            assert abs(adata.obsp["spatial_distances"] - adata.obsp["squidpy_distances"]).max() < 1e-6


def test_squidpy_and_scanpy_go_on(sq):
    adata = make(random_points(300), group=pd.Categorical(np.arange(300) % 3))
    adata.obs["group"] = adata.obs["group"].cat.rename_categories(str)
    sfm.pp.spatial_neighbors(adata)
    sq.gr.nhood_enrichment(adata, cluster_key="group", n_perms=10, seed=0, show_progress_bar=False)
    assert adata.uns["group_nhood_enrichment"]["zscore"].shape == (3, 3)
    sq.gr.centrality_scores(adata, cluster_key="group", show_progress_bar=False)
    assert adata.uns["group_centrality_scores"].shape[0] == 3
    sq.gr.interaction_matrix(adata, cluster_key="group")
    expected = np.zeros((3, 3))
    i, j = adata.obsp["spatial_connectivities"].nonzero()
    np.add.at(expected, (np.arange(300)[i] % 3, np.arange(300)[j] % 3), 1)
    np.testing.assert_array_equal(adata.uns["group_interactions"], expected)
    sc.tl.leiden(adata, neighbors_key="spatial_neighbors", flavor="igraph", n_iterations=2)
    assert 1 < adata.obs["leiden"].nunique() < 100


@pytest.mark.parametrize("library_key", [None, "slide"])
@pytest.mark.parametrize("method", METHODS)
def test_squidpy_builds_the_same_graph(sq, method, library_key):
    xy = hexagonal if method == "grid" else random_points(600)
    xy = np.vstack([xy, xy + np.array([3 * np.ptp(xy[:, 0]), 0])])
    slide = np.repeat(["b", "a"], len(xy) // 2)
    if method == "delaunay":
        xy = np.vstack([xy, xy[:4]])  # cells at the same location
        slide = np.r_[slide, slide[:4]]
    order = np.random.default_rng(1).permutation(len(xy))
    adata = make(xy[order], slide=pd.Categorical(slide[order]))
    sfm.pp.spatial_neighbors(adata, method=method, library_key=library_key, **METHODS[method])
    builder = sfm.pp.squidpy_builder(method=method, **METHODS[method])
    sq.gr.spatial_neighbors_from_builder(adata, builder, library_key=library_key, key_added="squidpy")
    for name in ("connectivities", "distances"):
        ours, theirs = adata.obsp[f"spatial_{name}"], adata.obsp[f"squidpy_{name}"]
        assert ours.dtype == theirs.dtype
        for part in ("indptr", "indices", "data"):
            np.testing.assert_array_equal(getattr(ours, part), getattr(theirs, part))
    params = adata.uns["squidpy_neighbors"]["params"]
    assert params == {
        "coord_type": "grid" if method == "grid" else "generic",
        "builder": f"spatialfm {method}",
        **METHODS[method],
    }


def test_functions_read_a_graph_built_by_squidpy(sq):
    adata = make(random_points(300))
    adata.obsm["X_rep"] = np.random.default_rng(0).normal(size=(300, 3))
    ours = sfm.tl.domains(adata, 3, use_rep="X_rep", copy=True)
    sq.gr.spatial_neighbors_from_builder(adata, sfm.pp.squidpy_builder())
    sfm.tl.domains(adata, 3, use_rep="X_rep")
    assert adata.obs["domain"].equals(ours.obs["domain"])


def test_builder_refuses_what_it_cannot_build(sq, monkeypatch):
    adata = make(random_points(50))
    with pytest.raises(ValueError, match="radius"):
        sq.gr.spatial_neighbors_from_builder(adata, sfm.pp.squidpy_builder(method="radius"))
    adata.obsm["spatial"][3] = np.nan
    with pytest.raises(ValueError, match="1 of 50 cells have NaN or infinite coordinates"):
        sq.gr.spatial_neighbors_from_builder(adata, sfm.pp.squidpy_builder())
    builder_module = sys.modules["spatialfm.pp._squidpy_builder"]
    builder_module.builder_class.cache_clear()
    monkeypatch.setitem(sys.modules, "squidpy.gr.neighbors", None)
    with pytest.raises(ImportError, match=r'pip install "spatialfm\[squidpy\]"'):
        sfm.pp.squidpy_builder()


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_round_trip(tmp_path, suffix):
    xy = random_points(50)
    adata = make(np.vstack([xy, xy[:3]]), slide=pd.Categorical(np.arange(53) % 2))
    adata.obs["slide"] = adata.obs["slide"].cat.rename_categories(str)
    sfm.pp.spatial_neighbors(adata)
    sfm.pp.spatial_neighbors(adata, method="radius", radius=0.3, library_key="slide", key_added="near")
    path = tmp_path / f"cells.{suffix}"
    getattr(adata, f"write_{suffix}")(path)
    back = ad.read_h5ad(path) if suffix == "h5ad" else ad.read_zarr(path)
    assert back.uns["near_neighbors"] == {
        "connectivities_key": "near_connectivities",
        "distances_key": "near_distances",
        "params": {
            "method": "radius",
            "basis": "spatial",
            "coord_type": "generic",
            "radius": 0.3,
            "library_key": "slide",
        },
    }
    params = back.uns["spatial_neighbors"]["params"]
    np.testing.assert_allclose(params["max_edge"], adata.uns["spatial_neighbors"]["params"]["max_edge"])
    for key in adata.obsp:
        assert back.obsp[key].dtype == np.float32
        assert back.obsp[key].nnz == adata.obsp[key].nnz
        assert (back.obsp[key] != adata.obsp[key]).nnz == 0


def test_copy_view_backed_and_basis(tmp_path):
    adata = make(random_points(60))
    adata.obsm["px"] = pd.DataFrame((random_points(60) * 100).astype(int), index=adata.obs_names, columns=["x", "y"])
    assert sfm.pp.spatial_neighbors(adata, copy=True).obsp["spatial_distances"].nnz
    assert not adata.obsp
    assert not adata.uns
    view = adata[10:50]
    sfm.pp.spatial_neighbors(view, basis="px", method="knn", key_added="px")
    assert view.obsp["px_distances"].shape == (40, 40)
    assert view.uns["px_neighbors"]["params"] == {
        "method": "knn",
        "basis": "px",
        "coord_type": "generic",
        "n_neighbors": 6,
    }
    assert not adata.obsp
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    sfm.pp.spatial_neighbors(backed)
    copied = sfm.pp.spatial_neighbors(backed, copy=True)
    assert edges(backed.obsp["spatial_distances"]) == edges(copied.obsp["spatial_distances"])
    backed.file.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "voronoi"}, r"method='voronoi' is not known; choose from \['delaunay', 'knn', 'radius', 'grid'\]"),
        (
            {"method": "radius"},
            r"needs radius=.* got None; the median distance from a cell to the nearest other is 0.0",
        ),
        ({"method": "radius", "radius": -1}, "needs radius="),
        ({"method": "radius", "radius": (0, 1)}, "radius must be a number or None"),
        ({"method": "radius", "radius": np.inf}, "positive finite"),
        (
            {"radius": 1.0},
            "radius=1.0 is for method='radius', not for method='delaunay'; to cut long edges use max_edge=",
        ),
        ({"max_edge": 0}, "max_edge must be a positive length"),
        ({"max_edge": np.nan}, "max_edge must be a number or None"),
        ({"method": "knn", "n_neighbors": 0}, "n_neighbors must be an integer of at least 1, got 0"),
        ({"method": "knn", "n_neighbors": 2.0}, "n_neighbors must be a whole number"),
        ({"method": "knn", "n_neighbors": 100}, "needs at least 101 cells, but the slide holds 100"),
        (
            {"method": "knn", "n_neighbors": 5, "library_key": "slide"},
            "needs at least 6 cells, but slide 'small' holds 5",
        ),
        ({"method": "grid", "n_neighbors": 5}, r"n_neighbors=5 is not known; choose from \[4, 6, 8\]"),
        ({"basis": "nan"}, r"NaN or infinite coordinates for 1 of 100 cells \(first: \['cell3'\]\)"),
        ({"basis": "wide"}, "coordinates must be"),
        ({"basis": "absent"}, "is missing"),
        ({"library_key": "absent"}, "is not a column"),
    ],
)
def test_refused(arguments, message):
    adata = make(random_points(100), slide=["small"] * 5 + ["large"] * 95)
    adata.obsm["nan"] = np.where(np.arange(100)[:, None] == 3, np.nan, adata.obsm["spatial"])
    adata.obsm["wide"] = random_points(100, 4)
    with pytest.raises((ValueError, KeyError), match=message):
        sfm.pp.spatial_neighbors(adata, **arguments)
    assert not adata.obsp
    assert not adata.uns


def test_no_cells():
    with pytest.raises(ValueError, match="holds no cells"):
        sfm.pp.spatial_neighbors(make(np.empty((0, 2))))
