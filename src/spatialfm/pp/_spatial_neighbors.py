"""The graph of neighbouring cells."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import starmap
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
from scipy.sparse import coo_matrix, csr_matrix
from scipy.spatial import Delaunay, QhullError, cKDTree

from spatialfm._checks import check_choice, checked
from spatialfm._data._adata import (
    check_within_slides,
    get_coordinates,
    get_graph,
    get_libraries,
    get_table,
    graph_params,
    graph_record,
    slide_codes,
)
from spatialfm._data._overlap import find_overlap
from spatialfm._data._write import adopt, check_free, write, written
from spatialfm._settings import logger, settings, warn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

Method = Literal["delaunay", "knn", "radius", "grid"]

GRAPH_KEYS = {"obsp": ["spatial_connectivities", "spatial_distances"], "uns": ["spatial_neighbors"]}
"""What :func:`spatial_neighbors` writes by default."""
TILE_SIZE = 8_000
"""Points in a tile of the triangulation; above it, qhull needs more time for each point."""
MAX_TWINS = 1_000
"""Largest number of cells at one location for a triangulation, as edges between them grow with its square."""
LATTICE_SLACK, LATTICE_SHARE = 0.01, 0.1
"""A slide is a square lattice where more than this share of its edges has a slack (radians) below the first number.

