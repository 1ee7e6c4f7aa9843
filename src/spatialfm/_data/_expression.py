"""Read expression: recognise what values are, find unmeasured features, and normalise."""

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
"""What a user may pass as ``values``; ``"auto"`` recognises them."""

TARGET_SUM = 1e4
NOT_MEASURED = "not measured on every slide"
# log2(1 + 1e7) = 23; larger values are not logarithms of sequencing or imaging data.
_MAX_LOG = 25.0
# Standardised columns have a mean absolute value of at most 1, intensities of hundreds.
_MAX_SCALED = 10.0
# In float32, squares of larger numbers overflow, and sums of smaller ones vanish.
_LARGEST, _SMALLEST = 1e18, 1e-30
_MAX_CELLS = 20_000
# Fewer cells give no reliable variance.
_MIN_CELLS = 20
_CHUNK = 1 << 22
_ACTIONS = {
    "counts": "normalised to 10,000 a cell and logged",
    "normalized": "normalised to 10,000 a cell and logged",
    "intensity": "arcsinh-transformed",
}


@dataclass
class Expression:
    """Values of an AnnData as they are stored, and what they are."""

    x: Any
    """(n, f) finite values of the features that every slide measured, csr or dense, read-only."""
    kind: Kind
    features: np.ndarray
    """(f,) positions of these features in ``var``."""
    unmeasured: list[str]
    """Names of the other features."""

    def logged(self) -> Any:
        """Transform the values to a log-like scale, see :func:`log_normalize`."""
        return log_normalize(self.x, self.kind)


def read_values(
    adata: AnnData,
    layer: str | None = None,
    values: ValuesKind = "auto",
    *,
    slides: Sequence[tuple[str, np.ndarray]] = (),
) -> Expression:
    """Read ``X`` or a layer, and recognise what the values are unless ``values`` says it.

    Features that one of the ``slides`` (see :func:`spatialfm._data._adata.get_libraries`) lacks are left out with a
    warning.

    Raises
    ------
    KeyError, ValueError
        If the layer is missing, holds no real numbers or NaN, or ``values`` is unknown.
    """
    check_cells(adata)
    warn_off_tissue(adata)
    x, where = get_matrix(adata, layer), "X" if layer is None else f"layers[{layer!r}]"
    names = adata.var_names.astype(str)
    lacking = find_unmeasured([(x, slides or [("", np.arange(adata.n_obs))])])
    left_out = lacking.any(axis=0)
    if left_out.all() and len(names):
        msg = (
            f"{where} holds no feature that was measured on every slide; embed the slides one by one, or features that "
            "they share"
        )
        raise ValueError(msg)
    features = np.flatnonzero(~left_out)
    if left_out.any():
        x = x[:, features]
        warn_unmeasured(list(names[left_out]), lacking[:, left_out], [name for name, _ in slides])
    check_finite(x, where, names[features], joined=len(slides) > 1)
    return Expression(x, resolve_kind(x, values, where), features, list(names[left_out]))


def resolve_kind(x: Any, values: ValuesKind, where: str) -> Kind:
    """Return ``values``, or what is recognised for ``"auto"``, with a warning where two kinds are about as likely."""
    check_choice("values", values, get_args(ValuesKind))
    if values != "auto":
        return values
    kind, other = recognise(x)
    if other is not None:
        warn(
            "%s is taken to hold %s values (%s), but from the numbers alone they may be %s (%s); say which with "
            "values=%r or values=%r",
            where,
            kind,
            _ACTIONS.get(kind, "used as they are"),
            other,
            _ACTIONS.get(other, "used as they are"),
            kind,
            other,
        )
    n_negative = sum(int(np.count_nonzero(v < 0)) for v in _blocks(x)) if kind in ("counts", "normalized") else 0
    logger.info(
        "%s holds %s values: %s%s", where, kind, _ACTIONS.get(kind, "used as they are"),
        f"; {n_negative} negative ones, as after subtracting a background, count as zero" if n_negative else "",
    )  # fmt: skip
    return kind


