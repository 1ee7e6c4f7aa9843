"""Permutation tests of sums over edges, for :func:`spatialfm.tl.ligand_receptor`; imported only when it runs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from spatialfm._settings import progress, settings
from spatialfm.tl._edge_sums import (
    LANES,
    Edges,
    Levels,
    Spread,
    Strata,
    null_moments,
    observed_sums,
    permuted_sums,
    shuffle,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import scipy.sparse as sp

FDR = 0.05
"""False discovery rate at which the tests are to be settled."""
# Numbers of the dense matrices of ligands and receptors that stand in memory at once.
BLOCK = 1 << 26
# Permutations after which it is first checked whether the tests are settled; then whenever they have doubled.
_FIRST = 1000


class NullResult(NamedTuple):
    """Tests against one null hypothesis."""

    z: np.ndarray
    """(t,) exact z-scores."""
    p: np.ndarray
    """(t,) one-sided p-values."""
    fdr: np.ndarray
    """(t,) false discovery rates, by Benjamini and Hochberg."""
    n_permutations: int
    """Permutations made."""
    n_undecided: int
    """Tests that may have a false discovery rate of at most ``FDR``, and do not with these permutations."""


class _Part(NamedTuple):
    """Tests whose levels stand in memory at once."""

    rows: np.ndarray
    """Positions among all tests."""
    tests: np.ndarray
    """(t, 3) block, and positions of ligand and receptor in ``levels``."""
    levels: Levels


class SequentialP:
    """Sequential Monte Carlo p-values (Besag and Clifford 1991).

    A test ends with the 20th permutation that reaches its score.
    """

    enough = 20

    def __init__(self, n_tests: int) -> None:
        self.reached = np.zeros(n_tests, np.int64)
        self._at_end = np.empty(n_tests)
        self.n_done = 0

    @property
    def open(self) -> np.ndarray:
        """Positions of the tests that have not ended."""
        return np.flatnonzero(self.reached < self.enough)

    def count(self, rows: np.ndarray, hits: np.ndarray, before: int) -> np.ndarray:
        """Count ``hits`` (rows, permutations) after ``before`` permutations; returns which of ``rows`` ended."""
        counts = self.reached[rows, None] + np.cumsum(hits, axis=1)
        ended = counts[:, -1] >= self.enough
        self.reached[rows] = counts[:, -1]
        last = before + 1 + (counts[ended] >= self.enough).argmax(axis=1)
        self._at_end[rows[ended]] = self.enough / last
        return ended

    def p(self) -> np.ndarray:
        """P-value of each test."""
        return np.where(self.reached < self.enough, (1 + self.reached) / (1 + self.n_done), self._at_end)

    def lower(self) -> np.ndarray:
        """P-values, for open tests the lower ends of their 95 % intervals."""
        from scipy.stats import beta

        low, reached = self.p(), self.reached[self.open]
        low[self.open] = np.where(reached > 0, beta.ppf(0.025, np.maximum(reached, 1), self.n_done - reached + 1), 0)
        return low


class EdgeTests:
    """Tests of sums over edges of the geometric mean of the sender's ligand and the receiver's receptor.

    Parameters
    ----------
    edges
        Edges in both directions, sorted by the pair of types that they join.
    sent, received
        (n, ligands) and (n, receptors) levels, sparse.
    tests
        (t, 3) block, ligand and receptor of each test.
    """

    def __init__(self, edges: Edges, sent: sp.csr_matrix, received: sp.csr_matrix, tests: np.ndarray) -> None:
        self.edges, self.tests = edges, tests
        self.levels = sent.sqrt().tocsc(), received.sqrt().tocsc()
        self.observed = np.empty(len(tests))
        for part in self._parts(np.arange(len(tests))):
            self.observed[part.rows] = observed_sums(edges, part.tests, part.levels)

    def against(self, groups: np.ndarray, seeds: np.ndarray, *, name: str) -> NullResult:
        """Compare the sums with those after permutations of profiles within ``groups`` (n,).

        No edge may join two groups, unless groups are of one type each.
        """
        from scipy.stats import false_discovery_control

        _, of, size = np.unique(groups, return_inverse=True, return_counts=True)
        strata = Strata(of, size)
        z = self._z(strata)
        found = SequentialP(len(self.tests))
        fdr = np.empty(len(self.tests))
        while len(found.open) and found.n_done < len(seeds):
            now = seeds[found.n_done : max(2 * found.n_done, _FIRST)]
            for part in self._parts(found.open):
                self._permute(part, strata, now, found, name=name)
            found.n_done += len(now)
            fdr = false_discovery_control(found.p())
            # The largest p-value of a hit: finer ones change little where so many permutations lie below it.
            if found.n_done * FDR * np.mean(fdr <= FDR) >= found.enough / 2:
                break
        undecided = (fdr > FDR) & (false_discovery_control(found.lower()) <= FDR)
        return NullResult(z, found.p(), fdr, found.n_done, int(undecided[found.open].sum()))

    def _z(self, strata: Strata) -> np.ndarray:
        """Differences from the mean of all permutations, in standard deviations; 0 where there is none."""
        spread = self._spread(strata)
        z = np.zeros(len(self.tests))
        for rows, tests, levels in self._parts(np.arange(len(self.tests))):
            pairs, pair = np.unique(tests[:, 1:], axis=0, return_inverse=True)
            mean, variance = null_moments(self.edges, tests, pairs, pair.ravel(), levels, strata, spread)
            sd = np.sqrt(np.maximum(variance, 0))
            more = self.observed[rows] - mean
            z[rows] = np.divide(more, sd, out=np.zeros_like(sd), where=sd > 1e-5 * self.observed[rows])
        return z

    def _parts(self, rows: np.ndarray) -> Iterator[_Part]:
        """Cut the tests ``rows`` into parts whose levels fit in memory."""
        pairs, pair = np.unique(self.tests[rows][:, [2, 1]], axis=0, return_inverse=True)
        width = max(1, BLOCK // (2 * self.levels[0].shape[0]))
        for first in range(0, len(pairs), width):
            here = rows[(pair.ravel() >= first) & (pair.ravel() < first + width)]
            here = here[np.lexsort(self.tests[here][:, [1, 2, 0]].T)]
            used = [np.unique(self.tests[here, k], return_inverse=True) for k in (1, 2)]
            tests = np.column_stack([self.tests[here, 0], *(inverse for _, inverse in used)])
            dense = (levels[:, columns].T.toarray() for levels, (columns, _) in zip(self.levels, used, strict=True))
            yield _Part(here, tests, Levels(*dense))

    def _spread(self, strata: Strata) -> Spread:
        """Compute sums of squares of the centred counts of edges between strata."""
        edges, size, n = self.edges, strata.size, len(strata.of)
        i = np.repeat(edges.sender, np.diff(edges.first))
        j = edges.receiver[edges.j]
        n_edges = np.diff(edges.first[edges.sender_start])
        block = np.repeat(np.arange(len(n_edges)), n_edges)
        crossing = strata.of[i] != strata.of[j]
        i, j, block = i[crossing], j[crossing], block[crossing]
        key = (block * len(size) + strata.of[i]) * len(size) + strata.of[j]
        found, row, counts = np.unique(key, return_inverse=True, return_counts=True)
        block, ends = np.divmod(found, len(size) ** 2)
        ends = np.column_stack(np.divmod(ends, len(size)))
        sizes = size[ends]
        squares = counts + counts**2 / sizes.prod(axis=1)
        for cell, n_other in ((i, sizes[:, 1]), (j, sizes[:, 0])):
            one, degree = np.unique(row * n + cell, return_counts=True)
            squares -= np.bincount(one // n, degree**2, minlength=len(found)) / n_other
        # Of a stratum of one cell, nothing is left in the squares.
        squares /= np.maximum(sizes - 1, 1).prod(axis=1)
        return Spread(np.searchsorted(block, np.arange(len(n_edges) + 1)), ends, squares)

    def _permute(self, part: _Part, strata: Strata, seeds: np.ndarray, found: SequentialP, *, name: str) -> None:
        """Count the permutations in which the sums of ``part`` reach what was observed."""
        n_cells, before = len(strata.of), found.n_done
        members, starts = np.argsort(strata.of, kind="stable"), np.r_[0, np.cumsum(strata.size)]
        needed = np.zeros(len(strata.size), bool)
        for block in np.unique(part.tests[:, 0]):
            needed[strata.of[self.edges.ends_of(block)]] = True
        # Ties count, whatever the rounding of the sums.
        enough = (1 - 1e-6) * self.observed[part.rows]
        alive = np.arange(len(part.rows))

        def permuted(lanes: np.ndarray) -> np.ndarray:
            source = np.zeros((n_cells, LANES), np.uint32)
            shuffle(members, starts, needed, lanes, source)
            sums = np.empty((len(alive), LANES))
            permuted_sums(self.edges, part.tests[alive], part.levels, source, sums)
            return sums[:, : len(lanes)]

        width = LANES * settings.n_jobs
        with ThreadPoolExecutor(settings.n_jobs) as pool:
            for done in progress(range(0, len(seeds), width), desc=f"{name} permutations from {before}"):
                now = seeds[done : done + width]
                lanes = [now[k : k + LANES] for k in range(0, len(now), LANES)]
                sums = np.hstack(list(pool.map(permuted, lanes)))
                ended = found.count(part.rows[alive], sums >= enough[alive, None], before + done)
                alive = alive[~ended]
                if not len(alive):
                    return
