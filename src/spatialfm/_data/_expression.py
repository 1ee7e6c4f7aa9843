"""What the values of an expression matrix are, read from the values alone, and how to bring them to a log-like scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import scipy.sparse as sp

if TYPE_CHECKING:
    from collections.abc import Iterator

    Kind = Literal["counts", "normalized", "log", "intensity", "scaled"]

TARGET_SUM = 1e4
# log2(1 + 1e7) = 23: whatever lies above is no logarithm of anything that was sequenced or imaged.
_MAX_LOG = 25.0
# Standardised columns have a mean absolute value of at most 1; intensities of hundreds.
_MAX_SCALED = 10.0
_MAX_CELLS = 20_000
_CHUNK = 1 << 22


def _blocks(x: Any) -> Iterator[np.ndarray]:
    """Give the stored values in pieces of bounded size."""
    if sp.issparse(x):
        for s in range(0, x.data.size, _CHUNK):
            yield x.data[s : s + _CHUNK]
    else:
        step = max(1, _CHUNK // max(1, x.shape[1]))
        for s in range(0, x.shape[0], step):
            yield np.asarray(x[s : s + step])


def check_finite(x: Any) -> None:
    """Raise where the matrix holds NaN or infinity."""
    n_bad = sum(int(np.count_nonzero(~np.isfinite(v))) for v in _blocks(x)) if x.dtype.kind == "f" else 0
    if n_bad:
        msg = f"the expression matrix holds {n_bad} NaN or infinite values; replace or drop them first (e.g. with numpy.nan_to_num)"
        raise ValueError(msg)


def hash_cells(x: Any) -> np.ndarray:
    """Hash each cell's values (n_cells,) uint64: sorted by it, cells stand in a random order that depends on their content alone.

    The sums are exact (modulo 2**64), so rows of any layout and dtype holding the same numbers hash alike; only identical cells tie.
    """
    weights = np.random.default_rng(0).integers(1, 2**63, size=x.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(
        1
    )

    def mix(values: np.ndarray) -> np.ndarray:
        z = (values.astype(np.float64) + 0.0).view(
            np.uint64
        )  # + 0.0 turns -0.0 into 0.0, whose bits (and hash) are zero
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    if sp.issparse(x):
        x = x.tocsr()
        mixed = np.concatenate([mix(v) for v in _blocks(x)] or [np.empty(0, np.uint64)])
        return sp.csr_matrix((mixed, x.indices, x.indptr), shape=x.shape) @ weights
    return np.concatenate([mix(v) @ weights for v in _blocks(x)] or [np.empty(0, np.uint64)])


def place_order(x: Any, places: np.ndarray) -> np.ndarray:
    """Sort cells by place, its first column first, and by content ``x`` where they share one; the order of rows plays no part."""
    return np.lexsort((hash_cells(x), *places.T[::-1]))


def _lattice(x: sp.csr_matrix, base: float | None) -> float:
    """Share of a cell's values that are whole multiples of its smallest, after undoing ``log(1 + x)`` to ``base``.

    Dividing each cell's counts by anything leaves its values on such a lattice. By chance alone 4 % of values lie on it.
    """
    values = x.data.astype(np.float64)
    if base is not None:
        values = np.expm1(values * np.log(base))
    n = np.diff(x.indptr)
    smallest = np.minimum.reduceat(values, x.indptr[:-1][n > 0])
    ratio = values / np.repeat(smallest, n[n > 0])
    ratio = ratio[(ratio > 1.5) & (ratio < 10)]
    return float(np.mean(np.abs(ratio - np.rint(ratio)) < 0.02)) if ratio.size else 0.0


def value_kind(x: Any) -> Kind:
    """Recognise what a matrix holds.

    Parameters
    ----------
    x
        Cells by features, dense or sparse.

    Returns
    -------
    ``"counts"`` (whole, non-negative), ``"normalized"`` (counts divided by something, not logged), ``"log"`` (logged, or already on
    a comparably small non-negative scale), ``"intensity"`` (continuous and large, as from CODEX or imaging mass cytometry, perhaps
    negative after compensation), ``"scaled"`` (negative and small, as z-scores). No metadata are consulted, and neither the order of
    the cells nor the dtype matters.

    Raises
    ------
    ValueError
        If the matrix holds NaN or infinity.
    """
    check_finite(x)
    low, high, total, n_nonzero, whole = 0.0, 0.0, 0.0, 0, True
    for v in _blocks(x):
        if v.size:
            low, high = min(low, float(v.min())), max(high, float(v.max()))
            total += float(np.abs(v).sum(dtype=np.float64))
            n_nonzero += int(np.count_nonzero(v))
            whole = whole and (v.dtype.kind in "iub" or bool((v == np.rint(v)).all()))
    size = max(1, x.shape[0] * x.shape[1])
    if low < 0:
        return "intensity" if total / size > _MAX_SCALED else "scaled"
    if whole:
        return "counts"
    rows = np.argsort(hash_cells(x), kind="stable")[:_MAX_CELLS] if x.shape[0] > _MAX_CELLS else slice(None)
    sample = sp.csr_matrix(x[rows])
    sample.eliminate_zeros()
    plain = _lattice(sample, None)
    if high > _MAX_LOG:
        return "intensity" if n_nonzero > 0.95 * size and plain < 0.2 else "normalized"
    # Not above but at least: values as small as 0.001 are on all four lattices, and then are no logarithms of counts.
    return "normalized" if plain >= max(0.2, *(_lattice(sample, b) for b in (np.e, 2.0, 10.0))) else "log"


def intensity_scale(x: Any) -> np.ndarray:
    """Median absolute value of each column, at least 1e-3."""
    x = x.toarray() if sp.issparse(x) else np.asarray(x)
    return np.maximum(np.median(np.abs(x), axis=0), 1e-3) if x.shape[0] else np.ones(x.shape[1])


def log_normalize(
    x: Any, kind: Kind, *, scale: np.ndarray | None = None, counted: np.ndarray | slice = slice(None)
) -> Any:
    """Bring a matrix to a log-like scale.

    Parameters
    ----------
    x
        Cells by features, dense or sparse; it is not changed.
    kind
        What it holds, see :func:`value_kind`. Counts and normalised values: each cell's total becomes 10,000 (an empty cell stays zero),
        then ``log(1 + x)``. Intensities: ``arcsinh(x / scale)``. The others stay as they are.
    scale
        For intensities, one positive number a column; by default the column's median absolute value.
    counted
        For counts and normalised values, the columns that a cell's total is taken over; all by default.

    Returns
    -------
    A new float32 matrix, sparse (csr) where ``x`` is sparse, except that intensities become dense.
    """
    if kind == "intensity":
        scale = intensity_scale(x) if scale is None else scale
        return np.arcsinh((x.toarray() if sp.issparse(x) else np.asarray(x)) / scale).astype(np.float32)
    y: Any = x.tocsr().astype(np.float32, copy=True) if sp.issparse(x) else np.array(x, dtype=np.float32, order="C")
    if kind in ("counts", "normalized"):
        totals = np.asarray(y[:, counted].sum(axis=1, dtype=np.float64)).ravel()
        factors = np.divide(TARGET_SUM, totals, out=np.zeros_like(totals), where=totals > 0)
        if sp.issparse(y):
            y.data = np.log1p(y.data * np.repeat(factors, np.diff(y.indptr))).astype(np.float32)
        else:
            y = np.log1p(y * factors[:, None]).astype(np.float32)
    return y
