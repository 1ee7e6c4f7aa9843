"""Splits of cells for cross-validation: whole blocks of tissue, slides or patients are held out."""

from __future__ import annotations

from typing import Any

import numpy as np


def check_folds(n_folds: Any) -> None:
    """Raise unless ``n_folds`` is a whole number of at least 2."""
    if isinstance(n_folds, bool) or not isinstance(n_folds, int | np.integer) or n_folds < 2:
        msg = f"n_folds must be a whole number from 2, got {n_folds!r}"
        raise ValueError(msg)


def spatial_blocks(xy: np.ndarray, slide: np.ndarray, *, per_side: int = 6) -> np.ndarray:
    """Block of each cell on a grid of ``per_side`` x ``per_side`` strips with about equally many cells, on each slide.

    Parameters
    ----------
    xy
        (n, 2) coordinates.
    slide
        (n,) position of each cell's slide.
    per_side
        Strips along each axis. Cells at the same location are in one block.

    Returns
    -------
    (n,) int64. Slides share no block; some numbers may be missing.
    """
    block = np.empty(len(xy), np.int64)
    inner = np.linspace(0, 1, per_side + 1)[1:-1]
    for s in np.unique(slide):
        rows = np.flatnonzero(slide == s)
        x, y = (np.searchsorted(np.quantile(axis, inner), axis) for axis in xy[rows, :2].T)
        block[rows] = (s * per_side + x) * per_side + y
    return block


def group_folds(groups: np.ndarray, n_folds: int) -> np.ndarray:
    """Fold of each cell, with whole groups in folds of about equal size.

    As :class:`sklearn.model_selection.GroupKFold`, the largest group goes to the smallest fold, in turn. There, an
    unstable sort decides between groups of the same size, such as blocks; here, their numbers do.

    Parameters
    ----------
    groups
        (n,) whole numbers from 0, what must stay together (blocks, slides, patients).
    n_folds
        At most the number of groups.

    Returns
    -------
    (n,) int64. It depends on the groups alone, not on the order of the cells.
    """
    names, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if not 2 <= n_folds <= len(names):
        msg = f"n_folds={n_folds} must be at least 2 and at most the {len(names)} groups"
        raise ValueError(msg)
    fold, load = np.empty(len(names), np.int64), np.zeros(n_folds, np.int64)
    for group in np.lexsort((names, -sizes)):
        fold[group] = load.argmin()
        load[fold[group]] += sizes[group]
    return fold[codes]
