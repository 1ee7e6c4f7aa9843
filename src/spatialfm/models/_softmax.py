"""Exponentials of attention on a CPU: scale, mask, power of two and row sum in one pass over scores in cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit

if TYPE_CHECKING:
    from numpy.typing import NDArray


def _polynomial(degree: int) -> tuple[np.float32, ...]:
    """Coefficients of 2**f on [-1/2, 1/2], lowest first, interpolated at Chebyshev nodes."""
    fit = np.polynomial.chebyshev.Chebyshev.interpolate(np.exp2, degree, domain=[-0.5, 0.5])
    return tuple(np.float32(c) for c in fit.convert(kind=np.polynomial.Polynomial, domain=[-1, 1], window=[-1, 1]).coef)


_P0, _P1, _P2, _P3, _P4, _P5 = _polynomial(5)  # relative error 2e-7, that of float32
_Q0, _Q1, _Q2, _Q3 = _polynomial(3)  # 1e-4; bfloat16 has 4e-3
_LOW, _HIGH = np.float32(-126), np.float32(127)
# float32 has no fraction at this size: adding this number rounds, and leaves the integer in the low bits.
_ROUND = np.float32(1.5 * 2**23)
_ROUND_BITS = np.int32(0x4B400000)
_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "cache": True,
    "error_model": "numpy",
    "fastmath": {"contract", "reassoc", "nsz"},
}


@njit(inline="always", **_OPTIONS)
def _split(x):  # type: ignore[no-untyped-def]
    """Split into an integer, shifted to the bits of the exponent, and the rest. NaN stays in the rest."""
    x = _LOW if x < _LOW else x
    x = _HIGH if x > _HIGH else x
    whole = np.int32(np.float32(x + _ROUND).view(np.int32) - _ROUND_BITS)
    return np.int32(whole << np.int32(23)), x - np.float32(whole)


@njit(**_OPTIONS)
def masked_exp2_float32(
    scores: NDArray[np.float32],
    scale: np.float32,
    keep: NDArray[np.int32],
    total: NDArray[np.float32],
    recorded: tuple[NDArray[np.bool_], NDArray[np.float32]] | None,
) -> None:
    """Compute ``2 ** (scale * scores)`` of the kept entries in place, set others to 0, and sum each row.

    Parameters
    ----------
    scores
        (n, G, G).
    scale
        Factor.
    keep
        (G, G) int32: -1 for kept entries, 0 for others.
    total
        (n, G), written.
    recorded
        (n,) and (G, G): the matrices that the first marks are added to the second, each row divided by its sum.
    """
    for a in range(scores.shape[0]):
        for i in range(scores.shape[1]):
            row, bits, s = scores[a, i], keep[i], np.float32(0)
            for j in range(row.shape[0]):
                exponent, f = _split(row[j] * scale)
                p = ((((_P5 * f + _P4) * f + _P3) * f + _P2) * f + _P1) * f + _P0
                w = np.int32((np.float32(p).view(np.int32) + exponent) & bits[j])
                row[j] = np.int32(w).view(np.float32)
                s += np.int32(w).view(np.float32)
            total[a, i] = s
            if recorded is not None and recorded[0][a]:
                part, into = np.float32(1) / s, recorded[1][i]
                for j in range(row.shape[0]):
                    into[j] += row[j] * part


@njit(**_OPTIONS)
def masked_exp2_bfloat16(
    scores: NDArray[np.int16],
    scale: np.float32,
    keep: NDArray[np.int32],
    total: NDArray[np.float32],
    recorded: tuple[NDArray[np.bool_], NDArray[np.float32]] | None,
) -> None:
    """:func:`masked_exp2_float32` for bfloat16, whose bits (the upper half of a float32) are passed as int16."""
    for a in range(scores.shape[0]):
        for i in range(scores.shape[1]):
            row, bits, s = scores[a, i], keep[i], np.float32(0)
            for j in range(row.shape[0]):
                score = np.int32(np.int32(row[j]) << np.int32(16))
                exponent, f = _split(np.int32(score).view(np.float32) * scale)
                p = ((_Q3 * f + _Q2) * f + _Q1) * f + _Q0
                w = np.int32((np.float32(p).view(np.int32) + exponent + np.int32(0x8000)) & bits[j] & np.int32(-65536))
                row[j] = w >> np.int32(16)
                s += np.int32(w).view(np.float32)
            total[a, i] = s
            if recorded is not None and recorded[0][a]:
                part, into = np.float32(1) / s, recorded[1][i]
                for j in range(row.shape[0]):
                    into[j] += np.int32(np.int32(row[j]) << np.int32(16)).view(np.float32) * part
