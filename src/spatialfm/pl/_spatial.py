"""Maps of cells on the tissue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from spatialfm._checks import checked
from spatialfm._data._adata import get_column, get_coordinates, get_libraries
from spatialfm._data._images import image_entries, open_image, stored_images
from spatialfm._settings import warn
from spatialfm.pl._style import (
    Colors,
    categorical,
    clear_frame,
    given_axes,
    grid,
    place_axes,
    resolve_colors,
    text_width,
)

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

Img = bool | str | Path | Mapping[str, str | Path] | None

_TITLE_FONT = 11.0
_PANEL_AREA = 14.0  # square inches
_PANEL_HEIGHT = (2.5, 6.0)
_MIN_DIAMETER = 0.013  # inches
_MAX_GAP = 3.0  # largest distance of neighbours with a border between them, in medians
_MAX_PIXELS = 2000  # of a side of an image that is drawn
_MIN_PIXELS = 0.05  # between neighbours; if closer, coordinates and image must have different units


@dataclass(frozen=True)
class MapOptions:
    """How maps are drawn; each field is the parameter of :func:`spatial` of that name."""

    library_key: str | None = None
    basis: str = "spatial"
    img: Img = False
    size: float | None = None
    ncols: int = 4
    outline: str | None = None
    alpha_img: float = 1.0
    alpha: float = 1.0  # opacity of the points


class Underlay(NamedTuple):
    """Image below the cells of a slide."""

    pixels: np.ndarray
    extent: tuple[float, float, float, float]  # left, right, bottom, top, in coordinates
    spot_diameter: float  # in coordinates; 0 where unknown


@checked
def spatial(
    adata: AnnData,
    color: str | Sequence[str] | None = None,
    *,
    groups: str | Sequence[str] | None = None,
    library_key: str | None = None,
    basis: str = "spatial",
    layer: str | None = None,
    img: Img = None,
    alpha_img: float = 1.0,
    outline: str | None = None,
    size: float | None = None,
    cmap: str = "viridis",
    palette: Mapping[str, Any] | Sequence[Any] | str | None = None,
    vmin: float | str | None = None,
    vmax: float | str | None = None,
    ncols: int = 4,
    ax: Axes | Sequence[Axes] | None = None,
) -> Axes | list[Axes]:
    """Plot cells or spots on the tissue, one panel for each slide.

    The y axis points down, as in images and as in scanpy and squidpy, with or without an image. All slides share the
    scale of length and the colour scale. Points are rasterised and keep their size in the unit of the coordinates.

    Parameters
    ----------
    %(adata)s
    color
        Column of ``obs`` or name of a gene (in ``adata.raw`` where ``X`` lacks it), or several: a panel for each. Where
        None, all cells are grey; above an image they are not drawn.
    groups
        Categories of ``color`` to show in their colours; cells of other categories are grey and drawn below.
    %(panel_per_slide)s
    basis
        Key of the coordinates in ``obsm``; of three columns the first two are drawn.
    %(layer)s
    img
        Image to draw below the cells, with at most 2,000 pixels a side. None or True: that of
        ``uns["spatial"][slide]`` (``"hires"`` before others); True raises an error where there is none. A string: the
        name of one of these, such as ``"lowres"``, or a file (JPEG, PNG, TIFF) whose pixels are the unit of the
        coordinates. A mapping from slides to these. False: no image.
    alpha_img
        Opacity of the image.
    outline
        Column of ``obs`` with categories, such as regions (:func:`spatialfm.pp.regions`), to draw borders between.
    size
        Diameter of the points in the unit of the coordinates. Where None, the spot diameter of the image if it is
        known, otherwise the median distance between nearest neighbours, so that points touch.
    %(cmap)s
    palette
        Colours of the categories: a list, a mapping from category to colour, or the name of a colour map. Where None,
        ``uns["<color>_colors"]``, otherwise colours that remain distinct for colour-blind readers.
    vmin, vmax
        Range of the colour scale, that of the values where None; ``"p99"`` is the 99th percentile.
    %(ncols)s
    %(ax)s

    Returns
    -------
    The axes, or a list where there are several panels (all slides of the first colour, then of the second, ...).

    Raises
    ------
    KeyError, FileNotFoundError
        A column, gene, layer, image or the coordinates are missing.
    ValueError
        ``color`` has no such ``groups``, or coordinates, image and ``ax`` do not fit each other.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()
    >>> axes = sfm.pl.spatial(adata, "region", library_key="mouse_id")
    >>> [ax.get_title() for ax in axes] == list(adata.obs["mouse_id"].cat.categories)
    True
    """
    names = [color] if color is None or isinstance(color, str) else list(color)
    wanted = [groups] if isinstance(groups, str) else None if groups is None else [str(g) for g in groups]
    colors = [
        resolve_colors(adata, name, layer=layer, cmap=cmap, palette=palette, vmin=vmin, vmax=vmax, groups=wanted)
        for name in names
    ]
    if wanted is not None:
        _check_groups(adata, names, wanted)
    options = MapOptions(
        library_key=library_key, basis=basis, img=img, size=size, ncols=ncols, outline=outline, alpha_img=alpha_img
    )
    axes = draw_maps(adata, colors, options, ax=ax)
    return axes if len(axes) > 1 else axes[0]


def draw_maps(adata: AnnData, colors: Sequence[Colors], options: MapOptions, *, ax: Any = None) -> list[Axes]:
    """Draw what :func:`spatial` describes: all slides by the first colours, then by the second, ..."""
    xy = get_coordinates(adata, options.basis)[:, :2]
    slides = get_libraries(adata, options.library_key)
    size, ncols = options.size, options.ncols
    outlined = None if options.outline is None else _codes(adata, options.outline)
    images = [_underlay(adata, name, xy[rows], options.img, len(slides)) for name, rows in slides]
    if options.img is None and not all(images):
        _warn_of_unused_images(adata, [name for name, _ in slides], options.library_key)
    diameters = [
        size or (image and image.spot_diameter) or _spacing(xy[rows])
        for (_, rows), image in zip(slides, images, strict=True)
    ]
    middles, extent = _windows(xy, slides)
    extent = extent + max(diameters)
    width, height = _panel_size(extent, slides)
    n_panels = len(colors) * len(slides)
    if ax is None:
        boxes, figsize = grid(len(slides), [c.legend_width for c in colors], width=width, height=height, ncols=ncols)
        axes = place_axes(boxes, figsize)
        height = boxes[0][3]
    else:
        axes = given_axes(ax, n_panels)
    # With far more cells than pixels, points of less than a pixel would fade.
    diameters = [size or max(d, _MIN_DIAMETER / height * extent[1]) for d in diameters]

    named = slides[0][0] != ""
    for k, colored in enumerate(colors):
        panels = axes[k * len(slides) : (k + 1) * len(slides)]
        for panel, (name, rows), image, middle, diameter in zip(
            panels, slides, images, middles, diameters, strict=True
        ):
            if image:
                panel.imshow(image.pixels, extent=image.extent, alpha=options.alpha_img, zorder=0)
            seen = rows[:0] if colored.name is None and image else rows
            points = colored.draw(panel, xy, seen, diameter=diameter, alpha=options.alpha)
            if outlined is not None:
                _draw_borders(panel, xy[rows], outlined[rows], cased=bool(image))
            left, top = middle - extent / 2
            panel.set(xlim=(left, left + extent[0]), ylim=(top + extent[1], top), aspect="equal")
            panel.set_title(name if named else (colored.name or ""), fontsize=_TITLE_FONT)
            clear_frame(panel)
        colored.explain(points, panels[min(ncols, len(slides)) - 1 if ax is None else -1], titled=named)
    return axes


def _check_groups(adata: AnnData, names: Sequence[str | None], groups: list[str]) -> None:
    """Raise unless each of ``groups`` is a category of one of the columns in ``names``."""
    columns = [values for name in names if name is not None and (values := categorical(adata, name)) is not None]
    if not columns:
        msg = f"groups={groups!r} are categories, but color={names} names no column of adata.obs that holds categories"
        raise ValueError(msg)
    known = [c for categories, _ in columns for c in categories]
    unknown = [g for g in groups if g not in known]
    if unknown or not groups:
        msg = f"groups={groups!r}: {unknown or 'nothing'} is not among the categories of {names}; choose from {known}"
        raise ValueError(msg)


def _codes(adata: AnnData, outline: str) -> np.ndarray:
    if outline not in adata.obs:
        msg = f"outline={outline!r} is not a column of adata.obs; it holds {list(adata.obs.columns)}"
        raise KeyError(msg)
    return np.asarray(get_column(adata.obs, outline).astype("category").cat.codes)


def _draw_borders(ax: Axes, xy: np.ndarray, codes: np.ndarray, *, cased: bool) -> None:
    """Draw borders between cells of different codes: sides of Voronoi cells, where the two cells are neighbours."""
    from matplotlib.collections import LineCollection
    from scipy.spatial import QhullError, Voronoi

    locations, first = np.unique(xy, axis=0, return_index=True)
    try:
        voronoi = Voronoi(locations - locations.mean(axis=0))
    except (QhullError, ValueError):  # fewer than four locations, or all on one line
        return
    i, j = voronoi.ridge_points.T
    sides = np.array([side if len(side) == 2 else (-1, -1) for side in voronoi.ridge_vertices])
    apart = np.linalg.norm(locations[i] - locations[j], axis=1)
    typical = np.median(apart)
    between = (codes[first[i]] != codes[first[j]]) & (sides >= 0).all(axis=1) & (apart < _MAX_GAP * typical)
    i, j, ends = i[between], j[between], voronoi.vertices[sides[between]] + locations.mean(axis=0)
    # Sides at the margin of the tissue are long; cut them to the distance of neighbours.
    middle = (locations[i, None] + locations[j, None]) / 2
    away = ends - middle
    length = np.linalg.norm(away, axis=-1, keepdims=True)
    ends = middle + away * np.minimum(1, typical / np.maximum(length, 1e-300))
    # White below black, so that the line is seen on any stain.
    for color, width in (("white", 3.0), ("black", 1.3)) if cased else (("black", 0.9),):
        ax.add_collection(LineCollection(ends, colors=color, linewidths=width, capstyle="round", zorder=2))


def panel_size(adata: AnnData, *, library_key: str | None, basis: str) -> tuple[float, float]:
    """Width and height in inches of the panels that :func:`spatial` makes."""
    slides = get_libraries(adata, library_key)
    return _panel_size(_windows(get_coordinates(adata, basis)[:, :2], slides)[1], slides)


def _panel_size(extent: np.ndarray, slides: list[tuple[str, np.ndarray]]) -> tuple[float, float]:
    ratio = extent[0] / extent[1]
    height = float(np.clip(np.sqrt(_PANEL_AREA / ratio), *_PANEL_HEIGHT))
    title = max((text_width(name) * _TITLE_FONT / 9 for name, _ in slides if name), default=0.0)
    return max(height * ratio, title), height


def _windows(xy: np.ndarray, slides: list[tuple[str, np.ndarray]]) -> tuple[list[np.ndarray], np.ndarray]:
    """Middle of each slide, and the extent that all panels share, so that lengths can be compared."""
    if not len(xy):
        msg = "adata holds no cells; there is nothing to draw"
        raise ValueError(msg)
    middles = [(xy[rows].min(axis=0) + xy[rows].max(axis=0)) / 2 for _, rows in slides]
    extent = np.max([np.ptp(xy[rows], axis=0) for _, rows in slides], axis=0)
    extent = np.maximum(extent * 1.04, 0.2 * extent.max())
    return middles, np.where(extent > 0, extent, 1.0)


def _spacing(xy: np.ndarray) -> float:
    """Median distance to the nearest neighbour at another location; 1 where there is only one location."""
    from scipy.spatial import cKDTree

    locations = np.unique(xy, axis=0)
    if len(locations) < 2:
        return 1.0
    return float(np.median(cKDTree(locations).query(locations, k=2)[0][:, 1]))


def _warn_of_unused_images(adata: AnnData, slides: list[str], library_key: str | None) -> None:
    """Warn of images under names that no slide has, while a slide has none."""
    lacking = [name for name in slides if not stored_images(adata, name, len(slides)).images]
    others = [name for name, entry in image_entries(adata).items() if name not in slides and entry.get("images")]
    if not (lacking and others):
        return
    if library_key is None:
        warn(
            "spatial: no image is drawn, as uns['spatial'] holds images of %s and the cells are drawn as one slide; "
            "pass library_key= with these names, keep the image of one slide in uns['spatial'], or pass img=False",
            others,
        )  # fmt: skip
    else:
        warn(
            "spatial: slides %s of obs[%r] have no image in uns['spatial'], which holds images of %s; give both the "
            "same names, name another column with library_key=, or pass img=False", lacking, library_key, others,
        )  # fmt: skip


def _underlay(adata: AnnData, slide: str, xy: np.ndarray, img: Img, n_slides: int) -> Underlay | None:
    """Image that ``img`` asks for; None where there is none to draw."""
    from spatialfm.pp._patch_images import of_slide

    if img is False:
        return None
    wanted = of_slide("img", img, slide)
    key, images, factors = stored_images(adata, slide, n_slides)
    usable = [name for name in images if f"tissue_{name}_scalef" in factors]
    if isinstance(wanted, str | Path) and wanted not in images:
        if not Path(wanted).is_file():
            msg = (
                f"img={str(wanted)!r} is neither a file nor an image of uns['spatial'][{key!r}], "
                f"which holds {list(images)}"
            )
            raise FileNotFoundError(msg)
        name, source, scale = str(wanted), wanted, 1.0
    else:
        name = wanted if isinstance(wanted, str) else next((k for k in ("hires", *usable) if k in usable), "")
        if name not in usable:
            if wanted is None:
                return None
            msg = (
                f"img={wanted!r}, but uns['spatial'][{key!r}] holds no such image with its scale factor "
                f"(uns['spatial'] holds {list(adata.uns.get('spatial', {}))}); add it, pass library_key= with these "
                "names, or leave out img"
            )
            raise KeyError(msg)
        source, scale = images[name], float(factors[f"tissue_{name}_scalef"])
    try:
        image = open_image(source)
        height, width = image.shapes[0]
        inside = ((xy * scale >= -0.5) & (xy * scale < [width, height])).all(axis=1).mean()
        if inside < 0.5 or _spacing(xy) * scale < _MIN_PIXELS:
            msg = (
                f"the coordinates of slide {key!r} do not fit its image {name!r} of {width} x {height} pixels "
                f"at {scale:.3g} pixels per unit: {inside:.0%} lie inside, {_spacing(xy) * scale:.2g} pixels apart. "
                "Bring obsm and uns['spatial'] to the same unit"
            )
            raise ValueError(msg)
        pixels = image.overview(_MAX_PIXELS)
    except ValueError as error:
        if wanted is not None:
            raise
        warn("spatial: %s; drawn without it. Choose an image with img=, or pass img=False", error)
        return None
    # As in matplotlib, pixel i covers i - 0.5 to i + 0.5.
    left, right, bottom, top = np.array([-0.5, width - 0.5, height - 0.5, -0.5]) / scale
    return Underlay(pixels, (left, right, bottom, top), float(factors.get("spot_diameter_fullres", 0)))