Among scattered cells 1 % of the edges have, on a square lattice 33 %."""
# Half way between the first lattice distance to keep and the next one to leave out, in spacings:
# square lattice 1 | sqrt 2, hexagonal lattice 1 | sqrt 3, square lattice with diagonals sqrt 2 | 2.
GRID_CUTOFF = {4: (1 + 2**0.5) / 2, 6: (1 + 3**0.5) / 2, 8: (2**0.5 + 2) / 2}


@checked
def spatial_neighbors(
    adata: AnnData,
    *,
    method: Method = "delaunay",
    n_neighbors: int = 6,
    radius: float | None = None,
    max_edge: float | None = None,
    basis: str = "spatial",
    library_key: str | None = None,
    allow_overlap: bool = False,
    key_added: str = "spatial",
    copy: bool = False,
) -> AnnData | None:
    """Build the graph of neighbouring cells from their coordinates.

    The result does not depend on the order of the cells. squidpy and scanpy read the graph, see also
    :func:`spatialfm.pp.squidpy_builder`.

    Parameters
    ----------
    %(adata)s
    method
        ``"delaunay"``: Delaunay triangulation without over-long edges: neighbours are cells whose Voronoi regions
        touch. On a square lattice these are the four cells above, below, left and right. ``"knn"``: an edge from each
        cell to its `n_neighbors` nearest cells; the graph is directed, as in squidpy. ``"radius"``: all pairs of cells
        at most `radius` apart. ``"grid"``: adjacent spots of a lattice, such as Visium.
    n_neighbors
        Number of neighbours for ``"knn"``. For ``"grid"`` the lattice: 6 hexagonal (Visium), 4 square, 8 square with
        diagonals; locations may deviate from it by about a tenth of the spacing.
    radius
        Largest distance of neighbours for ``"radius"``, in the unit of the coordinates.
    max_edge
        Length above which edges are cut, in the unit of the coordinates. None: five times the median edge of the slide
        for ``"delaunay"``, no limit otherwise. ``np.inf`` keeps the whole triangulation.
    %(basis)s
    %(library_key)s
    allow_overlap
        Build the graph also where slides seem to overlap, as after ``ad.concat`` of slides without `library_key`: cells
        of different categories of a column of ``obs`` are then closer together than cells of one category.
    key_added
        Prefix of the keys that are written.
    %(copy)s

    Returns
    -------
    None, or the changed copy. Written:

    ``obsp["{key_added}_connectivities"]``
        csr float32 (n_obs, n_obs), 1 for each edge, empty diagonal.
    ``obsp["{key_added}_distances"]``
        csr float32 with the same edges: length in the unit of the coordinates, 0 for cells at the same location.
    ``uns["{key_added}_neighbors"]``
        ``connectivities_key``, ``distances_key`` and ``params``: `method`, `basis`, squidpy's `coord_type`, those of
        `n_neighbors`, `radius`, `library_key` and `allow_overlap` that were used, and the `max_edge` of each slide.

    Raises
    ------
    KeyError
        If ``obsm[basis]`` or ``obs[library_key]`` is missing.
    ValueError
        If an argument is out of range or is not used by `method`, coordinates are missing or infinite, a slide has too
        few cells, is no lattice (``"grid"``), or slides overlap.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()
    >>> sfm.pp.spatial_neighbors(adata, library_key="mouse_id")
    >>> adata.obsp["spatial_connectivities"].shape
    (4788, 4788)
    """
    keys = {"connectivities_key": f"{key_added}_connectivities", "distances_key": f"{key_added}_distances"}
    check_free(adata, "pp.spatial_neighbors", {"obsp": [*keys.values()], "uns": [f"{key_added}_neighbors"]})
    coords = get_coordinates(adata, basis)
    libraries = get_libraries(adata, library_key)
    found = None if allow_overlap else find_overlap(adata, coords, libraries)
    if found is not None:
        msg = f"{found.message()}. If they are one slide: sfm.pp.spatial_neighbors(adata, allow_overlap=True)"
        raise ValueError(msg)
    graph = _build(coords, libraries, method, n_neighbors, radius, max_edge, settings.n_jobs)
    _log(graph, method, basis, len(libraries), keys, key_added)

    params: dict[str, Any] = {"method": method, "basis": basis, "coord_type": "grid" if method == "grid" else "generic"}
    if method in ("knn", "grid"):
        params["n_neighbors"] = int(n_neighbors)
    if radius is not None:
        params["radius"] = float(radius)
    if library_key is not None:
        params["library_key"] = library_key
    if allow_overlap:
        params["allow_overlap"] = True
    if graph.cuts:
        params["max_edge"] = graph.cuts

    fields = {
        "obsp": {keys["connectivities_key"]: graph.connectivities, keys["distances_key"]: graph.distances},
        "uns": {f"{key_added}_neighbors": {**keys, "params": params}},
    }
    adata = write(adata, "pp.spatial_neighbors", key_added, fields, copy=copy)
    return adata if copy else None


class _Graph(NamedTuple):
    """Graph of all slides."""

    connectivities: csr_matrix
    distances: csr_matrix
    cuts: list[float]
    """Length above which edges were cut, for each slide; empty where none were."""


def _log(graph: _Graph, method: Method, basis: str, n_slides: int, keys: dict[str, str], key_added: str) -> None:
    degrees = np.diff(graph.connectivities.indptr)
    n_alone = int((degrees == 0).sum())
    logger.info(
        "spatial_neighbors: %s graph of %d cells on %d slide(s), %.1f neighbours a cell, median edge %.4g in the unit "
        "of obsm[%r]%s -> obsp[%r], obsp[%r], uns[%r]",
        method,
        len(degrees),
        n_slides,
        degrees.mean(),
        np.median(graph.distances.data) if graph.distances.nnz else np.nan,
        basis,
        f"; {n_alone} cells without a neighbour" if n_alone else "",
        *keys.values(),
        f"{key_added}_neighbors",
    )


def neighbor_graph(
    coords: np.ndarray,
    *,
    method: Method = "delaunay",
    n_neighbors: int = 6,
    radius: float | None = None,
    max_edge: float | None = None,
    n_jobs: int = 1,
) -> tuple[csr_matrix, csr_matrix]:
    """Build connectivities and distances of one slide from finite coordinates, see :func:`spatial_neighbors`."""
    coords = np.asarray(coords, dtype=np.float64)
    slides = [("", np.arange(len(coords)))]
    graph = _build(coords, slides, method, n_neighbors, radius, max_edge, n_jobs)
    return graph.connectivities, graph.distances


class FoundGraph(NamedTuple):
    """Graph of neighbouring cells: the one stored in an AnnData, or a new one where there was none."""

    edges: csr_matrix
    """(n_obs, n_obs) float32, symmetric: 1 for each pair of neighbours, empty diagonal."""
    carrier: AnnData
    """Holds the graph in ``obsp`` and ``uns``: the AnnData itself, or a new AnnData of the cells without features."""
    new: dict[str, list[str]]
    """Keys of each field that are new in `carrier`, such as ``{"uns": ["spatial_neighbors"]}``."""

    def store(self, adata: AnnData) -> None:
        """Write what is new to ``adata``, unless it has a graph by now."""
        if self.new and "spatial_neighbors" not in adata.uns:
            adopt(adata, self.carrier, self.new)


def find_graph(adata: AnnData, *, neighbors_key: str, basis: str, library_key: str | None) -> FoundGraph:
    """Read the stored graph, or build the default one where there is none; ``adata`` is not changed.

    A stored graph that joins slides is an error.
    """
    carrier = adata
    is_new = neighbors_key == "spatial_neighbors" and neighbors_key not in adata.uns
    if is_new:
        carrier = _with_new_graph(adata, basis, library_key)
    graph, _ = get_graph(carrier, neighbors_key, basis)
    libraries = get_libraries(adata, library_key)
    check_within_slides(carrier, graph, slide_codes(libraries), library_key, neighbors_key)
    if "method" not in graph_params(carrier, neighbors_key):
        # Another tool built the graph, so overlapping slides have not been checked for yet.
        _check_overlap(adata, graph, basis, libraries, neighbors_key)
        if is_new:
            record = {"uns": {neighbors_key: graph_record(carrier, neighbors_key, basis)}}
            write(carrier, "pp.spatial_neighbors", "spatial", record, copy=False)
    i, j = graph.nonzero()
    edges = csr_matrix((np.ones(2 * len(i), np.float32), (np.r_[i, j], np.r_[j, i])), shape=graph.shape)
    edges.data[:] = 1
    new = {}
    if is_new:
        new = {field: [key for key in keys if key in written(carrier, field)] for field, keys in GRAPH_KEYS.items()}
    return FoundGraph(edges, carrier, new)


def _with_new_graph(adata: AnnData, basis: str, library_key: str | None) -> AnnData:
    """Table of the cells with a new graph, or with the matrices in ``obsp`` that lack only their record in ``uns``."""
    from anndata import AnnData

    cells = AnnData(shape=(adata.n_obs, 0), obs=get_table(adata.obs), obsm={basis: get_coordinates(adata, basis)})
    if "spatial_connectivities" in adata.obsp:
        cells.obsp.update(adata.obsp)
        return cells
    check_free(adata, "pp.spatial_neighbors", GRAPH_KEYS)
    if "spatial" in adata.uns:
        cells.uns["spatial"] = adata.uns["spatial"]
    spatial_neighbors(cells, basis=basis, library_key=library_key)
    return cells


def _check_overlap(
    adata: AnnData, graph: csr_matrix, basis: str, libraries: list[tuple[str, np.ndarray]], neighbors_key: str
) -> None:
    """Raise where a stored graph joins slides that overlap."""
    found = find_overlap(adata, get_coordinates(adata, basis), libraries)
    if found is None:
        return
    i, j = graph.nonzero()
    n_across = int((found.codes[i] != found.codes[j]).sum())
    if n_across:
        msg = (
            f"{found.message()}; {n_across} edges of the graph of uns[{neighbors_key!r}] join them: build it again "
            "with sfm.pp.spatial_neighbors(adata, library_key=...), or, if they are one slide, with "
            "allow_overlap=True"
        )
        raise ValueError(msg)


class _Slide(NamedTuple):
    """Graph of one slide, with its cells in a different order."""

    rows: np.ndarray
    """Rows of the AnnData, in the order of `graph`."""
    graph: csr_matrix
    """Lengths of the edges, float32."""
    max_edge: float
    """Length above which edges were cut, inf where none were."""
    n_twins: int
    """Cells at the location of another cell, which the triangulation merged."""


class _Triangulation(NamedTuple):
    """Delaunay graph of one slide before long edges are cut."""

    graph: csr_matrix
    max_edge: float
    n_twins: int


def _build(
    coords: np.ndarray,
    libraries: list[tuple[str, np.ndarray]],
    method: Method,
    n_neighbors: int,
    radius: float | None,
    max_edge: float | None,
    n_jobs: int,
) -> _Graph:
    _check_arguments(coords, libraries, method, n_neighbors, radius, max_edge)
    limit = None if max_edge is None else float(max_edge)
    inner = max(1, n_jobs // len(libraries))

    def one_slide(name: str, rows: np.ndarray) -> _Slide:
        where = f"slide {name!r}" if name else "the slide"
        rows = rows[_local_order(coords[rows])]
        xy = coords[rows]
        cut, n_twins = np.inf if limit is None else limit, 0
        if method == "delaunay":
            graph, cut, n_twins = _delaunay(xy, limit, where, inner)
        elif method == "knn":
            graph = _knn(xy, int(n_neighbors), inner)
        elif method == "radius":
            graph = _radius(xy, float(radius or 0))
        else:
            graph = _grid(xy, int(n_neighbors), where, inner)
        return _Slide(rows, _cut(graph, cut), cut, n_twins)

    if len(libraries) == 1 or n_jobs == 1:
        slides = list(starmap(one_slide, libraries))
    else:
        with ThreadPoolExecutor(n_jobs) as pool:
            slides = list(pool.map(lambda library: one_slide(*library), libraries))
    n_twins = sum(s.n_twins for s in slides)
    if n_twins:
        logger.info(
            "spatial_neighbors: %d cells are at the location of another cell; they are joined to it and its neighbours",
            n_twins,
        )
    distances = _in_row_order(slides, len(coords))
    connectivities = csr_matrix(
        (np.ones(distances.nnz, np.float32), distances.indices.copy(), distances.indptr.copy()), shape=distances.shape
    )
    cuts = [s.max_edge for s in slides]
    return _Graph(connectivities, distances, cuts if np.isfinite(cuts).any() else [])


def _check_arguments(
    coords: np.ndarray,
    libraries: list[tuple[str, np.ndarray]],
    method: Method,
    n_neighbors: int,
    radius: float | None,
    max_edge: float | None,
) -> None:
    check_choice("method", method, get_args(Method))
    if len(coords) == 0:
        msg = "adata holds no cells; a graph needs at least one"
        raise ValueError(msg)
    if method == "grid":
        check_choice("n_neighbors", n_neighbors, tuple(GRID_CUTOFF))
    elif isinstance(n_neighbors, bool) or not isinstance(n_neighbors, int | np.integer) or n_neighbors < 1:
        msg = f"n_neighbors must be an integer of at least 1, got {n_neighbors!r}"
        raise ValueError(msg)
    if method == "knn":
        for name, rows in libraries:
            if len(rows) <= n_neighbors:
                where = f"slide {name!r}" if name else "the slide"
                msg = (
                    f"n_neighbors={n_neighbors} needs at least {n_neighbors + 1} cells, but {where} holds {len(rows)}; "
                    "lower n_neighbors or drop the slide"
                )
                raise ValueError(msg)
    if max_edge is not None and not _is_positive(max_edge):
        msg = f"max_edge must be a positive length in the unit of the coordinates, np.inf or None, got {max_edge!r}"
        raise ValueError(msg)
    if method != "radius":
        if radius is not None:
            msg = (
                f"radius={radius!r} is for method='radius', not for method={method!r}; to cut long edges use max_edge="
            )
            raise ValueError(msg)
    elif not _is_positive(radius) or radius == np.inf:
        nearest = [cKDTree(coords[rows]).query(coords[rows], k=2)[0][:, 1] for _, rows in libraries if len(rows) > 1]
        hint = (
            f"; the median distance from a cell to the nearest other is {np.median(np.concatenate(nearest)):.4g}"
            if nearest
            else ""
        )
        msg = (
            "method='radius' needs radius=, a positive finite length in the unit of the coordinates, got "
            f"{radius!r}{hint}"
        )
        raise ValueError(msg)


def _is_positive(value: Any) -> bool:
    return isinstance(value, Real) and float(value) > 0


def _local_order(xy: np.ndarray) -> np.ndarray:
    """Sort points by strips of x and then y, which keeps near points near in memory.

    The order depends on the coordinates alone, so what is computed from sorted points does not depend on the order of
    the rows. Points at the same location follow each other.
    """
    low, extent = xy.min(axis=0), np.ptp(xy, axis=0)
    extent[extent == 0] = 1
    strip = np.floor((xy[:, 0] - low[0]) * (np.sqrt(len(xy) / 8) / extent[0]))
    key = strip + (xy[:, 1] - low[1]) / (2 * extent[1])
    order = np.argsort(key)
    # One key sorts ten times faster than several columns, which are needed only where keys are equal.
    return np.lexsort((*xy.T, key)) if (np.diff(key[order]) == 0).any() else order


def _in_row_order(slides: Sequence[_Slide], n: int) -> csr_matrix:
    """One csr matrix of all slides over the rows of the AnnData, columns sorted."""
    rows = np.concatenate([s.rows for s in slides])
    counts = np.concatenate([np.diff(s.graph.indptr) for s in slides])
    columns = np.concatenate([s.rows[s.graph.indices] for s in slides])
    lengths = np.concatenate([s.graph.data for s in slides])
    index = np.int32 if max(n, len(columns)) < 2**31 else np.int64
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(index)
    graph = csr_matrix((lengths, columns.astype(index), starts), shape=(n, n))
    graph = graph[np.argsort(rows)]
    graph.has_sorted_indices = False
    graph.sort_indices()
    return graph


def _lengths(xy: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Euclidean distance of each pair, float64."""
    squares = np.zeros(len(i))
    for axis in np.ascontiguousarray(xy.T):
        squares += (axis.take(i) - axis.take(j)) ** 2
    return np.sqrt(squares)


