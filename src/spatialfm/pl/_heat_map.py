"""Heat map of observed over expected."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from spatialfm.pl._style import color_bar, slanted_ticks

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_LIMIT = 2.0  # of the colour scale, log2


def draw_enrichment(
    ax: Axes,
    fraction: pd.DataFrame,
    expected: pd.DataFrame,
    marked: pd.DataFrame,
    *,
    title: str,
    numbers: bool = True,
    scale: bool = True,
) -> None:
    """Give ``marked`` entries a star and the colour of ``fraction / expected``.

    With ``numbers``, each entry shows its fraction in percent. ``scale`` adds a colour bar at the right.
    """
    values, stars = fraction.to_numpy(dtype=np.float64), marked.to_numpy(dtype=bool)
    with np.errstate(divide="ignore", invalid="ignore"):
        change = np.clip(np.log2(values / expected.to_numpy(dtype=np.float64)), -_LIMIT, _LIMIT)
    image = ax.pcolormesh(
        np.ma.masked_where(~stars, change),
        cmap="PuOr_r",
        vmin=-_LIMIT,
        vmax=_LIMIT,
        edgecolors="#EEEEEE",
        linewidth=0.5,
    )
    for (i, j), value in np.ndenumerate(values):
        star = "*" if stars[i, j] else ""
        text = f"{100 * value:.{1 if value < 0.0995 else 0}f}{star}" if numbers and np.isfinite(value) else star
        color = "white" if star and abs(change[i, j]) > 0.65 * _LIMIT else "black"
        if text:
            # A star is drawn above the middle of its line.
            ax.text(j + 0.5, i + (0.5 if numbers else 0.62), text, ha="center", va="center", fontsize=8, color=color)
    ax.invert_yaxis()
    slanted_ticks(ax, np.arange(fraction.shape[1]) + 0.5, fraction.columns)
    ax.set_yticks(np.arange(fraction.shape[0]) + 0.5, fraction.index, fontsize=9)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title(title, fontsize=11)
    if scale:
        inset = color_bar(ax, image, left=0.12, top=0.2, height=1.4, ticks=[-2, -1, 0, 1, 2])
        inset.set_yticklabels(["≤ ¼", "½", "1", "2", "≥ 4"], fontsize=9)
        inset.set_title("× expected", fontsize=9, loc="left", pad=8)
