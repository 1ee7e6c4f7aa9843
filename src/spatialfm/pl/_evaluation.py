"""Scores of embeddings and baselines, with intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from spatialfm._checks import checked
from spatialfm.get import evaluation_df
from spatialfm.pl._style import FONT, PALETTE, given_axes, place_axes, text_width

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes

_ROW = 0.3  # height of the row of an embedding, inches
_LABEL_ROW = 0.24  # height of the row of a label, inches
_WIDTH = 2.0  # of a panel, inches
_GAP = 0.6  # width of the column of values, inches
_TITLES = {"macro_f1": "macro F1", "accuracy": "accuracy"}
_GREYS = ("#4D4D4D", "#808080", "#A6A6A6", "#BFBFBF", "#D3D3D3")
_MARKERS = "sD^vP"


@checked
def evaluation(
    adata: AnnData, key: str = "evaluation", *, per_label: bool = True, ax: Sequence[Axes] | None = None
) -> list[Axes]:
    """Plot how well embeddings predict labels, beside baselines, and the score of each label.

    Lines are 95 % intervals over the blocks, slides or patients that were held out; there are none with fewer than five
    of these. Overlapping intervals do not mean that two embeddings are equal: the interval of their difference is in
    ``sfm.get.evaluation_df(adata, differences=True)``. Baselines are grey.

    Parameters
    ----------
    adata
        Cells after :func:`spatialfm.tl.evaluate`; not changed.
    %(result_key)s
    per_label
        Also draw the F1 of each label, from the highest to the lowest of the first embedding, with the number of cells.
    ax
        Two axes to draw into, three with ``per_label``; a new figure where None.

    Returns
    -------
    The axes of macro F1, of accuracy and, with ``per_label``, of the labels.

    Raises
    ------
    KeyError
        Nothing was evaluated under ``key``.
    ValueError
        ``ax`` does not fit the number of panels.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.codex_mouse_spleen()
    >>> sfm.tl.embed(adata)
    >>> sfm.tl.evaluate(adata, "compartment", baselines=["majority"], n_bootstrap=50)
    >>> axes = sfm.pl.evaluation(adata)
    >>> [ax.get_title() for ax in axes]
    ['macro F1', 'accuracy', 'F1 of each label']
    """
    table = evaluation_df(adata, key=key)
    entry = adata.uns[key]
    names = list(dict.fromkeys(table["embedding"]))
    baseline = dict(zip(table["embedding"], table["is_baseline"], strict=True))
    styles = _styles(names, baseline)
    labels = table[(table["metric"] == "f1") & (table["embedding"] == names[0])].sort_values(
        "value", ascending=False, kind="stable"
    )
    if ax is None:
        axes = _layout(
            names, [f"{label} ({n:,})" for label, n in zip(labels["label"], labels["n_cells"], strict=True)], per_label
        )
    else:
        axes = given_axes(ax, 2 + per_label)
    for panel, metric in zip(axes, _TITLES, strict=False):
        own = table[table["metric"] == metric].set_index("embedding").loc[names]
        _intervals(panel, own, np.arange(len(names)), [styles[name] for name in names])
        panel.set_yticks(np.arange(len(names)), names if panel is axes[0] else [""] * len(names))
        for at, value in enumerate(own["value"]):
            panel.text(1.04, at, f"{value:.3f}", va="center", fontsize=FONT)
        panel.set_ylim(len(names) - 0.4, -0.6)
        panel.set_title(_TITLES[metric], fontsize=FONT + 1.5)
    units = "blocks" if entry["split"] == "random" else entry["split"]
    how = (
        "random cells (neighbours of test cells were seen)"
        if entry["split"] == "random"
        else f"{entry['n_units']} {units}"
    )
    axes[0].set_xlabel(f"{entry['n_cells']:,} cells, {entry['n_folds']} folds of {how}", fontsize=FONT, loc="left")
    if per_label:
        _labels(axes[2], table, labels, names, styles)
    for panel in axes:
        panel.set_xlim(-0.02, 1.02)
        panel.grid(axis="x", color="#E6E6E6", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.tick_params(labelsize=FONT, length=0)
        panel.spines[["top", "right", "left"]].set_visible(False)
    return axes


def _styles(names: list[str], baseline: dict[str, bool]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each embedding; baselines are grey."""
    colors = ["#0072B2", "#D55E00", "#009E73", *(c for c in PALETTE if c not in ("#0072B2", "#D55E00", "#009E73"))]
    own = [name for name in names if not baseline[name]]
    plain = [name for name in names if baseline[name]]
    return {name: (colors[k % len(colors)], "o") for k, name in enumerate(own)} | {
        name: (_GREYS[k % len(_GREYS)], _MARKERS[k % len(_MARKERS)]) for k, name in enumerate(plain)
    }