def find_unmeasured(parts: Sequence[tuple[Any, Sequence[tuple[str, np.ndarray]]]]) -> np.ndarray:
    """Find the features that each slide did not measure, bool (slides, g).

    ``parts`` are matrices of the same features, each with its slides ``[(name, rows)]``. A feature was not measured on
    a slide if it is NaN in all cells, or zero in all cells where many cells of other slides have it. The expected
    number m of cells with the feature follows from the smallest share of such cells on the other slides (its lower
    bound of three standard deviations), corrected for the depth of the slide. With a factor of 3 for differences
    between tissues, the feature is zero by chance with probability ``exp(-m / 3)``. Features are taken from the largest
    m down, as long as at most 1 % of them are expected to be zero by chance.
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
    # Missing everywhere is no difference between slides; check_finite raises for it.
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
    """Warn of features (slides, names) that are left out because a slide lacks them."""
    which = [f"{slide!r} ({int(own.sum())})" for slide, own in zip(slides, lacking, strict=True) if own.any()]
    warn(
        "%d features (%s) are zero or missing in all cells of slides %s, though other slides have them: taken as not "
        "measured there and left out of all slides. To silence this, drop them, or keep the features that all slides "
        "share (join='inner')",
        len(names), _first(names), _first(which),
    )  # fmt: skip


def _first(names: Sequence[str], n: int = 5) -> str:
    return ", ".join(map(str, names[:n])) + (", ..." if len(names) > n else "")


def _blocks(x: Any) -> Iterator[np.ndarray]:
    """Yield the stored values in blocks of bounded size."""
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
    """Raise where values are NaN, infinite, or out of the range of float32.

    ``joined`` is whether the slides are known, which the message depends on.
    """
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
            "" if joined else ", or name joined slides with library_key=: features that a slide lacks are then left out"
        )
        msg = (
            f"{where} holds {n_bad} NaN or infinite values, in {len(columns)} features{which}; leave out these "
            f"features or the cells without them{slides}. sfm.tl.impute fills single values. Zeros in their place "
            "would pass for measurements"
        )
        raise ValueError(msg)
    if largest > _LARGEST or 0 < largest < _SMALLEST:
        msg = (
            f"{where} holds values of up to {largest:.2g}, out of the range of float32; convert them to "
            f"another unit, e.g. adata.X / {largest:.0e}"
        )
        raise ValueError(msg)


def hash_cells(x: Any) -> np.ndarray:
    """Hash the values of each cell, (n_cells,) uint64, for a random order that depends on their content alone.

    Rows with the same numbers have the same hash, whatever their layout and dtype, as the sums are exact (modulo
    2**64). Only identical cells tie.
    """
    weights = np.random.default_rng(0).integers(1, 2**63, size=x.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(
        1
    )

    def mix(values: np.ndarray) -> np.ndarray:
        # + 0.0 turns -0.0 into 0.0, whose bits (and hash) are zero.
        z = (values.astype(np.float64) + 0.0).view(np.uint64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    if sp.issparse(x):
        x = x.tocsr()
        mixed = np.concatenate([mix(v) for v in _blocks(x)] or [np.empty(0, np.uint64)])
        return sp.csr_matrix((mixed, x.indices, x.indptr), shape=x.shape) @ weights
    return np.concatenate([mix(v) @ weights for v in _blocks(x)] or [np.empty(0, np.uint64)])


def location_order(x: Any, locations: np.ndarray) -> np.ndarray:
    """Sort cells by ``locations``, and by content ``x`` at the same location, whatever the order of the rows."""
    return np.lexsort((hash_cells(x), *locations.T[::-1]))


def _lattice(x: sp.csr_matrix, undo: str | None) -> float:
    """Share of values that are integer multiples of the smallest value of their cell.

    A root (``undo="sqrt"``) or a logarithm is undone first. Normalised counts are such multiples, whatever each cell
    was divided by; 4 % of other values are, by chance.
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
    """Draw at most ``n`` cells by their content, whatever the order of the rows."""
    return x[np.argsort(hash_cells(x), kind="stable")[:n]] if x.shape[0] > n else x


def _dispersion(x: Any) -> float:
    """Variance over mean of the least dispersed tenth of the features: about 1 for counts of molecules.

    The variance is about the feature's mean, or about one share of the cells' totals, whichever is less: what remains
    is noise of counting and biology.
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
    """Whether these are counts minus a background: integers after adding a number to each cell, or to each feature."""
    y = _sample(x, max(200, _CHUNK // max(1, x.shape[1])))
    y = (y.toarray() if sp.issparse(y) else np.asarray(y)).astype(np.float64)
    for axis in (0, 1):
        # The precision of float32 for numbers of this size.
        up = y - y.min(axis=axis, keepdims=True)
        if up.max() > 1.5 and np.abs(up - np.rint(up)).max() < 1e-3:
            return True
    return False


def _recognise_whole(x: Any, n_ones: int, n_positive: int, size: int) -> tuple[Kind, Kind | None]:
    """Distinguish counts from rounded intensities: many counts are 1, or some features vary as counts do."""
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
    """Recognise what a matrix holds, see :func:`value_kind`, and a second kind that is about as likely, if any."""
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
        # Negative values are half of the absolute sum of centred ones.
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
    """Recognise non-negative values that are not all integers."""
    sample = sp.csr_matrix(_sample(x, _MAX_CELLS), copy=True)
    sample.eliminate_zeros()
    plain, root = _lattice(sample, None), _lattice(sample, "sqrt")
    root = root if root > plain + 0.05 else 0.0  # squares of integers are integers too
    if high <= _MAX_LOG:
        # At least, not above: values as small as 0.001 fit all of these, and are no logarithms of counts.
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
    ``"counts"`` (integers; a background may have been subtracted), ``"normalized"`` (divided counts, not logged),
    ``"log"`` (logarithms, roots, or similarly small non-negative values), ``"intensity"`` (continuous and large, as
    from CODEX or imaging mass cytometry, also rounded, cut at zero or negative after compensation), ``"scaled"``
    (negative and small, as z-scores). The order of the cells and the dtype do not matter.

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
    """Transform a matrix to a log-like scale.

    Parameters
    ----------
    x
        Cells by features, dense or sparse; it is not changed.
    kind
        What it holds, see :func:`value_kind`. Counts and normalised values: negative ones become zero, each cell's
        total becomes 10,000 (an empty cell stays zero), then ``log(1 + x)``. Intensities: ``arcsinh(x / scale)``. The
        others stay as they are.
    scale
        For intensities, a positive number for each column; by default its median absolute value.
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
        # Negative after a background was subtracted.
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
