"""Colours, legends and axes that the figures share."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatialfm._data._adata import as_labels, by_name, get_column, get_matrix, stored_colors

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.collections import EllipseCollection
    from matplotlib.colors import Colormap

# The eight colours of Okabe and Ito. Each further colour is as far as possible from those before it and from the grey
# of missing values: distance in CIELAB, the smallest of normal, protanope and deuteranope vision (Machado et al. 2009).
PALETTE = [
    *("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#F0E442", "#000000"),
    *("#3D3DC2", "#6D2418", "#0CF386", "#79006D", "#F31855", "#8692FF", "#9E0049", "#AADBAA", "#AAAA49", "#24E7FF"),
    *("#795518", "#9EE761", "#795579", "#24499E", "#617949", "#F36D86", "#C255DB", "#9E86C2", "#00493D", "#6DC26D"),
]
NA_COLOR = "#D3D3D3"
FONT = 9.0
_LINE = 1.62 * FONT / 72  # height of a legend line, inches
_WRAP = 28
_MIN_SCALE = 0.4  # of a panel; it is not made smaller
_SLANT = 40.0  # of the labels of an x axis, degrees
MAX_SIZE = 12.0  # largest width and height in inches; a notebook shows this width without shrinking the text


@dataclass
class Colors:
    """Colours of cells: ``rgba`` for categories; ``values`` with ``cmap`` and ``norm`` for numbers."""

    name: str | None
    legend: list[tuple[str, Any]]  # label and colour of the categories present
    rgba: np.ndarray | None = None
    values: np.ndarray | None = None
    cmap: Any = None
    norm: Any = None
    order: np.ndarray | None = None  # drawing order: missing values first, then small to large numbers

    def legend_columns(self, height: float) -> int:
        """Return the number of columns of a legend beside a panel of ``height`` inches."""
        lines = sum(_wrap(label).count("\n") + 1 for label, _ in self.legend)
        return -(-lines // max(int(height / _LINE), 6)) if lines else 0

    def legend_width(self, height: float) -> float:
        """Width in inches of the legend or colour bar at the right of a panel of ``height`` inches."""
        if self.values is not None:
            return max(1.0, text_width(str(self.name)) * (FONT + 1) / FONT + 0.3)
        widths = [text_width(_wrap(label)) for label, _ in self.legend]
        # As matplotlib does: columns are filled in order, the first ones with one more, each as wide as its labels.
        columns = np.array_split(widths, max(self.legend_columns(height), 1))
        return sum(float(column.max(initial=0.0)) + 0.45 for column in columns) + 0.1 if widths else 0.0

    def draw(self, ax: Axes, xy: np.ndarray, rows: np.ndarray, *, diameter: float, alpha: float) -> EllipseCollection:
        """Draw the cells ``rows`` as circles of a diameter in data units, as one rasterised collection."""
        from matplotlib.collections import EllipseCollection

        assert self.order is not None
        inside = np.zeros(len(xy), dtype=bool)
        inside[rows] = True
        rows = self.order[inside[self.order]]
        if self.values is None:
            face: dict[str, Any] = {"facecolors": self.rgba[rows]}  # type: ignore[index]
        else:
            face = {"array": np.ma.masked_invalid(self.values[rows]), "cmap": self.cmap, "norm": self.norm}
        points = EllipseCollection(
            [diameter],
            [diameter],
            [0.0],
            units="xy",
            offsets=xy[rows],
            offset_transform=ax.transData,
            linewidths=0,
            alpha=alpha,
            rasterized=True,
            **face,
        )
        ax.add_collection(points)
        return points

    def explain(self, points: EllipseCollection, ax: Axes, *, titled: bool) -> None:
        """Put the legend or colour bar at the right of ``ax``."""
        from matplotlib.lines import Line2D

        height = axes_size(ax)[1]
        if self.values is not None:
            inset = color_bar(ax, points, left=0.1, top=0.2 * height, height=0.6 * height)
            if titled:
                inset.set_title(str(self.name), fontsize=FONT + 1, loc="left")
        elif self.legend:
            handles = [
                Line2D(
                    [], [], linestyle="", marker="o", markersize=7, markeredgewidth=0, color=color, label=_wrap(label)
                )
                for label, color in self.legend
            ]
            ax.legend(
                handles=handles,
                title=self.name if titled else None,
                ncols=self.legend_columns(height),
                loc="center left",
                bbox_to_anchor=(1.0, 0.5),
                frameon=False,
                fontsize=FONT,
                title_fontsize=FONT + 1,
                alignment="left",
                handletextpad=0.1,
                columnspacing=0.8,
            )


def _wrap(label: str) -> str:
    return "\n".join(textwrap.wrap(label, _WRAP, break_on_hyphens=False, break_long_words=False)) or label


def text_width(text: str) -> float:
    """Width in inches of the widest line of ``text`` in a legend."""
    from matplotlib.textpath import TextPath

    lines = [line for line in text.split("\n") if line.strip()]  # matplotlib fails on an empty path
    widths = [TextPath((0, 0), line, size=FONT, usetex=False).get_extents().width for line in lines]
    return max(widths, default=0.0) / 72


def resolve_colors(
    adata: AnnData,
    color: str | None,
    *,
    layer: str | None = None,
    cmap: str = "viridis",
    palette: Any = None,
    vmin: float | str | None = None,
    vmax: float | str | None = None,
    groups: Sequence[str] | None = None,
) -> Colors:
    """Give each cell a colour by ``color``, a column of ``obs`` or else a gene.

    Where some of ``groups`` are categories of it, the other categories are grey.
    """
    from matplotlib.colors import to_rgba

    n = adata.n_obs
    if color is None:
        rgba = np.tile(to_rgba("#7F7F7F"), (n, 1))
        return Colors(None, [], rgba=rgba, order=np.arange(n))
    if color in adata.obs:
        values = categorical(adata, color)
        if values is not None:
            categories, codes = values
            present = np.unique(codes[codes >= 0])
            shown = np.isin(categories, groups or [])
            if not shown.any():
                shown[:] = True
            if isinstance(palette, Mapping):
                # No cell of these categories is drawn in a colour of its own.
                unseen = np.array(categories, dtype=object)[~shown | ~np.isin(np.arange(len(categories)), present)]
                palette = dict.fromkeys(unseen, NA_COLOR) | by_name(palette)
            colors = category_colors(adata, color, categories, palette)
            codes = np.where(np.r_[shown, False][codes], codes, -1)  # code -1 takes the last, here and below
            rgba = np.array([to_rgba(c) for c in [*colors, NA_COLOR]])[codes]
            legend = [(categories[k], colors[k]) for k in present if shown[k]]
            n_others = int((~shown[present]).sum())
            legend += [(f"{n_others} other{'s' * (n_others > 1)}", NA_COLOR)] if n_others else []
            return Colors(color, legend, rgba=rgba, order=np.argsort(codes >= 0, kind="stable"))
        if pd.api.types.is_complex_dtype(get_column(adata.obs, color)):
            msg = f"obs[{color!r}] holds complex numbers; draw their real or their imaginary part"
            raise ValueError(msg)
        numbers = get_column(adata.obs, color).to_numpy(dtype=np.float64, na_value=np.nan)
    else:
        x = _expression(adata, color, layer)
        numbers = np.asarray(x.toarray() if hasattr(x, "toarray") else x, dtype=np.float64).ravel()
    return number_colors(color, numbers, cmap=cmap, vmin=vmin, vmax=vmax)


def _expression(adata: AnnData, gene: str, layer: str | None) -> Any:
    """Column of ``X`` or of a layer; of ``adata.raw``, as in scanpy, where only that has the gene."""
    found = np.flatnonzero(adata.var_names == gene)
    in_raw = np.flatnonzero(adata.raw.var_names == gene) if adata.raw is not None else found[:0]
    if len(found) == 1:
        if not adata.obs.columns.is_unique:
            twice = adata.obs.columns[adata.obs.columns.duplicated()][0]
            msg = f"several columns of adata.obs are named {twice!r}; rename or drop all but one of them"
            raise ValueError(msg)
        return get_matrix(adata[:, found], layer)
    if not len(found) and len(in_raw) == 1 and layer is None:
        return adata.raw.X[:, in_raw]
    columns = [c for c in adata.var.columns if (adata.var[c].astype(str) == gene).any()]
    if len(found) or len(in_raw) > 1:
        where = "adata.var_names" if len(found) else "adata.raw.var_names"
        what = (
            f"{max(len(found), len(in_raw))} genes in {where} have that name; "
            "make names unique with adata.var_names_make_unique()"
        )
    elif len(in_raw):
        what = f"only adata.raw has that gene, not layer={layer!r}; leave out layer= to draw it from adata.raw"
    elif columns:
        names = [str(v) for v in adata.var_names[adata.var[columns[0]].astype(str) == gene]]
        what = (
            f"that is a name in adata.var[{columns[0]!r}], not in adata.var_names; pass color={names[0]!r}, or make "
            f"these the names: adata.var_names = adata.var[{columns[0]!r}].astype(str); adata.var_names_make_unique()"
        )
    else:
        what = f"neither a column of adata.obs ({list(adata.obs.columns)}) nor a gene"
        what += did_you_mean(gene, [*adata.obs.columns, *adata.var_names])
    msg = f"color={gene!r}: {what}"
    raise KeyError(msg)


def categorical(adata: AnnData, color: str) -> tuple[list[str], np.ndarray] | None:
    """All categories of ``obs[color]``, used or not, and the code of each cell; None for numbers or no column."""
    if color not in adata.obs:
        return None
    column = get_column(adata.obs, color)
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        return None
    values = as_labels(column)
    return list(values.categories), np.asarray(values.codes)


def number_colors(
    name: str, numbers: np.ndarray, *, cmap: str, vmin: float | str | None = None, vmax: float | str | None = None
) -> Colors:
    """Give each cell the colour of its number; the scale spans the finite numbers unless given."""
    from matplotlib.colors import Normalize

    finite = numbers[np.isfinite(numbers)]
    low, high = _limit("vmin", vmin, finite, 0.0), _limit("vmax", vmax, finite, 100.0)
    scale = color_map("cmap", cmap).with_extremes(bad=NA_COLOR)
    order = np.argsort(np.where(np.isfinite(numbers), numbers, -np.inf), kind="stable")
    return Colors(name, [], values=numbers, cmap=scale, norm=Normalize(low, high), order=order)


def color_map(name: str, value: str) -> Colormap:
    """Colour map named ``value``; ``name`` is the argument for the message of an error."""
    import matplotlib as mpl

    if value not in mpl.colormaps:
        msg = f"{name}={value!r} is not a colour map of matplotlib; some are 'viridis', 'magma', 'coolwarm' and 'tab20'"
        raise ValueError(msg)
    return mpl.colormaps[value]


def _limit(name: str, value: float | str | None, finite: np.ndarray, percentile: float) -> float | None:
    """One end of the colour scale: a number, a percentile such as ``"p99"``, or ``percentile``."""
    if isinstance(value, str):
        try:
            percentile = float(value.removeprefix("p"))
        except ValueError:
            percentile = np.nan
        if not (value.startswith("p") and 0 <= percentile <= 100):
            msg = f"{name}={value!r} must be a number or a percentile such as 'p99'"
            raise ValueError(msg)
        value = None
    if value is not None:
        return float(value)
    return float(np.percentile(finite, percentile)) if len(finite) else None


def category_colors(adata: AnnData, color: str, categories: list[str], palette: Any) -> list[Any]:
    """Colours of the categories: ``palette``, else ``uns["<color>_colors"]``, else the colour-blind safe default."""
    from matplotlib.colors import is_color_like

    if isinstance(palette, Mapping):
        palette = by_name(palette)
        missing = [c for c in categories if c not in palette]
        if missing:
            msg = f"palette= has no colour for {missing} of obs[{color!r}]"
            raise ValueError(msg)
        return [palette[c] for c in categories]
    known = categorical(adata, color)
    if known is not None and categories != known[0] and set(categories) <= set(known[0]):
        # A part of the categories has the colours that it has among all.
        own = dict(zip(known[0], category_colors(adata, color, known[0], palette), strict=True))
        return [own[c] for c in categories]
    if isinstance(palette, str):
        scale = color_map("palette", palette)
        n = len(categories)
        steps = np.arange(n) % scale.N if scale.N < 256 else np.linspace(0, 1, n)
        return [scale(step) for step in steps]
    if palette is None:
        named = stored_colors(adata, color)
        used = categories if known is None else [known[0][k] for k in np.unique(known[1][known[1] >= 0])]
        if named and all(c in named for c in used):
            return [named.get(c, NA_COLOR) for c in categories]
    wrong = [] if palette is None else [c for c in palette if not is_color_like(c)]
    if wrong or (palette is not None and not len(palette)):
        msg = f"palette={palette!r} must hold colours of matplotlib, such as '#0072B2' or 'tab:blue'"
        raise ValueError(msg)
    stored = PALETTE if palette is None else palette
    chosen = [stored[k % len(stored)] for k in range(len(categories))]
    # Cells that tl.annotate left "unsure" are grey, as missing values are.
    return [NA_COLOR if c == "unsure" and stored is PALETTE else v for c, v in zip(categories, chosen, strict=True)]


def given_axes(ax: Any, n: int) -> list[Axes]:
    """Return the axes that the user gave as a list; there must be ``n`` of them."""
    axes = list(np.ravel(np.asarray(ax, dtype=object)))
    if len(axes) != n:
        msg = f"ax= holds {len(axes)} axes, but this figure has {n} panels; pass a list of {n} axes, or leave out ax"
        raise ValueError(msg)
    strange = [type(a).__name__ for a in axes if not hasattr(a, "pcolormesh")]
    if strange:
        msg = f"ax= must hold Axes of matplotlib, but holds {strange[0]}"
        raise ValueError(msg)
    return axes


def place_axes(boxes: Sequence[tuple[float, float, float, float]], size: tuple[float, float]) -> list[Axes]:
    """Make a figure of ``size`` (width, height) with axes at ``boxes`` (left, top, width, height), all in inches."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=size)
    width, height = size
    return [figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height)) for x, y, w, h in boxes]