def _with_lengths(graph: csr_matrix, xy: np.ndarray) -> csr_matrix:
    rows = np.repeat(np.arange(len(xy)), np.diff(graph.indptr))
    lengths = _lengths(xy, rows, graph.indices).astype(np.float32)
    return csr_matrix((lengths, graph.indices, graph.indptr), shape=graph.shape)


def _voronoi_edges(i: np.ndarray, j: np.ndarray, angle: np.ndarray, xy: np.ndarray) -> csr_matrix:
    """Lengths of the edges of a triangulation, in both directions, without edges that are not unique.

    The sides of each triangle are given, with the angle opposite to each. The two angles opposite to an edge add up to
    less than pi. They reach pi where both triangles have the same circumcircle, so that the edge is one of several
    valid diagonals; at the outline, one angle does where the edge spans over cells on it. Both are left out, up to the
    rounding of coordinates.
    """
    n = len(xy)
    index = np.int32 if max(n, 2 * len(i)) < 2**31 else np.int64
    half = coo_matrix((np.maximum(angle, 1e-12), (i.astype(index), j.astype(index))), shape=(n, n)).tocsr()
    both = half + half.T
    graph = _with_lengths(both, xy)
    if not graph.nnz:
        return graph
    slack = np.pi - both.data
    if (slack < LATTICE_SLACK).mean() >= LATTICE_SHARE:
        tolerance = 10 * LATTICE_SLACK
    else:
        tolerance = 1e-9 + 32 * np.finfo(np.float64).eps * np.abs(xy).max() / max(np.median(graph.data), 1e-300)
    return _keep(graph, slack > min(tolerance, 10 * LATTICE_SLACK))


