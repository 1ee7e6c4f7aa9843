"""Predictions of hidden values from embeddings, and their scores, for :func:`spatialfm.tl.impute`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from spatialfm._data._splits import group_folds, spatial_blocks

_N_NEAREST = 30
# Measured cells to search, so that time grows with the number of cells and not with its square.
_MAX_REFERENCE = 4096
_N_SMOOTH = 20
_N_FREQUENCIES = 150
_STRENGTHS = np.array([1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0])
_N_BOOTSTRAP = 500
# Of each fold.
_MIN_CELLS = 10

SCORES = (
    *("correlation", "correlation_low", "correlation_high", "correlation_smoothing", "skill", "skill_smoothing"),
    *("n_held_out", "n_units"),
)
"""Names of the scores of a gene."""
Predict = Callable[[int, np.ndarray], np.ndarray]
"""Function ``(f, rows)`` that predicts (rows, m) values of the cells ``rows`` from the cells of all folds but ``f``."""


class Location(NamedTuple):
    """Where cells are."""

    xy: np.ndarray
    """(n, 2) coordinates."""
    slide: np.ndarray
    """(n,) slide."""


class Prediction(NamedTuple):
    """Predicted values and their scores."""

    values: np.ndarray
    """(n, m); those of measured cells come from cells of other folds."""
    scores: np.ndarray
    """(scores, m), in the order of ``SCORES``."""


class _Folds(NamedTuple):
    fold: np.ndarray
    """(n,) fold of each cell, -1 where the value is missing."""
    units: np.ndarray
    """(n,) slides or blocks that are held out together."""
    n: int


def predict_hidden(
    features: np.ndarray,
    y: np.ndarray,
    lacks: np.ndarray,
    at: Location,
    *,
    method: str,
    n_folds: int,
    name: str,
    rng: np.random.Generator,
) -> Prediction:
    """Predict values from features, and score the predictions on cells that were held out.

    Parameters
    ----------
    features
        (n, d) embedding.
    y
        (n, m) values of genes that the same cells lack.
    lacks
        (n,) cells that lack them.
    method
        As for :func:`spatialfm.tl.impute`.
    name
        Name of a gene, for the message where too few cells were measured.
    """
    folds = _make_folds(lacks, at, n_folds, name)
    predict = (decoder if method == "fine_tune" else nearest)(features, y, folds.fold, rng)
    predicted, smooth, mean = (np.empty_like(y) for _ in range(3))
    for f in range(-1 if lacks.any() else 0, folds.n):
        known, hidden = np.flatnonzero((folds.fold != f) & (folds.fold >= 0)), np.flatnonzero(folds.fold == f)
        # Not below what was measured: no negative expression.
        predicted[hidden] = np.maximum(predict(f, hidden), y[known].min(axis=0))
        if f >= 0:
            mean[hidden] = y[known].mean(axis=0, dtype=np.float64)
            smooth[hidden] = _smooth(y, at, known, hidden, mean[hidden])
    measured = np.flatnonzero(~lacks)
    guesses = (values[measured].astype(np.float64) for values in (predicted, smooth, mean))
    return Prediction(predicted, _score(y[measured].astype(np.float64), folds.units[measured], *guesses, rng=rng))


def _make_folds(lacks: np.ndarray, at: Location, n_folds: int, name: str) -> _Folds:
    """Cut the measured cells into folds: of whole slides where whole slides lack the value, otherwise of blocks."""
    measured, missing = np.flatnonzero(~lacks), np.flatnonzero(lacks)
    slides = np.unique(at.slide[measured])
    whole = len(missing) > 0 and not np.isin(at.slide[missing], slides).any() and len(slides) > 1
    units = at.slide if whole else spatial_blocks(at.xy, at.slide)
    n_units = len(np.unique(units[measured]))
    n_folds = min(n_folds, n_units) if whole else n_folds
    if len(measured) < _MIN_CELLS * n_folds or n_units < n_folds:
        msg = (
            f"{name!r} was measured in {len(measured)} cells in {n_units} blocks; {n_folds} folds need "
            f"{_MIN_CELLS * n_folds} cells. Lower n_folds, or leave the gene out"
        )
        raise ValueError(msg)
    fold = np.full(len(lacks), -1)
    fold[measured] = group_folds(units[measured], n_folds)
    return _Folds(fold, units, n_folds)


def _smooth(y: np.ndarray, at: Location, known: np.ndarray, hidden: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """Mean over the nearest known cells of the same slide; ``otherwise`` where a slide has none."""
    out = otherwise.copy()
    for s in np.unique(at.slide[hidden]):
        here, near = at.slide[hidden] == s, known[at.slide[known] == s]
        if len(near):
            out[here] = mean_nearest(at.xy, near, hidden[here], _N_SMOOTH) @ y[near]
    return out


def _score(
    truth: np.ndarray,
    units: np.ndarray,
    predicted: np.ndarray,
    smooth: np.ndarray,
    mean: np.ndarray,
    *,
    rng: np.random.Generator,
) -> np.ndarray:
    """Scores (scores, m) of predictions of held-out cells, with intervals by a bootstrap over units."""
    n_units = len(np.unique(units))
    sums = [moments(guess, truth, units) for guess in (predicted, smooth)]
    correlations = [pearson(s.sum(axis=0)) for s in sums]
    draws = rng.multinomial(n_units, np.full(n_units, 1 / n_units), size=_N_BOOTSTRAP)
    spread = pearson(np.tensordot(draws, sums[0], axes=1).swapaxes(0, 1))
    spread = np.where(np.isfinite(spread).all(axis=0), spread, np.nan)
    low, high = np.percentile(spread, [2.5, 97.5], axis=0)
    error = np.square(mean - truth).sum(axis=0)
    skills = [1 - np.square(guess - truth).sum(axis=0) / error for guess in (predicted, smooth)]
    counts = [np.full(truth.shape[1], float(n)) for n in (len(truth), n_units)]
    return np.stack([correlations[0], low, high, correlations[1], *skills, *counts])


def averages(near: np.ndarray, n_known: int) -> sp.csr_matrix:
    """Mean over ``near`` (n, k), positions among the known cells, as a matrix (n, n_known)."""
    n, k = near.shape
    shares = np.full(near.size, 1 / k, np.float32)
    return sp.csr_matrix((shares, near.ravel(), np.arange(0, near.size + 1, k)), shape=(n, n_known))


def mean_nearest(points: np.ndarray, known: np.ndarray, rows: np.ndarray, k: int) -> sp.csr_matrix:
    """Mean over the ``k`` nearest ``known`` points of each of ``rows``, as a matrix (rows, known)."""
    from scipy.spatial import cKDTree

    near = cKDTree(points[known]).query(points[rows], k=np.arange(1, min(k, len(known)) + 1))[1]
    return averages(near, len(known))


def nearest(features: np.ndarray, y: np.ndarray, fold: np.ndarray, rng: np.random.Generator) -> Predict:
    """Mean of the measured values over the 30 cells with the most similar features."""
    from sklearn.neighbors import NearestNeighbors

    def predict(f: int, rows: np.ndarray) -> np.ndarray:
        known = np.flatnonzero((fold != f) & (fold >= 0))
        if len(known) > _MAX_REFERENCE:
            known = np.sort(rng.choice(known, _MAX_REFERENCE, replace=False))
        search = NearestNeighbors(n_neighbors=min(_N_NEAREST, len(known)), algorithm="brute").fit(features[known])
        return averages(search.kneighbors(features[rows], return_distance=False), len(known)) @ y[known]

    return predict


class _Sums(NamedTuple):
    """Sums over the cells of a fold, from which all ridge regressions are computed."""

    n: int
    x: np.ndarray
    y: np.ndarray
    xx: np.ndarray
    xy: np.ndarray
    yy: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray) -> _Sums:
        return cls(len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y, np.square(y).sum(0))


class _Ridge(NamedTuple):
    """Ridge regressions of all strengths, along the principal axes of the features."""

    mean_x: np.ndarray
    mean_y: np.ndarray
    sizes: np.ndarray
    """(d,) variances along the axes."""
    axes: np.ndarray
    """(d, d)."""
    turned: np.ndarray
    """(d, m) covariances with y along the axes."""

    @classmethod
    def fit(cls, parts: list[_Sums]) -> _Ridge:
        n, x, y, xx, xy, _ = (sum(values[1:], values[0]) for values in zip(*parts, strict=True))
        mean_x, mean_y = x / n, y / n
        sizes, axes = np.linalg.eigh(xx / n - np.outer(mean_x, mean_x))
        return cls(mean_x, mean_y, np.maximum(sizes, 0), axes, axes.T @ (xy / n - np.outer(mean_x, mean_y)))

    def slope(self, strength: float | np.ndarray) -> np.ndarray:
        """Coefficients (d, m) at a strength, or at one for each y."""
        return self.axes @ (self.turned / (self.sizes[:, None] + strength))

    def errors(self, on: _Sums) -> np.ndarray:
        """Squared errors (strengths, m) on the cells of a fold."""
        out = []
        for strength in _STRENGTHS:
            slope = self.slope(strength)
            start = self.mean_y - self.mean_x @ slope
            square = (slope * (on.xx @ slope)).sum(0) + 2 * start * (on.x @ slope) + on.n * start**2
            out.append(on.yy - 2 * (slope * on.xy).sum(0) - 2 * start * on.y + square)
        return np.array(out)


def decoder(features: np.ndarray, y: np.ndarray, fold: np.ndarray, rng: np.random.Generator) -> Predict:
    """Ridge regression on the features and on 300 random Fourier features of them (Rahimi & Recht 2007).

    The strength is chosen for each column of ``y`` on held-out folds of the training cells. All fits come from sums
    over the folds, which are computed once; scikit-learn would read all cells for each of them.
    """
    # Typical squared distance of two cells, twice the total variance.
    distance = 2 * max(float(features.var(axis=0, dtype=np.float64).sum()), 1e-12)
    angles = features @ rng.normal(0, (0.3 * distance) ** -0.5, (features.shape[1], _N_FREQUENCIES)).astype(np.float32)
    x = np.hstack([features, np.cos(angles), np.sin(angles)]).astype(np.float64)
    x -= x.mean(axis=0)
    x /= np.maximum(x.std(axis=0), 1e-9)
    n_folds = fold.max() + 1
    sums = [_Sums.of(x[fold == f], y[fold == f].astype(np.float64)) for f in range(n_folds)]

    def predict(f: int, rows: np.ndarray) -> np.ndarray:
        known = [g for g in range(n_folds) if g != f]
        strength = np.full(y.shape[1], 0.01)
        if len(known) > 1:
            errors = [_Ridge.fit([sums[h] for h in known if h != g]).errors(sums[g]) for g in known]
            strength = _STRENGTHS[np.sum(errors, axis=0).argmin(axis=0)]
        ridge = _Ridge.fit([sums[g] for g in known])
        return ridge.mean_y + (x[rows] - ridge.mean_x) @ ridge.slope(strength)

    return predict


def moments(a: np.ndarray, b: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Sum up (units, 6, m) 1, a, b, aa, bb and ab over the cells of each unit, a and b (n, m) being centred first."""
    _, codes = np.unique(units, return_inverse=True)
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    member = sp.csr_matrix((np.ones(len(codes)), (codes, np.arange(len(codes)))))
    return np.stack([member @ v for v in (np.ones_like(a), a, b, a * a, b * b, a * b)], axis=1)


def pearson(sums: np.ndarray) -> np.ndarray:
    """Correlation from sums (6, ...) of 1, a, b, aa, bb, ab; NaN where one is constant."""
    n, a, b, aa, bb, ab = sums
    va, vb = aa - a * a / n, bb - b * b / n
    flat = (va <= 1e-9 * n) | (vb <= 1e-9 * n)
    return np.divide(ab - a * b / n, np.sqrt(np.maximum(va * vb, 0)), out=np.full(n.shape, np.nan), where=~flat)
