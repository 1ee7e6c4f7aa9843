"""Numba kernels of :func:`spatialfm.pp.grn`; imported only when networks are computed.

The bins of a gene are renumbered over those that occur, the fullest first, and the cells outside its fullest bin are
listed. The joint histogram of a pair then takes one pass over the shorter of the two lists, as the row of the fullest
bin follows from the marginal. With sparse expression, where most cells share the bin of zero, these are few cells.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def compact_bins(bins, n_bins, counts, n_levels):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Renumber each gene's bins in place, the fullest becoming 0; fill ``counts`` (gene, level) and ``n_levels``."""
    n_genes, n = bins.shape
    for g in range(n_genes):
        raw = np.zeros(n_bins, np.int64)
        for c in range(n):
            raw[bins[g, c]] += 1
        fullest = np.argmax(raw)
        level = np.zeros(n_bins, np.uint8)
        counts[g, :] = 0
        counts[g, 0] = raw[fullest]
        k = 1
        for b in range(n_bins):
            if b != fullest and raw[b] > 0:
                level[b] = k
                counts[g, k] = raw[b]
                k += 1
        n_levels[g] = k
        for c in range(n):
            bins[g, c] = level[bins[g, c]]


@njit(nogil=True, cache=True)
def list_cells(bins, start, cells):  # type: ignore[no-untyped-def]  # pragma: no cover
    """List the cells outside each gene's fullest bin: those of gene g are ``cells[start[g] : start[g + 1]]``."""
    for g in range(bins.shape[0]):
        t = start[g]
        for c in range(bins.shape[1]):
            if bins[g, c] != 0:
                cells[t] = c
                t += 1


@njit(nogil=True, cache=True)
def joint_sums(a, b, plogp, pairs, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Sum ``p log p`` over the levels that occur in the joint histogram of each pair.

    ``a`` and ``b`` are ``(bins, counts, n_levels, start, cells)`` of two blocks of genes, ``pairs`` (n, 2) a gene of
    each, and ``plogp[c]`` the term of a joint bin with c cells.
    """
    width = a[1].shape[1]
    joint = np.zeros(width * width, np.int32)
    for p in range(pairs.shape[0]):
        i, j = pairs[p]
        one, other = a, b
        if b[3][j + 1] - b[3][j] < a[3][i + 1] - a[3][i]:
            one, other, i, j = b, a, j, i
        rows, columns = one[2][i], other[2][j]
        x, y = one[0][i], other[0][j]
        joint[: rows * columns] = 0
        for c in one[4][one[3][i] : one[3][i + 1]]:
            joint[np.int64(x[c]) * columns + y[c]] += 1
        total = 0.0
        for v in range(columns):
            rest = other[1][j, v]
            for u in range(1, rows):
                n = joint[u * columns + v]
                rest -= n
                total += plogp[n]
            total += plogp[rest]
        out[p] = total