def _cut(graph: csr_matrix, max_edge: float) -> csr_matrix:
    """Leave out the edges longer than `max_edge` in float32, as the lengths are."""
    return _keep(graph, graph.data <= max_edge)


def _keep(graph: csr_matrix, keep: np.ndarray) -> csr_matrix:
    if keep.all():
        return graph
    starts = np.concatenate([[0], np.cumsum(keep)])[graph.indptr].astype(graph.indptr.dtype)
    return csr_matrix((graph.data[keep], graph.indices[keep], starts), shape=graph.shape)


def _knn(xy: np.ndarray, k: int, n_jobs: int) -> csr_matrix:
    n = len(xy)
    lengths, neighbors = cKDTree(xy, balanced_tree=False).query(xy, k=k + 1, workers=n_jobs)
    # Among more than k cells at one location, a cell may not find itself; then the last of the k + 1 is dropped.
    if (neighbors[:, 0] == np.arange(n)).all():
        neighbors, lengths = neighbors[:, 1:], lengths[:, 1:]
    else:
        drop = neighbors == np.arange(n)[:, None]
        drop[~drop.any(axis=1), -1] = True
        neighbors, lengths = neighbors[~drop], lengths[~drop]
    index = np.int32 if n * k < 2**31 else np.int64
    starts = np.arange(0, n * k + 1, k, dtype=index)
    return csr_matrix((lengths.astype(np.float32).ravel(), neighbors.astype(index).ravel(), starts), shape=(n, n))


