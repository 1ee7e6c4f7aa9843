"""Numba kernels of :func:`spatialfm.tl.ligand_receptor`; imported only when it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numba import njit

if TYPE_CHECKING:
    from typing import Self

# Permutations that are computed side by side: 16 float32 fill a cache line and the widest register.
LANES = 16


class Edges(NamedTuple):
    """Edges sorted by block (a pair of cell types), and the cells at their ends, each once in a block."""

    sender_start: np.ndarray
    """(blocks + 1,) first sender of each block."""
    sender: np.ndarray
    """(senders,) cells."""
    receiver_start: np.ndarray
    """(blocks + 1,) first receiver of each block."""
    receiver: np.ndarray
    """(receivers,) cells."""
    first: np.ndarray
    """(senders + 1,) first edge of each sender."""
    j: np.ndarray
    """(edges,) position of an edge's receiver in ``receiver``."""
    within: np.ndarray
    """(blocks,) whether a block joins a type with itself."""

    @classmethod
    def of(cls, i: np.ndarray, j: np.ndarray, block: np.ndarray, within: np.ndarray, n_cells: int) -> Self:
        """Sort the edges ``i -> j``."""
        order = np.lexsort((j, i, block))
        i, j, block = i[order], j[order], block[order]
        parts = []
        for cell in (i, j):
            ends, inverse = np.unique(block * n_cells + cell, return_inverse=True)
            parts.append((np.searchsorted(ends, np.arange(len(within) + 1) * n_cells), ends % n_cells, inverse))
        (sender_start, sender, at_i), (receiver_start, receiver, at_j) = parts
        first = np.searchsorted(at_i, np.arange(len(sender) + 1))
        return cls(sender_start, sender, receiver_start, receiver, first, at_j, within)

    def ends_of(self, block: int) -> np.ndarray:
        """Cells at the ends of a block's edges."""
        senders = self.sender[self.sender_start[block] : self.sender_start[block + 1]]
        return np.r_[senders, self.receiver[self.receiver_start[block] : self.receiver_start[block + 1]]]


class Levels(NamedTuple):
    """Square roots of the expression, whose products are geometric means."""

    sent: np.ndarray
    """(ligands, n) float32."""
    received: np.ndarray
    """(receptors, n) float32."""


class Strata(NamedTuple):
    """Groups of cells within which profiles are permuted."""

    of: np.ndarray
    """(n,) stratum of each cell."""
    size: np.ndarray
    """(strata,) cells of each stratum."""


class Spread(NamedTuple):
    """Sums of squares of the centred counts of edges between two strata; those of a block stand together."""

    start: np.ndarray
    """(blocks + 1,) first entry of each block."""
    strata: np.ndarray
    """(entries, 2) stratum of the sender and of the receiver."""
    squares: np.ndarray
    """(entries,) sums of squares."""


class _Cells(NamedTuple):
    """What the edges of a block that lead out of (``out``) and into each cell add up to; each (n,)."""

    n_out: np.ndarray
    """Edges within the cell's stratum."""
    n_in: np.ndarray
    f: np.ndarray
    """Mean receptor levels of the strata of its receivers."""
    g: np.ndarray
    """Mean ligand levels of the strata of its senders."""


class _Sums(NamedTuple):
    """Sums over the cells of each stratum; each (strata,)."""

    edges: np.ndarray
    shared: np.ndarray
    """Ordered pairs of edges with the same sender or the same receiver."""
    chains: np.ndarray
    """Ordered pairs of edges of which one ends where the other begins."""
    f: np.ndarray
    ff: np.ndarray
    fn: np.ndarray
    """Sums of f times the number of edges."""
    g: np.ndarray
    gg: np.ndarray
    gn: np.ndarray
    fg: np.ndarray


@njit(nogil=True, cache=True)
def shuffle(members, starts, needed, seeds, source):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Fill column p of ``source`` (n, LANES) with a random permutation within groups, by splitmix64 from ``seeds[p]``.

    Group g is ``members[starts[g] : starts[g + 1]]``. A group that is not ``needed`` is left out, but uses up as many
    random numbers, so that the permutations of the others do not depend on it.
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
                source[members[k], p] = moved[k]


