"""Confusion of transferred labels on held-out cells, and calibration of their probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from spatialfm._checks import checked
from spatialfm.get import annotation_df
from spatialfm.pl._style import (
    MAX_SIZE,
    PALETTE,
    axes_size,
    given_axes,
    place_axes,
    slanted_size,
    slanted_ticks,
    text_width,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes

_LARGEST, _SMALLEST = 0.36, 0.23  # inches of an entry of the heat map
_SIDE = 2.6  # inches of the reliability curve


@checked
def annotation(adata: AnnData, key: str = "annotation", *, ax: Sequence[Axes] | None = None) -> list[Axes]:
    """Plot the confusion of transferred labels on held-out cells and the calibration of their probabilities.

    A row of the heat map holds the cells of one label: the percentage that was given each label, and in the last column
    the percentage that is unsure. The number of labelled cells is at the right, the precision of each label below. Rows
    go from the most to the least frequent label.

    The curve at the right shows the fraction of correct labels by predicted probability; it follows the diagonal where
    probabilities are calibrated. The grey curve is before calibration. Larger points stand for more cells. Cells below
    the dotted line are unsure.

    Parameters
    ----------
    adata
        Cells after :func:`spatialfm.tl.annotate`; not changed.
    %(result_key)s
    ax
        Two axes to draw into, for the heat map and the curve; a new figure where None.

    Returns
    -------
    The axes of the heat map and of the curve.

    Raises
    ------
    KeyError
        Nothing was annotated under ``key``.
    ValueError
        ``ax`` does not hold two axes.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()
    >>> sfm.tl.embed(adata, library_key="mouse_id")
    >>> adata.obs["known"] = adata.obs["region"].where(adata.obs["age"] == "3")
    >>> sfm.tl.annotate(adata, groupby="known", library_key="mouse_id")
    >>> heat_map, curve = sfm.pl.annotation(adata)
    >>> curve.get_xlabel()
    'predicted probability'
    """
    table = annotation_df(adata, key=key)
    entry = adata.uns[key]
    # Labels of the same frequency stay in the order of the table.
    order = np.argsort(-table["n_labelled"].to_numpy(), kind="stable")
    confusion = np.asarray(entry["confusion"], float)[order][:, [*order, len(order)]]
    share = confusion / confusion.sum(axis=1, keepdims=True)
    labels = table["label"].to_numpy()[order].tolist()
    counts, precision = table["n_labelled"].to_numpy()[order], table["precision_sure"].to_numpy()[order]
    n = len(labels)
    if ax is None:
        left = max(text_width(v) for v in labels) + 0.25
        side = min(max((MAX_SIZE - left - _SIDE - 2.0) / (n + 1), _SMALLEST), _LARGEST)
        over, foot = slanted_size([*labels, "unsure"], side)
        left = max(left, over)
        width, height = side * (n + 1), side * n
        top = 0.6
        right = left + width + 1.55
        bottom = max(top + height + side + foot, top + _SIDE + 1.3)
        axes = place_axes([(left, top, width, height), (right, top, _SIDE, _SIDE)], (right + _SIDE + 0.15, bottom))
    else:
        axes = given_axes(ax, 2)
    _heat_map(axes[0], share, labels, counts, precision)
    _curve(axes[1], entry)
    return axes


def _heat_map(ax: Axes, share: np.ndarray, labels: list[str], counts: np.ndarray, precision: np.ndarray) -> None:
    n = len(labels)
    ax.pcolormesh(share, cmap="Blues", vmin=0, vmax=1, edgecolors="#EEEEEE", linewidth=0.5)
    ax.invert_yaxis()
    ax.axvline(n, color="black", linewidth=1)
    width, height = axes_size(ax)
    size = min(8.0, 72 * min(width / (n + 1), height / n) * 0.42)
    for (i, j), value in np.ndenumerate(share):
        if value >= 0.005:
            color = "white" if value > 0.6 else "black"
            ax.text(j + 0.5, i + 0.5, f"{100 * value:.0f}", ha="center", va="center", fontsize=size, color=color)
    for i, count in enumerate(counts):
        ax.text(n + 1.2, i + 0.5, f"{count:,}", ha="left", va="center", fontsize=8)
    for j, value in enumerate(precision):
        text = f"{100 * value:.0f}" if np.isfinite(value) else "–"
        ax.text(j + 0.5, n + 0.5, text, ha="center", va="center", fontsize=size, style="italic")
    ax.text(n + 1.2, n + 0.5, "precision, %", ha="left", va="center", fontsize=8, style="italic")
    ax.text(n + 1.2, -0.3, "cells", ha="left", va="center", fontsize=8)
    slanted_ticks(ax, np.arange(n + 1) + 0.5, [*labels, "unsure"])
    ax.set_yticks(np.arange(n) + 0.5, labels, fontsize=9)
    ax.tick_params(length=0)
    # The row of precisions is between the heat map and the labels.
    ax.tick_params(axis="x", pad=height / n * 72)
    ax.spines[:].set_visible(False)
    ax.set_title("% of held-out cells: label (rows), prediction (columns)", fontsize=10, loc="left", pad=18)


def _curve(ax: Axes, entry: Any) -> None:
    held_out = entry["held_out"]
    ax.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="--", zorder=1)
    for name, color, label, zorder in (
        ("reliability_before", "#9A9A9A", f"uncalibrated, error {held_out['calibration_error_before']:.3f}", 2),
        ("reliability", PALETTE[4], f"calibrated, error {held_out['calibration_error']:.3f}", 3),
    ):
        table = entry[name]
        n = table["n"].to_numpy()
        x, y = table["confidence"].to_numpy(), table["accuracy"].to_numpy()
        some = n > 0
        ax.plot(x[some], y[some], color=color, linewidth=1.2, label=label, zorder=zorder)
        ax.scatter(
            x[some], y[some], s=6 + 60 * n[some] / n.sum(), color=color, linewidths=0, clip_on=False, zorder=zorder
        )
    threshold = float(entry.get("threshold", 0))
    if threshold > 0:
        sure, right = 100 * held_out["coverage"], 100 * held_out["accuracy_sure"]
        text = f"unsure below {threshold:.2f}:\n{sure:.0f} % sure, {right:.0f} % of them correct"
        ax.axvline(threshold, color=PALETTE[3], linewidth=1, linestyle=":", label=text)
    ax.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    ax.set_xlabel("predicted probability", fontsize=9)
    ax.set_ylabel("fraction correct", fontsize=9)
    ax.set_title(f"{held_out['n_folds']} folds of {held_out['folds']}", fontsize=10, loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(-0.05, -0.2), handlelength=1.2)
