"""Ligands and receptors between types as dots, and one pair on the tissue."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from spatialfm._checks import check_choice, check_positive, checked
from spatialfm._data._adata import get_graph
from spatialfm._data._components import walk
from spatialfm._data._genes import feature_names
from spatialfm.get._ligand_receptor_df import ligand_receptor_df
from spatialfm.pl._spatial import draw_maps
from spatialfm.pl._style import axes_size, given_axes, number_colors, place_axes, text_width
from spatialfm.tl._pairs import find_pairs, read_levels

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes

_STEP = 0.25  # inches of a row or column
_LARGEST = 0.21  # inches across the largest dot


@checked
def ligand_receptor(
    adata: AnnData,
    *,
    pair: tuple[str, str] | None = None,
    source: str | Sequence[str] | None = None,
    target: str | Sequence[str] | None = None,
    null: Literal["specific", "local"] = "local",
    max_fdr: float = 0.05,
    n_pairs: int = 20,
    n_types: int = 20,
    key: str = "ligand_receptor",
    library_key: str | None = None,
    basis: str = "spatial",
    size: float | None = None,
    cmap: str = "viridis",
    ncols: int = 4,
    ax: Axes | Sequence[Axes] | None = None,
) -> list[Axes]:
    """Plot the strongest ligands and receptors between types as dots, or one pair on the tissue.

    Dots: rows are pairs, columns go from the type of the sender to that of the receiver, both from the largest z-score down. The size of a dot is
    ``-log10(p)``, its colour the score; a ring means a false discovery rate of at most ``max_fdr``. Where nothing reaches it, the largest z-scores are shown
    without a ring.

    Parameters
    ----------
    adata
        Cells after :func:`spatialfm.tl.ligand_receptor`; not changed.
    pair
        Draw a map of this ligand and receptor instead: each cell as receiver, coloured by the mean over its neighbours of the geometric mean of their
        ligand and its receptor, whatever the types.
    source, target
        Types of the sender and of the receiver whose dots to draw; all where None.
    null
        Whose z-scores, p-values and false discovery rates.
    max_fdr
        False discovery rate up to which a test counts.
    n_pairs, n_types
        At most so many rows, and columns.
    key
        The ``key_added`` of :func:`spatialfm.tl.ligand_receptor`.
    library_key, basis, size, ncols
        For the map, as in :func:`spatial`.
    cmap
        Colour map of the scores.
    ax
        Axes to draw into: one, or for the map one a slide.

    Returns
    -------
    The axes.

    Raises
    ------
    KeyError
        If there is no such result, or the map's tissue graph or coordinates are missing.
    ValueError
        If ``pair`` is not measured, a type or ``null`` is unknown, no test is between the types named, a number is not positive, or ``ax`` does not fit.
    """
    table = ligand_receptor_df(adata, source=source, target=target, key=key)
    check_choice("null", null, ("specific", "local"))
    check_positive("n_pairs", n_pairs)
    check_positive("n_types", n_types)
    check_positive("ncols", ncols)
    if pair is not None:
        heard = _received(adata, pair, adata.uns[key]["params"])
        colors = number_colors(" → ".join(pair), heard, cmap=cmap, vmin=0, vmax="p99")
        return draw_maps(
            adata, [colors], library_key=library_key, basis=basis, img=False, size=size, ncols=ncols,
            ax=None if ax is None else np.ravel(np.asarray(ax, dtype=object)),
        )  # fmt: skip
    if table.empty:
        msg = f"no test has source={source!r} and target={target!r}: too few edges between these types, or no pair that both express; see sfm.get.ligand_receptor_df"
        raise ValueError(msg)
    return [_dots(table, null, max_fdr, n_pairs, n_types, cmap, ax)]


def _received(adata: AnnData, pair: tuple[str, str], params: Any) -> np.ndarray:
    """Mean over each cell's neighbours of the geometric mean of their ligand and its receptor; NaN where it has none."""
    names = [str(v) for v in feature_names(adata, params["gene_column"] or None)]
    found = find_pairs(names, [tuple(pair)], params["organism"] or None)  # type: ignore[list-item]
    values, _, _ = read_levels(adata, params["layer"] or None, params["values"])
    sent, heard = (found.levels([name], values).sqrt().toarray().ravel() for name in pair)
    graph, _ = get_graph(adata, params["neighbors_key"])
    near = ((graph + graph.T) != 0).tocsr()
    return np.where(np.diff(near.indptr) > 0, heard * (walk(near) @ sent), np.nan)