def _radius(xy: np.ndarray, radius: float) -> csr_matrix:
    # The tree compares squares; the margin leaves the last digit to the lengths themselves.
    pairs = cKDTree(xy, balanced_tree=False).query_pairs(radius * (1 + 1e-12), output_type="ndarray")
    i, j = np.ascontiguousarray(pairs.T)
    lengths = _lengths(xy, i, j)
    near = lengths <= radius
    if not near.all():
        i, j, lengths = i[near], j[near], lengths[near]
    n, index = len(xy), np.int32 if max(len(xy), 2 * len(i)) < 2**31 else np.int64
    i, j, lengths = i.astype(index), j.astype(index), lengths.astype(np.float32)
    both = coo_matrix(
        (np.concatenate([lengths, lengths]), (np.concatenate([i, j]), np.concatenate([j, i]))), shape=(n, n)
    )
    # No pair comes twice, so scipy need not search for duplicates.
    both.has_canonical_format = True
    return both.tocsr()


def _grid(xy: np.ndarray, n_neighbors: int, where: str, n_jobs: int) -> csr_matrix:
    if len(xy) == 1:
        return csr_matrix((1, 1), dtype=np.float32)
    nearest = np.median(_knn(xy, 1, n_jobs).data)
    near = _knn(xy, min(4, len(xy) - 1), n_jobs).data
    spacing = float(np.median(near[near <= nearest * GRID_CUTOFF[4]]))
    if spacing == 0:
        msg = (
            f"method='grid': most spots of {where} are at the location of another; give library_key= if several slides "
            "overlap"
        )
        raise ValueError(msg)
    graph = _radius(xy, spacing * GRID_CUTOFF[n_neighbors])
    degrees = np.diff(graph.indptr)
    # On a distorted lattice, a few spots may have one neighbour more.
    crowded = (degrees > n_neighbors).mean()
    if crowded > 0.02:
        msg = (
            f"method='grid': {crowded:.0%} of the spots of {where} have more than n_neighbors={n_neighbors} others "
            f"within {spacing * GRID_CUTOFF[n_neighbors]:.4g}, so they are on no such lattice; use method='delaunay', "
            "or library_key= if several slides overlap"
        )
        raise ValueError(msg)
    full = (degrees >= n_neighbors).mean()
    # On a lattice with a fifth of its spots missing, 17 % of the spots have all eight neighbours; on another lattice,
    # no spot can have more than that lattice allows.
    if full < 0.02:
        warn(
            "spatial_neighbors: only %.0f%% of the spots of %s have n_neighbors=%d neighbours at the spacing of %.4g "
            "that was found; for another lattice give n_neighbors=4, 6 or 8, for none method='delaunay'",
            100 * full,
            where,
            n_neighbors,
            spacing,
        )
    return graph


