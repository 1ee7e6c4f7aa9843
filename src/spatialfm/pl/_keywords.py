"""Keyword genes of groups of spots as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spatialfm._checks import check_positive, checked
from spatialfm._data._adata import as_labels
from spatialfm.get._keywords_df import keywords_df
from spatialfm.pl._style import MAX_SIZE, category_colors, given_axes, place_axes, text_width

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

_BAR = 0.2  # inches a gene
_WIDTH = 1.35  # inches of the bars
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
    """Plot the keyword genes of each group of spots: bars of the mean TF-IDF weight in the group, a line at the mean in all other spots.

    The colours are those of the groups in :func:`spatial`; all panels have one scale. :func:`spatialfm.get.keywords_df` gives the numbers.

    Parameters
    ----------
    adata
        Spots with TF-IDF weights (:func:`spatialfm.pp.tfidf`); not changed.
    groupby
        Column of ``obs`` with the groups.
    key
        Key of ``layers`` with the weights.
    n_genes
        At most so many genes a group, from the highest score (mean in the group less mean elsewhere) down.
    palette
        Colours of the groups, as in :func:`spatial`.
    ncols
        Panels a row.
    ax
        Axes to draw into, one a group.

    Returns
    -------
    The axes, one a group.

    Raises
    ------
    KeyError
        If ``layers[key]`` or ``obs[groupby]`` is missing.
    ValueError
        If no spot has a group, ``n_genes`` or ``ncols`` is not a positive integer, or ``ax`` does not fit the number of groups.
    """
    check_positive("n_genes", n_genes)
    check_positive("ncols", ncols)
    table = keywords_df(adata, groupby, key=key, n_genes=n_genes)
    groups = list(table["group"].cat.categories)
    # Of all categories, also those without a spot: the stored colours count them.
    categories = list(as_labels(adata.obs[groupby]).categories)
    colors = dict(zip(categories, category_colors(adata, groupby, categories, palette), strict=True))
    if ax is None:
        labels = max((text_width(gene) for gene in table["gene"]), default=0.0) + 0.15
        names = max(text_width(group) for group in groups) * _TITLE_FONT / 9
        height, pitch = _BAR * n_genes + 0.1, labels + max(_WIDTH, names) + 0.2
        columns = max(1, min(ncols, len(groups), int(MAX_SIZE / pitch)))
        n_rows = -(-len(groups) // columns)
        places = [divmod(k, columns) for k in range(len(groups))]
        boxes = [(0.1 + j * pitch + labels, i * (height + 0.35) + 0.35, _WIDTH, height) for i, j in places]
        size = (0.1 + columns * pitch, n_rows * (height + 0.35) + 0.6)
        axes = place_axes(boxes, size)
    else:
        axes, columns = given_axes(ax, len(groups)), len(groups)
    limit = 1.05 * max(table["mean"].max() if len(table) else 0.0, 1e-6)
    for k, (panel, group) in enumerate(zip(axes, groups, strict=True)):
        rows = table[table["group"] == group]
        y = np.arange(len(rows))
        panel.barh(y, rows["mean"], height=0.72, color=colors[group])
        # White below black, so that the line is seen on bars of any colour.
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