def _dots(table: pd.DataFrame, null: str, max_fdr: float, n_pairs: int, n_types: int, cmap: str, ax: Any) -> Axes:
    z, fdr = f"z_{null}", f"fdr_{null}"
    table = table.assign(
        pair=[f"{a} → {b}" for a, b in zip(table["ligand"], table["receptor"], strict=True)],
        types=[f"{a} → {b}" for a, b in zip(table["source"], table["target"], strict=True)],
    ).sort_values(z, ascending=False, kind="stable")
    found = table[table[fdr] <= max_fdr]
    shown = found if len(found) else table
    rows: list[str] = []
    columns: list[str] = []
    for row, column in zip(shown["pair"], shown["types"], strict=True):
        # Both or neither, so that no row or column is empty.
        if (row in rows or len(rows) < n_pairs) and (column in columns or len(columns) < n_types):
            rows += [row] if row not in rows else []
            columns += [column] if column not in columns else []
    shown = table[table["pair"].isin(rows) & table["types"].isin(columns)]
    if ax is None:
        left, foot = (max(text_width(v) for v in labels) for labels in (rows, columns))
        width, height = _STEP * len(columns), _STEP * len(rows)
        box = (left + 0.25, 0.2, width, height)
        axes = place_axes([box], (box[0] + width + 1.6, max(height, 2.6) + foot * 0.72 + 0.55))[0]
    else:
        axes = given_axes(ax, 1)[0]
    x, y = (np.array([labels.index(v) for v in shown[name]]) for name, labels in (("types", columns), ("pair", rows)))
    strength = -np.log10(shown[f"p_{null}"].to_numpy())
    most = max(float(-np.log10(table[f"p_{null}"].min())), 1e-6)

    def area(value: Any) -> Any:
        return (72 * _LARGEST) ** 2 * (0.04 + 0.96 * value / most)

    sure = (shown[fdr] <= max_fdr).to_numpy()
    points = axes.scatter(
        x,
        y,
        s=area(strength),
        c=shown["score"],
        cmap=cmap,
        vmin=0,
        linewidths=np.where(sure, 1.2, 0.0).tolist(),
        edgecolors="black",
    )
    ticks: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor", "fontsize": 9}
    axes.set_xticks(range(len(columns)), columns, **ticks)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    axes.set(xlim=(-0.7, len(columns) - 0.3), ylim=(len(rows) - 0.3, -0.7))
    axes.tick_params(length=0)
    axes.spines[:].set_color("#BBBBBB")
    axes.grid(color="#EEEEEE", linewidth=0.6)
    axes.set_axisbelow(True)
    width, height = axes_size(axes)
    inset = axes.inset_axes((1 + 0.2 / width, 1 - 1.15 / height, 0.13 / width, 0.95 / height))
    bar = axes.figure.colorbar(points, cax=inset)
    bar.outline.set_visible(False)
    inset.tick_params(labelsize=9)
    inset.set_title("score", fontsize=9, loc="left")
    values = [v for v in (1.0, 2.0, 3.0) if v <= most + 0.01] or [round(most, 1)]
    handles = [axes.scatter([], [], s=area(v), color="#999999", linewidths=0, label=f"{v:g}") for v in values]
    handles.append(
        axes.scatter(
            [], [], s=area(most), color="white", edgecolors="black", linewidths=1.2, label=f"FDR ≤ {max_fdr:g}"
        )
    )
    axes.legend(
        handles=handles, title="−log₁₀ p", loc="upper left", bbox_to_anchor=(1 + 0.1 / width, 1 - 1.2 / height), frameon=False, fontsize=9,
        title_fontsize=9, alignment="left", handletextpad=0.3,
    )  # fmt: skip
    return axes