def _delaunay(xy: np.ndarray, max_edge: float | None, where: str, n_jobs: int) -> _Triangulation:
    """Triangulate points whose order puts those at the same location side by side."""
    new = np.concatenate([[True], (xy[1:] != xy[:-1]).any(axis=1)])
    place = np.cumsum(new) - 1
    xy_places = xy[new]
    # Sorted by x, a tile and its surroundings are within one slice.
    order = np.lexsort(xy_places.T[::-1])
    i, j, angle = _triangulate(xy_places[order], n_jobs)
    graph = _voronoi_edges(order[i], order[j], angle, xy_places)
    typical = float(np.median(graph.data)) if graph.nnz else 0.0
    # Locations too near to another for qhull's precision have no edge; they are merged with the nearest.
    alone = np.diff(graph.indptr) == 0
    if alone.any() and graph.nnz:
        apart, nearest = cKDTree(xy_places[~alone]).query(xy_places[alone])
        if apart.max() > typical / 1000:
            stray = xy_places[((xy_places - np.median(xy_places, axis=0)) ** 2).sum(axis=1).argmax()]
            msg = (
                f"{where} is too wide for its triangulation: cells {apart.max():.4g} apart cannot be distinguished at "
                f"an extent of {np.ptp(xy_places, axis=0).max():.4g}; drop cells far from the tissue, such as the "
                f"one at {stray.tolist()}, or use method='knn'"
            )
            raise ValueError(msg)
        merged = np.arange(len(alone))
        merged[alone] = np.flatnonzero(~alone)[nearest]
        place = merged[place]
    if max_edge is None:
        max_edge = 5 * typical or np.inf
    sizes = np.bincount(place)
    if sizes.max() > 1:
        if sizes.max() > MAX_TWINS:
            msg = (
                f"{sizes.max()} cells of {where} are at the same location {xy_places[sizes.argmax()].tolist()}; "
                "if that stands for an unknown location drop them, or use method='knn'"
            )
            raise ValueError(msg)
        n = len(xy)
        member = csr_matrix((np.ones(n, np.float32), place, np.arange(n + 1)), shape=(n, len(xy_places)))
        pattern = _cut(graph, max_edge)
        pattern.data[:] = 1
        pattern = (member @ pattern @ member.T + member @ member.T).tocoo()
        off_diagonal = pattern.row != pattern.col
        i, j = pattern.row[off_diagonal], pattern.col[off_diagonal]
        graph = _with_lengths(coo_matrix((np.ones(len(i), np.float32), (i, j)), shape=(n, n)).tocsr(), xy)
    return _Triangulation(graph, max_edge, len(xy) - int((sizes > 0).sum()))


class Sides(NamedTuple):
    """Sides of all triangles: an inner edge comes twice."""

    i: np.ndarray
    """One end of each side."""
    j: np.ndarray
    """The other end."""
    angle: np.ndarray
    """Angle opposite to the side, in radians; 0 where there is none, and in three dimensions."""


