"""Predicted beside measured genes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spatialfm._checks import check_positive, checked
from spatialfm._data._adata import get_libraries, get_matrix
from spatialfm._data._expression import ValuesKind
from spatialfm.get._predicted_expression import predicted_expression as predicted_table
from spatialfm.pl._spatial import Img, draw_maps, panel_size
from spatialfm.pl._style import MAX_SIZE, Colors, given_axes, number_colors, place_axes

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes


_FONT = 9.0
_ROW = (1.3, 2.3)  # inches of a map's height
_MAX_WIDTH = 3.0
_GAP = 0.58
_BAR = 0.8
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
    """Plot genes as measured and as predicted from H&E: two maps, and one against the other with their Pearson correlation.

    Each map has a colour scale of its own, up to the 99th percentile: predictions vary less than measurements, and what the maps compare is where
    a gene is high. The plot of points states how far the values agree. Where none of the genes was measured, there are maps of the predictions alone.

    Parameters
    ----------
    adata
        Spots with predicted expression (:func:`spatialfm.tl.predict_expression`); not changed.
    genes
        Predicted genes to show. By default the ``n`` of highest confidence, of those that were measured if any was.
    key
        Key of ``obsm`` with the predictions and of ``uns`` with their confidence.
    n
        Number of genes where none are named.
    gene_column
        Column of ``var`` with names as in the predictions, such as ``"gene_symbol"``; ``var_names`` by default.
    layer
        Layer with the measured expression, instead of ``X``.
    values
        What the measured values are, as for :func:`spatialfm.tl.embed`; recognised by default.
    library_key, basis, img, size
        As in :func:`spatial`, but without ``img`` no image is drawn.
    cmap
        Colour map.
    ncols
        Panels a row where there are maps of predictions alone.
    ax
        Axes to draw into: three a gene and slide, or one where there are maps of predictions alone.

    Returns
    -------
    The axes, row by row, a row for each slide of each gene: map as measured, map as predicted, points; or the maps of predictions alone. The titles
    give the confidence: the correlation that the gene reached on held-out slides of the training data; ``(other tissue)`` in its place where the
    measured expression shows that it does not hold.

    Raises
    ------
    KeyError
        If the predictions, a gene among them, a column, layer or the coordinates are missing.
    ValueError
        If ``n`` is not a positive integer, a gene was measured by several features of its name, or ``ax`` does not fit the number of panels.
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
    genes = _listed(genes, list(predicted.var_names), "predicted")
    measured = _measured(adata, genes, names, layer, values)
    drawn = np.asarray(predicted.X)[:, predicted.var_names.get_indexer(genes)].astype(np.float64)
    shown: dict[str, Any] = {"library_key": library_key, "basis": basis, "img": img, "size": size}
    colors = [_colors(column, cmap) for column in drawn.T]
    other = not adata.uns[key].get("tissue", {}).get("alike", True)
    notes = [
        " (other tissue)" if other else f" (confidence {confidence[gene]:.2f})" if np.isfinite(confidence[gene]) else ""
        for gene in genes
    ]
    if not measured:
        axes = draw_maps(adata, colors, **shown, ncols=ncols, ax=ax)
        for k, panel in enumerate(axes):
            g, (slide, _) = k // len(slides), slides[k % len(slides)]
            _title(panel, slide, f"{genes[g]}{notes[g]}")
        return axes

    axes = _rows(adata, len(genes) * len(slides), library_key, basis) if ax is None else given_axes(
        ax, 3 * len(genes) * len(slides)
    )  # fmt: skip
    for g, gene in enumerate(genes):
        panels = np.array(axes[3 * g * len(slides) : 3 * (g + 1) * len(slides)]).reshape(-1, 3)
        x = measured.get(gene)
        draw_maps(adata, [colors[g]], **shown, ncols=1, ax=panels[:, 1])
        if x is not None:
            draw_maps(adata, [_colors(x, cmap)], **shown, ncols=1, ax=panels[:, 0])
        for (slide, rows), (left, middle, right) in zip(slides, panels, strict=True):
            _title(left, slide, gene if x is None else f"{gene} measured")
            _title(middle, slide, f"predicted{notes[g]}")
            if x is None:
                left.set_axis_off()
                right.set_axis_off()
                left.text(0.5, 0.5, "not measured", ha="center", va="center", fontsize=_FONT, transform=left.transAxes)
            else:
                _points(right, x[rows], drawn[rows, g])
    return axes


