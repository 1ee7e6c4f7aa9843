"""Contexts: pieces of a tissue that a model reads at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from spatialfm._checks import check_positive

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


class Context(NamedTuple):
    """A piece of one slide that a model reads at once."""

    cells: np.ndarray
    """Positions of its cells in ascending order: the core and its halo."""
    is_core: np.ndarray
    """Whether each of these cells belongs to the core. Every cell is in the core of exactly one context."""


def cut_contexts(
    xy: np.ndarray, graph: csr_matrix, slide: np.ndarray, *, context_size: int = 256, halo: int = 1
) -> list[Context]:
    """Cut slides into compact blocks of about equal size, each with a halo of its neighbours in the tissue graph.

    A slide is halved across its longer side until its pieces are small enough (a k-d tree). The pieces depend only on
    the coordinates, not on the order of rows, unless several cells have the same coordinates.

    Parameters
    ----------
    xy
        (n, 2) coordinates.
    graph
        (n, n) symmetric tissue graph.
    slide
        (n,) slide of each cell; no context spans two.
    context_size
        Largest number of cells in a core.
    halo
        Number of steps on the graph by which the halo extends beyond the core.

    Returns
    -------
    The contexts; their cores partition the cells.
    """
    check_positive("context_size", context_size)
    contexts: list[Context] = []
    in_context = np.zeros(len(xy), bool)
    stack = [np.flatnonzero(slide == s) for s in np.unique(slide)[::-1]]
    while stack:
        core = stack.pop()
        n_pieces = -(-len(core) // context_size)
        if n_pieces > 1:
            axis = int(np.ptp(xy[core], axis=0).argmax())
            core = core[np.lexsort((core, xy[core, 1 - axis], xy[core, axis]))]
            at = len(core) * (n_pieces // 2) // n_pieces
            stack += [core[at:], core[:at]]
            continue
        in_context[core] = True
        cells = core
        for _ in range(halo):
            cells = np.unique(np.concatenate([cells, graph[cells].indices]))
        cells = np.sort(cells)
        contexts.append(Context(cells, in_context[cells]))
        in_context[core] = False
    return contexts