def _triangulate(xy: np.ndarray, n_jobs: int) -> Sides:
    """Sides of the Delaunay triangulation of distinct points sorted by their first coordinate."""
    if len(xy) == 1:
        return _chain(np.zeros(1, np.int64))
    varying = np.ptp(xy, axis=0) > 0
    if not varying.all():
        return _triangulate(xy[:, varying], n_jobs)
    if xy.shape[1] == 1:
        return _chain(np.argsort(xy[:, 0], kind="stable"))
    # qhull squares the coordinates: near the origin, where most points shall be, it loses fewer digits.
    middle = np.median(xy, axis=0)
    if xy.shape[1] == 2 and len(xy) >= 2 * TILE_SIZE:
        return _triangulate_tiles(xy - middle, n_jobs)
    return _triangulate_at_once(xy - middle)


def _triangulate_at_once(xy: np.ndarray) -> Sides:
    try:
        return _sides(xy, Delaunay(xy).simplices)
    except QhullError:
        # Fewer points than a simplex has, or all on one line or plane (up to rounding): drop a dimension.
        axes = np.linalg.svd(xy - xy.mean(axis=0), full_matrices=False)[2]
        flat = xy @ axes[: xy.shape[1] - 1].T
        return _triangulate_at_once(flat) if flat.shape[1] > 1 else _chain(np.argsort(flat[:, 0], kind="stable"))


def _chain(order: np.ndarray) -> Sides:
    return Sides(order[:-1], order[1:], np.zeros(len(order) - 1))


def _sides(xy: np.ndarray, simplices: np.ndarray) -> Sides:
    """Sides of triangles (each corner to the next) or tetrahedra."""
    if simplices.shape[1] > 3:
        pairs = [(a, b) for a in range(simplices.shape[1]) for b in range(a)]
        i, j = (np.concatenate([simplices[:, pair[end]] for pair in pairs]) for end in (0, 1))
        return Sides(i, j, np.zeros(len(i)))
    angles = []
    for a, b, c in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        u, v = ((xy[simplices[:, end]] - xy[simplices[:, c]]).T for end in (a, b))
        angles.append(np.arctan2(np.abs(u[0] * v[1] - u[1] * v[0]), u[0] * v[0] + u[1] * v[1]))
    return Sides(simplices.T.ravel(), simplices[:, [1, 2, 0]].T.ravel(), np.concatenate(angles))


