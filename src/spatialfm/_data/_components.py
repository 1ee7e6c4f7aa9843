"""Principal components of expression that vary over the tissue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from threadpoolctl import threadpool_limits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scipy.sparse import csc_matrix, csr_matrix

_MIN_FEATURES = 50
_CLIP = 10.0
# Up to so many features, their covariance is decomposed; above, Lanczos iterations do without it.
_MAX_EXACT = 2000
# Up to so many features, this takes milliseconds.
_FEW = 500
_BLOCK = 1 << 24
# Components with a smaller standard deviation, relative to the largest, are rounding errors, which models would scale
# up.
_ROUNDING = 1e-4


class ComponentAxes(NamedTuple):
    """Axes of components, onto which cells of another tissue can be projected."""

    spread: np.ndarray
    """(f,) standard deviations of the features."""
    floor: np.ndarray
    """(f,) and the next: limits of the features in units of ``spread``."""
    ceiling: np.ndarray
    mean: np.ndarray
    """(f,) means in units of ``spread``."""
    loadings: np.ndarray
    """(f, K) float32."""

    def scale(self, x: Any) -> Any:
        """Features (n, f) in units of their standard deviation and within the limits, float32, not centred.

        Zeros stay zero, whether or not they are stored.
        """
        if not sp.issparse(x):
            x = np.asarray(x, dtype=np.float32)
            return np.where(x == 0, 0, np.clip(x / self.spread, self.floor, self.ceiling)).astype(np.float32)
        x = sp.csc_matrix(x, dtype=np.float32, copy=True)
        column = np.repeat(np.arange(x.shape[1]), np.diff(x.indptr))
        x.data = np.clip(x.data / self.spread[column], self.floor[column], self.ceiling[column]).astype(np.float32)
        return x

    def scores(self, x: Any, names: Sequence[str], features: Sequence[str]) -> np.ndarray:
        """Scores (n, K) float32 of cells ``x`` (n, g) with columns ``names``; ``features`` are those of these axes.

        Raises if a feature is missing.
        """
        position = {name: i for i, name in enumerate(names)}
        missing = [name for name in features if name not in position]
        if missing:
            msg = (
                f"{len(missing)} of the {len(features)} features of the state are not measured (first: {missing[:3]}); "
                "fit a new embedding of these cells, or add the features to var_names"
            )
            raise ValueError(msg)
        return self.project(self.scale(x[:, [position[name] for name in features]]))

    def project(self, values: Any) -> np.ndarray:
        """Scores (n, K) float32 of what :meth:`scale` returned."""
        return (np.asarray(values @ self.loadings, np.float64) - self.mean @ self.loadings).astype(np.float32)


@dataclass
class Components:
    """Principal components of features weighted by their spatial autocorrelation."""

    scores: np.ndarray
    """(n, K) float32, largest variance first; the mean squared length of a row is K."""
    values: Any
    """(n, f) float32 features in units of their standard deviation, dense or csr, not centred."""
    axes: ComponentAxes
    """With ``scores = (values - axes.mean) @ axes.loadings``."""
    features: np.ndarray
    """(f,) positions of the features that were used."""
    autocorrelation: np.ndarray
    """(f,) Moran's I."""
    left_out: dict[str, np.ndarray]
    """Positions of the other features, by the reason."""

    def project(self, chosen: np.ndarray) -> np.ndarray:
        """Scores (n, K) from some features only, ``chosen`` (f,) bool, scaled up for the missing ones."""
        loadings = self.axes.loadings * (chosen[:, None] / max(chosen.mean(), 1e-6))
        return (self.values @ loadings - self.axes.mean @ loadings).astype(np.float32)


def transition_matrix(graph: csr_matrix) -> csr_matrix:
    """Mean over neighbours as a matrix (n, n); cells without neighbours keep their own value."""
    degree = np.diff(graph.indptr)
    alone = sp.diags((degree == 0).astype(np.float32))
    return (sp.diags((1 / np.maximum(degree, 1)).astype(np.float32)) @ (graph != 0).astype(np.float32) + alone).tocsr()


