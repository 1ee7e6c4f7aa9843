"""Numba kernels of :func:`spatialfm.tl.ligand_receptor`; imported only when it runs."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def shuffle(members, starts, seed, place):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Fill ``place`` with a random permutation within each group ``members[starts[g] : starts[g + 1]]``, by splitmix64 from ``seed``."""
    moved = members.copy()
    state = np.uint64(seed)
    for g in range(len(starts) - 1):
        first = starts[g]
        for k in range(starts[g + 1] - 1, first, -1):
            state += np.uint64(0x9E3779B97F4A7C15)
            z = state
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z ^= z >> np.uint64(31)
            other = first + np.int64(z % np.uint64(k - first + 1))
            moved[k], moved[other] = moved[other], moved[k]
    for k in range(len(members)):
        place[members[k]] = moved[k]


@njit(nogil=True, cache=True)
def edge_sums(i, j, block, n_ligands, indptr, ligand, level, receptors, first, receptor, place, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Add up each test's products over the edges, the profile of the cell at i being that of ``place[i]``.

    Edges ``i -> j`` are sorted by i and ``block`` (the pair of types). Rows of ``indptr, ligand, level`` (csr) hold a cell's ligands, those of
    ``receptors`` (n, r) its receptors. The tests of a block and ligand are ``first[block * n_ligands + ligand]`` to the next; ``receptor`` is theirs.
    """
    # Neighbours have near positions: what is moved first lies together.
    moved = np.empty_like(receptors)
    for k in range(len(place)):
        moved[k] = receptors[place[k]]
    heard = np.empty(receptors.shape[1], np.float32)
    e = 0
    while e < len(i):
        sender, own = i[e], block[e]
        heard[:] = 0
        while e < len(i) and i[e] == sender and block[e] == own:
            row = moved[j[e]]
            for r in range(len(heard)):
                heard[r] += row[r]
            e += 1
        profile = place[sender]
        for t in range(indptr[profile], indptr[profile + 1]):
            at = own * n_ligands + ligand[t]
            for q in range(first[at], first[at + 1]):
                out[q] += level[t] * heard[receptor[q]]
