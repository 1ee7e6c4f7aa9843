"""Numba kernels of :func:`spatialfm.tl.ligand_receptor`; imported only when it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numba import njit

if TYPE_CHECKING:
    from typing import Self

# Permutations that go side by side: 16 float32 fill a cache line and the widest register.
LANES = 16


class Edges(NamedTuple):
    """Edges by block (the pair of types of their ends), and the cells at their ends, each once a block."""

    sender_start: np.ndarray
    """(blocks + 1,) where a block's senders begin."""
    sender: np.ndarray
    """Cells."""
    receiver_start: np.ndarray
    receiver: np.ndarray
    first: np.ndarray
    """(senders + 1,) where a sender's edges begin."""
    j: np.ndarray
    """Position of an edge's receiver in ``receiver``."""

    @classmethod
    def of(cls, i: np.ndarray, j: np.ndarray, block: np.ndarray, n_blocks: int, n_cells: int) -> Self:
        """Sort the edges ``i -> j``."""
        order = np.lexsort((j, i, block))
        i, j, block = i[order], j[order], block[order]
        parts = []
        for cell in (i, j):
            ends, inverse = np.unique(block * n_cells + cell, return_inverse=True)
            parts.append((np.searchsorted(ends, np.arange(n_blocks + 1) * n_cells), ends % n_cells, inverse))
        (sender_start, sender, at_i), (receiver_start, receiver, at_j) = parts
        first = np.searchsorted(at_i, np.arange(len(sender) + 1))
        return cls(sender_start, sender, receiver_start, receiver, first, at_j)

    def ends_of(self, block: int) -> np.ndarray:
        """Cells at the ends of a block's edges."""
        senders = self.sender[self.sender_start[block] : self.sender_start[block + 1]]
        return np.r_[senders, self.receiver[self.receiver_start[block] : self.receiver_start[block + 1]]]


@njit(nogil=True, cache=True)
def shuffle(members, starts, needed, seeds, place):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Fill column p of ``place`` with a random permutation within each ``needed`` group ``members[starts[g] : starts[g + 1]]``, by splitmix64 from ``seeds[p]``.

    A group that is left out takes its numbers all the same, so that the permutation of the others does not depend on it.
    """
    step = np.uint64(0x9E3779B97F4A7C15)
    moved = members.copy()
    for p in range(len(seeds)):
        state = np.uint64(seeds[p])
        for g in range(len(starts) - 1):
            first, last = starts[g], starts[g + 1]
            if not needed[g]:
                state += step * np.uint64(last - first - 1)
                continue
            moved[first:last] = members[first:last]
            for k in range(last - 1, first, -1):
                state += step
                z = state
                z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
                z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
                z ^= z >> np.uint64(31)
                # The upper half, scaled to the size of the group: no division.
                other = first + np.int64(((z >> np.uint64(32)) * np.uint64(k - first + 1)) >> np.uint64(32))
                moved[k], moved[other] = moved[other], moved[k]
            for k in range(first, last):
                place[members[k], p] = moved[k]


@njit(nogil=True, cache=True)
def edge_sums(edges, tests, sent, heard, place, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Add up each test's products over the edges of its block where the cell at k has the profile of ``place[k, p]``, p being the column of ``out``.

    ``tests`` (t, 3) hold block, ligand and receptor, those of one block and receptor in a row; ``sent`` (ligands, n) and ``heard`` (receptors, n) levels.
    """
    around = np.empty((np.diff(edges.sender_start).max(), LANES), np.float32)
    moved = np.empty((np.diff(edges.receiver_start).max(), LANES), np.float32)
    total = np.empty(LANES)
    for t in range(len(tests)):
        block = tests[t, 0]
        first, last = edges.sender_start[block], edges.sender_start[block + 1]
        if t == 0 or block != tests[t - 1, 0] or tests[t, 2] != tests[t - 1, 2]:
            level, begin = heard[tests[t, 2]], edges.receiver_start[block]
            for k in range(begin, edges.receiver_start[block + 1]):
                row, profile = moved[k - begin], place[edges.receiver[k]]
                for p in range(LANES):
                    row[p] = level[profile[p]]
            for k in range(first, last):
                row = around[k - first]
                row[:] = 0
                for e in range(edges.first[k], edges.first[k + 1]):
                    other = moved[edges.j[e] - begin]
                    for p in range(LANES):
                        row[p] += other[p]
        level = sent[tests[t, 1]]
        total[:] = 0
        for k in range(first, last):
            row, profile = around[k - first], place[edges.sender[k]]
            for p in range(LANES):
                total[p] += level[profile[p]] * row[p]
        out[t] = total


