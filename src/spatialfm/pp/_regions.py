"""Nested, contiguous regions of a tissue."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from spatialfm._checks import check_positive, checked
from spatialfm._data._adata import get_coordinates, get_libraries
from spatialfm._data._embeddings import NICHE, get_embedding, rep_name
from spatialfm._data._expression import ValuesKind, location_order, read_values
from spatialfm._data._write import check_free, write
from spatialfm._settings import logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from scipy.sparse import csr_matrix

    from spatialfm._data._expression import Kind

# Chosen on five labelled tissues: more steps change little, and 32 components follow cortical layers less well than 10.
_N_COMPONENTS = 10
_N_STEPS = 5


class _Found(NamedTuple):
    """Regions of all slides, for each level from the coarsest to the finest."""

    codes: np.ndarray
    """(n_levels, n_obs) position of each cell's region in `names`, -1 for cells without one."""
    names: list[list[str]]
    parents: list[list[str]]
    """Region of the next coarser level in which each region lies; empty for the coarsest."""


class _Level(NamedTuple):
    """Regions of one slide at one level, sorted by their parent."""

    labels: np.ndarray
    """(n,) number of each cell's region, -1 for cells without one."""
    parent: np.ndarray
    """Number of the region of the next coarser level in which each region lies."""


@checked
def regions(
    adata: AnnData,
    *,
    n_levels: int = 2,
    size: int = 50,
    branching: int = 4,
    use_rep: str | Sequence[str] | None = NICHE,
    layer: str | None = None,
    values: ValuesKind = "auto",
    library_key: str | None = None,
    neighbors_key: str = "spatial_neighbors",
    basis: str = "spatial",
    key_added: str = "tissue_region",
    copy: bool = False,
) -> AnnData | None:
    """Divide each slide into nested, connected regions of similar cells.

    Neighbouring cells are merged into regions of bounded size by Ward's criterion (Ward 1963), and these into larger
    ones in the same way. The result does not depend on the order of the cells, nor on other slides with `library_key`.

    Parameters
    ----------
    %(adata)s
    n_levels
        Number of levels.
    size
        Mean number of cells in a region of the finest level. Each region has between half and twice as many, apart from
        rare regions that cannot be cut without leaving a part that is too small.
    branching
        Mean number of regions that make one region of the next coarser level: with ``size=50, branching=4``, regions of
        the two levels have 200 and 50 cells.
    use_rep
        Key of ``obsm`` with the embedding that decides which cells are similar, or several keys. None: components of
        the expression, computed for each slide (10 principal components weighted by their spatial autocorrelation and
        smoothed over neighbours).
    layer
        Layer with the expression, for ``use_rep=None``; ``X`` by default.
    %(values)s
    %(library_key)s
    %(neighbors_key)s
    %(basis)s
    %(key_added)s
    %(copy)s

    Returns
    -------
    None, or the changed copy. Written:

    ``obs["{key_added}_1"]``, ..., ``obs["{key_added}_{n_levels}"]``
        Categorical, from the coarsest to the finest level: ``"1"`` is the largest region, ``"2.1"`` the largest inside
        region 2; with `library_key`, the slide comes first: ``"<slide> 2.1"``. Missing for cells in connected
        components of the graph with fewer than ``size / 2`` cells. ``obs[key_added]`` is the finest level again.
    ``uns[key_added]``
        ``params``; ``levels``, the columns of ``obs`` from coarsest to finest; ``parents``, for each column but the
        first, the coarser region of each category.
    ``obsp``, ``uns["spatial_neighbors"]``
        The tissue graph, where there was none.

    Raises
    ------
    KeyError
        If a column, layer, embedding or graph is missing.
    ValueError
        If an argument is out of range, the graph joins slides, or no part of the tissue is large enough.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()
    >>> sfm.pp.regions(adata, use_rep=None, library_key="mouse_id")
    >>> adata.uns["tissue_region"]["levels"]
    ['tissue_region_1', 'tissue_region_2']
    >>> adata.obs["tissue_region_1"].cat.categories[0]
    'OC1 1'
    """
    from spatialfm.pp._spatial_neighbors import find_graph

    _check_sizes(n_levels, size, branching)
    levels = [f"{key_added}_{k + 1}" for k in range(n_levels)]
    check_free(adata, "pp.regions", {"obs": [key_added, *levels], "uns": [key_added]})

    xy = get_coordinates(adata, basis)
    libraries = get_libraries(adata, library_key)
    kind = None
    if use_rep is None:
        expression = read_values(adata, layer, values, slides=libraries)
        rep, kind = expression.x, expression.kind
    else:
        rep = get_embedding(adata, use_rep, instead="pass use_rep=None for components of the expression")
    neighbors = find_graph(adata, neighbors_key=neighbors_key, basis=basis, library_key=library_key)

    sizes = [size * branching**k for k in range(n_levels)]
    found = _find_regions(rep, neighbors.edges, kind, xy, libraries, sizes)

    params: dict[str, Any] = {"n_levels": int(n_levels), "size": int(size), "branching": int(branching)}
    params |= {
        "use_rep": rep_name(use_rep) if use_rep else "expression",
        "neighbors_key": neighbors_key,
        "basis": basis,
    }
    params |= {k: v for k, v in (("layer", layer), ("values", kind), ("library_key", library_key)) if v is not None}
    n_missing = int((found.codes[0] < 0).sum())
    logger.info(
        "regions: %s regions by %s on %d slide(s)%s -> obs[%r], obs[%r], ..., uns[%r]",
        " in ".join(str(len(names)) for names in found.names[::-1]),
        f"obsm[{rep_name(use_rep)!r}]" if use_rep else f"components of {layer or 'X'} ({kind} values)",
        len(libraries),
        f"; {n_missing} cells in parts of fewer than {size / 2:g} cells belong to none" if n_missing else "",
        key_added,
        levels[0],
        key_added,
    )
    columns = [pd.Categorical.from_codes(c.tolist(), names) for c, names in zip(found.codes, found.names, strict=True)]
    obs = dict(zip([*levels, key_added], [*columns, columns[-1]], strict=True))
    entry = {"params": params, "levels": levels, "parents": dict(zip(levels[1:], found.parents[1:], strict=True))}
    adata = write(adata, "pp.regions", key_added, {"obs": obs, "uns": {key_added: entry}}, copy=copy)
    neighbors.store(adata)
    return adata if copy else None


