"""Activity of pathways in the tissue."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from spatialfm._checks import check_positive, checked
from spatialfm._data._adata import get_coordinates, get_libraries
from spatialfm.pl._spatial import Img, draw_maps
from spatialfm.pl._style import axes_size, number_colors

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

_FONT = 9.0
_SAME = 0.9  # correlation of pathways that say the same
_LETTER = 0.068  # inches of an average letter of a title


@checked
def pathways(
    adata: AnnData,
    names: str | Sequence[str] | None = None,
    *,
    key: str = "pathways",
    n: int = 8,
    library_key: str | None = None,
    basis: str = "spatial",
    img: Img = False,
    size: float | None = None,
    cmap: str = "coolwarm",
    ncols: int = 4,
    ax: Axes | Sequence[Axes] | None = None,
) -> list[Axes]:
    """Plot maps of pathways' activity, or of another table of scores, such as the similarity of spots to pathway anchors.

    Each pathway has a colour scale of its own, around its mean over all spots (grey) and as far up as down: to the 99th percentile of the
    distance from it. Maps of measured activity and of anchor similarity, whose units differ, so show the same where they agree.

    Parameters
    ----------
    adata
        Cells or spots with coordinates and scores; not changed.
    names
        Columns of the table to show. By default the ``n`` of strongest spatial structure: of largest Moran's I on the Delaunay graph of each
        slide, values taken from their mean over the slide; of those that correlate above 0.9 over the spots only the first, since many pathways
        share most of their genes.
    key
        Key of ``obsm`` with a table of scores: ``"pathways"`` by :func:`spatialfm.pp.pathways`, ``"hibio_anchors"`` by
        :func:`spatialfm.tl.embed`.
    n
        Largest number of pathways where none are named.
    library_key, basis, img, size, ncols, ax
        As in :func:`spatial`, but without ``img`` no image is drawn, since colours are told apart best on white.
    cmap
        Colour map.

    Returns
    -------
    The axes: the slides of the first pathway, then those of the second, ... Titles leave out what all columns begin with, such as ``HALLMARK_``, and
    the numbers of Reactome.

    Raises
    ------
    KeyError
        If the table or a column of it, the coordinates or the image are missing.
    ValueError
        If ``n`` is not a positive integer, or ``ax`` does not fit the number of panels.
    """
    check_positive("n", n)
    table = adata.obsm.get(key)
    if not isinstance(table, pd.DataFrame):
        msg = (
            f"key={key!r}: obsm[{key!r}] is {'missing' if table is None else 'no table with names'}; run sfm.pp.pathways(adata) (or, for "
            f"'hibio_anchors', sfm.tl.embed(adata, model='hibio')) first, or name a table of obsm with key="
        )
        raise KeyError(msg)
    xy = get_coordinates(adata, basis)[:, :2]
    slides = get_libraries(adata, library_key)
    if names is None:
        names = list(table.columns[_most_structured(table.to_numpy(np.float64), xy, slides, n)])
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in table:
            import difflib

            near = [c for c in table.columns if str(name).upper() in str(c).upper()]
            near = near or difflib.get_close_matches(str(name), map(str, table.columns))
            msg = f"names={name!r} is not a column of obsm[{key!r}]" + (f"; did you mean {near[:3]}?" if near else "")
            raise KeyError(msg)

    colors = []
    for name in names:
        values = table[name].to_numpy(np.float64)
        finite = values[np.isfinite(values)]
        middle = float(finite.mean()) if len(finite) else 0.0
        reach = float(np.percentile(np.abs(finite - middle), 99)) if len(finite) else 1.0
        # No name: it would be written above the colour bar, where most are too long.
        colors.append(number_colors("", values, cmap=cmap, vmin=middle - reach, vmax=middle + reach))
    axes = draw_maps(adata, colors, library_key=library_key, basis=basis, img=img, size=size, ncols=ncols, ax=ax)
    start = _common_start([str(c) for c in table.columns])
    for k, panel in enumerate(axes):
        slide = slides[k % len(slides)][0]
        title = re.sub(r" R-[A-Z]{3}-\d+$", "", str(names[k // len(slides)])[len(start) :]).replace("_", " ")
        letters = int((axes_size(panel)[0] + (0.6 if ax is None and not slide else 0.0)) / _LETTER)
        lines = textwrap.wrap(title, letters, max_lines=1 if slide else 2, placeholder=" …")
        panel.set_title(
            "\n".join([*lines, *([slide] if slide else [])]), fontsize=_FONT, loc="left", pad=3, linespacing=1.1
        )
        panel.set_title("")
    return axes


def _most_structured(values: np.ndarray, xy: np.ndarray, slides: list[tuple[str, np.ndarray]], n: int) -> list[int]:
    """Columns of largest Moran's I, without those that repeat one of them."""
    chosen: list[int] = []
    scaled = np.empty((len(values), 0))
    for column in np.argsort(-_morans_i(values, xy, slides), kind="stable"):
        z = values[:, column] - values[:, column].mean()
        z = z / (np.linalg.norm(z) or 1.0)
        if not (z @ scaled > _SAME).any():
            chosen.append(int(column))
            scaled = np.column_stack([scaled, z])
        if len(chosen) == n:
            break
    return chosen


def _morans_i(values: np.ndarray, xy: np.ndarray, slides: list[tuple[str, np.ndarray]]) -> np.ndarray:
    """Moran's I of each column, -1 where it is not defined; rounded, so that the order of the spots decides no tie."""
    from spatialfm.pp._spatial_neighbors import neighbor_graph

    graphs = [neighbor_graph(xy[rows])[0] for _, rows in slides]
    n_edges = sum(graph.nnz for graph in graphs)
    found = np.full(values.shape[1], -1.0)
    for column in range(values.shape[1]):
        across = within = 0.0
        for (_, rows), graph in zip(slides, graphs, strict=True):
            z = values[rows, column] - values[rows, column].mean()
            across, within = across + z @ (graph @ z), within + z @ z
        if n_edges and within > 0:
            found[column] = np.round(across / n_edges * len(values) / within, 9)
    return found


def _common_start(names: list[str]) -> str:
    """Give what all names begin with, up to an underscore: the name of their collection."""
    match = re.match(r"[A-Za-z]+_", names[0])
    start = match.group() if match else ""
    return start if all(name.startswith(start) for name in names) else ""
