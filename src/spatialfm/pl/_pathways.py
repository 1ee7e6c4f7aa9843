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
from spatialfm.pl._spatial import Img, MapOptions, draw_maps
from spatialfm.pl._style import FONT, Colors, axes_size, did_you_mean, number_colors

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

_SAME = 0.9  # correlation above which two pathways count as the same
_LETTER = 0.068  # width of an average letter of a title, inches


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
    """Plot maps of pathway activity, or of another table of scores in ``obsm``.

    The colour scale of each pathway is centred on its mean over all spots (grey) and ends at the 99th percentile of the
    distance from the mean, so that tables in different units can be compared.

    Parameters
    ----------
    %(adata)s
    names
        Columns of the table to show. Where None, the ``n`` columns of highest Moran's I on the Delaunay graph of each
        slide, without those that correlate above 0.9 with an earlier one.
    key
        Key of ``obsm`` with the table: ``"pathways"`` of :func:`spatialfm.pp.pathways`, ``"hibio_anchors"`` of
        :func:`spatialfm.tl.embed`, or another DataFrame.
    n
        Largest number of pathways where ``names`` is None.
    %(panel_per_slide)s
    %(basis)s
    %(image_background)s
    %(size)s
    %(cmap)s
    %(ncols)s
    %(ax)s

    Returns
    -------
    The axes: all slides of the first pathway, then of the second, ... Titles leave out the start that all names share,
    such as ``HALLMARK_``, and the identifiers of Reactome.

    Raises
    ------
    KeyError
        The table, a column of it, the coordinates or the image are missing.
    ValueError
        ``n`` is not a positive integer, or ``ax`` does not fit the number of panels.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.her2_breast_tumour()
    >>> sfm.pp.pathways(adata)
    >>> (ax,) = sfm.pl.pathways(adata, "HALLMARK_HYPOXIA")
    >>> ax.get_title(loc="left")
    'HYPOXIA'
    """
    check_positive("n", n)
    table = adata.obsm.get(key)
    if not isinstance(table, pd.DataFrame):
        msg = (
            f"key={key!r}: obsm[{key!r}] is {'missing' if table is None else 'not a DataFrame'}; run "
            "sfm.pp.pathways(adata) (or, for 'hibio_anchors', sfm.tl.embed(adata, model='hibio')) first, or name a "
            "DataFrame in obsm with key="
        )
        raise KeyError(msg)
    xy = get_coordinates(adata, basis)[:, :2]
    slides = get_libraries(adata, library_key)
    if names is None:
        names = list(table.columns[_most_structured(table.to_numpy(np.float64), xy, slides, n)])
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in table:
            near = [str(c) for c in table.columns if str(name).upper() in str(c).upper()]
            hint = f"; did you mean {near[:3]}?" if near else did_you_mean(name, table.columns)
            msg = f"names={name!r} is not a column of obsm[{key!r}]{hint}"
            raise KeyError(msg)

    colors = [_around_mean(table[name].to_numpy(np.float64), cmap) for name in names]
    options = MapOptions(library_key=library_key, basis=basis, img=img, size=size, ncols=ncols)
    axes = draw_maps(adata, colors, options, ax=ax)
    start = _common_start([str(c) for c in table.columns])
    for k, panel in enumerate(axes):
        name = re.sub(r" R-[A-Z]{3}-\d+$", "", str(names[k // len(slides)])[len(start) :]).replace("_", " ")
        _set_title(panel, name, slides[k % len(slides)][0], margin=0.6 if ax is None else 0.0)
    return axes


def _around_mean(values: np.ndarray, cmap: str) -> Colors:
    finite = values[np.isfinite(values)]
    middle = float(finite.mean()) if len(finite) else 0.0
    reach = float(np.percentile(np.abs(finite - middle), 99)) if len(finite) else 1.0
    # Without a name above the colour bar, where most names are too long.
    return number_colors("", values, cmap=cmap, vmin=middle - reach, vmax=middle + reach)


def _set_title(ax: Axes, name: str, slide: str, *, margin: float) -> None:
    """Write the name on up to two lines; with a slide on one line, and the slide below."""
    letters = int((axes_size(ax)[0] + (0.0 if slide else margin)) / _LETTER)
    lines = textwrap.wrap(name, letters, max_lines=1 if slide else 2, placeholder=" …")
    ax.set_title("\n".join([*lines, *([slide] if slide else [])]), fontsize=FONT, loc="left", pad=3, linespacing=1.1)
    ax.set_title("")


def _most_structured(values: np.ndarray, xy: np.ndarray, slides: list[tuple[str, np.ndarray]], n: int) -> list[int]:
    """Columns of largest Moran's I, without those that correlate with an earlier one."""
    chosen: list[int] = []
    scaled = np.empty((len(values), 0))
    for column in np.argsort(-morans_i(values, xy, slides), kind="stable"):
        z = values[:, column] - values[:, column].mean()
        z = z / (np.linalg.norm(z) or 1.0)
        if not (z @ scaled > _SAME).any():
            chosen.append(int(column))
            scaled = np.column_stack([scaled, z])
        if len(chosen) == n:
            break
    return chosen


def morans_i(values: np.ndarray, xy: np.ndarray, slides: list[tuple[str, np.ndarray]]) -> np.ndarray:
    """Moran's I of each column on the Delaunay graphs of the slides, values centred on each slide.

    -1 where it is not defined. Rounded, so that ties do not depend on the order of the spots.
    """
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
    """Return the start that all names share, up to an underscore: the name of their collection."""
    match = re.match(r"[A-Za-z]+_", names[0])
    start = match.group() if match else ""
    return start if all(name.startswith(start) for name in names) else ""
