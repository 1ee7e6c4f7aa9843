"""Heat map of what is more or less frequent than expected."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from spatialfm.pl._style import axes_size

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
    """Give fields that are ``marked`` a star and the colour of ``fraction / expected``.

    With ``numbers``, each field states its fraction in percent. ``scale`` puts the colour scale at the right.
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
            # The star's ink lies above the middle of its line.
            ax.text(j + 0.5, i + (0.5 if numbers else 0.62), text, ha="center", va="center", fontsize=8, color=color)
    ax.invert_yaxis()
    ticks: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor", "fontsize": 9}
    ax.set_xticks(np.arange(fraction.shape[1]) + 0.5, fraction.columns, **ticks)
    ax.set_yticks(np.arange(fraction.shape[0]) + 0.5, fraction.index, fontsize=9)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title(title, fontsize=11)
    if not scale:
        return
    width, height = axes_size(ax)
    inset = ax.inset_axes((1 + 0.12 / width, 1 - 1.6 / height, 0.13 / width, 1.4 / height))
    bar = ax.figure.colorbar(image, cax=inset, ticks=[-2, -1, 0, 1, 2])
    bar.outline.set_visible(False)
    inset.set_yticklabels(["≤ ¼", "½", "1", "2", "≥ 4"], fontsize=9)
    inset.set_title("× expected", fontsize=9, loc="left", pad=8)
