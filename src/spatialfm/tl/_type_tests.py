"""Tests of attention between cell types, for :func:`spatialfm.tl.attention`."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
import scipy.sparse as sp

from spatialfm._settings import progress


class TypeTests:
    """Attention between cell types, over cells sorted by slide.

    Parameters
    ----------
    weights
        (n, n) attention of each cell (row) to its neighbours.
    type_of, slide, condition
        (n,) numbers; -1 for a cell without a type.
    types, conditions
        Their names.
    """

    def __init__(
        self,
        weights: sp.csr_matrix,
        type_of: np.ndarray,
        slide: np.ndarray,
        condition: np.ndarray,
        *,
        types: list[str],
        conditions: list[str],
    ) -> None:
        edges = weights.tocoo()
        real = (edges.row != edges.col) & (edges.data > 0) & (type_of[edges.row] >= 0) & (type_of[edges.col] >= 0)
        degree = np.bincount(edges.row[real], minlength=len(type_of))
        # Cells without a type or a neighbour are left out, of the permutations too.
        known = np.flatnonzero(degree)
        position = np.cumsum(degree > 0) - 1
        self.row, self.column = position[edges.row[real]], position[edges.col[real]]
        mass = edges.data[real].astype(np.float64)
        self.share = mass / np.bincount(self.row, mass)[self.row]
        self.plain = 1 / degree[known][self.row]
        self.codes, self.slide, self.condition = type_of[known], slide[known], condition[known]
        self.names, self.conditions = types, conditions
        self.n_slides = int(slide.max()) + 1

    def types(self, *, n_permutations: int, generator: np.random.Generator) -> pd.DataFrame:
        """Test each pair of types in each condition."""
        from scipy.stats import false_discovery_control

        n_cells, expected = self._expected(self.condition, len(self.conditions))
        attention, neighbors = (
            self._mean(self.codes, self.condition, n_cells, values) for values in (self.share, self.plain)
        )
        slides = [np.flatnonzero(self.slide == s) for s in np.unique(self.slide)]
        deviation = np.abs(attention - expected) - 1e-9  # ties count, whatever the rounding of the sums
        extreme, square = np.zeros(expected.shape, np.int64), np.zeros(expected.shape)
        permuted = np.empty_like(self.codes)
        for _ in progress(range(n_permutations), desc="permutations"):
            for members in slides:
                permuted[members] = generator.permutation(self.codes[members])
            change = self._mean(permuted, self.condition, n_cells, self.share) - expected
            extreme += ~(np.abs(change) < deviation)
            square += change**2
        sd = np.sqrt(square / n_permutations)
        c, a, b = np.nonzero(expected > 0)
        here = c, a, b
        more, sd = (attention - expected)[here], sd[here]
        table = {
            "condition": pd.Categorical.from_codes(c, categories=self.conditions),
            "cell_type": pd.Categorical.from_codes(a, categories=self.names),
            "neighbor_type": pd.Categorical.from_codes(b, categories=self.names),
            "n_cells": n_cells[c, a],
            "attention": attention[here],
            "expected": expected[here],
            "log2_enrichment": _log2(attention[here], expected[here]),
            "neighbors": neighbors[here],
            "log2_over_neighbors": _log2(attention[here], neighbors[here]),
            "z": np.divide(more, sd, out=np.zeros_like(sd), where=sd > 1e-12),
            "p": (1 + extreme[here]) / (1 + n_permutations),
        }
        return _named(pd.DataFrame(table).assign(fdr=lambda t: false_discovery_control(t["p"]) if len(t) else t["p"]))

    def differences(self) -> pd.DataFrame:
        """Compare each pair of conditions, slides being the samples."""
        from scipy.stats import false_discovery_control, ttest_ind

        n_cells, expected = self._expected(self.slide, self.n_slides)
        excess = self._mean(self.codes, self.slide, n_cells, self.share) - expected
        excess[~(expected > 0)] = np.nan
        of_slide = np.full(self.n_slides, -1)
        of_slide[self.slide] = self.condition
        rows = []
        for reference, other in combinations(range(len(self.conditions)), 2):
            for a, b in np.ndindex(len(self.names), len(self.names)):
                x, y = (v[np.isfinite(v)] for v in (excess[of_slide == k, a, b] for k in (other, reference)))
                if not len(x) or not len(y):
                    continue
                # Slides that differ by rounding alone have no spread to compare with.
                tested = min(len(x), len(y)) > 1 and max(np.ptp(x), np.ptp(y)) > 1e-9
                p = float(ttest_ind(x, y, equal_var=False).pvalue) if tested else np.nan
                rows.append((other, reference, a, b, x.mean() - y.mean(), len(x), len(y), p))
        named = dict.fromkeys(["condition", "reference"], self.conditions)
        named |= dict.fromkeys(["cell_type", "neighbor_type"], self.names)
        table = pd.DataFrame(rows, columns=[*named, "difference", "n_slides", "n_slides_reference", "p"])
        for name, categories in named.items():
            table[name] = pd.Categorical.from_codes(table[name].to_numpy(dtype=np.int64), categories=categories)
        p = table["p"].to_numpy(dtype=np.float64)
        fdr = np.full(len(p), np.nan)
        if np.isfinite(p).any():
            fdr[np.isfinite(p)] = false_discovery_control(p[np.isfinite(p)])
        return _named(table.assign(p=p, fdr=fdr))

    def _mean(self, codes: np.ndarray, part: np.ndarray, n_cells: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Mean (parts, types, types) of the edges' values on each type, over the cells of each part and type.

        NaN where a part has no cell of a type.
        """
        n_parts, t = n_cells.shape
        index = ((part * t + codes)[self.row]) * t + codes[self.column]
        sums = np.bincount(index, values, minlength=n_parts * t * t).reshape(n_parts, t, t)
        return np.divide(sums, n_cells[..., None], out=np.full(sums.shape, np.nan), where=n_cells[..., None] > 0)

    def _expected(self, part: np.ndarray, n_parts: int) -> tuple[np.ndarray, np.ndarray]:
        """Count cells (parts, types), and give the exact mean of :meth:`_mean` under permutations within slides.

        A part consists of whole slides.
        """
        t = len(self.names)
        n_cells = np.bincount(part * t + self.codes, minlength=n_parts * t).reshape(n_parts, t)
        sums = np.zeros((n_parts, t, t))
        for s in np.unique(self.slide):
            here = self.slide == s
            count = np.bincount(self.codes[here], minlength=t)
            # Each row sums to 1; the neighbour is any of the other cells.
            sums[part[here][0]] += count[:, None] * (count - np.eye(t)) / (count.sum() - 1)
        return n_cells, np.divide(sums, n_cells[..., None], out=np.zeros_like(sums), where=n_cells[..., None] > 0)


def _log2(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Logarithm of the ratio, NaN where one of them is 0."""
    return np.log2(np.divide(a, b, out=np.full(a.shape, np.nan), where=(a > 0) & (b > 0)))


def _named(table: pd.DataFrame) -> pd.DataFrame:
    table.index = table.index.astype(str)
    return table
