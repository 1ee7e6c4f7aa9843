"""Measured and imputed genes side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spatialfm._checks import check_positive, checked
from spatialfm._data._adata import get_column, get_libraries, get_matrix
from spatialfm.get import imputation_df
from spatialfm.pl._gene_maps import BAR, MAX_WIDTH, ROW, expression_colors, listed_genes
from spatialfm.pl._spatial import Img, MapOptions, draw_maps, panel_size
from spatialfm.pl._style import FONT, MAX_SIZE, given_axes, place_axes, text_width

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes

_GAP = 0.58  # between rows, inches
_SIDE = 2.8  # side of the scatter plot, inches
_SHOWN, _OTHERS = "#D55E00", "#0072B2"  # of Okabe and Ito


@checked
def imputation(
    adata: AnnData,
    genes: str | Sequence[str] | None = None,
    *,
    key: str = "imputed",
    n: int = 3,
    layer: str | None = None,
    library_key: str | None = None,
    basis: str = "spatial",
    img: Img = False,
    size: float | None = None,
    cmap: str = "viridis",
    ax: Axes | Sequence[Axes] | None = None,
) -> list[Axes]:
    """Plot genes as measured and as imputed, and how well each imputed gene agrees with hidden measurements.

    Each map has its own colour scale, up to the 99th percentile, since imputed values vary less than measured ones.
    Cells that lack a gene are grey in the map of measured values. In the scatter plot, each point is a gene with its
    95 % interval. Genes above the diagonal are imputed better than by the mean of the nearest cells; those on the maps
    are named.

    Parameters
    ----------
    adata
        Cells with imputed genes (:func:`spatialfm.tl.impute`); not changed.
    genes
        Imputed genes to show. Where None, ``n`` genes from the highest to the lowest correlation.
    %(result_key)s
    n
        Number of genes where ``genes`` is None.
    layer
        Layer with the measured expression, shown log-normalised; the one that was imputed from where None.
    %(panel_per_slide)s
    %(basis)s
    %(image_background)s
    %(size)s
    %(cmap)s
    ax
        Axes to draw into: two for each gene and slide, and one; a new figure where None.

    Returns
    -------
    The axes: for each gene and slide the map of measured and that of imputed values, and last the scatter plot.

    Raises
    ------
    KeyError
        Nothing was imputed under ``key``, or a gene, column, layer or the coordinates are missing.
    ValueError
        ``n`` is not a positive integer or ``ax`` does not fit the number of panels.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()
    >>> adata = adata[adata.obs["age"] == "3"][:600].copy()
    >>> sfm.tl.impute(adata, ["Mog", "Cd9"])
    >>> axes = sfm.pl.imputation(adata, "Mog")
    >>> len(axes)
    3
    """
    check_positive("n", n)
    table = imputation_df(adata, key=key).set_index("gene")
    if key not in adata.layers:
        msg = f"layers[{key!r}] is missing; run sfm.tl.impute(adata) again"
        raise KeyError(msg)
    if genes is None:
        present = table[table.index.isin(adata.var_names.drop_duplicates(keep=False))]
        if present.empty:
            msg = f"none of the {len(table)} imputed genes of uns[{key!r}] occurs exactly once in adata.var_names"
            raise KeyError(msg)
        ranked = present.index[present["correlation"].notna() | present["correlation"].isna().all()]
        genes = [str(ranked[k]) for k in np.unique(np.linspace(0, len(ranked) - 1, n).astype(int))]
    genes = listed_genes(genes, list(table.index), "imputed")
    for gene in genes:
        n_found = int((adata.var_names == gene).sum())
        if n_found != 1:
            msg = f"genes={gene!r} occurs {n_found} times in adata.var_names; it must occur once"
            raise KeyError(msg)
    measured = _as_measured(adata, genes, key, layer)
    imputed = _dense(adata, get_matrix(adata, key), genes)

    slides = get_libraries(adata, library_key)
    titles = [(f"{gene} measured", f"imputed (r = {table.loc[gene, 'correlation']:.2f})") for gene in genes]
    names = [slide for slide, _ in slides]
    across, axes = 1, list[Any]()
    if ax is None:
        across, axes = _layout(titles, names, panel_size(adata, library_key=library_key, basis=basis))
    else:
        axes = given_axes(ax, 2 * len(genes) * len(slides) + 1)
    options = MapOptions(library_key=library_key, basis=basis, img=img, size=size, ncols=1)
    for g, gene in enumerate(genes):
        panels = np.array(axes[2 * g * len(slides) : 2 * (g + 1) * len(slides)]).reshape(-1, 2)
        draw_maps(adata, [expression_colors(measured[gene], cmap)], options, ax=panels[:, 0])
        draw_maps(adata, [expression_colors(imputed[:, g], cmap)], options, ax=panels[:, 1])
        for k, (slide, pair) in enumerate(zip(names, panels, strict=True)):
            for panel, title in zip(pair, titles[g], strict=True):
                panel.set_title("")
                panel.set_title(_heading(title, slide, k % across == 0), fontsize=FONT, loc="left", pad=4)
    _compare(axes[-1], table, genes)
    return axes


def _as_measured(adata: AnnData, genes: list[str], key: str, layer: str | None) -> dict[str, np.ndarray]:
    """Measured values (n_obs,) of genes, NaN in cells that lack them."""
    from spatialfm._data._expression import check_finite, log_normalize

    params = adata.uns[key]["params"]
    x = get_matrix(adata, layer if layer is not None else params["layer"] or None)
    lacks = np.isnan(_dense(adata, x, genes))
    if params["mask"] and params["mask"] in adata.obs:
        lacks |= get_column(adata.obs, params["mask"]).to_numpy(dtype=bool)[:, None]
    # The layer holds measured values where only some cells lacked a gene; otherwise read what was measured.
    values = _dense(adata, get_matrix(adata, key), genes)
    whole = ~lacks.any(axis=0)
    if whole.any():
        known = x.copy()
        stored = known.data if hasattr(known, "toarray") else known
        stored[np.isnan(stored)] = 0
        check_finite(known)
        known = log_normalize(known, params["values"])
        values[:, whole] = _dense(adata, known, genes)[:, whole]
    return dict(zip(genes, np.where(lacks, np.nan, values).T, strict=True))


def _dense(adata: AnnData, x: Any, genes: list[str]) -> np.ndarray:
    own = x[:, adata.var_names.get_indexer_for(genes)]
    return np.asarray(own.toarray() if hasattr(own, "toarray") else own, np.float64)


def _heading(title: str, slide: str, first: bool) -> str:
    """Title of a map: the slide, and on the ``first`` of a row also what the row shows."""
    return "\n".join(line for line in (title if first else "", slide) if line)


def _layout(titles: list[tuple[str, str]], slides: list[str], panel: tuple[float, float]) -> tuple[int, list[Axes]]:
    """Make a figure with as many slides in a row as fit, measured at the left and imputed at the right.

    Returns that number and the axes.
    """
    named = max(map(text_width, slides))
    widest = [max(map(text_width, column)) for column in zip(*titles, strict=True)]
    for across in range(len(slides), 0, -1):
        per_title = -(-len(slides) // across)
        tall = float(np.clip(MAX_SIZE / (len(titles) * per_title) - _GAP, *ROW))
        scale = min(tall / panel[1], MAX_WIDTH / panel[0])
        width, height = panel[0] * scale, panel[1] * scale
        pitch = max(width, named) + 0.1
        steps = [max((across - 1) * pitch + max(width + BAR, named + 0.3), title + 0.3) for title in widest]
        if sum(steps) + _SIDE <= MAX_SIZE:
            break
    # One more line where slides have names.
    top = 0.45 if named else 0.3
    boxes = []
    for title, k in np.ndindex(len(titles), len(slides)):
        row, column = divmod(k, across)
        y = top + (title * per_title + row) * (height + top + _GAP - 0.3)
        boxes += [(0.1 + start + column * pitch, y, width, height) for start in (0.0, steps[0])]
    left = 0.1 + sum(steps) + 0.5
    boxes.append((left, 0.3, _SIDE, _SIDE))
    bottom = max(boxes[-2][1] + height + 0.1, 0.3 + _SIDE + 0.55)
    return across, place_axes(boxes, (left + _SIDE + 0.2, bottom))


def _compare(ax: Axes, table: pd.DataFrame, genes: list[str]) -> None:
    """Draw the correlation of each gene against that of smoothing; constant predictions count as 0."""
    x, y, low, high = (
        table[c].fillna(0).to_numpy(dtype=np.float64)
        for c in ("correlation_smoothing", "correlation", "correlation_low", "correlation_high")
    )
    named = table.index.isin(genes)
    ends = np.array([min(0.0, x.min(), low.min(), y.min()) - 0.03, max(0.1, x.max(), high.max(), y.max()) + 0.05])
    ax.plot(ends, ends, color="#7F7F7F", linewidth=0.8, zorder=1)
    for rows, color in ((~named, _OTHERS), (named, _SHOWN)):
        ax.vlines(x[rows], np.minimum(low, y)[rows], np.maximum(high, y)[rows], color=color, alpha=0.3, linewidth=0.8)
        ax.scatter(x[rows], y[rows], s=12, color=color, alpha=0.8, linewidths=0, zorder=3)
    for k in np.flatnonzero(named):
        right = x[k] > ends.mean()
        ax.annotate(
            str(table.index[k]), (x[k], y[k]), xytext=(-4 if right else 4, 3), textcoords="offset points",
            ha="right" if right else "left", fontsize=FONT, zorder=4,
        )  # fmt: skip
    ax.set(xlim=ends, ylim=ends)
    better = int((y > x).sum())
    ax.set_title(f"{better} of {len(table)} genes better than smoothing", fontsize=FONT, loc="left", pad=4)
    ax.set_xlabel("correlation of the mean of the nearest cells", fontsize=FONT)
    ax.set_ylabel("correlation of imputed values", fontsize=FONT)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
