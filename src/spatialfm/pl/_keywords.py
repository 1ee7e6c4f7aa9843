"""Keyword genes of groups of spots as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spatialfm._checks import check_positive, checked
from spatialfm.get import keywords_df
from spatialfm.pl._style import MAX_SIZE, category_colors, given_axes, place_axes, text_width

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

_BAR = 0.2  # height of the row of a gene, inches
_WIDTH = 1.35  # width of a panel, inches
_TITLE_FONT = 11


@checked
def keywords(
    adata: AnnData,
    groupby: str,
    *,
    key: str = "tfidf",
    n_genes: int = 8,
    palette: Mapping[str, Any] | Sequence[Any] | str | None = None,
    ncols: int = 4,
    ax: Sequence[Axes] | None = None,
) -> list[Axes]:
    """Plot the genes with the highest TF-IDF weights in each group of spots.

    A bar is the mean weight in the group; the line across it is the mean in all other spots. Groups have the colours
    of :func:`spatial`, and all panels share one scale. :func:`spatialfm.get.keywords_df` returns the numbers.

    Parameters
    ----------
    adata
        Spots with TF-IDF weights (:func:`spatialfm.pp.tfidf`); not changed.
    groupby
        Column of ``obs`` with the groups.
    key
        Layer with the weights.
    n_genes
        Largest number of genes in a group, those of highest mean in the group minus mean in all other spots.
    %(palette)s
    %(ncols)s
    %(ax)s

    Returns
    -------
    The axes, one for each group.

    Raises
    ------
    KeyError
        ``layers[key]`` or ``obs[groupby]`` is missing.
    ValueError
        No spot has a group, ``n_genes`` is not a positive integer, or ``ax`` does not fit the number of groups.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.visium_human_dlpfc()
    >>> sfm.pp.tfidf(adata)
    >>> axes = sfm.pl.keywords(adata, "layer", n_genes=5)
    >>> [ax.get_title(loc="left") for ax in axes][:2]
    ['Layer1', 'Layer2']
    """
    check_positive("n_genes", n_genes)
    check_positive("ncols", ncols)
    table = keywords_df(adata, groupby, key=key, n_genes=n_genes)
    groups = list(table["group"].cat.categories)
    colors = dict(zip(groups, category_colors(adata, groupby, groups, palette), strict=True))
    if ax is None:
        labels = max((text_width(gene) for gene in table["gene"]), default=0.0) + 0.15
        names = max(text_width(group) for group in groups) * _TITLE_FONT / 9
        height, pitch = _BAR * n_genes + 0.1, labels + max(_WIDTH, names) + 0.2
        columns = max(1, min(ncols, len(groups), int(MAX_SIZE / pitch)))
        n_rows = -(-len(groups) // columns)
        cells = [divmod(k, columns) for k in range(len(groups))]
        boxes = [(0.1 + j * pitch + labels, i * (height + 0.35) + 0.35, _WIDTH, height) for i, j in cells]
        size = (0.1 + columns * pitch, n_rows * (height + 0.35) + 0.6)
        axes = place_axes(boxes, size)
    else:
        axes, columns = given_axes(ax, len(groups)), len(groups)
    limit = 1.05 * max(table["mean"].max() if len(table) else 0.0, 1e-6)
    for k, (panel, group) in enumerate(zip(axes, groups, strict=True)):
        rows = table[table["group"] == group]
        y = np.arange(len(rows))
        panel.barh(y, rows["mean"], height=0.72, color=colors[group])
        # White below black, so that the line is visible on bars of any colour.
        for color, width in (("white", 3.0), ("black", 1.2)):
            panel.vlines(rows["mean_rest"], y - 0.36, y + 0.36, colors=color, linewidth=width)
        panel.set_yticks(y, rows["gene"], fontsize=9)
        panel.set(xlim=(0, limit), ylim=(n_genes - 0.4, -0.6))
        panel.set_title(group, fontsize=_TITLE_FONT, loc="left")
        panel.tick_params(axis="y", length=0)
        panel.tick_params(axis="x", labelsize=9)
        panel.locator_params(axis="x", nbins=3)
        panel.spines[["top", "right", "left"]].set_visible(False)
        if k + columns >= len(groups):
            panel.set_xlabel("mean TF-IDF\n(line: other spots)", fontsize=9)
        else:
            panel.tick_params(axis="x", labelbottom=False)
    return axes