def _check_sizes(n_levels: int, size: int, branching: int) -> None:
    check_positive("n_levels", n_levels)
    for name, value in (("size", size), ("branching", branching)):
        check_positive(name, value)
        if value < 2:
            msg = f"{name} must be at least 2, got {value!r}"
            raise ValueError(msg)


def _find_regions(
    rep: Any,
    graph: csr_matrix,
    kind: Kind | None,
    xy: np.ndarray,
    libraries: list[tuple[str, np.ndarray]],
    sizes: list[int],
) -> _Found:
    """Regions of all slides; ``sizes`` are the mean numbers of cells, from the finest level to the coarsest."""
    n_levels = len(sizes)
    codes = np.full((n_levels, rep.shape[0]), -1)
    names: list[list[str]] = [[] for _ in sizes]
    parents: list[list[str]] = [[] for _ in sizes]
    for slide, rows in libraries:
        rows = rows[location_order(rep[rows], xy[rows])]
        above: list[str] = []
        for k, level in enumerate(_regions_of_slide(rep[rows], graph[rows][:, rows], kind, sizes)):
            codes[k, rows] = np.where(level.labels >= 0, level.labels + len(names[k]), -1)
            # Number of each region within its parent.
            number = np.arange(len(level.parent)) - np.searchsorted(level.parent, level.parent) + 1
            if k:
                parents[k] += [above[p] for p in level.parent]
                prefix = [f"{above[p]}." for p in level.parent]
            else:
                prefix = [f"{slide} " if slide else ""] * len(level.parent)
            above = [f"{before}{i}" for before, i in zip(prefix, number, strict=True)]
            names[k] += above
    if (codes[0] < 0).all():
        msg = (
            f"every connected part of the tissue graph has fewer than size / 2 = {sizes[0] / 2:g} cells; lower size=, "
            "or build a graph with more edges with sfm.pp.spatial_neighbors"
        )
        raise ValueError(msg)
    return _Found(codes, names, parents)