def grid(
    n_panels: int, sides: Sequence[Any], *, width: float, height: float, ncols: int
) -> tuple[list[tuple[float, float, float, float]], tuple[float, float]]:
    """Lay out blocks of ``n_panels`` panels, each block with its legend at the right, up to ``ncols`` panels in a row.

    Panels of ``width`` x ``height`` inches are made smaller where the figure would be too large; where that is not
    enough, there are fewer blocks in a row. ``sides`` holds, for each block, the function from the height of a panel to
    the width of the legend. Returns the boxes, block after block, and the size of the figure.
    """
    columns = min(ncols, n_panels)
    gap, title, margin = 0.15, 0.35, 0.1
    for per_row in range(min(max(1, ncols // columns), len(sides)), 0, -1):
        lines = [range(start, min(start + per_row, len(sides))) for start in range(0, len(sides), per_row)]
        widest = max(sum(sides[b](height) for b in line) for line in lines)
        fits = (MAX_SIZE - widest) / (per_row * columns * (width + gap))
        if fits >= _MIN_SCALE:
            break
    n_rows = len(lines) * -(-n_panels // columns)
    shrink = min(1.0, max(_MIN_SCALE, min(fits, MAX_SIZE / (n_rows * (height + title)))))
    width, height = width * shrink, height * shrink
    boxes: list[tuple[float, float, float, float]] = []
    right = y = 0.0
    for line in lines:
        x = margin
        for b in line:
            for k in range(n_panels):
                row, column = divmod(k, columns)
                boxes.append((x + column * (width + gap), y + title + row * (height + title), width, height))
            x += columns * (width + gap) + sides[b](height)
        right = max(right, x)
        y += -(-n_panels // columns) * (height + title)
    return boxes, (right, y + margin)


def axes_size(ax: Axes) -> tuple[float, float]:
    """Width and height of the axes in inches, as they will be drawn."""
    ax.apply_aspect()
    dpi = float(ax.figure.dpi)
    return float(ax.bbox.width) / dpi, float(ax.bbox.height) / dpi


def clear_frame(ax: Axes) -> None:
    """Remove ticks and frame, which say nothing on a map of tissue or a UMAP."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def color_bar(ax: Axes, drawn: Any, *, left: float, top: float, height: float, ticks: Any = None) -> Axes:
    """Put a colour bar at the right of ``ax``: inches from its right side, from its top, and in height."""
    width, tall = axes_size(ax)
    inset = ax.inset_axes((1 + left / width, 1 - (top + height) / tall, 0.13 / width, height / tall))
    bar = ax.figure.colorbar(drawn, cax=inset, ticks=ticks)
    bar.outline.set_visible(False)
    inset.tick_params(labelsize=FONT)
    return inset


def slanted_ticks(ax: Axes, at: Any, labels: Sequence[str]) -> None:
    """Label the x axis with names that may be long."""
    ax.set_xticks(at, labels, rotation=_SLANT, ha="right", rotation_mode="anchor", fontsize=FONT)


def slanted_size(labels: Sequence[str], step: float) -> tuple[float, float]:
    """Inches that slanted labels, ``step`` inches apart, take at the left of the axes and below them."""
    widths = np.array([text_width(str(label)) for label in labels])
    slant = np.deg2rad(_SLANT)
    left = np.max(np.cos(slant) * widths - (np.arange(len(widths)) + 0.5) * step)
    return max(0.0, float(left)) + 0.1, float(np.sin(slant) * widths.max()) + 0.25


def did_you_mean(name: Any, known: Iterable[Any]) -> str:
    """End of a message that suggests names alike ``name``; empty where there is none."""
    import difflib

    near = list(dict.fromkeys(difflib.get_close_matches(str(name), map(str, known))))
    return f"; did you mean {near}?" if near else ""