def _circumcircles(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centres (t, 2) and radii (t,) of triangles (t, 3, 2); infinite or NaN where the corners are on one line."""
    b, c = (corners[:, 1] - corners[:, 0]).T, (corners[:, 2] - corners[:, 0]).T
    bb, cc = (b**2).sum(axis=0), (c**2).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        to_center = np.stack([c[1] * bb - b[1] * cc, b[0] * cc - c[0] * bb]) / (2 * (b[0] * c[1] - b[1] * c[0]))
        return corners[:, 0] + to_center.T, np.hypot(*to_center)


def _triangulate_tiles(xy: np.ndarray, n_jobs: int) -> Sides:
    """Triangulate tile by tile; the result is exactly that of a triangulation of all points, sorted by x.

    Each tile is triangulated together with the points in a halo around it. A triangle belongs to the tile with the
    centre of its circumcircle, if the radius is at most the halo and the centre is not on the border of the tile. All
    points that could lie in the circle were then there, so the triangle is one of all points, and no other tile has it.

    All triangles of a point are known if, in the point's own tile, each of them belongs to a tile, each of their
    circles lies within tile and halo, and they surround the point. The other points are open: around gaps and along the
    outline, where circles are large. The remaining triangles have three open corners. They are found by a triangulation
    of the open points and their neighbours, which contains everything around an open point.
    """
    n = len(xy)
    tiles = _Tiles(xy)
    # Each point is written by its own tile only.
    is_open = np.ones(n, bool)

    def one_tile(t: int) -> Sides:
        low, high = tiles.low[t] - tiles.halo[t], tiles.high[t] + tiles.halo[t]
        first, last = np.searchsorted(xy[:, 0], [low[0], high[0]])
        y = xy[first:last, 1]
        points = first + np.flatnonzero((low[1] <= y) & (y <= high[1]))
        local = xy[points]
        middle = np.median(local, axis=0)
        try:
            triangulation = Delaunay(local - middle)
        except QhullError:
            return _chain(np.zeros(1, np.int64))
        triangles = triangulation.simplices
        center, r = _circumcircles(triangulation.points[triangles])
        center += middle
        owner = tiles.owner(center, r)
        with np.errstate(invalid="ignore"):
            known = (owner >= 0) & ((center.T - r > low[:, None]) & (center.T + r < high[:, None])).all(axis=0)
        surrounded = np.zeros(len(points), bool)
        surrounded[triangles] = True
        surrounded[triangles[~known]] = False
        outline, corner = np.nonzero(triangulation.neighbors == -1)
        surrounded[triangles[outline, corner - 1]] = False
        surrounded[triangles[outline, corner - 2]] = False
        own = ((tiles.low[t] <= local) & (local < tiles.high[t])).all(axis=1)
        is_open[points[own]] = ~surrounded[own]
        sides = _sides(triangulation.points, triangles[owner == t])
        return Sides(points[sides.i], points[sides.j], sides.angle)

    with ThreadPoolExecutor(n_jobs) as pool:
        found = list(pool.map(one_tile, range(len(tiles.halo))))
    i, j, angle = map(np.concatenate, zip(*found, strict=True))
    if is_open.all():
        return _triangulate_at_once(xy)

    needed = is_open.copy()
    needed[i[is_open[j]]] = True
    needed[j[is_open[i]]] = True
    points = np.flatnonzero(needed)
    local = xy[points]
    middle = np.median(local, axis=0)
    triangulation = Delaunay(local - middle)
    triangles = triangulation.simplices
    center, r = _circumcircles(triangulation.points[triangles])
    triangles = triangles[is_open[points[triangles]].all(axis=1) & (tiles.owner(center + middle, r) < 0)]
    rest = _sides(triangulation.points, triangles)
    return Sides(
        np.concatenate([i, points[rest.i]]),
        np.concatenate([j, points[rest.j]]),
        np.concatenate([angle, rest.angle]),
    )


class _Tiles:
    """Rectangles of about `TILE_SIZE` points each that cover the plane: strips of x, each cut along y."""

    def __init__(self, xy: np.ndarray) -> None:
        n_tiles = -(-len(xy) // TILE_SIZE)
        width, height = np.ptp(xy, axis=0)
        n_strips = int(np.clip(round((n_tiles * width / height) ** 0.5), 1, n_tiles))
        n_rows = -(-n_tiles // n_strips)
        self.x_cuts = xy[len(xy) * np.arange(1, n_strips) // n_strips, 0]
        strips = np.split(xy, np.searchsorted(xy[:, 0], self.x_cuts))
        self.y_cuts = np.full((n_strips, n_rows - 1), np.inf)
        low, high, halo = [], [], []
        x_edges = [-np.inf, *self.x_cuts, np.inf]
        for s, strip in enumerate(strips):
            y = np.sort(strip[:, 1])
            if len(y):
                self.y_cuts[s] = y[len(y) * np.arange(1, n_rows) // n_rows]
            y_edges = [-np.inf, *self.y_cuts[s], np.inf]
            for row in range(n_rows):
                inside = y[np.searchsorted(y, y_edges[row]) : np.searchsorted(y, y_edges[row + 1])]
                low.append([x_edges[s], y_edges[row]])
                high.append([x_edges[s + 1], y_edges[row + 1]])
                # Six times the spacing of points, which is twice the circles of evenly spread points; larger circles
                # are left to the end. Measured without the outer tenths, so that a stray cell does not widen it.
                middle = [
                    np.ptp(v[len(v) // 10 : -(-len(v) * 9 // 10)]) / 0.8 if len(v) else 0.0
                    for v in (strip[:, 0], inside)
                ]
                halo.append(6 * (middle[0] * middle[1] / max(len(inside), 1)) ** 0.5)
        self.low, self.high, self.halo = np.array(low), np.array(high), np.array(halo)

    def owner(self, center: np.ndarray, r: np.ndarray) -> np.ndarray:
        """Tile to which the triangle of a circle belongs, -1 for none."""
        strip = np.searchsorted(self.x_cuts, center[:, 0], side="right")
        tile = strip * (self.y_cuts.shape[1] + 1) + (center[:, 1, None] >= self.y_cuts[strip]).sum(axis=1)
        halo = self.halo[tile]
        # Triangles with the same circle give its centre up to rounding; at a border they could disagree about the tile.
        margin = 1e-9 * halo
        with np.errstate(invalid="ignore"):
            inside = (center - self.low[tile] > margin[:, None]) & (self.high[tile] - center > margin[:, None])
        return np.where((r + margin < halo) & inside.all(axis=1), tile, -1)