@njit(nogil=True, cache=True)
def observed_sums(edges, tests, sent, heard, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Add up as :func:`edge_sums`, each cell with its own profile."""
    for t in range(len(tests)):
        block, ligand, receptor = tests[t]
        out[t] = 0
        for k in range(edges.sender_start[block], edges.sender_start[block + 1]):
            level = sent[ligand, edges.sender[k]]
            if level > 0:
                for e in range(edges.first[k], edges.first[k + 1]):
                    out[t] += level * heard[receptor, edges.receiver[edges.j[e]]]


@njit(nogil=True, cache=True)
def null_moments(  # type: ignore[no-untyped-def]  # pragma: no cover
    edges, tests, pair, pairs, within, sent, heard, stratum, size, spread_start, spread_ends, spread, mean, variance
):
    """Fill in mean and variance (t,) of the sums of :func:`edge_sums` over all permutations of profiles within the ``stratum`` (n,) of cells.

    Exact. With a ligand A + x and a receptor B + y, where A and B are the means of the stratum, a sum is a constant, sums over single cells (x times f, the B's
    of its neighbours; y times g, the A's of its neighbours), and the sum Q of xy over the edges. Of Q within a stratum, pairs of edges count by the ends that they have in
    common (Mantel 1967). Of Q between two strata, which are of one type each, the variance is that of x times that of y times ``spread``, the squares of the edges' centred
    counts: those of a block are ``spread_start[block]`` to the next, of the strata ``spread_ends``. ``tests[t]`` tests ``pairs[pair[t]]`` and is grouped as in
    :func:`edge_sums`; blocks ``within`` are those of a type and itself.
    """
    n, n_strata = len(stratum), len(size)
    means = np.zeros((len(sent), n_strata)), np.zeros((len(heard), n_strata))
    squares = np.zeros((len(sent), n_strata)), np.zeros((len(heard), n_strata))
    for side in range(2):
        levels = (sent, heard)[side]
        for k in range(len(levels)):
            for c in range(n):
                means[side][k, stratum[c]] += levels[k, c] / size[stratum[c]]
            for c in range(n):
                squares[side][k, stratum[c]] += (levels[k, c] - means[side][k, stratum[c]]) ** 2
    products = np.zeros((len(pairs), n_strata, 4))
    for k in range(len(pairs)):
        ligand, receptor = pairs[k]
        for c in range(n):
            s = stratum[c]
            x, y = sent[ligand, c] - means[0][ligand, s], heard[receptor, c] - means[1][receptor, s]
            products[k, s, 0] += x * y
            products[k, s, 1] += x * x * y
            products[k, s, 2] += x * y * y
            products[k, s, 3] += x * x * y * y

    f, g, n_out, n_in = np.zeros(n), np.zeros(n), np.zeros(n), np.zeros(n)
    # Of each stratum: edges, pairs of edges with an end in common, and sums over cells.
    one, ends, chains, sf, sff, sfn, sg, sgg, sgn, sfg = np.zeros((10, n_strata))
    for t in range(len(tests)):
        block, ligand, receptor = tests[t]
        a, b, xx, yy = means[0][ligand], means[1][receptor], squares[0][ligand], squares[1][receptor]
        first, last = edges.sender_start[block], edges.sender_start[block + 1]
        senders = edges.sender[first:last]
        receivers = edges.receiver[edges.receiver_start[block] : edges.receiver_start[block + 1]]
        new_block = t == 0 or block != tests[t - 1, 0]
        if new_block:
            n_out[senders] = n_in[senders] = n_out[receivers] = n_in[receivers] = 0
            one[:], ends[:], chains[:] = 0, 0, 0
            for k in range(first, last):
                for e in range(edges.first[k], edges.first[k + 1]):
                    i, j = edges.sender[k], edges.receiver[edges.j[e]]
                    if stratum[i] == stratum[j]:
                        n_out[i] += 1
                        n_in[j] += 1
            for c in senders:
                one[stratum[c]] += n_out[c]
                ends[stratum[c]] += n_out[c] * (n_out[c] - 1)
                chains[stratum[c]] += 2 * n_out[c] * n_in[c]
            for c in receivers:
                ends[stratum[c]] += n_in[c] * (n_in[c] - 1)
        if new_block or receptor != tests[t - 1, 2]:
            sf[:], sff[:], sfn[:] = 0, 0, 0
            for k in range(first, last):
                c = edges.sender[k]
                f[c] = 0
                for e in range(edges.first[k], edges.first[k + 1]):
                    f[c] += b[stratum[edges.receiver[edges.j[e]]]]
                sf[stratum[c]] += f[c]
                sff[stratum[c]] += f[c] * f[c]
                sfn[stratum[c]] += f[c] * (n_out[c] + n_in[c])
        g[receivers] = 0
        sg[:], sgg[:], sgn[:], sfg[:] = 0, 0, 0, 0
        mean[t] = variance[t] = 0
        for k in range(first, last):
            c = edges.sender[k]
            mean[t] += a[stratum[c]] * f[c]
            for e in range(edges.first[k], edges.first[k + 1]):
                g[edges.receiver[edges.j[e]]] += a[stratum[c]]
        for c in receivers:
            sg[stratum[c]] += g[c]
            sgg[stratum[c]] += g[c] * g[c]
            sgn[stratum[c]] += g[c] * (n_out[c] + n_in[c])
            if within[block]:
                sfg[stratum[c]] += f[c] * g[c]
        for s in range(n_strata):
            m = size[s]
            if m < 2:
                continue
            m2 = m * (m - 1.0)
            m3 = m2 * max(m - 2, 1)
            m4 = m3 * max(m - 3, 1)
            xy, xxy, xyy, xxyy = products[pair[t], s]
            variance[t] += xx[s] * (sff[s] - sf[s] ** 2 / m) / (m - 1)
            variance[t] += yy[s] * (sgg[s] - sg[s] ** 2 / m) / (m - 1)
            variance[t] += 2 * xy * (sfg[s] - sf[s] * sg[s] / m) / (m - 1)
            if one[s] == 0:
                continue
            there_and_back = one[s] if within[block] else 0.0
            chained = chains[s] - 2 * there_and_back
            apart = one[s] ** 2 - one[s] - there_and_back - ends[s] - chained
            drift = -one[s] * xy / m2
            mean[t] += drift
            variance[t] += 2 * xxy * (2 * (one[s] * sf[s] - sfn[s]) / m3 - sfn[s] / m2)
            variance[t] += 2 * xyy * (2 * (one[s] * sg[s] - sgn[s]) / m3 - sgn[s] / m2)
            variance[t] += (one[s] * (xx[s] * yy[s] - xxyy) + there_and_back * (xy * xy - xxyy)) / m2
            variance[t] += (ends[s] * (2 * xxyy - xx[s] * yy[s]) + chained * (2 * xxyy - xy * xy)) / m3
            variance[t] += apart * (xx[s] * yy[s] + 2 * xy * xy - 6 * xxyy) / m4 - drift * drift
        for k in range(spread_start[block], spread_start[block + 1]):
            s, other = spread_ends[k]
            both = products[pair[t], s, 0] * products[pair[t], other, 0] if within[block] else 0.0
            variance[t] += (xx[s] * yy[other] + both) * spread[k]