def _layout(names: list[str], labels: list[str], per_label: bool) -> list[Axes]:
    left = max(text_width(name) for name in names) + 0.35
    height = max(_ROW * len(names), 1.2)
    boxes = [(left + k * (_WIDTH + _GAP), 0.4, _WIDTH, height) for k in range(2)]
    size = [left + 2 * (_WIDTH + _GAP), height + 0.95]
    if per_label:
        x = size[0] + max(text_width(label) for label in labels) + 0.2
        tall = max(_LABEL_ROW * len(labels), height)
        boxes.append((x, 0.4, _WIDTH * 1.2, tall))
        size = [x + _WIDTH * 1.2 + max(text_width(name) for name in names) + 0.6, tall + 0.95]
    return place_axes(boxes, (size[0], size[1]))


def _intervals(ax: Axes, table: pd.DataFrame, y: np.ndarray, styles: list[tuple[str, str]], size: float = 6.5) -> None:
    """Points with their intervals, one for each row of the table."""
    columns = (table[c].to_numpy(dtype=np.float64) for c in ("value", "low", "high"))
    for value, low, high, at, (color, marker) in zip(*columns, y, styles, strict=True):
        ax.plot([low, high], [at, at], color=color, linewidth=1.6, solid_capstyle="butt")
        ax.plot([value], [at], marker=marker, color=color, markersize=size, markeredgewidth=0)


def _labels(
    ax: Axes, table: pd.DataFrame, labels: pd.DataFrame, names: list[str], styles: dict[str, tuple[str, str]]
) -> None:
    """F1 of each label: embeddings with intervals, baselines as small marks behind."""
    order = list(labels["label"])
    f1 = table[table["metric"] == "f1"]
    own = [name for name in names if styles[name][1] == "o"]
    marks = {}
    for name in [*(n for n in names if n not in own), *own]:
        rows = f1[f1["embedding"] == name].set_index("label").loc[order]
        # Shifted, so that intervals do not cover each other.
        shift = (own.index(name) - (len(own) - 1) / 2) * 0.6 / max(len(own), 2) if name in own else 0.0
        if name not in own:
            rows = rows.assign(low=np.nan, high=np.nan)
        _intervals(ax, rows, np.arange(len(order)) + shift, [styles[name]] * len(order), 5.0 if name in own else 4.0)
        color, marker = styles[name]
        (marks[name],) = ax.plot([], [], linestyle="", marker=marker, color=color, markeredgewidth=0, markersize=6)
    for k in range(0, len(order), 2):
        ax.axhspan(k - 0.5, k + 0.5, color="#F7F7F7", linewidth=0, zorder=-1)
    ticks = [f"{label} ({n:,})" for label, n in zip(order, labels["n_cells"], strict=True)]
    ax.set_yticks(np.arange(len(order)), ticks)
    ax.set_ylim(len(order) - 0.5, -0.5)
    ax.set_title("F1 of each label", fontsize=FONT + 1.5)
    ax.legend(
        [marks[name] for name in names], names,
        loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=FONT, handletextpad=0.2,
    )  # fmt: skip