@njit(nogil=True, cache=True)
def permuted_sums(edges, tests, levels, source, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Add up each test's products over the edges of its block, with permuted profiles.

    In permutation p, the cell k has the profile of the cell ``source[k, p]``, and ``out[t, p]`` is the sum of test t.
    ``tests`` (t, 3) are block, ligand and receptor; those of one block and receptor must stand together.
    """
    around = np.empty((np.diff(edges.sender_start).max(), LANES), np.float32)
    moved = np.empty((np.diff(edges.receiver_start).max(), LANES), np.float32)
    total = np.empty(LANES)
    for t in range(len(tests)):
        block = tests[t, 0]
        first, last = edges.sender_start[block], edges.sender_start[block + 1]
        if t == 0 or block != tests[t - 1, 0] or tests[t, 2] != tests[t - 1, 2]:
            level, begin = levels.received[tests[t, 2]], edges.receiver_start[block]
            for k in range(begin, edges.receiver_start[block + 1]):
                row, profile = moved[k - begin], source[edges.receiver[k]]
                for p in range(LANES):
                    row[p] = level[profile[p]]
            for k in range(first, last):
                row = around[k - first]
                row[:] = 0
                for e in range(edges.first[k], edges.first[k + 1]):
                    other = moved[edges.j[e] - begin]
                    for p in range(LANES):
                        row[p] += other[p]
        level = levels.sent[tests[t, 1]]
        total[:] = 0
        for k in range(first, last):
            row, profile = around[k - first], source[edges.sender[k]]
            for p in range(LANES):
                total[p] += level[profile[p]] * row[p]
        out[t] = total


@njit(nogil=True, cache=True)
def observed_sums(edges, tests, levels):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Add up (t,) as :func:`permuted_sums`, each cell with its own profile."""
    out = np.zeros(len(tests))
    for t in range(len(tests)):
        block, ligand, receptor = tests[t]
        for k in range(edges.sender_start[block], edges.sender_start[block + 1]):
            level = levels.sent[ligand, edges.sender[k]]
            if level > 0:
                for e in range(edges.first[k], edges.first[k + 1]):
                    out[t] += level * levels.received[receptor, edges.receiver[edges.j[e]]]
    return out


@njit(nogil=True, cache=True)
def null_moments(edges, tests, pairs, pair, levels, strata, spread):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Compute mean and variance (t,) of the sums of :func:`permuted_sums` over all permutations within the strata.

    Exact. Write a ligand as A + x and a receptor as B + y, where A and B are the means of the stratum. A sum is then a
    constant, plus sums over single cells (x times f, the B of its neighbours; y times g, the A of its neighbours), plus
    the sum Q of xy over the edges. Within a stratum, pairs of edges contribute to the variance of Q by the ends that
    they have in common (Mantel 1967). Between two strata, which are of one type each, the variance of Q is that of x
    times that of y times the entry of ``spread``.

    ``tests[t]`` tests ``pairs[pair[t]]``, a ligand and a receptor; tests stand in the order of :func:`permuted_sums`.
    """
    n, n_strata = len(strata.of), len(strata.size)
    mean_sent, square_sent = _stratum_moments(levels.sent, strata)
    mean_received, square_received = _stratum_moments(levels.received, strata)
    products = _stratum_products(levels, pairs, mean_sent, mean_received, strata)
    cells = _Cells(np.zeros(n), np.zeros(n), np.zeros(n), np.zeros(n))
    one, two, three, four, five, six, seven, eight, nine, ten = np.zeros((10, n_strata))
    sums = _Sums(one, two, three, four, five, six, seven, eight, nine, ten)
    mean, variance = np.zeros(len(tests)), np.zeros(len(tests))
    for t in range(len(tests)):
        block, ligand, receptor = tests[t]
        new_block = t == 0 or block != tests[t - 1, 0]
        if new_block:
            _count_edges(edges, block, strata, cells, sums)
        if new_block or receptor != tests[t - 1, 2]:
            _sum_receivers(edges, block, mean_received[receptor], strata, cells, sums)
        mean[t] = _sum_senders(edges, block, mean_sent[ligand], strata, cells, sums)
        xx, yy, product = square_sent[ligand], square_received[receptor], products[pair[t]]
        for s in range(n_strata):
            if strata.size[s] > 1:
                more, var = _moments_within(s, strata.size[s], edges.within[block], xx[s], yy[s], product[s], sums)
                mean[t] += more
                variance[t] += var
        for k in range(spread.start[block], spread.start[block + 1]):
            s, other = spread.strata[k]
            both = product[s, 0] * product[other, 0] if edges.within[block] else 0.0
            variance[t] += (xx[s] * yy[other] + both) * spread.squares[k]
    return mean, variance


@njit(nogil=True, cache=True)
def _stratum_moments(levels, strata):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Mean and sum of squared deviations (k, strata) of levels (k, n)."""
    mean, square = np.zeros((2, len(levels), len(strata.size)))
    for k in range(len(levels)):
        for c in range(len(strata.of)):
            mean[k, strata.of[c]] += levels[k, c] / strata.size[strata.of[c]]
        for c in range(len(strata.of)):
            square[k, strata.of[c]] += (levels[k, c] - mean[k, strata.of[c]]) ** 2
    return mean, square


@njit(nogil=True, cache=True)
def _stratum_products(levels, pairs, sent, received, strata):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Sum up (pairs, strata, 4) xy, xxy, xyy and xxyy, x and y being differences from the means of strata."""
    products = np.zeros((len(pairs), len(strata.size), 4))
    for k in range(len(pairs)):
        ligand, receptor = pairs[k]
        for c in range(len(strata.of)):
            s = strata.of[c]
            x = levels.sent[ligand, c] - sent[ligand, s]
            y = levels.received[receptor, c] - received[receptor, s]
            products[k, s, 0] += x * y
            products[k, s, 1] += x * x * y
            products[k, s, 2] += x * y * y
            products[k, s, 3] += x * x * y * y
    return products


@njit(nogil=True, cache=True)
def _count_edges(edges, block, strata, cells, sums):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Count a block's edges within strata, and pairs of them that have an end in common."""
    first, last = edges.sender_start[block], edges.sender_start[block + 1]
    senders = edges.sender[first:last]
    receivers = edges.receiver[edges.receiver_start[block] : edges.receiver_start[block + 1]]
    for ends in (senders, receivers):
        for c in ends:
            cells.n_out[c] = cells.n_in[c] = 0
    sums.edges[:], sums.shared[:], sums.chains[:] = 0, 0, 0
    for k in range(first, last):
        for e in range(edges.first[k], edges.first[k + 1]):
            i, j = edges.sender[k], edges.receiver[edges.j[e]]
            if strata.of[i] == strata.of[j]:
                cells.n_out[i] += 1
                cells.n_in[j] += 1
    for c in senders:
        s, n_out = strata.of[c], cells.n_out[c]
        sums.edges[s] += n_out
        sums.shared[s] += n_out * (n_out - 1)
        sums.chains[s] += 2 * n_out * cells.n_in[c]
    for c in receivers:
        sums.shared[strata.of[c]] += cells.n_in[c] * (cells.n_in[c] - 1)


@njit(nogil=True, cache=True)
def _sum_receivers(edges, block, received, strata, cells, sums):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Sum up the mean receptor levels of each sender's receivers."""
    sums.f[:], sums.ff[:], sums.fn[:] = 0, 0, 0
    for k in range(edges.sender_start[block], edges.sender_start[block + 1]):
        c = edges.sender[k]
        f = 0.0
        for e in range(edges.first[k], edges.first[k + 1]):
            f += received[strata.of[edges.receiver[edges.j[e]]]]
        cells.f[c] = f
        s = strata.of[c]
        sums.f[s] += f
        sums.ff[s] += f * f
        sums.fn[s] += f * (cells.n_out[c] + cells.n_in[c])


@njit(nogil=True, cache=True)
def _sum_senders(edges, block, sent, strata, cells, sums):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Sum up the mean ligand levels of each receiver's senders; return the sum over edges of products of means."""
    receivers = edges.receiver[edges.receiver_start[block] : edges.receiver_start[block + 1]]
    for c in receivers:
        cells.g[c] = 0
    total = 0.0
    for k in range(edges.sender_start[block], edges.sender_start[block + 1]):
        c = edges.sender[k]
        a = sent[strata.of[c]]
        total += a * cells.f[c]
        for e in range(edges.first[k], edges.first[k + 1]):
            cells.g[edges.receiver[edges.j[e]]] += a
    sums.g[:], sums.gg[:], sums.gn[:], sums.fg[:] = 0, 0, 0, 0
    for c in receivers:
        s, g = strata.of[c], cells.g[c]
        sums.g[s] += g
        sums.gg[s] += g * g
        sums.gn[s] += g * (cells.n_out[c] + cells.n_in[c])
        if edges.within[block]:
            sums.fg[s] += cells.f[c] * g
    return total


@njit(nogil=True, cache=True)
def _moments_within(s, m, within, xx, yy, product, sums):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Mean and variance that stratum ``s`` of ``m`` cells adds, all but what its edges with other strata add.

    ``xx``, ``yy`` and ``product`` are its sums of squares and its sums of xy, xxy, xyy and xxyy.
    """
    xy, xxy, xyy, xxyy = product
    variance = xx * (sums.ff[s] - sums.f[s] ** 2 / m) / (m - 1)
    variance += yy * (sums.gg[s] - sums.g[s] ** 2 / m) / (m - 1)
    variance += 2 * xy * (sums.fg[s] - sums.f[s] * sums.g[s] / m) / (m - 1)
    edges, shared = sums.edges[s], sums.shared[s]
    if edges == 0:
        return 0.0, variance
    m2 = m * (m - 1.0)
    m3 = m2 * max(m - 2, 1)
    m4 = m3 * max(m - 3, 1)
    # The same edge in the other direction.
    back = edges if within else 0.0
    chained = sums.chains[s] - 2 * back
    apart = edges**2 - edges - back - shared - chained
    drift = -edges * xy / m2
    variance += 2 * xxy * (2 * (edges * sums.f[s] - sums.fn[s]) / m3 - sums.fn[s] / m2)
    variance += 2 * xyy * (2 * (edges * sums.g[s] - sums.gn[s]) / m3 - sums.gn[s] / m2)
    variance += (edges * (xx * yy - xxyy) + back * (xy * xy - xxyy)) / m2
    variance += (shared * (2 * xxyy - xx * yy) + chained * (2 * xxyy - xy * xy)) / m3
    variance += apart * (xx * yy + 2 * xy * xy - 6 * xxyy) / m4 - drift * drift
    return drift, variance
