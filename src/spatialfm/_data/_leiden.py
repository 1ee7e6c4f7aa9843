"""Leiden communities and the numbers of clusters; the state of the process stays as it was."""

from __future__ import annotations

import random
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    import scipy.sparse as sp


def leiden(graph: sp.spmatrix, *, resolution: float, seed: int, n_iterations: int = -1) -> np.ndarray:
    """Community (n,) of each node, by modularity with the weights above the diagonal of ``graph``.

    With ``n_iterations=-1`` it runs until nothing changes.
    """
    import igraph
    from scipy.sparse import triu

    edges = triu(graph, k=1).tocoo()
    network = igraph.Graph(graph.shape[0], np.column_stack([edges.row, edges.col]))
    with igraph_random(seed):
        found = network.community_leiden(
            "modularity", weights=edges.data.tolist(), resolution=resolution, n_iterations=n_iterations
        )
    return np.asarray(found.membership, np.int64)


def neighbor_graph(rep: np.ndarray, n_neighbors: int = 15) -> sp.csr_matrix:
    """UMAP weights (n, n) of the graph of the nearest neighbours in an embedding; exact neighbours."""
    import scanpy as sc
    from anndata import AnnData

    cells = AnnData(rep)
    with process_state():
        # scanpy's approximate neighbours, above 8,192 cells, depend on more than the data.
        sc.pp.neighbors(cells, n_neighbors=n_neighbors, use_rep="X", transformer="sklearn")
    return cells.obsp["connectivities"]


def number_by_size(labels: np.ndarray) -> np.ndarray:
    """Renumber labels (n,) from 0, the largest cluster first; of the same size, the one that comes first."""
    _, first, inverse, counts = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), np.int64)
    rank[np.lexsort((first, -counts))] = np.arange(len(counts))
    return rank[inverse]


@contextmanager
def igraph_random(seed: int) -> Iterator[None]:
    """Let igraph draw from a seeded generator inside, and from Python's afterwards, which is its default."""
    import igraph

    igraph.set_random_number_generator(random.Random(seed))
    try:
        yield
    finally:
        igraph.set_random_number_generator(random)


@contextmanager
def process_state() -> Iterator[None]:
    """Restore Python's random state and torch's number of threads.

    Imports draw from the former, and the first parallel kernel of numba sets the latter.
    """
    state, torch = random.getstate(), sys.modules.get("torch")
    threads: Any = None if torch is None else torch.get_num_threads()
    try:
        yield
    finally:
        random.setstate(state)
        if torch is not None:
            torch.set_num_threads(threads)
