"""Measured and predicted genes side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from spatialfm._checks import check_positive, checked
from spatialfm._data._adata import get_libraries, get_matrix
from spatialfm._data._expression import ValuesKind
from spatialfm.get import predicted_expression as predicted_table
from spatialfm.pl._gene_maps import BAR, MAX_WIDTH, ROW, expression_colors, listed_genes
from spatialfm.pl._spatial import Img, MapOptions, draw_maps, panel_size
from spatialfm.pl._style import FONT, MAX_SIZE, given_axes, place_axes

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

_GAP = 0.75  # between rows, inches
_POINTS = "#0072B2"  # of Okabe and Ito


@checked
def predicted_expression(
    adata: AnnData,
    genes: str | Sequence[str] | None = None,
    *,
    key: str = "predicted_expression",
    n: int = 4,
    gene_column: str | None = None,
    layer: str | None = None,
    values: ValuesKind = "auto",
    library_key: str | None = None,
    basis: str = "spatial",
    img: Img = False,
    size: float | None = None,
    cmap: str = "viridis",
    ncols: int = 4,
    ax: Axes | Sequence[Axes] | None = None,
) -> list[Axes]:
    """Plot genes as measured and as predicted from H&E, with a scatter plot and the Pearson correlation.

    Each map has its own colour scale, up to the 99th percentile, since predicted values vary less than measured ones.
    Where no gene was measured, only the predictions are drawn.

    Parameters
    ----------
    adata
        Spots with predicted expression (:func:`spatialfm.tl.predict_expression`); not changed.
    genes
        Predicted genes to show. Where None, the ``n`` genes of highest confidence, of those measured if there are any.
    %(result_key)s
    n
        Number of genes where ``genes`` is None.
    %(gene_column)s
    %(layer)s
    %(values)s
    %(panel_per_slide)s
    %(basis)s
    %(image_background)s
    %(size)s
    %(cmap)s
    ncols
        Panels in a row, where only predictions are drawn.
    ax
        Axes to draw into: three for each gene and slide, or one where only predictions are drawn.

    Returns
    -------
    The axes, for each gene and slide: map as measured, map as predicted, scatter plot. Titles give the confidence: the
    correlation of the gene on held-out slides of the training data, or ``(other tissue)`` where it does not apply.

    Raises
    ------
    KeyError
        The predictions, a gene, a column, a layer or the coordinates are missing.
    ValueError
        ``n`` is not a positive integer, several features have the name of a gene, or ``ax`` does not fit.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.her2_breast_tumour()[:50].copy()
    >>> sfm.tl.predict_expression(adata)
    >>> axes = sfm.pl.predicted_expression(adata, "ERBB2")
    >>> len(axes)
    3
    """
    from spatialfm._data._genes import feature_names

    check_positive("n", n)
    predicted = predicted_table(adata, key=key, basis=basis)
    confidence = predicted.var["confidence"]
    names = feature_names(adata, gene_column).astype(str).to_numpy()
    if layer is None and adata.X is None:
        names = names[:0]
    slides = get_libraries(adata, library_key)
    if genes is None:
        best = confidence.sort_values(ascending=False, kind="stable").index
        seen = best[best.isin(names)]
        genes = list(map(str, (seen if len(seen) else best)[:n]))
    genes = listed_genes(genes, list(predicted.var_names), "predicted")
    measured = _measured(adata, genes, names, layer, values)
    drawn = np.asarray(predicted.X)[:, predicted.var_names.get_indexer(genes)].astype(np.float64)
    options = MapOptions(library_key=library_key, basis=basis, img=img, size=size, ncols=ncols)
    colors = [expression_colors(column, cmap) for column in drawn.T]
    other = not adata.uns[key].get("tissue", {}).get("alike", True)
    notes = [
        " (other tissue)" if other else f" (confidence {confidence[gene]:.2f})" if np.isfinite(confidence[gene]) else ""
        for gene in genes
    ]
    if not measured:
        axes = draw_maps(adata, colors, options, ax=ax)
        for k, panel in enumerate(axes):
            g, (slide, _) = k // len(slides), slides[k % len(slides)]
            _title(panel, slide, f"{genes[g]}{notes[g]}")
        return axes

    n_rows = len(genes) * len(slides)
    axes = _rows(adata, n_rows, options) if ax is None else given_axes(ax, 3 * n_rows)
    for g, gene in enumerate(genes):
        panels = np.array(axes[3 * g * len(slides) : 3 * (g + 1) * len(slides)]).reshape(-1, 3)
        x = measured.get(gene)
        draw_maps(adata, [colors[g]], options, ax=panels[:, 1])
        if x is not None:
            draw_maps(adata, [expression_colors(x, cmap)], options, ax=panels[:, 0])
        for (slide, rows), (left, middle, right) in zip(slides, panels, strict=True):
            _title(left, slide, gene if x is None else f"{gene} measured")
            _title(middle, slide, f"predicted{notes[g]}")
            if x is None:
                left.set_axis_off()
                right.set_axis_off()
                left.text(0.5, 0.5, "not measured", ha="center", va="center", fontsize=FONT, transform=left.transAxes)
            else:
                _points(right, x[rows], drawn[rows, g])
    return axes


def _measured(
    adata: AnnData, genes: list[str], names: np.ndarray, layer: str | None, values: ValuesKind
) -> dict[str, np.ndarray]:
    """Log-normalised expression (n_obs,) of those genes that were measured."""
    from spatialfm._data._expression import check_finite, log_normalize, resolve_kind

    columns = {gene: np.flatnonzero(names == gene) for gene in genes}
    several = [gene for gene, found in columns.items() if len(found) > 1]
    if several:
        msg = (
            f"genes {several} were measured by several features of the same name; "
            "sum them with sfm.pp.resolve_genes first"
        )
        raise ValueError(msg)
    if not any(len(found) for found in columns.values()):
        return {}
    x, where = get_matrix(adata, layer), "X" if layer is None else f"layers[{layer!r}]"
    check_finite(x, where)
    x = log_normalize(x, resolve_kind(x, values, where))
    x = x.tocsc() if hasattr(x, "tocsc") else np.asarray(x)
    picked = {gene: x[:, found] for gene, found in columns.items() if len(found)}
    return {
        gene: np.asarray(column.toarray() if hasattr(column, "toarray") else column, np.float64).ravel()
        for gene, column in picked.items()
    }


def _rows(adata: AnnData, n_rows: int, options: MapOptions) -> list[Axes]:
    """Make a figure with rows of two maps, each with room for a colour bar, and a scatter plot."""
    width, height = panel_size(adata, library_key=options.library_key, basis=options.basis)
    row = float(np.clip(MAX_SIZE / n_rows - _GAP, *ROW))
    scale = min(row / height, MAX_WIDTH / width)
    width, row = width * scale, height * scale
    boxes = []
    for k in range(n_rows):
        top = 0.3 + k * (row + _GAP)
        boxes += [(0.1, top, width, row), (0.1 + width + BAR, top, width, row)]
        boxes.append((0.1 + 2 * (width + BAR) + 0.45, top, row, row))
    return place_axes(boxes, (boxes[-1][0] + row + 0.3, boxes[-1][1] + row + 0.5))


def _title(ax: Axes, slide: str, text: str) -> None:
    ax.set_title("")
    ax.set_title(f"{slide}: {text}" if slide else text, fontsize=FONT, loc="left", pad=4)


def _points(ax: Axes, measured: np.ndarray, predicted: np.ndarray) -> None:
    both = np.isfinite(measured) & np.isfinite(predicted)
    x, y = measured[both], predicted[both]
    varies = len(x) > 1 and x.std() > 0 and y.std() > 0
    ax.scatter(x, y, s=5, color=_POINTS, alpha=0.35, linewidths=0, rasterized=True)
    ax.set_title(f"r = {np.corrcoef(x, y)[0, 1]:.2f}" if varies else "no correlation (constant)", fontsize=FONT, pad=4)
    ax.set_xlabel("measured (log)", fontsize=FONT, labelpad=1)
    ax.set_ylabel("predicted (log)", fontsize=FONT)
    ax.tick_params(labelsize=8)
    ax.locator_params(nbins=4)
    ax.spines[["top", "right"]].set_visible(False)
