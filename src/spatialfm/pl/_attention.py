"""Attention on the tissue and from type to type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from spatialfm._checks import check_positive, checked
from spatialfm._data._adata import get_coordinates, get_libraries
from spatialfm.get import attention_df
from spatialfm.pl._heat_map import draw_enrichment
from spatialfm.pl._spatial import MapOptions, draw_maps, panel_size
from spatialfm.pl._style import (
    FONT,
    MAX_SIZE,
    Colors,
    given_axes,
    grid,
    place_axes,
    resolve_colors,
    slanted_size,
    text_width,
)

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection

_FIELD = (0.2, 0.3)  # smallest and largest side of an entry of a heat map, inches
_HEAT = 3.5  # side of a heat map within these limits, inches
_SCALE = 1.8  # height of the colour bar with its title, inches
_FAINT = 0.45  # opacity of the cells below the lines


@checked
def attention(
    adata: AnnData,
    key: str = "attention",
    *,
    color: str | None = None,
    n_edges: int = 500,
    library_key: str | None = None,
    basis: str = "spatial",
    size: float | None = None,
    palette: Mapping[str, Any] | Sequence[Any] | str | None = None,
    max_fdr: float = 0.05,
    ncols: int = 4,
    ax: Sequence[Axes] | None = None,
) -> list[Axes]:
    """Plot which neighbours cells attend to most, and attention from type to type.

    A line joins a cell to a neighbour that gets a multiple of the attention that the cell gives to its neighbours on
    average. Larger multiples are darker and wider. The note below each slide gives the smallest multiple drawn; where
    it is near 1, attention is nearly uniform.

    In a heat map, columns attend to rows. A star and a colour mark pairs of types that differ from permuted types:
    brown for more attention than expected, violet for less. Most of these differences are due to which types are
    neighbours (see :func:`spatialfm.tl.attention`).

    Parameters
    ----------
    adata
        Cells after :func:`spatialfm.tl.attention`, or a part of them; not changed.
    %(result_key)s
    color
        Column of ``obs`` or gene to colour cells by; where None, the types that attention was computed for.
    n_edges
        Number of lines in each slide.
    library_key
        Column of ``obs`` with the slide of each cell; that of :func:`spatialfm.tl.attention` where None.
    %(basis)s
    %(size)s
    %(palette)s
    %(max_fdr)s
    %(ncols)s
    ax
        Axes to draw into: one for each slide and, where types were compared, one for each condition.

    Returns
    -------
    The axes of the slides, then those of the heat maps.

    Raises
    ------
    KeyError
        There is no attention under ``key``, or a column is missing.
    ValueError
        ``ax`` does not fit the number of panels, or ``n_edges`` is not positive.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()
    >>> adata = adata[adata.obs["age"] == "3"][:150, :60].copy()
    >>> sfm.tl.attention(adata, groupby="celltype", n_permutations=20)
    >>> cells, heat_map = sfm.pl.attention(adata)
    >>> heat_map.get_title()
    'Attention from columns to rows'
    """
    check_positive("n_edges", n_edges)
    attention_df(adata, key=key, level="genes")  # raises where something is missing
    entry = adata.uns[key]
    color = color or str(entry["params"]["groupby"]) or None
    library_key = library_key or str(entry["params"]["library_key"]) or None
    slides = get_libraries(adata, library_key)
    table = entry.get("types")
    # Without two neighbouring cells, no pair of types was tested.
    conditions = [] if table is None or not len(table) else list(table["condition"].astype("category").cat.categories)
    colors = resolve_colors(adata, color, palette=palette)
    options = MapOptions(library_key=library_key, basis=basis, size=size, ncols=ncols, alpha=_FAINT)
    if ax is None:
        types = _types(table) if conditions else []
        axes = _layout(adata, colors, options, types, len(conditions))
    else:
        axes = given_axes(ax, len(slides) + len(conditions))
    maps, heats = axes[: len(slides)], axes[len(slides) :]
    draw_maps(adata, [colors], options, ax=maps)
    xy = get_coordinates(adata, basis)[:, :2]
    weights = sp.csr_matrix(adata.obsp[key])
    for panel, (_, rows) in zip(maps, slides, strict=True):
        lines, note = _strongest(weights[rows][:, rows], xy[rows], n_edges)
        panel.add_collection(lines)
        panel.text(0.5, -0.01, note, transform=panel.transAxes, ha="center", va="top", fontsize=7)
    for k, (panel, condition) in enumerate(zip(heats, conditions, strict=True)):
        shown = table[table["condition"] == condition]
        # Rows, columns and all conditions have the same order.
        types = _types(table)
        wide = {
            c: shown.pivot(index="neighbor_type", columns="cell_type", values=c).reindex(index=types, columns=types)
            for c in ("attention", "expected", "fdr")
        }
        title = "Attention from columns to rows" if conditions == ["all"] else str(condition)
        last = k == len(heats) - 1
        found = wide["fdr"] <= max_fdr
        draw_enrichment(panel, wide["attention"], wide["expected"], found, title=title, numbers=False, scale=last)
        if not found.to_numpy().any():
            note = f"no difference at FDR ≤ {max_fdr:g}"
            panel.text(0.5, 0.5, note, transform=panel.transAxes, ha="center", va="center", fontsize=FONT)
    return axes


def _types(table: Any) -> list[str]:
    present = set(table["cell_type"]) | set(table["neighbor_type"])
    return [c for c in table["cell_type"].astype("category").cat.categories if c in present]


def _layout(adata: AnnData, colors: Colors, options: MapOptions, names: list[str], n_conditions: int) -> list[Axes]:
    """Make a figure with the slides above and a heat map for each condition below."""
    width, height = panel_size(adata, library_key=options.library_key, basis=options.basis)
    n_slides = len(get_libraries(adata, options.library_key))
    boxes, (right, bottom) = grid(n_slides, [colors.legend_width], width=width, height=height, ncols=options.ncols)
    bottom += 0.3
    if n_conditions:
        side = len(names) * float(np.clip(_HEAT / len(names), *_FIELD))
        labels, foot = slanted_size(names, side / len(names))
        labels = max(labels, max(text_width(v) for v in names) + 0.3)
        step = labels + side + 0.2
        per_row = max(1, int((MAX_SIZE - 1.0) / step))
        for k in range(n_conditions):
            row, column = divmod(k, per_row)
            boxes.append((column * step + labels, bottom + 0.35 + row * (side + foot + 0.4), side, side))
        right = max(right, *(x + w + 1.0 for x, _, w, _ in boxes[n_slides:]))
        bottom = boxes[-1][1] + max(side + foot, _SCALE)
    return place_axes(boxes, (right, bottom))


def _strongest(weights: sp.csr_matrix, xy: np.ndarray, n_edges: int) -> tuple[LineCollection, str]:
    """Lines for the strongest edges of a slide, the strongest on top, and a note that says what is drawn."""
    from matplotlib.collections import LineCollection

    edges = weights.tocoo()
    degree = np.maximum(np.diff(weights.indptr), 1)
    mean = np.asarray(weights.sum(axis=1)).ravel() / degree
    times = np.divide(edges.data, mean[edges.row], out=np.zeros(edges.nnz), where=mean[edges.row] > 0)
    # Equal values up to rounding stay in the order of the cells.
    top = np.lexsort((edges.col, edges.row, -np.round(times, 9)))[:n_edges][::-1]
    if not len(top):
        return LineCollection([]), "no edges"
    strength = (times[top] - times[top].min()) / max(float(np.ptp(times[top])), 1e-12)
    lines = LineCollection(
        list(xy[np.column_stack([edges.row[top], edges.col[top]])]),
        colors=[(0.05, 0.05, 0.05, a) for a in 0.35 + 0.6 * strength],
        linewidths=0.5 + 1.5 * strength,
        capstyle="round",
        rasterized=True,
        zorder=2,
    )
    return lines, f"{len(top):,} of {edges.nnz:,} edges\nattention ≥ {times[top].min():.2f} × the mean of the cell"
