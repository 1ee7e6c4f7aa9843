"""Subpopulations in the tissue and what they live next to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatialfm._checks import get_libraries
from spatialfm.pl._spatial import panel_size, spatial
from spatialfm.pl._style import axes_size, given_axes, grid, place_axes, resolve_colors, text_width

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

_CELL = (0.62, 0.27)  # inches of a field of the heat map
_LIMIT = 2.0  # of the colour scale, log2


def subpopulations(
    adata: AnnData,
    key: str = "subpopulation",
    *,
    library_key: str | None = None,
    basis: str = "spatial",
    img: bool | None = None,
    size: float | None = None,
    palette: Mapping[str, Any] | Sequence[Any] | str | None = None,
    max_fdr: float = 0.05,
    ncols: int = 4,
    ax: Sequence[Axes] | None = None,
) -> list[Axes]:
    """Plot a map of the subpopulations of a cell type and a heat map of their neighbourhoods.

    A field of the heat map states which percentage of a subpopulation's neighbours is of a type. Fields that the permutation test found at
    ``max_fdr`` have a star and a colour: observed over expected, brown where there are more neighbours of that type than around all cells of
    the type that was split, violet where there are fewer.

    Parameters
    ----------
    adata
        Cells with subpopulations (:func:`spatialfm.tl.subpopulations`); not changed.
    key
        Key of ``obs`` and ``uns`` with the subpopulations.
    library_key, basis, img, size, palette, ncols
        As in :func:`spatial`.
    max_fdr
        False discovery rate up to which a field gets star and colour.
    ax
        Axes to draw into: one a slide and one for the heat map.

    Returns
    -------
    The axes of the slides, then that of the heat map.

    Raises
    ------
    KeyError
        If ``key`` does not stand in ``obs`` and ``uns``.
    ValueError
        If ``ax`` does not fit the number of panels.
    """
    entry = adata.uns.get(key)
    if key not in adata.obs or not isinstance(entry, Mapping) or "enrichment" not in entry:
        msg = f"key={key!r}: no subpopulations in obs and uns; run sfm.tl.subpopulations(adata, ..., key_added={key!r}) first"
        raise KeyError(msg)
    table = entry["enrichment"]
    names = [str(v) for v in entry["names"]]
    fraction, expected, fdr = (
        table.pivot(index="cell_type", columns="subpopulation", values=column).loc[:, names]
        for column in ("fraction", "expected", "fdr")
    )
    # Rows from the most to the least frequent neighbour; types that nobody neighbours say nothing.
    mean = expected.max(axis=1)
    rows = mean[mean > 0].sort_values(ascending=False, kind="stable").index
    fraction, expected, fdr = fraction.loc[rows], expected.loc[rows], fdr.loc[rows]

    n_slides = len(get_libraries(adata, library_key))
    if ax is None:
        colors = resolve_colors(adata, key, palette=palette)
        width, height = panel_size(adata, library_key=library_key, basis=basis)
        labels = max(text_width(str(v)) for v in rows) + 0.5
        boxes, (right, bottom) = grid(n_slides, [colors.legend_width], width=width, height=height, ncols=ncols)
        heat = (right + labels, 0.35, _CELL[0] * len(names), _CELL[1] * len(rows))
        foot = max(text_width(v) for v in names) * 0.75 + 0.5
        axes = place_axes([*boxes, heat], (heat[0] + heat[2] + 1.0, max(bottom, heat[1] + heat[3] + foot)))
    else:
        axes = given_axes(ax, n_slides + 1)
    spatial(
        adata, key, library_key=library_key, basis=basis, img=img, size=size, palette=palette, ncols=ncols, ax=axes[:-1]
    )
    _heat_map(axes[-1], fraction, expected, fdr <= max_fdr)
    return axes


def _heat_map(ax: Axes, fraction: pd.DataFrame, expected: pd.DataFrame, marked: pd.DataFrame) -> None:
    with np.errstate(divide="ignore", invalid="ignore"):
        change = np.clip(np.log2(fraction.to_numpy() / expected.to_numpy()), -_LIMIT, _LIMIT)
    image = ax.pcolormesh(
        np.ma.masked_where(~marked.to_numpy(), change),
        cmap="PuOr_r",
        vmin=-_LIMIT,
        vmax=_LIMIT,
        edgecolors="#EEEEEE",
        linewidth=0.5,
    )
    for (i, j), value in np.ndenumerate(fraction.to_numpy()):
        if np.isfinite(value):
            star = bool(marked.iloc[i, j])
            text = f"{100 * value:.{1 if value < 0.0995 else 0}f}" + ("*" if star else "")
            color = "white" if star and abs(change[i, j]) > 0.65 * _LIMIT else "black"
            ax.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=8, color=color)
    ax.invert_yaxis()
    ticks: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor", "fontsize": 9}
    ax.set_xticks(np.arange(fraction.shape[1]) + 0.5, fraction.columns, **ticks)
    ax.set_yticks(np.arange(fraction.shape[0]) + 0.5, fraction.index, fontsize=9)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title("% of neighbours", fontsize=11)
    width, height = axes_size(ax)
    inset = ax.inset_axes((1 + 0.12 / width, 1 - 1.6 / height, 0.13 / width, 1.4 / height))
    bar = ax.figure.colorbar(image, cax=inset, ticks=[-2, -1, 0, 1, 2])
    bar.outline.set_visible(False)
    inset.set_yticklabels(["≤ ¼", "½", "1", "2", "≥ 4"], fontsize=9)
    inset.set_title("× expected", fontsize=9, loc="left", pad=8)
