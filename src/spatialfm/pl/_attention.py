"""Attention in the tissue and from type to type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from spatialfm._checks import check_positive, checked
from spatialfm._data._adata import get_coordinates, get_libraries
from spatialfm.get._attention_df import attention_df
from spatialfm.pl._heat_map import draw_enrichment
from spatialfm.pl._spatial import panel_size, spatial
from spatialfm.pl._style import MAX_SIZE, given_axes, grid, place_axes, resolve_colors, text_width

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection

_FIELD = (0.2, 0.3)  # inches of a field of a heat map, at least and at most
_HEAT = 3.5  # inches of a heat map, as far as that allows
_SCALE = 1.8  # inches of the colour scale with its title
_FAINT = 0.45  # opacity of cells below lines


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
    """Plot which neighbours cells attend to most, and attention from type to type against permuted types.

    A line joins a cell to a neighbour that it gives a large multiple of what it gives its neighbours on average, which the size of its context does
    not change; the larger, the darker and wider. What the smallest multiple drawn is, stands below each slide: near 1, the attention is all but uniform.

    In a heat map, columns attend to rows. Fields that the permutation test found at ``max_fdr`` have a star and a colour: brown where neighbours of that type
    get more attention than under permuted types, violet where they get less. Most of this is neighbourhood itself (see :func:`spatialfm.tl.attention`).

    Parameters
    ----------
    adata
        Cells after :func:`spatialfm.tl.attention`, or a part of them; not changed.
    key
        Its ``key_added``.
    color
        Column of ``obs`` or gene to colour cells by; the cell types that attention was computed for by default.
    n_edges
        Lines a slide.
    library_key
        Column of ``obs`` with the slide of each cell; that of :func:`spatialfm.tl.attention` by default.
    basis, size, palette, ncols
        As in :func:`spatial`.
    max_fdr
        False discovery rate up to which a field gets star and colour.
    ax
        Axes to draw into: one a slide and, where types were compared, one a condition.

    Returns
    -------
    The axes of the slides, then those of the heat maps.

    Raises
    ------
    KeyError
        If there is no attention under this key, or a column is missing.
    ValueError
        If ``ax`` does not fit the number of panels, or ``n_edges`` is not positive.
    """
    check_positive("n_edges", n_edges)
    attention_df(adata, key=key, level="genes")  # says what is missing
    entry = adata.uns[key]
    color = color or str(entry["params"]["groupby"]) or None
    library_key = library_key or str(entry["params"]["library_key"]) or None
    slides = get_libraries(adata, library_key)
    table = entry.get("types")
    # Without two neighbouring cells, no pair of types was tested.
    conditions = [] if table is None or not len(table) else list(table["condition"].astype("category").cat.categories)
    if ax is None:
        axes = _place(
            adata, color, table, conditions, library_key=library_key, basis=basis, palette=palette, ncols=ncols
        )
    else:
        axes = given_axes(ax, len(slides) + len(conditions))
    maps, heats = axes[: len(slides)], axes[len(slides) :]
    spatial(
        adata, color, library_key=library_key, basis=basis, img=False, size=size, alpha=_FAINT, palette=palette, ncols=ncols, ax=maps,
    )  # fmt: skip
    xy = get_coordinates(adata, basis)[:, :2]
    weights = sp.csr_matrix(adata.obsp[key])
    for panel, (_, rows) in zip(maps, slides, strict=True):
        lines, note = _strongest(weights[rows][:, rows], xy[rows], n_edges)
        panel.add_collection(lines)
        panel.text(0.5, -0.01, note, transform=panel.transAxes, ha="center", va="top", fontsize=7)
    for k, (panel, condition) in enumerate(zip(heats, conditions, strict=True)):
        shown = table[table["condition"] == condition]
        # One order on both sides and in all conditions.
        types = _types(table)
        wide = {
            c: shown.pivot(index="neighbor_type", columns="cell_type", values=c).reindex(index=types, columns=types)
            for c in ("attention", "expected", "fdr")
        }
        title = "Attention of columns to rows" if conditions == ["all"] else str(condition)
        last = k == len(heats) - 1
        draw_enrichment(
            panel, wide["attention"], wide["expected"], wide["fdr"] <= max_fdr, title=title, numbers=False, scale=last
        )
    return axes


def _types(table: Any) -> list[str]:
    present = set(table["cell_type"]) | set(table["neighbor_type"])
    return [c for c in table["cell_type"].astype("category").cat.categories if c in present]


def _place(
    adata: AnnData,
    color: str | None,
    table: Any,
    conditions: list[str],
    *,
    library_key: str | None,
    basis: str,
    palette: Any,
    ncols: int,
) -> list[Axes]:
    """Axes of the slides above, those of the heat maps below."""
    width, height = panel_size(adata, library_key=library_key, basis=basis)
    legend = resolve_colors(adata, color, palette=palette).legend_width
    n_slides = len(get_libraries(adata, library_key))
    boxes, (right, bottom) = grid(n_slides, [legend], width=width, height=height, ncols=ncols)
    bottom += 0.3
    if conditions:
        names = _types(table)
        side = len(names) * float(np.clip(_HEAT / len(names), *_FIELD))
        labels = max(text_width(v) for v in names) + 0.3
        foot = max(text_width(v) for v in names) * 0.65 + 0.3  # slanted
        step = labels + side + 0.2
        per_row = max(1, int((MAX_SIZE - 1.0) / step))
        for k in range(len(conditions)):
            row, column = divmod(k, per_row)
            boxes.append((column * step + labels, bottom + 0.35 + row * (side + foot + 0.4), side, side))
        right = max(right, *(x + w + 1.0 for x, _, w, _ in boxes[n_slides:]))
        bottom = boxes[-1][1] + max(side + foot, _SCALE)
    return place_axes(boxes, (right, bottom))


def _strongest(weights: sp.csr_matrix, xy: np.ndarray, n_edges: int) -> tuple[LineCollection, str]:
    """Lines of a slide's strongest edges, the strongest on top, and what they are."""
    from matplotlib.collections import LineCollection

    edges = weights.tocoo()
    degree = np.maximum(np.diff(weights.indptr), 1)
    mean = np.asarray(weights.sum(axis=1)).ravel() / degree
    times = np.divide(edges.data, mean[edges.row], out=np.zeros(edges.nnz), where=mean[edges.row] > 0)
    # Rounding must not choose among equals: of those, the order of the cells does.
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
    return lines, f"{len(top):,} of {edges.nnz:,} edges\n≥ {times[top].min():.2f} × the cell's mean"
