"""Augmentation of batches: random rotations of a slide, and random loss of counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

if TYPE_CHECKING:
    from spatialfm.engine import Tissue

# Kinds of values (see ``value_kind``) that were read as logarithms of counts.
_LOG_COUNTS = ("counts", "normalized", "log")


class Rotator:
    """Standardised coordinates of the cells of a tissue after a rotation or reflection of its slides.

    Coordinates are standardised after the rotation, so the model gets exactly the coordinates of a rotated slide.
    """

    def __init__(self, tissue: Tissue) -> None:
        slides = range(int(tissue.slide.max()) + 1)
        self.mean = np.stack([tissue.xy[tissue.slide == s].mean(0) for s in slides])  # (slides, 2)
        self.cov = np.stack([np.cov(tissue.xy[tissue.slide == s].T, bias=True) for s in slides])  # (slides, 2, 2)

    def coords(self, tissue: Tissue, cells: np.ndarray, rotation: np.ndarray) -> np.ndarray:
        """Standardised coordinates (n, 2) float32 of ``cells`` after the orthogonal map ``rotation`` (2, 2)."""
        slide = tissue.slide[cells]
        variance = np.einsum("ij,sjk,ik->si", rotation, self.cov, rotation)
        spread = np.sqrt(np.where(variance > 0, variance, 1))
        return (((tissue.xy[cells] - self.mean[slide]) @ rotation.T) / spread[slide]).astype(np.float32)


def draw_rotation(random: np.random.Generator, *, rotate: bool, reflect: bool) -> np.ndarray:
    """Draw an orthogonal (2, 2) matrix: a rotation by a random angle, after a reflection with probability 1/2."""
    angle, mirrored = random.uniform(0, 2 * np.pi), random.random() < 0.5
    angle *= rotate
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return rotation * ([-1, 1] if reflect and mirrored else [1, 1])


def count_unit(tissue: Tissue) -> np.ndarray | None:
    """Estimate the value of one count in each cell (n,) before the logarithm; None if values do not come from counts.

    The smallest expressed value of a cell is assumed to be one count, which is nearly always true of spatial data.
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
    r"""Drop counts from the expression (n, g): each count is lost with probability ``share``.

    If values are logarithms of counts, :math:`c` = ``expm1(x) / unit`` counts become :math:`c' \sim B(c, 1 - s)`, and
    the value becomes ``log1p(expm1(x) c' / (c (1 - s)))``, as if the thinned cell had been normalised again. Of other
    values (intensities, scores), a share of the expressed entries is set to zero.
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
