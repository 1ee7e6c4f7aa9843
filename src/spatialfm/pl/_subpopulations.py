"""Subpopulations in the tissue and what they live next to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spatialfm._checks import checked
from spatialfm._data._adata import get_libraries
from spatialfm.get._subpopulations_df import subpopulations_df
from spatialfm.pl._heat_map import draw_enrichment
from spatialfm.pl._spatial import panel_size, spatial
from spatialfm.pl._style import given_axes, grid, place_axes, resolve_colors, text_width

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

_CELL = (0.62, 0.27)  # inches of a field of the heat map


@checked
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
    table = subpopulations_df(adata, key=key)
    names = list(table["subpopulation"].cat.categories)
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
    draw_enrichment(axes[-1], fraction, expected, fdr <= max_fdr, title="% of neighbours")
    return axes