def spatial_components(x: Any, graph: csr_matrix, *, n_components: int = 32, min_detected: float = 0.02) -> Components:
    """Find the components of an expression matrix that vary over the tissue.

    Features detected in less than ``min_detected`` of the cells are left out (but for the 50 most detected); the others
    are standardised, clipped at 10 standard deviations and weighted by the fourth root of Moran's I: what neighbours
    share is signal, what they do not is mostly counting noise. Signs are chosen so that scores are skewed to the right.

    Parameters
    ----------
    x
        (n, g) values on a log-like scale, dense or sparse.
    graph
        (n, n) symmetric tissue graph.
    n_components
        K; fewer where the cells or features do not allow as many.
    min_detected
        Share of the cells.

    Raises
    ------
    ValueError
        No feature varies.
    """
    n = x.shape[0]
    values: Any = sp.csc_matrix(x, dtype=np.float32, copy=True) if sp.issparse(x) else np.asarray(x, dtype=np.float32)
    if sp.issparse(values):
        values.eliminate_zeros()
        detected = np.diff(values.indptr) / n
        mean = _means(values)
        # Not from the mean square: by its rounding, a constant feature would vary.
        stored = zip(_stored(values), mean, strict=True)
        spread = np.sqrt([(np.square(v - m).sum() + (n - len(v)) * m**2) / n for v, m in stored])
    else:
        detected = np.count_nonzero(values, axis=0) / n
        mean = values.mean(axis=0, dtype=np.float64)
        spread = values.std(axis=0, dtype=np.float64)
    varies = spread > 1e-6 * np.maximum(np.abs(mean), 1e-3)
    if not varies.any() or n < 2:
        msg = f"none of the {x.shape[1]} features varies between the {n} cells"
        raise ValueError(msg)
    rank = np.empty(len(detected), np.int64)
    rank[np.lexsort((np.arange(len(detected)), -detected * varies))] = np.arange(len(detected))
    kept = varies & ((detected >= min_detected) | (rank < _MIN_FEATURES))
    features = np.flatnonzero(kept)
    left_out = {
        "the same in all cells": np.flatnonzero(~varies),
        f"found in less than {min_detected:.3g} of the cells (min_detected)": np.flatnonzero(varies & ~kept),
    }
    mean, spread = mean[features], spread[features]
    limits = mean / spread - _CLIP, mean / spread + _CLIP
    scaling = ComponentAxes(spread, *limits, np.zeros(len(features)), np.zeros((len(features), 0), np.float32))
    values = scaling.scale(values[:, features])
    mean = _means(values) if sp.issparse(values) else values.mean(axis=0, dtype=np.float64)

    step = transition_matrix(graph)
    autocorrelation = np.empty(len(features))
    width = max(1, _BLOCK // n)
    for s in range(0, len(features), width):
        z = values[:, s : s + width]
        z = ((z.toarray() if sp.issparse(z) else z) - mean[s : s + width]).astype(np.float32)
        near = (z * (step @ z)).sum(axis=0, dtype=np.float64)
        autocorrelation[s : s + width] = near / np.maximum((z * z).sum(axis=0, dtype=np.float64), 1e-12)
    weight = np.maximum(autocorrelation, 0) ** 0.25
    if not weight.any():
        weight[:] = 1.0
    values = values.tocsr() if sp.issparse(values) else values

    k = min(n_components, max(1, len(features) - 1), n - 1)
    axes = _axes(values, mean, weight, k)
    loadings = weight[:, None] * axes
    scores = np.asarray(values @ loadings.astype(np.float32), np.float64) - mean @ loadings
    width = scores.std(axis=0)
    rounding = width < _ROUNDING * width.max()
    scores[:, rounding] = loadings[:, rounding] = 0
    size = np.sqrt(k / max(np.square(scores).sum(axis=1).mean(), 1e-12))
    sign = np.where((scores**3).sum(axis=0) < 0, -size, size)
    return Components(
        scores=(scores * sign).astype(np.float32),
        values=values,
        axes=scaling._replace(mean=mean, loadings=(loadings * sign).astype(np.float32)),
        features=features,
        autocorrelation=autocorrelation,
        left_out=left_out,
    )


def _stored(values: csc_matrix) -> list[np.ndarray]:
    return np.split(values.data, values.indptr[1:-1])


def _means(values: csc_matrix) -> np.ndarray:
    """Means (f,) of the columns in float64; scipy sums in float32."""
    return np.array([v.sum(dtype=np.float64) for v in _stored(values)]) / values.shape[0]


def _axes(values: Any, mean: np.ndarray, weight: np.ndarray, k: int) -> np.ndarray:
    """First ``k`` principal axes (f, k) of the centred and weighted values."""
    n, f = values.shape
    if f <= _MAX_EXACT:
        product = values.T @ values
        product = np.asarray(product.toarray() if sp.issparse(product) else product, np.float64)
        covariance = (product / n - np.outer(mean, mean)) * np.outer(weight, weight)
        # For few features, one thread takes milliseconds; several threads on a busy machine take a hundred times that.
        with threadpool_limits(1 if f <= _FEW else None, "blas"):
            return np.linalg.eigh(covariance)[1][:, ::-1][:, :k]
    from scipy.sparse.linalg import LinearOperator, svds

    turned = values.T.tocsr() if sp.issparse(values) else values.T

    def forward(a: np.ndarray) -> np.ndarray:
        a = weight * a.ravel()
        return values @ a.astype(np.float32) - mean @ a

    def backward(b: np.ndarray) -> np.ndarray:
        b = b.ravel()
        return weight * (turned @ b.astype(np.float32) - mean * b.sum())

    operator = LinearOperator((n, f), matvec=forward, rmatvec=backward, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(min(n, f))
    _, s, vt = svds(operator, k=min(k, min(n, f) - 1), v0=start, tol=1e-4)
    return vt[np.argsort(-s)].T