def _listed(genes: str | Sequence[str], known: list[str], what: str) -> list[str]:
    """Return ``genes`` as a list, all of them among the ``known``."""
    genes = [genes] if isinstance(genes, str) else list(genes)
    for gene in genes:
        if gene not in known:
            import difflib

            near = difflib.get_close_matches(str(gene), known)
            msg = f"genes={gene!r} is not among the {len(known)} {what} genes" + (
                f"; did you mean {near}?" if near else ""
            )
            raise KeyError(msg)
    return genes


def _measured(
    adata: AnnData, genes: list[str], names: np.ndarray, layer: str | None, values: ValuesKind
) -> dict[str, np.ndarray]:
    """Expression (n_obs,) of those genes that were measured, on a log-like scale."""
    from spatialfm._data._expression import check_finite, log_normalize, resolve_kind

    columns = {gene: np.flatnonzero(names == gene) for gene in genes}
    several = [gene for gene, found in columns.items() if len(found) > 1]
    if several:
        msg = f"genes {several} were measured by several features of the same name; sum them with sfm.pp.resolve_genes first"
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


def _colors(values: np.ndarray, cmap: str) -> Colors:
    """Scale up to the 99th percentile, or to the largest where nearly all spots have the same: few spots of a rare gene would vanish."""
    low, high = np.nanpercentile(values, [0, 99]) if np.isfinite(values).any() else (0, 0)
    # No name: the titles have it.
    return number_colors("", values, cmap=cmap, vmax=float(high) if high > low else None)


def _rows(adata: AnnData, n_rows: int, library_key: str | None, basis: str) -> list[Axes]:
    """Make a figure with rows of two maps, each with room for a colour bar, and a square."""
    width, height = panel_size(adata, library_key=library_key, basis=basis)
    row = float(np.clip(MAX_SIZE / n_rows - _GAP, *_ROW))
    scale = min(row / height, _MAX_WIDTH / width)
    width, row = width * scale, height * scale
    boxes = []
    for k in range(n_rows):
        top = 0.3 + k * (row + _GAP)
        boxes += [(0.1, top, width, row), (0.1 + width + _BAR, top, width, row)]
        boxes.append((0.1 + 2 * (width + _BAR) + 0.45, top, row, row))
    return place_axes(boxes, (boxes[-1][0] + row + 0.15, boxes[-1][1] + row + 0.5))


def _title(ax: Axes, slide: str, text: str) -> None:
    ax.set_title("")
    ax.set_title(f"{slide}: {text}" if slide else text, fontsize=_FONT, loc="left", pad=4)


def _points(ax: Axes, measured: np.ndarray, predicted: np.ndarray) -> None:
    both = np.isfinite(measured) & np.isfinite(predicted)
    x, y = measured[both], predicted[both]
    varies = len(x) > 1 and x.std() > 0 and y.std() > 0
    ax.scatter(x, y, s=5, color=_POINTS, alpha=0.35, linewidths=0, rasterized=True)
    ax.set_title(f"r = {np.corrcoef(x, y)[0, 1]:.2f}" if varies else "no correlation: constant", fontsize=_FONT, pad=4)
    ax.set_xlabel("measured", fontsize=_FONT, labelpad=1)
    ax.set_ylabel("predicted", fontsize=_FONT)
    ax.tick_params(labelsize=8)
    ax.locator_params(nbins=4)
    ax.spines[["top", "right"]].set_visible(False)
