"""UMAP of each part of an embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spatialfm._checks import checked
from spatialfm._data._adata import canonical_order, get_embedding
from spatialfm.pl._style import clear_frame, given_axes, grid, place_axes, resolve_colors

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

_PANEL = 3.8  # inches


@checked
def embedding_blocks(
    adata: AnnData,
    color: str | None = None,
    *,
    key: str = "heist",
    layer: str | None = None,
    n_neighbors: int = 15,
    size: float | None = None,
    cmap: str = "viridis",
    palette: Mapping[str, Any] | Sequence[Any] | str | None = None,
    rng: int | np.random.Generator | None = 0,
    ax: Sequence[Axes] | None = None,
) -> list[Axes]:
    """Plot a UMAP of each block of an embedding side by side, to see what each separates: ``cell``, the cell in its tissue, and ``gene``, its own state.

    The UMAPs are computed for the figure and thrown away.

    Parameters
    ----------
    adata
        Cells with an embedding (:func:`spatialfm.tl.embed`); not changed.
    color
        Column of ``obs`` or name of a gene.
    key
        ``uns[key]["blocks"]`` names the blocks, as ranges of the columns of ``obsm["X_<key>"]``.
    layer
        Layer with the expression of the gene in ``color``; ``X`` by default.
    n_neighbors
        Neighbours a cell in the graph below the UMAP.
    size
        Diameter of the points in inches on a panel of 3.8 inches; chosen from the number of cells by default.
    cmap
        Colour map of numbers.
    palette
        Colours of categories, as in :func:`spatial`.
    rng
        Seed or generator of the UMAP.
    ax
        Axes to draw into, one a block.

    Returns
    -------
    The axes, one a block.

    Raises
    ------
    KeyError
        If the embedding or its blocks are missing, or ``color`` is unknown.
    ValueError
        If ``n_neighbors`` does not fit the number of cells, or ``ax`` the number of blocks.
    """
    import scanpy as sc
    from anndata import AnnData

    colors = resolve_colors(adata, color, layer=layer, cmap=cmap, palette=palette)
    entry = adata.uns.get(key)
    blocks = entry.get("blocks") if isinstance(entry, Mapping) else None
    if f"X_{key}" not in adata.obsm:
        msg = f"key={key!r}: obsm['X_{key}'] is missing; run sfm.tl.embed(adata) first, or name the key_added= of that call"
        raise KeyError(msg)
    rep = get_embedding(adata, f"X_{key}")
    if not blocks:
        msg = f"uns[{key!r}]['blocks'] is missing: the models 'heist-niche' and 'heist' of sfm.tl.embed write it, others have one block (sc.tl.umap)"
        raise KeyError(msg)
    if not 2 <= n_neighbors < adata.n_obs:
        msg = f"n_neighbors={n_neighbors!r} must be at least 2 and less than the number of cells, {adata.n_obs}"
        raise ValueError(msg)
    if ax is None:
        boxes, figsize = grid(len(blocks), [colors.legend_width], width=_PANEL, height=_PANEL, ncols=len(blocks))
        axes = place_axes(boxes, figsize)
    else:
        axes = given_axes(ax, len(blocks))

    seed = int(np.random.default_rng(rng).integers(2**31))
    inches = size or float(np.clip(2.4 / np.sqrt(adata.n_obs), 0.013, 0.12))
    for panel, (name, (start, stop)) in zip(axes, blocks.items(), strict=True):
        columns = np.ascontiguousarray(rep[:, int(start) : int(stop)])
        order = canonical_order(columns)
        cells = AnnData(columns[order])
        sc.pp.neighbors(cells, n_neighbors=n_neighbors, use_rep="X", transformer="sklearn")
        sc.tl.umap(cells, random_state=seed)
        xy = np.empty((adata.n_obs, 2))
        xy[order] = cells.obsm["X_umap"]
        extent = 1.06 * np.ptp(xy, axis=0).max()
        low = (xy.min(axis=0) + xy.max(axis=0) - extent) / 2
        points = colors.draw(panel, xy, np.arange(adata.n_obs), diameter=inches / _PANEL * extent, alpha=1.0)
        panel.set(xlim=(low[0], low[0] + extent), ylim=(low[1], low[1] + extent), aspect="equal")
        panel.set_title(f"{name} block (UMAP)", fontsize=11)
        clear_frame(panel)
    colors.explain(points, axes[-1], titled=True)
    return axes
