"""What the values of an expression matrix are, which features every slide measured, and how to bring values to a log-like scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import scipy.sparse as sp

from spatialfm._checks import check_choice
from spatialfm._data._adata import check_cells, get_matrix, warn_off_tissue
from spatialfm._settings import logger, warn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from anndata import AnnData

Kind = Literal["counts", "normalized", "log", "intensity", "scaled"]
ValuesKind = Literal["auto", "counts", "normalized", "log", "intensity", "scaled"]
"""What a user may say of values; ``"auto"`` has them recognised."""

TARGET_SUM = 1e4
NOT_MEASURED = "not measured on every slide"
# log2(1 + 1e7) = 23: whatever lies above is no logarithm of anything that was sequenced or imaged.
_MAX_LOG = 25.0
# Standardised columns have a mean absolute value of at most 1; intensities of hundreds.
_MAX_SCALED = 10.0
# Squares of larger numbers are none of float32, and sums of smaller ones vanish.
_LARGEST, _SMALLEST = 1e18, 1e-30
_MAX_CELLS = 20_000
# Of fewer cells no variance is known.
_MIN_CELLS = 20
_CHUNK = 1 << 22
_ACTIONS = {
    "counts": "normalised to 10,000 a cell and logged",
    "normalized": "normalised to 10,000 a cell and logged",
    "intensity": "arcsinh-transformed",
}


@dataclass
class Expression:
    """Values as they stand in an AnnData, and what they are."""

    x: Any
    """(n, f) finite values of the features that every slide measured, csr or dense; not to be written to."""
    kind: Kind
    features: np.ndarray
    """(f,) their positions in ``var``."""
    unmeasured: list[str]
    """Names of the other features."""

    def logged(self) -> Any:
        """Bring the values to a log-like scale, see :func:`log_normalize`."""
        return log_normalize(self.x, self.kind)


def read_values(
    adata: AnnData,
    layer: str | None = None,
    values: ValuesKind = "auto",
    *,
    slides: Sequence[tuple[str, np.ndarray]] = (),
) -> Expression:
    """Read ``X`` or a layer; what the values are is recognised unless ``values`` says it.

    Features that one of the ``slides`` (see :func:`spatialfm._data._adata.get_libraries`) lacks are left out with a warning.

    Raises
    ------
    KeyError, ValueError
        The layer does not exist, it holds no real numbers, some are missing, or ``values`` is unknown.
    """
    check_cells(adata)
    warn_off_tissue(adata)
    x, where = get_matrix(adata, layer), "X" if layer is None else f"layers[{layer!r}]"
    names = adata.var_names.astype(str)
    lacking = find_unmeasured([(x, slides or [("", np.arange(adata.n_obs))])])
    left_out = lacking.any(axis=0)
    if left_out.all() and len(names):
        msg = f"{where} holds no feature that was measured on every slide; embed the slides one by one, or features that they share"
        raise ValueError(msg)
    features = np.flatnonzero(~left_out)
    if left_out.any():
        x = x[:, features]
        warn_unmeasured(list(names[left_out]), lacking[:, left_out], [name for name, _ in slides])
    check_finite(x, where, names[features], joined=len(slides) > 1)
    return Expression(x, resolve_kind(x, values, where), features, list(names[left_out]))


def resolve_kind(x: Any, values: ValuesKind, where: str) -> Kind:
    """Tell what a matrix holds: ``values`` where it says so, otherwise what is recognised, with a warning where two readings are close."""
    check_choice("values", values, get_args(ValuesKind))
    if values != "auto":
        return values
    kind, other = recognise(x)
    if other is not None:
        warn(
            "%s is taken to hold %s values (%s), but from the numbers alone they may be %s (%s); say which with values=%r or values=%r",
            where, kind, _ACTIONS.get(kind, "used as they are"), other, _ACTIONS.get(other, "used as they are"), kind, other,
        )  # fmt: skip
    n_negative = sum(int(np.count_nonzero(v < 0)) for v in _blocks(x)) if kind in ("counts", "normalized") else 0
    logger.info(
        "%s holds %s values: %s%s", where, kind, _ACTIONS.get(kind, "used as they are"),
        f"; {n_negative} negative ones, as subtracting a background leaves, count as zero" if n_negative else "",
    )  # fmt: skip
    return kind


def find_unmeasured(parts: Sequence[tuple[Any, Sequence[tuple[str, np.ndarray]]]]) -> np.ndarray:
    """Tell which features (slides, g) each slide did not measure.

    ``parts`` are matrices of the same features, each with its slides ``[(name, rows)]``. A feature was not measured on a slide where it is NaN in all
    cells; or where it is zero in all cells though the other slides let more cells have it than chance explains. For that, the smallest share of cells that
    have it elsewhere (its lower bound of three standard deviations), corrected for the depth of the slide, gives the number of cells to expect, m, and a third
    of it allows for differences between tissues: a feature is zero by chance with probability ``exp(-m / 3)``. The features of the largest m are taken, as
    many as hold at most 1 % that are zero by chance.
    """
    seen, missing, sizes = [], [], []
    for x, slides in parts:
        for _, rows in slides:
            here = x if len(slides) == 1 else x[rows]
            absent: Any = (
                type(here)((np.isnan(here.data), here.indices, here.indptr), shape=here.shape)
                if sp.issparse(here)
                else np.isnan(here)
            )
            n_absent = np.asarray(absent.sum(axis=0)).ravel()
            stored = here.getnnz(axis=0) if sp.issparse(here) else np.count_nonzero(here, axis=0)
            seen.append(stored - n_absent)
            missing.append(n_absent == here.shape[0])
            sizes.append(here.shape[0])
    lacking, detected, n_cells = np.array(missing), np.array(seen, np.float64), np.array(sizes, np.float64)
    lacking &= n_cells[:, None] > 0
    # Missing everywhere is no difference between slides: check_finite tells of it.
    lacking &= ~lacking.all(axis=0) | (len(sizes) > 1)
    share = detected / np.maximum(n_cells[:, None], 1)
    least = np.maximum(detected - 3 * np.sqrt(detected), 0) / np.maximum(n_cells[:, None], 1)
    for s in np.flatnonzero(((detected == 0) & ~lacking).any(axis=1)):
        common = (detected > 0) & (detected[s] > 0)
        depth = [np.median(share[s, c] / share[t, c]) if c.any() else 1.0 for t, c in enumerate(common)]
        expected = np.where(detected > 0, least * np.minimum(depth, 1)[:, None], np.inf).min(axis=0) * n_cells[s]
        expected[~np.isfinite(expected)] = 0
        order = np.argsort(-expected, kind="stable")
        by_chance = np.cumsum(np.exp(-expected[order] / 3))
        found = np.cumsum((detected[s] == 0)[order])
        enough = np.flatnonzero((by_chance <= 0.01 * found) & (expected[order] > 0))
        if len(enough):
            at = order[: enough[-1] + 1]
            lacking[s, at] |= detected[s, at] == 0
    return lacking


def warn_unmeasured(names: Sequence[str], lacking: np.ndarray, slides: Sequence[str]) -> None:
    """Say which features (slides, names) are left out because a slide lacks them."""
    which = [f"{slide!r} ({int(own.sum())})" for slide, own in zip(slides, lacking, strict=True) if own.any()]
    warn(
        "%d features (%s) are zero or missing in all cells of slides %s, though other slides have them: taken as not measured there and left out of all "
        "slides. Drop them to say so yourself, or keep the features that all slides share (join='inner')",
        len(names), _first(names), _first(which),
    )  # fmt: skip


def _first(names: Sequence[str], n: int = 5) -> str:
    return ", ".join(map(str, names[:n])) + (", ..." if len(names) > n else "")


def _blocks(x: Any) -> Iterator[np.ndarray]:
    """Give the stored values in pieces of bounded size."""
    if sp.issparse(x):
        for s in range(0, x.data.size, _CHUNK):
            yield x.data[s : s + _CHUNK]
    else:
        step = max(1, _CHUNK // max(1, x.shape[1]))
        for s in range(0, x.shape[0], step):
            yield np.asarray(x[s : s + step])


def check_finite(
    x: Any, where: str = "the expression matrix", names: Sequence[str] | None = None, *, joined: bool = False
) -> None:
    """Raise where values are NaN, infinite, or of a size that float32 cannot compute with; ``joined``: whether slides were told apart."""
    n_bad, largest = 0, 0.0
    for v in _blocks(x):
        finite = np.isfinite(v) if v.dtype.kind == "f" else np.ones(1, bool)
        n_bad += int(np.count_nonzero(~finite))
        if v.size:
            low, high = (float(v.min()), float(v.max())) if finite.all() else (0.0, 0.0)
            largest = max(largest, high, -low)
    if n_bad:
        values = x.tocsc() if sp.issparse(x) else x
        columns = np.flatnonzero(
            [(~np.isfinite(values[:, [j]].data if sp.issparse(x) else values[:, j])).any() for j in range(x.shape[1])]
        )
        which = "" if names is None else f" ({_first([names[int(j)] for j in columns])})"
        slides = (
            ""
            if joined
            else ", or name the slides with library_key= where they were joined: features that a slide lacks are then left out"
        )
        msg = (
            f"{where} holds {n_bad} NaN or infinite values, in {len(columns)} features{which}; leave out these features or the cells "
            f"without them{slides}. sfm.tl.impute fills single values. Zeros in their place would pass for measurements"
        )
        raise ValueError(msg)
    if largest > _LARGEST or 0 < largest < _SMALLEST:
        msg = f"{where} holds values of up to {largest:.2g}, outside of what float32 computes with; bring them to another unit, e.g. adata.X / {largest:.0e}"
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


def _lattice(x: sp.csr_matrix, undo: str | None) -> float:
    """Share of a cell's values that are whole multiples of its smallest, after undoing a root (``"sqrt"``) or ``log(1 + x)`` to a base.

    Dividing each cell's counts by anything leaves its values on such a lattice. By chance alone 4 % of values lie on it.
    """
    values = x.data.astype(np.float64)
    if undo == "sqrt":
        values = np.square(values)
    elif undo is not None:
        values = np.expm1(values * {"ln": 1.0, "log2": np.log(2), "log10": np.log(10)}[undo])
    n = np.diff(x.indptr)
    smallest = np.minimum.reduceat(values, x.indptr[:-1][n > 0])
    ratio = values / np.repeat(smallest, n[n > 0])
    ratio = ratio[(ratio > 1.5) & (ratio < 10)]
    return float(np.mean(np.abs(ratio - np.rint(ratio)) < 0.02)) if ratio.size else 0.0


def _sample(x: Any, n: int) -> Any:
    """At most ``n`` cells, drawn by their content, so that the order of the rows plays no part."""
    return x[np.argsort(hash_cells(x), kind="stable")[:n]] if x.shape[0] > n else x


def _dispersion(x: Any) -> float:
    """Variance over mean of the least dispersed tenth of the features: about 1 for counts of molecules.

    The variance is about the feature's mean, or about one share of the cells' totals, whichever is less: what remains is noise of counting and biology.
    """
    y = _sample(x, max(200, _CHUNK // max(1, x.shape[1])))
    y = np.maximum(y.toarray() if sp.issparse(y) else y, 0).astype(np.float64)
    y = y[y.any(axis=1)][:, y.any(axis=0)]
    if len(y) < _MIN_CELLS or y.shape[1] < 2:
        return 1.0
    expected = np.outer(y.sum(axis=1), y.sum(axis=0)) / y.sum()
    ratio = (np.square(y - expected) / expected).sum(axis=0) / ((len(y) - 1) * (1 - 1 / y.shape[1]))
    return float(np.quantile(np.minimum(ratio, y.var(axis=0, ddof=1) / y.mean(axis=0)), 0.1))


def _is_shifted(x: Any) -> bool:
    """Tell whether all values become whole when one number a cell, or one a feature, is added: counts from which a background was subtracted."""
    y = _sample(x, max(200, _CHUNK // max(1, x.shape[1])))
    y = (y.toarray() if sp.issparse(y) else np.asarray(y)).astype(np.float64)
    for axis in (0, 1):
        # As many decimals as float32 has beside numbers of this size.
        up = y - y.min(axis=axis, keepdims=True)
        if up.max() > 1.5 and np.abs(up - np.rint(up)).max() < 1e-3:
            return True
    return False


def _recognise_whole(x: Any, n_ones: int, n_positive: int, size: int) -> tuple[Kind, Kind | None]:
    """Tell counts from rounded intensities: of counts many are 1, or some features vary as counts do."""
    share = n_ones / max(1, n_positive)
    if share >= 0.3 or n_positive == 0:
        return "counts", None
    dispersion = _dispersion(x)
    if dispersion < 5:
        return "counts", None
    totals = np.asarray(x.sum(axis=1), np.float64).ravel()
    if np.ptp(totals) < 0.05 * totals.mean():
        return "normalized", None  # and rounded
    positive = sp.csr_matrix(_sample(x, _MAX_CELLS), copy=True)
    positive.data = np.maximum(positive.data, 0)
    positive.eliminate_zeros()
    n = np.diff(positive.indptr)
    smallest = np.minimum.reduceat(positive.data, positive.indptr[:-1][n > 0])
    if np.median(smallest) >= 5 and _lattice(positive, None) > 0.5:
        return "normalized", None
    if share < 0.03 and dispersion >= 15:
        sure = share < 0.005 and dispersion > 150 and n_positive > 0.5 * size
        return "intensity", None if sure else "counts"
    return "counts", "intensity" if n_positive > 0.4 * size else None


def recognise(x: Any) -> tuple[Kind, Kind | None]:
    """Recognise what a matrix holds, see :func:`value_kind`, and what else it may be where two readings are close."""
    check_finite(x)
    low, high, total, below, n_positive, n_ones, whole = 0.0, 0.0, 0.0, 0.0, 0, 0, True
    for v in _blocks(x):
        if v.size:
            low, high = min(low, float(v.min())), max(high, float(v.max()))
            total += float(np.abs(v).sum(dtype=np.float64))
            if v.dtype.kind != "u" and v.min() < 0:
                below -= float(np.minimum(v, 0).sum(dtype=np.float64))
                v = v[v > 0]
            n_positive += int(np.count_nonzero(v))
            n_ones += int(np.count_nonzero(v == 1))
            whole = whole and (v.dtype.kind in "iub" or bool((v == np.rint(v)).all()))
    size = max(1, x.shape[0] * x.shape[1])
    if low < 0:
        share = below / total
        # Centred values are negative for half of their sum.
        if share < 0.45 and whole:
            return _recognise_whole(x, n_ones, n_positive, size)
        if share < 0.45 and _is_shifted(x):
            return "counts", None
        positive = x.maximum(0).tocsr() if sp.issparse(x) else np.maximum(x, 0)
        kind, other = _recognise_fractions(positive, high, n_positive, size)
        if kind == "log":
            return ("log" if share < 0.05 else "scaled"), None
        if share < 0.3:
            return kind, other or ("scaled" if kind == "normalized" and share > 0.1 else None)
        return ("intensity" if total / size > _MAX_SCALED else "scaled"), None
    return _recognise_whole(x, n_ones, n_positive, size) if whole else _recognise_fractions(x, high, n_positive, size)


def _recognise_fractions(x: Any, high: float, n_positive: int, size: int) -> tuple[Kind, Kind | None]:
    """Tell non-negative values apart that are not all whole."""
    sample = sp.csr_matrix(_sample(x, _MAX_CELLS), copy=True)
    sample.eliminate_zeros()
    plain, root = _lattice(sample, None), _lattice(sample, "sqrt")
    root = root if root > plain + 0.05 else 0.0  # squares of whole numbers are whole too
    if high <= _MAX_LOG:
        # Not above but at least: values as small as 0.001 are on all lattices, and then are no logarithms of counts.
        logs = max(root, *(_lattice(sample, base) for base in ("ln", "log2", "log10")))
        kind: Kind = "normalized" if plain >= max(0.2, logs) else "log"
        close = max(plain, logs) >= 0.15 and abs(plain - logs) < 0.05 and plain < 0.5
        return kind, None if not close else "log" if kind == "normalized" else "normalized"
    if plain >= 0.2 or root >= 0.2:
        return ("log" if root else "normalized"), None
    totals = np.asarray(x.sum(axis=1), np.float64).ravel()
    if np.ptp(totals) < 1e-3 * totals.mean():
        return "normalized", None
    dense = n_positive / size
    return ("intensity", "normalized" if dense < 0.6 else None) if dense > 0.4 else (
        "normalized", "intensity" if dense > 0.3 else None)  # fmt: skip


def value_kind(x: Any) -> Kind:
    """Recognise what a matrix holds.

    Parameters
    ----------
    x
        Cells by features, dense or sparse.

    Returns
    -------
    ``"counts"`` (whole; a background may have been subtracted), ``"normalized"`` (counts divided by something, not logged), ``"log"`` (logged, a root, or
    already on a comparably small non-negative scale), ``"intensity"`` (continuous and large, as from CODEX or imaging mass cytometry, perhaps rounded, cut at
    zero or negative after compensation), ``"scaled"`` (negative and small, as z-scores). No metadata are consulted, and neither the order of the cells nor the
    dtype matters.

    Raises
    ------
    ValueError
        If the matrix holds NaN or infinity.
    """
    return recognise(x)[0]


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
        What it holds, see :func:`value_kind`. Counts and normalised values: negative ones become zero, each cell's total becomes 10,000 (an empty cell
        stays zero), then ``log(1 + x)``. Intensities: ``arcsinh(x / scale)``. The others stay as they are.
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
        # What subtracting a background left below zero.
        if sp.issparse(y):
            np.maximum(y.data, 0, out=y.data)
        else:
            np.maximum(y, 0, out=y)
        totals = np.asarray(y[:, counted].sum(axis=1, dtype=np.float64)).ravel()
        factors = np.divide(TARGET_SUM, totals, out=np.zeros_like(totals), where=totals > 0)
        if sp.issparse(y):
            y.data = np.log1p(y.data * np.repeat(factors, np.diff(y.indptr))).astype(np.float32)
        else:
            y = np.log1p(y * factors[:, None]).astype(np.float32)
    return y
