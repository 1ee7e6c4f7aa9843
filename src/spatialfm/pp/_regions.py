"""Nested, contiguous regions of a tissue."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatialfm._checks import check_positive, checked
from spatialfm._data._adata import get_coordinates, get_embedding, get_libraries
from spatialfm._data._embeddings import NICHE, rep_name
from spatialfm._data._expression import ValuesKind
from spatialfm._data._write import check_free, write
from spatialfm._settings import logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from scipy.sparse import csr_matrix


# On five labelled tissues neither mattered much from two steps on, except that 10 components followed the layers of a cortex better than 32.
_N_COMPONENTS = 10
_N_STEPS = 5


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
    """Divide each slide into contiguous regions of similar cells, in nested levels.

    Cells that are neighbours in the tissue graph are merged into regions by Ward's criterion (the pair whose union adds least to the sum of
    squares within regions goes first), and these in the same way into larger ones. Each region is connected in the tissue graph and lies
    within one slide and one region of the next coarser level. The result does not depend on the order of the cells, nor, with
    `library_key`, on the other slides.

    Parameters
    ----------
    adata
        Cells or spots with coordinates; a tissue graph (:func:`spatialfm.pp.spatial_neighbors`) is built where there is none.
    n_levels
        Number of levels.
    size
        Cells of a region of the finest level, on average; in tissues it came to 1.0 to 1.2 times that, on a slide of 350 spots to 1.4. Each has at least half as many and
        at most twice, exceeded only where no cut of its minimum spanning tree leaves two parts of at least
        half: 1 in 18,000 regions of random graphs, none of the tissues tried.
    branching
        Regions of a level that make one of the next coarser level, on average: with ``size=50, branching=4`` the levels have regions of 200
        and 50 cells. The bounds of size hold for every level, but a smaller piece of tissue is one region.
    use_rep
        Key of ``obsm`` with the values by which cells are similar, Euclidean. None: ``"X_niche"`` if it is there (see
        :func:`spatialfm.tl.embed`); otherwise, for each slide, the first 10 principal components of the expression, weighted
        by spatial autocorrelation and averaged over neighbours (five times the mean of a cell and its neighbours' mean).
    layer
        Layer with the expression for these components; ``X`` by default.
    values
        What the expression is, as for :func:`spatialfm.tl.embed`; recognised by default. Features that a slide lacks are left out.
    library_key
        Column of ``obs`` with the slide of each cell.
    neighbors_key
        Key of ``uns`` that names the tissue graph.
    basis
        Key of ``obsm`` with the coordinates, which number regions of the same size and make a missing graph.
    key_added
        Where the result is written, in ``obs`` and ``uns``.
    copy
        Whether to return a changed copy instead of changing ``adata``.

    Returns
    -------
    None, or the copy. Written are

    ``obs["{key_added}_1"]``, ..., ``obs["{key_added}_{n_levels}"]``
        Categorical, from the coarsest to the finest level. Regions are named ``"1"`` (the largest), ``"2"``, ..., those within region 2
        ``"2.1"``, ``"2.2"``, ...; with `library_key` after the slide: ``"<slide> 2.1"``. Missing for cells in pieces of tissue (connected
        components of the graph) of fewer than ``size / 2`` cells, such as cells without neighbours.
    ``obs[key_added]``
        The finest level again.
    ``uns[key_added]``
        ``params``; ``levels``, the list of the columns from coarsest to finest; ``parents``: for each column but the first, the list of the
        coarser regions in which its categories lie, in their order.
    ``obsp``, ``uns["spatial_neighbors"]``
        The tissue graph, where it was missing.

    Raises
    ------
    KeyError
        If a column, layer, embedding, tissue graph of another name, or the coordinates are missing.
    ValueError
        If a number is out of range, the graph joins slides, every piece of tissue is too small, nothing varies, or a field to be written
        holds something else than regions of an earlier call.

    Notes
    -----
    80,000 cells with a graph took 1.4 s and 380 MiB beyond the data (200 features, one thread); memory grows in proportion to the cells. A slide of
    fewer than about twice the size of the coarsest regions may be one such region.

    Ward, J. H. (1963), Hierarchical grouping to optimize an objective function, J. Am. Stat. Assoc. 58, 236-244, with connectivity constraint and
    bounds of size. To stay within them, unions stop at 1.5 times the average, regions below half of it join the adjacent region with room that is
    most similar, and one that became too large is cut at the edge of its minimum spanning tree that separates most.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()
    >>> sfm.pp.regions(adata, library_key="mouse_id")
    """
    from spatialfm._data._expression import place_order
    from spatialfm.pp._spatial_neighbors import find_graph

    check_positive("n_levels", n_levels)
    for name, value in (("size", size), ("branching", branching)):
        check_positive(name, value)
        if value < 2:
            msg = f"{name} must be at least 2, got {value!r}"
            raise ValueError(msg)
    levels = [f"{key_added}_{k + 1}" for k in range(n_levels)]
    check_free(adata, "pp.regions", {"obs": [key_added, *levels], "uns": [key_added]})
    xy = get_coordinates(adata, basis)
    libraries = get_libraries(adata, library_key)

    neighbors = find_graph(adata, neighbors_key=neighbors_key, basis=basis, library_key=library_key)

    kind = None
    if use_rep is None:
        from spatialfm._data._expression import read_values

        read = read_values(adata, layer, values, slides=libraries)
        rep, kind = read.x, read.kind
    else:
        rep = get_embedding(adata, use_rep)

    codes = np.full((n_levels, adata.n_obs), -1)
    names: list[list[str]] = [[] for _ in levels]
    parents: list[list[str]] = [[] for _ in levels]
    for slide, rows in libraries:
        rows = rows[place_order(rep[rows], xy[rows])]
        found = _regions_of_slide(rep[rows], neighbors.edges[rows][:, rows], kind, n_levels, size, branching)
        above: list[str] = []
        for k, (labels, within) in enumerate(found):
            codes[k, rows] = np.where(labels >= 0, labels + len(names[k]), -1)
            # The number within the parent; regions come sorted by parent.
            number = np.arange(len(within)) - np.searchsorted(within, within) + 1
            head = [f"{above[p]}." for p in within] if k else [f"{slide} " if slide else ""] * len(within)
            parents[k] += [above[p] for p in within] if k else []
            above = [f"{h}{i}" for h, i in zip(head, number, strict=True)]
            names[k] += above
    n_missing = int((codes[0] < 0).sum())
    if n_missing == adata.n_obs:
        msg = (
            f"every connected piece of the tissue graph has fewer than size / 2 = {size / 2:g} cells; lower size=, or build a graph with more "
            "edges with sfm.pp.spatial_neighbors"
        )
        raise ValueError(msg)

    params: dict[str, Any] = {"n_levels": int(n_levels), "size": int(size), "branching": int(branching)}
    params |= {
        "use_rep": rep_name(use_rep) if use_rep else "expression",
        "neighbors_key": neighbors_key,
        "basis": basis,
    }
    params |= {k: v for k, v in (("layer", layer), ("values", kind), ("library_key", library_key)) if v is not None}
    logger.info(
        "regions: %s regions by %s on %d slide(s)%s; written to obs[%r], obs[%r], ... and uns[%r]",
        " in ".join(str(len(n)) for n in names[::-1]),
        f"obsm[{rep_name(use_rep)!r}]" if use_rep else f"components of {layer or 'X'} ({kind} values)",
        len(libraries),
        f"; {n_missing} cells in pieces of fewer than {size / 2:g} cells belong to none" if n_missing else "",
        key_added,
        levels[0],
        key_added,
    )
    columns = zip([*levels, key_added], [*codes, codes[-1]], [*names, names[-1]], strict=True)
    obs = {column: pd.Categorical.from_codes(c.tolist(), categories=categories) for column, c, categories in columns}
    entry = {"params": params, "levels": levels, "parents": dict(zip(levels[1:], parents[1:], strict=True))}
    adata = write(adata, "pp.regions", key_added, {"obs": obs, "uns": {key_added: entry}}, copy=copy)
    neighbors.store(adata)
    return adata if copy else None


def _regions_of_slide(
    values: Any, graph: csr_matrix, kind: Any, n_levels: int, size: int, branching: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Labels (cells,) and parents (regions,) of each level of one slide, coarsest first; -1 for cells in too small pieces.

    ``values`` are expression where they have a ``kind``. Regions are sorted by parent, then from large to small, then by first cell.
    """
    from scipy.sparse.csgraph import connected_components

    _, piece = connected_components(graph, directed=False)
    kept = np.flatnonzero(np.bincount(piece)[piece] >= size / 2)
    nowhere = np.full(len(piece), -1)
    if not len(kept):
        return [(nowhere, np.empty(0, np.int64))] * n_levels
    values, graph = values[kept], graph[kept][:, kept]
    rep = np.asarray(values, np.float64) if kind is None else _smooth_components(values, graph, kind)
    fine_to_coarse = nested_partitions(rep, graph, [size * branching**k for k in range(n_levels)])

    result: list[tuple[np.ndarray, np.ndarray]] = []
    above = np.zeros(len(kept), np.int64)
    for labels in fine_to_coarse[::-1]:
        _, first, labels, counts = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
        order = np.lexsort((first, -counts, above[first]))
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        within, above = above[first[order]], rank[labels]
        everywhere = nowhere.copy()
        everywhere[kept] = above
        result.append((everywhere, within))
    return result


def _smooth_components(values: Any, graph: csr_matrix, kind: Any) -> np.ndarray:
    from spatialfm._data._components import spatial_components, walk
    from spatialfm._data._expression import log_normalize

    rep = spatial_components(log_normalize(values, kind), graph, n_components=_N_COMPONENTS).scores.astype(np.float64)
    step = walk(graph).astype(np.float64)
    for _ in range(_N_STEPS):
        rep = (rep + step @ rep) / 2
    return rep


def nested_partitions(values: np.ndarray, graph: csr_matrix, sizes: list[int]) -> list[np.ndarray]:
    """Partition cells into connected parts of about ``sizes[0]`` cells, these into parts of about ``sizes[1]``, and so on.

    Parameters
    ----------
    values
        (n, d) float64.
    graph
        (n, n) symmetric, empty diagonal.
    sizes
        Mean number of cells, increasing.

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
        labels = _cut_large(labels, values, weights, graph, size / 2, 2 * size)
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


def _cut_large(
    labels: np.ndarray, values: np.ndarray, weights: np.ndarray, graph: csr_matrix, smallest: float, largest: float
) -> np.ndarray:
    """Cut each part heavier than ``largest`` in two of at least ``smallest`` each, where its minimum spanning tree has such an edge."""
    from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree

    labels = labels.copy()
    for large in np.flatnonzero(np.bincount(labels, weights) > largest):
        nodes = np.flatnonzero(labels == large)
        edges = graph[nodes][:, nodes].tocoo()
        v, w = values[nodes], weights[nodes]
        # Zero would be no edge.
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
