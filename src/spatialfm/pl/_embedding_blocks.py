"""UMAPs of embeddings side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spatialfm._checks import checked
from spatialfm._data._adata import canonical_order
from spatialfm._data._embeddings import NICHE_AND_STATE, get_embedding, rep_keys
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
    use_rep: str | Sequence[str] = NICHE_AND_STATE,
    layer: str | None = None,
    n_neighbors: int = 15,
    size: float | None = None,
    cmap: str = "viridis",
    palette: Mapping[str, Any] | Sequence[Any] | str | None = None,
    rng: int | np.random.Generator | None = 0,
    ncols: int = 4,
    ax: Axes | Sequence[Axes] | None = None,
) -> list[Axes]:
    """Plot a UMAP of each embedding side by side.

    With the default keys, compare what separates in the niche of a cell with what separates in its state. The UMAPs are
    computed for the figure and not stored.

    Parameters
    ----------
    adata
        Cells with embeddings (:func:`spatialfm.tl.embed`); not changed.
    color
        Column of ``obs`` or name of a gene; all points are grey where None.
    use_rep
        One or several keys of ``obsm``, a panel for each.
    %(layer)s
    n_neighbors
        Neighbours of each cell in the graph from which a UMAP is computed.
    size
        Diameter of the points in inches, on a panel of 3.8 inches; chosen from the number of cells where None.
    %(cmap)s
    %(palette)s
    %(rng)s
    %(ncols)s
    %(ax)s

    Returns
    -------
    The axes, one for each key.

    Raises
    ------
    KeyError
        An embedding is missing, or ``color`` is unknown.
    ValueError
        ``n_neighbors`` does not fit the number of cells, or ``ax`` the number of panels.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.codex_mouse_spleen()[:300].copy()
    >>> sfm.tl.embed(adata)
    >>> axes = sfm.pl.embedding_blocks(adata, "cell_type")
    >>> [ax.get_title() for ax in axes]
    ['UMAP of X_niche', 'UMAP of X_state']
    """
    keys = rep_keys(use_rep)
    if not keys:
        msg = "use_rep is empty; name at least one embedding in obsm"
        raise ValueError(msg)
    colors = resolve_colors(adata, color, layer=layer, cmap=cmap, palette=palette)
    reps = [get_embedding(adata, key) for key in keys]
    if not 2 <= n_neighbors < adata.n_obs:
        msg = f"n_neighbors={n_neighbors!r} must be at least 2 and less than the number of cells, {adata.n_obs}"
        raise ValueError(msg)
    if ax is None:
        boxes, figsize = grid(len(keys), [colors.legend_width], width=_PANEL, height=_PANEL, ncols=ncols)
        axes = place_axes(boxes, figsize)
    else:
        axes = given_axes(ax, len(keys))

    seed = int(np.random.default_rng(rng).integers(2**31))
    inches = size or float(np.clip(2.4 / np.sqrt(adata.n_obs), 0.013, 0.12))
    for panel, key, rep in zip(axes, keys, reps, strict=True):
        xy = _umap(rep, n_neighbors, seed)
        extent = 1.06 * np.ptp(xy, axis=0).max()
        low = (xy.min(axis=0) + xy.max(axis=0) - extent) / 2
        points = colors.draw(panel, xy, np.arange(adata.n_obs), diameter=inches / _PANEL * extent, alpha=1.0)
        panel.set(xlim=(low[0], low[0] + extent), ylim=(low[1], low[1] + extent), aspect="equal")
        panel.set_title(f"UMAP of {key}", fontsize=11)
        clear_frame(panel)
    colors.explain(points, axes[min(ncols, len(keys)) - 1 if ax is None else -1], titled=True)
    return axes


def _umap(rep: np.ndarray, n_neighbors: int, seed: int) -> np.ndarray:
    """Coordinates (n_obs, 2) that do not depend on the order of the cells."""
    import scanpy as sc
    from anndata import AnnData

    order = canonical_order(rep)
    cells = AnnData(np.ascontiguousarray(rep[order]))
    sc.pp.neighbors(cells, n_neighbors=n_neighbors, use_rep="X", transformer="sklearn")
    sc.tl.umap(cells, random_state=seed)
    xy = np.empty((len(rep), 2))
    xy[order] = cells.obsm["X_umap"]
    return xy
