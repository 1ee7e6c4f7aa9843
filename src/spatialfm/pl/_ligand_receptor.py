"""Ligands and receptors between types as dots, or one pair on the tissue."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from spatialfm._checks import check_choice, check_positive, checked
from spatialfm._data._adata import get_graph
from spatialfm._data._components import transition_matrix
from spatialfm._data._genes import feature_names
from spatialfm.get import ligand_receptor_df
from spatialfm.pl._spatial import MapOptions, draw_maps
from spatialfm.pl._style import (
    axes_size,
    color_bar,
    given_axes,
    number_colors,
    place_axes,
    slanted_size,
    slanted_ticks,
    text_width,
)
from spatialfm.tl._pairs import find_pairs, read_levels

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes

_STEP = 0.25  # between rows and columns, inches
_LARGEST = 0.21  # diameter of the largest dot, inches
_LEGEND = 2.4  # height of colour bar and legend, inches


@checked
def ligand_receptor(
    adata: AnnData,
    *,
    pair: tuple[str, str] | None = None,
    source: str | Sequence[str] | None = None,
    target: str | Sequence[str] | None = None,
    null: Literal["specific", "local"] = "local",
    max_fdr: float = 0.05,
    n: int = 20,
    key: str = "ligand_receptor",
    library_key: str | None = None,
    basis: str = "spatial",
    size: float | None = None,
    cmap: str = "viridis",
    ncols: int = 4,
    ax: Axes | Sequence[Axes] | None = None,
) -> list[Axes]:
    """Plot the strongest ligands and receptors between types as dots, or one pair on the tissue.

    Rows are pairs of ligand and receptor, columns go from the type of the sender to the type of the receiver, both from
    the highest z-score down. The size of a dot is ``-log10(p)``, its colour the score. Dots with a ring have a false
    discovery rate of at most ``max_fdr``; where there are none, the highest z-scores are shown.

    Parameters
    ----------
    adata
        Cells after :func:`spatialfm.tl.ligand_receptor`; not changed.
    pair
        Draw a map of this ligand and receptor instead. Each cell is coloured by the geometric mean of its receptor and
        the ligand of a neighbour, averaged over its neighbours of any type.
    source, target
        Types of the sender and of the receiver to show; all where None.
    null
        Null model of the z-scores, p-values and false discovery rates (:func:`spatialfm.tl.ligand_receptor`).
    %(max_fdr)s
    n
        Largest number of rows and of columns.
    %(result_key)s
    %(panel_per_slide)s
    %(basis)s
    %(size)s
    %(cmap)s
    %(ncols)s
    ax
        Axes to draw into: one, or with ``pair`` one for each slide; a new figure where None.

    Returns
    -------
    The axes.

    Raises
    ------
    KeyError
        There is no such result, or the graph or coordinates of the map are missing.
    ValueError
        ``pair`` was not measured, a type is unknown, no test is between these types, or ``ax`` does not fit.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()
    >>> sfm.tl.ligand_receptor(adata, "celltype", library_key="mouse_id", n_permutations=50)
    >>> (ax,) = sfm.pl.ligand_receptor(adata, max_fdr=1, n=5)
    >>> len(ax.get_xticklabels()), len(ax.get_yticklabels())
    (5, 5)
    """
    table = ligand_receptor_df(adata, source=source, target=target, key=key)
    check_choice("null", null, ("specific", "local"))
    check_positive("n", n)
    if pair is not None:
        received = _received(adata, pair, adata.uns[key]["params"])
        colors = number_colors(" → ".join(pair), received, cmap=cmap, vmin=0, vmax="p99")
        options = MapOptions(library_key=library_key, basis=basis, size=size, ncols=ncols)
        return draw_maps(adata, [colors], options, ax=ax)
    if table.empty:
        msg = (
            f"no test has source={source!r} and target={target!r}: there are too few edges between these types, or "
            "they express no ligand with its receptor; see sfm.get.ligand_receptor_df"
        )
        raise ValueError(msg)
    return [_dots(table, null, max_fdr, n, cmap, ax)]


def _received(adata: AnnData, pair: tuple[str, str], params: Any) -> np.ndarray:
    """Mean over the neighbours of each cell of the geometric mean of their ligand and its receptor; NaN without any."""
    names = [str(v) for v in feature_names(adata, params["gene_column"] or None)]
    found = find_pairs(names, [tuple(pair)], params["organism"] or None)  # type: ignore[list-item]
    values, _, _ = read_levels(adata, params["layer"] or None, params["values"])
    sent, own = (found.levels([name], values).sqrt().toarray().ravel() for name in pair)
    graph, _ = get_graph(adata, params["neighbors_key"])
    near = ((graph + graph.T) != 0).tocsr()
    return np.where(np.diff(near.indptr) > 0, own * (transition_matrix(near) @ sent), np.nan)


class _Selection(NamedTuple):
    tests: pd.DataFrame
    rows: list[str]  # ligand and receptor, from the largest z-score down
    columns: list[str]  # sender and receiver, likewise


def _strongest(table: pd.DataFrame, null: str, max_fdr: float, n: int) -> _Selection:
    """Choose the tests to draw."""
    table = table.assign(
        pair=[f"{a} → {b}" for a, b in zip(table["ligand"], table["receptor"], strict=True)],
        types=[f"{a} → {b}" for a, b in zip(table["source"], table["target"], strict=True)],
    ).sort_values(f"z_{null}", ascending=False, kind="stable")
    found = table[table[f"fdr_{null}"] <= max_fdr]
    shown = found if len(found) else table
    rows: list[str] = []
    columns: list[str] = []
    for row, column in zip(shown["pair"], shown["types"], strict=True):
        # Both or neither, so that no row or column is empty.
        if (row in rows or len(rows) < n) and (column in columns or len(columns) < n):
            rows += [row] if row not in rows else []
            columns += [column] if column not in columns else []
    return _Selection(table[table["pair"].isin(rows) & table["types"].isin(columns)], rows, columns)


def _dots(table: pd.DataFrame, null: str, max_fdr: float, n: int, cmap: str, ax: Any) -> Axes:
    most = max(float(-np.log10(table[f"p_{null}"].min())), 1e-6)
    shown, rows, columns = _strongest(table, null, max_fdr, n)
    if ax is None:
        left, foot = slanted_size(columns, _STEP)
        left = max(left, max(text_width(v) for v in rows) + 0.25)
        width, height = _STEP * len(columns), _STEP * len(rows)
        size = (left + width + 1.6, 0.2 + max(height + foot, _LEGEND))
        axes = place_axes([(left, 0.2, width, height)], size)[0]
    else:
        axes = given_axes(ax, 1)[0]

    def area(value: Any) -> Any:
        return (72 * _LARGEST) ** 2 * (0.04 + 0.96 * value / most)

    points = axes.scatter(
        [columns.index(v) for v in shown["types"]],
        [rows.index(v) for v in shown["pair"]],
        s=area(-np.log10(shown[f"p_{null}"].to_numpy())),
        c=shown["score"],
        cmap=cmap,
        vmin=0,
        linewidths=np.where(shown[f"fdr_{null}"] <= max_fdr, 1.2, 0.0).tolist(),
        edgecolors="black",
    )
    slanted_ticks(axes, range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    axes.set(xlim=(-0.7, len(columns) - 0.3), ylim=(len(rows) - 0.3, -0.7))
    axes.tick_params(length=0)
    axes.spines[:].set_color("#BBBBBB")
    axes.grid(color="#EEEEEE", linewidth=0.6)
    axes.set_axisbelow(True)
    color_bar(axes, points, left=0.2, top=0.2, height=0.95).set_title("score", fontsize=9, loc="left")
    _size_legend(axes, area, most, max_fdr)
    return axes


def _size_legend(ax: Axes, area: Callable[[Any], Any], most: float, max_fdr: float) -> None:
    """Explain the size of the dots and the ring."""
    values = [v for v in (1.0, 2.0, 3.0) if v <= most + 0.01] or [round(most, 1)]
    handles = [ax.scatter([], [], s=area(v), color="#999999", linewidths=0, label=f"{v:g}") for v in values]
    ring: dict[str, Any] = {"color": "white", "edgecolors": "black", "linewidths": 1.2}
    handles.append(ax.scatter([], [], s=area(most), label=f"FDR ≤ {max_fdr:g}", **ring))
    width, height = axes_size(ax)
    ax.legend(
        handles=handles, title="−log₁₀ p", loc="upper left", bbox_to_anchor=(1 + 0.1 / width, 1 - 1.2 / height),
        frameon=False, fontsize=9, title_fontsize=9, alignment="left", handletextpad=0.7,
    )  # fmt: skip
