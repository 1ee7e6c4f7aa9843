"""Niches of samples as bars, and differences between conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spatialfm._checks import checked
from spatialfm.get import niche_composition_df
from spatialfm.pl._style import (
    FONT,
    axes_size,
    category_colors,
    given_axes,
    place_axes,
    slanted_size,
    slanted_ticks,
    text_width,
)

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes

_BAR = 0.3  # width of the bar of a sample, inches
_GAP = 0.6  # between conditions, in bars
_ROW = 0.27  # height of the row of a niche, inches
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
    """Plot the niches of each sample as stacked bars, and how conditions differ.

    Where conditions were compared, a second panel shows the fold change of each niche against the reference condition,
    relative to the other niches: the difference of centred log-ratios. Lines are 95 % intervals over samples or
    patients. Points are filled where the permutation test found a difference.

    Parameters
    ----------
    adata
        Cells after :func:`spatialfm.tl.niche_composition`; not changed.
    %(result_key)s
    palette
        Colours of the niches: a list, a mapping from niche to colour, or the name of a colour map. Where None, those in
        ``uns["<niche_key>_colors"]``, otherwise the default.
    %(max_fdr)s
    ax
        Axes to draw into: one, or two where conditions were compared; a new figure where None.

    Returns
    -------
    The axes of the bars and, where conditions were compared, of the differences.

    Raises
    ------
    KeyError
        There is no result under ``key``.
    ValueError
        ``ax`` does not fit the number of panels.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()
    >>> sfm.tl.niche_composition(adata, "region", sample_key="mouse_id")
    >>> (bars,) = sfm.pl.niche_composition(adata)
    >>> bars.get_ylabel()
    'fraction of cells'
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
    position = np.arange(len(samples)) + _GAP * np.r_[0, np.cumsum(groups[1:] != groups[:-1])]
    if ax is None:
        axes = _layout(niches, [str(name) for name in samples["sample"]], float(position[-1]) + 1, tested)
    else:
        axes = given_axes(ax, 1 + tested)
    _bars(axes[0], table, samples, groups, position, niches, colors)
    if tested:
        _differences(axes[1], niche_composition_df(adata, key=key, table="differences"), niches, max_fdr)
    for panel in axes:
        panel.tick_params(labelsize=FONT, length=0)
        panel.spines[["top", "right", "left"]].set_visible(False)
    return axes


def _layout(niches: list[str], samples: list[str], bars: float, tested: bool) -> list[Axes]:
    names = max(text_width(name) for name in niches)
    left, foot = slanted_size(samples, _BAR)
    left = max(left, 0.6)
    tall = max(2.4, _ROW * len(niches))
    width = max(_BAR * bars, 1.0)
    boxes = [(left, 0.5, width, tall)]
    right = left + width + names + 0.6
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
    position: np.ndarray,
    niches: list[str],
    colors: list[Any],
) -> None:
    names = samples["sample"].to_numpy()
    shares = table.pivot(index="sample", columns="niche", values="proportion").loc[names, niches].to_numpy()
    below = np.zeros(len(names))
    drawn = []
    for k in range(len(niches))[::-1]:  # the first on top, as in the legend
        drawn.append(ax.bar(position, shares[:, k], 0.9, bottom=below, color=colors[k], label=niches[k], linewidth=0))
        below += shares[:, k]
    # matplotlib leaves out labels that start with an underscore unless the artists are named.
    ax.legend(
        drawn[::-1], niches,
        loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, fontsize=FONT, labelspacing=0.35,
        handlelength=1.0, handleheight=1.0,
    )  # fmt: skip
    slanted_ticks(ax, position, [str(name) for name in names])
    ax.set(ylim=(0, 1), xlim=(position[0] - 0.6, position[-1] + 0.6))
    ax.set_ylabel("fraction of cells", fontsize=FONT)
    for name in dict.fromkeys(groups):
        ax.text(position[groups == name].mean(), 1.02, str(name), ha="center", va="bottom", fontsize=FONT + 1)


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
    # Wide intervals of few samples are cut, so that the points can be compared.
    limit = max(1.5, 2.5 * float(np.abs(table["difference"]).max()) * log2)
    low, high = (float(np.clip(f(table[c]) * log2, -limit, limit)) for f, c in ((np.min, "low"), (np.max, "high")))
    margin = 0.05 * max(high - low, 1.0)
    # At least from half to twice, so that there are two ticks.
    ax.set_xlim(min(low, -1) - margin, max(high, 1) + margin)
    ticks = [t for t in ax.get_xticks() if ax.get_xlim()[0] <= t <= ax.get_xlim()[1] and float(t).is_integer()]
    ax.set_xticks(ticks, [f"{2**t:,.0f}" if t >= 0 else f"1/{2**-t:,.0f}" for t in ticks])
    ax.set_xlabel("fold change against the reference", fontsize=FONT)
    smallest = float(table["smallest_p"].max())
    title = f"95 % intervals; filled: FDR ≤ {max_fdr:g}\nsmallest p that this number can reach: {smallest:.2g}"
    ax.set_title(title, fontsize=FONT)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.45 / axes_size(ax)[1]), frameon=False, fontsize=FONT)