def _regions_of_slide(values: Any, graph: csr_matrix, kind: Kind | None, sizes: list[int]) -> list[_Level]:
    """Regions of one slide from the coarsest level to the finest, by an embedding, or by expression of ``kind``."""
    from scipy.sparse.csgraph import connected_components

    _, piece = connected_components(graph, directed=False)
    kept = np.flatnonzero(np.bincount(piece)[piece] >= sizes[0] / 2)
    n = values.shape[0]
    if not len(kept):
        return [_Level(np.full(n, -1), np.empty(0, np.int64))] * len(sizes)
    values, graph = values[kept], graph[kept][:, kept]
    rep = np.asarray(values, np.float64) if kind is None else _smooth_components(values, graph, kind)

    result: list[_Level] = []
    above = np.zeros(len(kept), np.int64)
    for labels in nested_partitions(rep, graph, sizes)[::-1]:
        _, first, labels, counts = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
        order = np.lexsort((first, -counts, above[first]))
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        parent, above = above[first[order]], rank[labels]
        everywhere = np.full(n, -1)
        everywhere[kept] = above
        result.append(_Level(everywhere, parent))
    return result


def _smooth_components(values: Any, graph: csr_matrix, kind: Any) -> np.ndarray:
    from spatialfm._data._components import spatial_components, transition_matrix
    from spatialfm._data._expression import log_normalize

    rep = spatial_components(log_normalize(values, kind), graph, n_components=_N_COMPONENTS).scores.astype(np.float64)
    step = transition_matrix(graph).astype(np.float64)
    for _ in range(_N_STEPS):
        rep = (rep + step @ rep) / 2
    return rep


def nested_partitions(values: np.ndarray, graph: csr_matrix, sizes: list[int]) -> list[np.ndarray]:
    """Partition cells into connected regions, these into larger regions, and so on.

    Parameters
    ----------
    values
        (n, d) float64.
    graph
        (n, n) symmetric, empty diagonal.
    sizes
        Mean number of cells in a region of each level, increasing.

    Returns
    -------
    Labels (n,) from 0 for each of ``sizes``.
    """
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    from spatialfm.pp._ward import agglomerate

    _, piece = connected_components(graph, directed=False)
    weights = np.ones(len(values))
    of_cell, result = np.arange(len(values)), []
    for size in sizes:
        wanted = np.maximum(np.rint(np.bincount(piece, weights) / size), 1).astype(np.int64)
        labels = agglomerate(
            values, weights, graph.indptr, graph.indices, piece, wanted, size / 2, 1.5 * size, 2.0 * size
        )
        labels = cut_large(labels, values, weights, graph, size / 2, 2 * size)
        _, first, labels = np.unique(labels, return_index=True, return_inverse=True)
        of_cell = labels[of_cell]
        result.append(of_cell)
        # The regions become the cells of the next level.
        member = csr_matrix((np.ones(len(labels)), (labels, np.arange(len(labels)))))
        totals = member @ weights
        values, weights, piece = (member @ (values * weights[:, None])) / totals[:, None], totals, piece[first]
        graph = (member @ graph @ member.T).tocsr()
        graph.setdiag(0)
        graph.eliminate_zeros()
        graph.sort_indices()
    return result


def cut_large(
    labels: np.ndarray, values: np.ndarray, weights: np.ndarray, graph: csr_matrix, smallest: float, largest: float
) -> np.ndarray:
    """Cut each part heavier than ``largest`` in two, at an edge of its minimum spanning tree.

    Both parts weigh at least ``smallest``; a part without such an edge stays as it is.
    """
    from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree

    labels = labels.copy()
    for large in np.flatnonzero(np.bincount(labels, weights) > largest):
        nodes = np.flatnonzero(labels == large)
        edges = graph[nodes][:, nodes].tocoo()
        v, w = values[nodes], weights[nodes]
        # An explicit zero would not count as an edge.
        edges.data = 1e-12 + np.linalg.norm(v[edges.row] - v[edges.col], axis=1)
        order, above = breadth_first_order(minimum_spanning_tree(edges.tocsr()), 0, directed=False)
        sums, inside = v * w[:, None], w.copy()
        for i in order[:0:-1]:
            sums[above[i]] += sums[i]
            inside[above[i]] += inside[i]
        rest = inside[0] - inside[1:]
        ends = 1 + np.flatnonzero((inside[1:] >= smallest) & (rest >= smallest))
        if not len(ends):
            continue
        rest = inside[0] - inside[ends]
        apart = ((sums[ends] / inside[ends, None] - (sums[0] - sums[ends]) / rest[:, None]) ** 2).sum(axis=1)
        fits = np.maximum(inside[ends], rest) <= largest
        end = ends[np.lexsort((ends, -apart * inside[ends] * rest, ~fits))[0]]
        part = np.zeros(len(nodes), bool)
        for i in order:
            part[i] = i == end or (i != 0 and part[above[i]])
        labels[nodes[part]] = labels.max() + 1
    return labels
