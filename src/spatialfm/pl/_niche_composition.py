"""Niches of samples as bars, and how conditions differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spatialfm._checks import checked
from spatialfm.get._niche_composition_df import niche_composition_df
from spatialfm.pl._style import axes_size, category_colors, given_axes, place_axes, text_width

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes

_FONT = 9.0
_BAR = 0.3  # inches of a sample
_GAP = 0.6  # of a bar, between conditions
_ROW = 0.27  # inches of a niche
_COMPARED = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@checked
def niche_composition(
    adata: AnnData,
    key: str = "niche_composition",
    *,
    palette: Mapping[str, Any] | Sequence[Any] | str | None = None,
    max_fdr: float = 0.05,
    ax: Sequence[Axes] | None = None,
) -> list[Axes]:
    """Plot the niches of each sample as stacked bars, grouped by condition, and where they were compared how conditions differ.

    The difference of centred log-ratios is drawn in powers of two: at 2 a niche is twice as much as in the reference condition, relative to the other niches.
    Lines are 95 % intervals over samples or patients; points are filled where the false discovery rate of the permutation test is at most ``max_fdr``.

    Parameters
    ----------
    adata
        Cells after :func:`spatialfm.tl.niche_composition`; not changed.
    key
        Its ``key_added``.
    palette
        Colours of the niches: a mapping, a sequence, or the name of a colour map. None: those of ``uns["{niche_key}_colors"]``, or the default.
    max_fdr
        False discovery rate up to which points are filled.
    ax
        Axes to draw into, one, or two where conditions were compared.

    Returns
    -------
    The axes of the bars and, where conditions were compared, of the differences.

    Raises
    ------
    KeyError
        If there is nothing under this key.
    ValueError
        If ``ax`` does not hold as many axes.
    """
    table = niche_composition_df(adata, key=key)
    entry = adata.uns[key]
    niches = [str(name) for name in entry["niches"]]
    colors = category_colors(adata, str(entry["params"]["niche_key"]), niches, palette)
    tested = "differences" in entry
    samples = table.drop_duplicates("sample")
    if "condition" in samples:
        order = {str(name): k for k, name in enumerate(entry["conditions"])}
        samples = samples.iloc[np.argsort([order[c] for c in samples["condition"]], kind="stable")]
    groups = samples["condition"].to_numpy() if "condition" in samples else np.full(len(samples), "")
    place = np.arange(len(samples)) + _GAP * np.r_[0, np.cumsum(groups[1:] != groups[:-1])]
    if ax is None:
        axes = _layout(niches, [str(name) for name in samples["sample"]], float(place[-1]) + 1, tested)
    else:
        axes = given_axes(ax, 1 + tested)
    _bars(axes[0], table, samples, groups, place, niches, colors)
    if tested:
        _differences(axes[1], niche_composition_df(adata, key=key, table="differences"), niches, max_fdr)
    for panel in axes:
        panel.tick_params(labelsize=_FONT, length=0)
        panel.spines[["top", "right", "left"]].set_visible(False)
    return axes


def _layout(niches: list[str], samples: list[str], bars: float, tested: bool) -> list[Axes]:
    names = max(text_width(name) for name in niches)
    foot = 0.75 * max(text_width(name) for name in samples) + 0.35
    tall = max(2.4, _ROW * len(niches))
    width = max(_BAR * bars, 1.0)
    boxes = [(0.6, 0.5, width, tall)]
    right = 0.6 + width + names + 0.6
    if tested:
        right += names + 0.2
        boxes.append((right, 0.5, 3.0, tall))
        right += 3.1
    return place_axes(boxes, (right, 0.5 + tall + max(foot, 0.95 if tested else 0.0)))


def _bars(
    ax: Axes,
    table: pd.DataFrame,
    samples: pd.DataFrame,
    groups: np.ndarray,
    place: np.ndarray,
    niches: list[str],
    colors: list[Any],
) -> None:
    names = samples["sample"].to_numpy()
    shares = table.pivot(index="sample", columns="niche", values="proportion").loc[names, niches].to_numpy()
    below = np.zeros(len(names))
    drawn = []
    for k in range(len(niches))[::-1]:  # the first on top, as in the legend
        drawn.append(ax.bar(place, shares[:, k], 0.9, bottom=below, color=colors[k], label=niches[k], linewidth=0))
        below += shares[:, k]
    # By the artists: by their labels, matplotlib would leave out those that start with an underscore.
    ax.legend(
        drawn[::-1], niches,
        loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, fontsize=_FONT, labelspacing=0.35, handlelength=1.0, handleheight=1.0,
    )  # fmt: skip
    ticks: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor", "fontsize": _FONT}
    ax.set_xticks(place, [str(name) for name in names], **ticks)
    ax.set(ylim=(0, 1), xlim=(place[0] - 0.6, place[-1] + 0.6))
    ax.set_ylabel("share of cells", fontsize=_FONT)
    for name in dict.fromkeys(groups):
        ax.text(place[groups == name].mean(), 1.02, str(name), ha="center", va="bottom", fontsize=_FONT + 1)


def _differences(ax: Axes, table: pd.DataFrame, niches: list[str], max_fdr: float) -> None:
    pairs = list(dict.fromkeys(zip(table["condition"], table["reference"], strict=True)))
    log2 = 1 / np.log(2)
    for k, (condition, reference) in enumerate(pairs):
        rows = table[(table["condition"] == condition).to_numpy()].set_index("niche").loc[niches]
        y = np.arange(len(niches)) + (k - (len(pairs) - 1) / 2) * 0.7 / len(pairs)
        color = _COMPARED[k % len(_COMPARED)]
        columns = (rows[c].to_numpy(dtype=np.float64) for c in ("difference", "low", "high", "fdr"))
        for value, low, high, fdr, at in zip(*columns, y, strict=True):
            ax.plot([low * log2, high * log2], [at, at], color=color, linewidth=1.5, solid_capstyle="butt", zorder=2)
            fill = color if fdr <= max_fdr else "white"
            ax.plot([value * log2], [at], "o", markersize=6, markeredgecolor=color, markerfacecolor=fill, zorder=3)
        n = int(rows["n_condition"].iloc[0]), int(rows["n_reference"].iloc[0])
        ax.plot([], [], "o", color=color, label=f"{condition} ({n[0]}) against {reference} ({n[1]})")
    ax.axvline(0, color="#999999", linewidth=1, zorder=1)
    for k in range(0, len(niches), 2):
        ax.axhspan(k - 0.5, k + 0.5, color="#F7F7F7", linewidth=0, zorder=0)
    ax.set_yticks(np.arange(len(niches)), niches)
    ax.set_ylim(len(niches) - 0.5, -0.5)
    # Wide intervals of few samples must not hide where the points are: what lies beyond is cut.
    limit = max(1.5, 2.5 * float(np.abs(table["difference"]).max()) * log2)
    low, high = (float(np.clip(f(table[c]) * log2, -limit, limit)) for f, c in ((np.min, "low"), (np.max, "high")))
    margin = 0.05 * max(high - low, 1.0)
    # From half to twice at least: without two ticks there is no scale.
    ax.set_xlim(min(low, -1) - margin, max(high, 1) + margin)
    ticks = [t for t in ax.get_xticks() if ax.get_xlim()[0] <= t <= ax.get_xlim()[1] and float(t).is_integer()]
    ax.set_xticks(ticks, [f"{2**t:,.0f}" if t >= 0 else f"1/{2**-t:,.0f}" for t in ticks])
    ax.set_xlabel("times the reference, relative to the other niches", fontsize=_FONT)
    smallest = float(table["smallest_p"].max())
    title = f"95 % intervals; filled: FDR ≤ {max_fdr:g}\nsmallest p that so few can reach: {smallest:.2g}"
    ax.set_title(title, fontsize=_FONT)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.45 / axes_size(ax)[1]), frameon=False, fontsize=_FONT)
