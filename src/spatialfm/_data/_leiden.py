"""Leiden communities, with the state of the process left as it was."""

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
    """Community (n,) of each node by modularity, from the weights above the diagonal of ``graph``; until nothing changes where ``n_iterations`` is -1."""
    import igraph
    from scipy.sparse import triu

    edges = triu(graph, k=1).tocoo()
    network = igraph.Graph(graph.shape[0], np.column_stack([edges.row, edges.col]))
    with igraph_random(seed):
        found = network.community_leiden(
            "modularity", weights=edges.data.tolist(), resolution=resolution, n_iterations=n_iterations
        )
    return np.asarray(found.membership, np.int64)


@contextmanager
def igraph_random(seed: int) -> Iterator[None]:
    """Let igraph draw from a generator of its own inside, and afterwards from Python's again, which is its default."""
    import igraph

    igraph.set_random_number_generator(random.Random(seed))
    try:
        yield
    finally:
        igraph.set_random_number_generator(random)


@contextmanager
def process_state() -> Iterator[None]:
    """Put Python's random state and torch's number of threads back: imports draw from the one, and numba's first parallel kernel sets the other."""
    state, torch = random.getstate(), sys.modules.get("torch")
    threads: Any = None if torch is None else torch.get_num_threads()
    try:
        yield
    finally:
        random.setstate(state)
        if torch is not None:
            torch.set_num_threads(threads)
