"""Subpopulations on the tissue and their neighbourhoods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spatialfm._checks import checked
from spatialfm._data._adata import get_libraries
from spatialfm.get import subpopulations_df
from spatialfm.pl._heat_map import draw_enrichment
from spatialfm.pl._spatial import Img, MapOptions, draw_maps, panel_size
from spatialfm.pl._style import given_axes, grid, place_axes, resolve_colors, slanted_size, text_width

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

_CELL = (0.62, 0.27)  # width and height of an entry of the heat map, inches


@checked
def subpopulations(
    adata: AnnData,
    key: str = "subpopulation",
    *,
    library_key: str | None = None,
    basis: str = "spatial",
    img: Img = None,
    size: float | None = None,
    palette: Mapping[str, Any] | Sequence[Any] | str | None = None,
    max_fdr: float = 0.05,
    ncols: int = 4,
    ax: Sequence[Axes] | None = None,
) -> list[Axes]:
    """Plot a map of the subpopulations of a cell type and a heat map of their neighbourhoods.

    The heat map shows the percentage of the neighbours of a subpopulation that are of each type. A star and a colour
    mark what differs from all cells of the type that was split: brown for more neighbours, violet for fewer.

    Parameters
    ----------
    adata
        Cells with subpopulations (:func:`spatialfm.tl.subpopulations`); not changed.
    %(result_key)s
    %(panel_per_slide)s
    %(basis)s
    img
        Image to draw below the cells, as in :func:`spatial`: by default that of the slide, where there is one.
    %(size)s
    %(palette)s
    %(max_fdr)s
    %(ncols)s
    ax
        Axes to draw into: one for each slide and one for the heat map; a new figure where None.

    Returns
    -------
    The axes of the slides, then that of the heat map.

    Raises
    ------
    KeyError
        ``obs`` and ``uns`` hold no subpopulations under ``key``.
    ValueError
        ``ax`` does not fit the number of panels.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()
    >>> sfm.tl.embed(adata, library_key="mouse_id")
    >>> sfm.tl.subpopulations(adata, "celltype", "Astrocyte", n_clusters=3, n_permutations=50, library_key="mouse_id")
    >>> axes = sfm.pl.subpopulations(adata, library_key="mouse_id")
    >>> axes[-1].get_title()
    '% of neighbours'
    """
    table = subpopulations_df(adata, key=key)
    names = list(table["subpopulation"].cat.categories)
    fraction, expected, fdr = (
        table.pivot(index="cell_type", columns="subpopulation", values=column).loc[:, names]
        for column in ("fraction", "expected", "fdr")
    )
    # Rows from the most to the least frequent neighbour; types that are never neighbours are left out.
    mean = expected.max(axis=1)
    rows = mean[mean > 0].sort_values(ascending=False, kind="stable").index
    fraction, expected, fdr = fraction.loc[rows], expected.loc[rows], fdr.loc[rows]

    n_slides = len(get_libraries(adata, library_key))
    colors = resolve_colors(adata, key, palette=palette)
    if ax is None:
        width, height = panel_size(adata, library_key=library_key, basis=basis)
        left, foot = slanted_size(names, _CELL[0])
        left = max(left, max(text_width(str(v)) for v in rows) + 0.5)
        boxes, (right, bottom) = grid(n_slides, [colors.legend_width], width=width, height=height, ncols=ncols)
        heat = (right + left, 0.35, _CELL[0] * len(names), _CELL[1] * len(rows))
        axes = place_axes([*boxes, heat], (heat[0] + heat[2] + 1.0, max(bottom, heat[1] + heat[3] + foot)))
    else:
        axes = given_axes(ax, n_slides + 1)
    options = MapOptions(library_key=library_key, basis=basis, img=img, size=size, ncols=ncols)
    draw_maps(adata, [colors], options, ax=axes[:-1])
    draw_enrichment(axes[-1], fraction, expected, fdr <= max_fdr, title="% of neighbours")
    return axes
