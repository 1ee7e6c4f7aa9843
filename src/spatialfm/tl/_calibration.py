"""Calibrate probabilities, and find thresholds and weights, on held-out predictions."""

from __future__ import annotations

import numpy as np
import pandas as pd

_SMALLEST = 1e-12
_N_BINS = 15
_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
_N_THRESHOLDS = 200
_ONE_SIDED = 1.6449  # quantile of the normal distribution for a one-sided 95 % bound


def find_temperature(probabilities: np.ndarray, codes: np.ndarray) -> float:
    """Temperature, between 1/20 and 20, with the highest likelihood of the true labels ``codes`` (n,).

    ``probabilities`` (n, labels) are held-out ones (Guo et al. 2017, https://arxiv.org/abs/1706.04599). Cells whose
    label has probability 0, because it was missing in training, are left out.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    mine = probabilities[np.arange(len(codes)), codes] > 0
    logs, codes = np.log(np.maximum(probabilities[mine], _SMALLEST)), codes[mine]
    if not len(codes):
        return 1.0

    def loss(log_temperature: float) -> float:
        scaled = logs / np.exp(log_temperature)
        return float((logsumexp(scaled, axis=1) - scaled[np.arange(len(codes)), codes]).mean())

    bound = np.log(20)
    return float(np.exp(minimize_scalar(loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-4}).x))


def with_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities (n, labels) after dividing their logarithms by a temperature; rows sum to 1."""
    from scipy.special import softmax

    return softmax(np.log(np.maximum(probabilities, _SMALLEST)) / temperature, axis=1)


def blended(probe: np.ndarray, network: np.ndarray, weight: float) -> np.ndarray:
    """Weighted geometric mean of two probabilities (n, labels); 0 where both are."""
    if not weight:
        return probe
    mixed = with_temperature(probe, 1.0) ** (1 - weight) * with_temperature(network, 1.0) ** weight
    mixed[(probe == 0) & (network == 0)] = 0
    return mixed / mixed.sum(axis=1, keepdims=True)


def find_weight(probe: np.ndarray, network: np.ndarray, codes: np.ndarray, units: list[np.ndarray]) -> float:
    """Weight of a network beside a probe, from the held-out predictions (n, labels) of both: 0, 0.25, 0.5, 0.75 or 1.

    It is the weight with the highest lower 95 % bound, over ``units`` (see :func:`lower_bound`), of the gain in
    log-likelihood, each after its own temperature; 0 where no bound is above zero without fewer correct labels.
    Macro F1 would depend on the few cells of rare labels.
    """
    mine = probe[np.arange(len(codes)), codes] > 0
    if not mine.any():
        return 0.0
    codes, units = codes[mine], [unit[mine] for unit in units]
    best, chosen = 0.0, 0.0
    before = np.zeros(0)
    for weight in _WEIGHTS:
        p = blended(probe[mine], network[mine], weight)
        p = with_temperature(p, find_temperature(p, codes))
        likelihood = np.log(np.maximum(p[np.arange(len(codes)), codes], _SMALLEST))
        right = (p.argmax(axis=1) == codes).sum()
        if not weight:
            before, right_before = likelihood, right
            continue
        sure = float(lower_bound(likelihood - before, np.zeros(len(codes), np.int64), 1, units)[0])
        if sure > best and right >= right_before:
            best, chosen = sure, weight
    return chosen


def lower_bound(values: np.ndarray, step: np.ndarray, n_steps: int, units: list[np.ndarray]) -> np.ndarray:
    """Lower 95 % bound (n_steps,) of the mean of the ``values`` (n,) whose ``step`` (n,) is this one or a later one.

    ``units`` are arrays (n,) with the number of the independent unit of each cell, such as blocks of tissue and slides;
    the largest of the standard errors counts.
    """
    lower = np.full(n_steps, np.inf)
    for unit in units:
        names = np.unique(unit, return_inverse=True)[1]
        n_units = names.max(initial=0) + 1
        cell = step * n_units + names
        # Counts (steps, units) of the cells from each step on, and the sums of their values.
        n, sums = (
            np.bincount(cell, weights=weights, minlength=n_steps * n_units)
            .reshape(n_steps, n_units)[::-1]
            .cumsum(0)[::-1]
            for weights in (np.ones(len(cell)), values)
        )
        total = n.sum(1)
        mean = sums.sum(1) / total
        used = (n > 0).sum(1)
        spread = np.sqrt(np.square(sums - mean[:, None] * n).sum(1) * used / np.maximum(used - 1, 1)) / total
        lower = np.minimum(lower, mean - _ONE_SIDED * spread)
    return lower


def reliability(confidence: np.ndarray, correct: np.ndarray) -> pd.DataFrame:
    """Accuracy by confidence, in those of 15 bins that hold any cell: ``n``, mean ``confidence``, ``accuracy``."""
    which = np.minimum((confidence * _N_BINS).astype(np.int64), _N_BINS - 1)
    n = np.bincount(which, minlength=_N_BINS)
    sums = [np.bincount(which, weights=v, minlength=_N_BINS) for v in (confidence, correct)]
    some = n > 0
    mean, accuracy = (s[some] / n[some] for s in sums)
    return pd.DataFrame({"n": n[some], "confidence": mean, "accuracy": accuracy})


def calibration_error(table: pd.DataFrame) -> float:
    """Compute the expected calibration error of a table of :func:`reliability`."""
    n, gap = table["n"].to_numpy(), np.abs(table["confidence"] - table["accuracy"]).to_numpy()
    return float((n * gap).sum() / n.sum())


def find_threshold(confidence: np.ndarray, correct: np.ndarray, units: list[np.ndarray], accuracy: float) -> float:
    """Smallest confidence from which held-out predictions reach an accuracy, with 95 % certainty; infinite if none.

    The lower bound of the accuracy is the smaller of Wilson's, for independent cells, and that over ``units`` (see
    :func:`lower_bound`). 200 quantiles of the confidences are tried.
    """
    steps = np.linspace(0, 1, _N_THRESHOLDS, endpoint=False)
    thresholds = np.unique(np.quantile(confidence, steps, method="lower"))
    step = np.searchsorted(thresholds, confidence, side="right") - 1
    total, right = (
        np.bincount(step, weights=weights, minlength=len(thresholds))[::-1].cumsum()[::-1]
        for weights in (np.ones(len(step)), correct.astype(np.float64))
    )
    reached = right / total
    z = _ONE_SIDED
    wilson = reached + z**2 / (2 * total) - z * np.sqrt(reached * (1 - reached) / total + z**2 / (4 * total**2))
    by_unit = lower_bound(correct.astype(np.float64), step, len(thresholds), units)
    enough = np.flatnonzero(np.minimum(wilson / (1 + z**2 / total), by_unit) >= accuracy)
    return float(thresholds[enough[0]]) if len(enough) else np.inf
