"""What training changes about a batch so that a model cannot rely on it: the turn of a slide and the depth of its counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

if TYPE_CHECKING:
    from spatialfm.engine import Tissue

# Kinds of values (see ``value_kind``) that are logarithms of something counted.
_LOG_COUNTS = ("counts", "normalized", "log")


class Turner:
    """Coordinates of a tissue as they would be read had its slides lain differently under the microscope.

    Standardising comes after turning, so what a model sees is exactly what it will see of a turned slide.
    """

    def __init__(self, tissue: Tissue) -> None:
        slides = range(int(tissue.slide.max()) + 1)
        self.mean = np.stack([tissue.xy[tissue.slide == s].mean(0) for s in slides])  # (slides, 2)
        self.cov = np.stack([np.cov(tissue.xy[tissue.slide == s].T, bias=True) for s in slides])  # (slides, 2, 2)

    def coords(self, tissue: Tissue, cells: np.ndarray, turn: np.ndarray) -> np.ndarray:
        """Standardised coordinates (n, 2) float32 of ``cells`` after ``turn`` (2, 2)."""
        slide = tissue.slide[cells]
        variance = np.einsum("ij,sjk,ik->si", turn, self.cov, turn)
        spread = np.sqrt(np.where(variance > 0, variance, 1))
        return (((tissue.xy[cells] - self.mean[slide]) @ turn.T) / spread[slide]).astype(np.float32)


def draw_turn(random: np.random.Generator, *, rotate: bool, reflect: bool) -> np.ndarray:
    """Orthogonal (2, 2) matrix: a rotation by any angle, after a reflection in half of the draws."""
    angle, mirrored = random.uniform(0, 2 * np.pi), random.random() < 0.5
    angle *= rotate
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return turn * ([-1, 1] if reflect and mirrored else [1, 1])


def count_unit(tissue: Tissue) -> np.ndarray | None:
    """Find what one count is worth in each cell (n,) before the logarithm, or None where values are no logarithms of counts.

    The smallest expressed value of a cell is taken for one count: nearly always true of the panels and depths of spatial data.
    """
    x = tissue.expression
    if tissue.kind not in _LOG_COUNTS or (x.min() < 0):
        return None
    smallest = np.full(x.shape[0], np.inf)
    if sp.issparse(x):
        x = x.tocsr()
        full = np.diff(x.indptr) > 0
        smallest[full] = np.minimum.reduceat(np.where(x.data > 0, x.data, np.inf), x.indptr[:-1][full])
    else:
        smallest = np.where(x > 0, x, np.inf).min(1)
    return np.expm1(np.where(np.isfinite(smallest), smallest, 1.0))


def drop_counts(x: np.ndarray, unit: np.ndarray | None, share: float, random: np.random.Generator) -> np.ndarray:
    r"""Expression (n, g) as if each count had been lost with probability ``share``.

    Of values that are logarithms of counts, :math:`c` = ``expm1(x) / unit`` counts become :math:`c' \sim B(c, 1 - s)`, and the value
    ``log1p(expm1(x) c' / (c (1 - s)))``, as if the thinned cell had been normalised again. Of other values (intensities, scores), a share
    of the expressed entries is set to zero.
    """
    out = x.copy()
    i, j = x.nonzero()
    if unit is None:
        out[i, j] = np.where(random.random(len(i)) < share, 0, out[i, j])
        return out
    values = np.expm1(x[i, j].astype(np.float64))
    counts = np.maximum(np.rint(values / unit[i]), 1).astype(np.int64)
    kept = random.binomial(counts, 1 - share)
    out[i, j] = np.log1p(values * kept / (counts * (1 - share)))
    return out
