"""Image, scale and window of the patches of each slide."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from spatialfm._data._adata import get_coordinates
from spatialfm._data._images import StoredImages, open_image, stored_images
from spatialfm._data._spatialdata import Placed, is_element, is_spatialdata, place

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

# Spots drawn at a wrong scale of 0.3 (lowres for hires) reach no further than this share of the image; tissue rarely
# covers so little.
_CORNER = 0.35
_CORNER_SPOTS = 20
_VISIUM_PITCH = 100.0  # µm between centres of spots
_VISIUM_SPOT = 65.0  # µm, what Space Ranger calls spot_diameter_fullres
_VISIUM_RATIO = (0.6, 0.75)  # spot diameter to distance between spots; 0.65 to 0.70 in files of all versions


class PatchOptions(NamedTuple):
    """Arguments of :func:`spatialfm.pp.patches` that decide image, scale and window."""

    image: Any
    size_um: float | None
    size_px: float | None
    out_px: int
    scale: Any
    um_per_px: Any
    spot_distance_um: float | None
    library_key: str | None
    coordinate_system: str | None
    basis: str
    n_slides: int


class SlideImage(NamedTuple):
    """What patches of a slide are cut from."""

    name: str
    """Name of the slide, ``""`` for a single one."""
    source: Any
    """What :func:`spatialfm._data._images.open_image` takes."""
    scale: float
    """Pixels of the image in a unit of the coordinates."""
    window: float
    """Side of a patch in units of the coordinates."""
    um_per_px: float | None
    """µm in a unit of the coordinates, None where unknown."""


class SlidePatches(NamedTuple):
    """Patches of a slide that were found to fit its image."""

    image: SlideImage
    xy: np.ndarray
    """Coordinates of the spots (n, 2), float64."""
    summary: str
    """What was assumed, for the log."""


class _Spots(NamedTuple):
    """Spots of a slide."""

    where: str
    """The slide, for messages."""
    xy: np.ndarray
    names: pd.Index


class _Found(NamedTuple):
    """Image of a slide with its scale."""

    source: Any
    label: str
    scale: float
    is_given: bool
    """Whether the caller gave the scale."""
    factors: Mapping[str, float]
    """Numbers among the scale factors in ``uns["spatial"]``."""
    placed: Placed | None
    """Spots on an image of a SpatialData object."""


class _Micrometres(NamedTuple):
    """µm in a unit of the coordinates, None where unknown, and the reason."""

    value: float | None
    reason: str


def slide_patches(adata: AnnData, name: str, rows: np.ndarray, options: PatchOptions) -> SlidePatches:
    """Find image, scale and window of a slide's patches, and check that the spots lie on the image."""
    where = f"slide {name!r}" if name else "the slide"
    source = _source(adata, name, rows, options, where)
    xy = source.xy if isinstance(source, Placed) else get_coordinates(adata, options.basis)[rows, :2]
    spots = _Spots(where, xy, adata.obs_names[rows])
    found = _find_image(adata, name, source, options, where)
    shape = open_image(found.source).shapes[0]
    _check_fit(spots, found, shape)
    um = _micrometres(
        where,
        xy,
        found.factors,
        of_slide("um_per_px", options.um_per_px, name),
        options.spot_distance_um,
        placed=found.placed,
    )
    window = _window(where, found, shape, um, options)
    summary = _summary(spots, found, shape, um, window, options.out_px)
    return SlidePatches(SlideImage(name, found.source, found.scale, window, um.value), xy, summary)


def _source(adata: AnnData, name: str, rows: np.ndarray, options: PatchOptions, where: str) -> Any:
    """Image of a slide as given; for a SpatialData object, the spots on its image."""
    source = of_slide("image", options.image, name)
    if is_spatialdata(source):
        sdata, element = source, None
    elif isinstance(source, tuple) and len(source) == 2 and is_spatialdata(source[0]):
        sdata, element = source
    elif options.coordinate_system is not None:
        msg = (
            f"coordinate_system={options.coordinate_system!r} is for a SpatialData object as image, got "
            f"{type(source).__name__}"
        )
        raise ValueError(msg)
    else:
        return source
    if of_slide("scale", options.scale, name) is not None:
        msg = (
            f"scale={options.scale!r} and a SpatialData object: its transformations say where spots lie. Leave scale "
            "out, or pass the image alone, sdata.images[name], for coordinates in obsm"
        )
        raise ValueError(msg)
    return place(
        adata,
        rows,
        sdata,
        element,
        where=where,
        coordinate_system=options.coordinate_system,
        library_key=options.library_key,
    )


def _find_image(adata: AnnData, name: str, source: Any, options: PatchOptions, where: str) -> _Found:
    stored = stored_images(adata, name, options.n_slides)
    given = of_slide("scale", options.scale, name)
    check_real("scale", given)
    if isinstance(source, Placed):
        # The scale factors in uns are those of another image.
        factors = {"spot_diameter_fullres": source.diameter}
        return _Found(source.image, source.label, 1.0, False, factors, source)
    if source is None or (isinstance(source, str) and source in stored.images):
        usable = [k for k in stored.images if given is not None or f"tissue_{k}_scalef" in stored.factors]
        choice = source or next((k for k in ("hires", *usable) if k in usable), None)
        if choice not in usable:
            msg = (
                f"{where}: there is no image with its scale factor: {_listed(adata, stored)}. Pass image= (a file or "
                "an array), or library_key= with the column whose values name the slides in uns['spatial']"
            )
            raise KeyError(msg)
        scale = float(given if given is not None else stored.factors[f"tissue_{choice}_scalef"])
        pixels, label = np.asarray(stored.images[choice]), f"uns image {choice!r}"
        return _Found(pixels, label, scale, given is not None, stored.factors, None)
    if isinstance(source, str) and stored.images and not Path(source).exists():
        msg = (
            f"image={source!r} is neither a file nor an image of uns['spatial'][{stored.key!r}], which holds "
            f"{list(stored.images)}"
        )
        raise FileNotFoundError(msg)
    label = str(source) if isinstance(source, str | Path) else "image"
    return _Found(source, label, 1.0 if given is None else float(given), given is not None, stored.factors, None)


def _listed(adata: AnnData, stored: StoredImages) -> str:
    """Describe what ``uns["spatial"]`` holds."""
    if stored.images or stored.factors:
        return (
            f"uns['spatial'][{stored.key!r}] holds the images {list(stored.images)} and the scalefactors "
            f"{list(stored.factors)}"
        )
    held = adata.uns.get("spatial", {})
    return f"uns['spatial'] holds {list(held) if isinstance(held, Mapping) else held!r}"


def _check_fit(spots: _Spots, found: _Found, shape: tuple[int, int]) -> None:
    """Raise where spots lie outside the image, or all in its upper left corner."""
    xy, scale = spots.xy, found.scale
    size = np.array(shape[::-1])
    outside = ((xy < 0) | (xy * scale > size)).any(axis=1)
    reach = (xy * scale / size).max()
    in_corner = not found.is_given and found.placed is None and len(xy) >= _CORNER_SPOTS and reach < _CORNER
    if not outside.any() and not in_corner:
        return
    hint = _scale_hint(xy, found, size)
    image = f"{found.label} ({size[0]} x {size[1]} pixels) at scale {scale:.4g}"
    if outside.any():
        msg = (
            f"{spots.where}: {int(outside.sum())} of {len(xy)} spots lie outside {image}, such as "
            f"{list(spots.names[outside][:3])}. {hint}"
            + (". If only these are beyond the image, drop them" if outside.mean() < 0.5 else "")
        )
    else:
        msg = (
            f"{spots.where}: all {len(xy)} spots lie in the upper left {reach:.0%} of {image}; a wrong scale? {hint}. "
            f"If they do lie there, pass scale={scale:.4g}"
        )
    raise ValueError(msg)


def _scale_hint(xy: np.ndarray, found: _Found, size: np.ndarray) -> str:
    if found.placed is not None:
        return (
            f"Check the transformations of {found.placed.region!r} and of the image to {found.placed.system!r} "
            "(spatialdata.transformations.get_transformation)"
        )
    known = {"1 (full resolution)": 1.0, **{k: v for k, v in found.factors.items() if k.startswith("tissue_")}}
    fits = [
        f"{k} = {v:.4g}"
        for k, v in known.items()
        if v != found.scale and _CORNER <= (xy * v / size).max() <= 1 and (xy >= 0).all()
    ]
    if fits:
        return f"All would fit at {' or '.join(fits)}: pass it as scale=, or the image for scale {found.scale:.4g}"
    if (xy < 0).any():
        return f"Coordinates from {xy.min():.4g} on are no pixels: convert obsm to pixels of the full-resolution image"
    return f"All would fit at scales up to {(size / np.maximum(xy.max(axis=0), 1e-300)).min():.3g}"


def _window(where: str, found: _Found, shape: tuple[int, int], um: _Micrometres, options: PatchOptions) -> float:
    """Side of a patch in units of the coordinates."""
    if options.size_um is not None and um.value is None:
        msg = (
            f"{where}: size_um={options.size_um:g} needs the µm a pixel, but {um.reason}. Pass um_per_px=, "
            "spot_distance_um= (200 for the first Spatial Transcriptomics arrays, 100 for Visium) or size_px="
        )
        raise ValueError(msg)
    if options.size_px is not None:
        window = float(options.size_px)
    else:
        window = float(options.size_um or 0) / float(um.value or 1)
    height, width = shape
    if not 2 <= window * found.scale <= 16 * max(height, width):
        msg = (
            f"{where}: a patch covers {window:.4g} units of the coordinates, {window * found.scale:.3g} pixels of "
            f"{found.label} ({width} x {height}) at scale {found.scale:.4g}; it must be at least 2 pixels, and no more "
            "than 16 times the image. Give another size_um= or size_px=, a finer image or the scale"
        )
        raise ValueError(msg)
    return window


def _summary(spots: _Spots, found: _Found, shape: tuple[int, int], um: _Micrometres, window: float, out_px: int) -> str:
    height, width = shape
    pixels = window * found.scale
    size = f"= {window * um.value:.4g} µm ({um.reason})" if um.value is not None else f"({um.reason})"
    return (
        f"{spots.where}: {len(spots.xy)} spots, patches of {window:.4g} px {size}, {pixels:.4g} pixels of "
        f"{found.label} ({width} x {height}, scale {found.scale:.4g})"
        + (f", enlarged {out_px / pixels:.2g}-fold: a finer image shows more" if pixels < out_px / 2 else "")
    )


def stated_micrometres(adata: AnnData, name: str, xy: np.ndarray, n_slides: int = 1) -> float | None:
    """Read the µm in a unit of a slide's coordinates ``xy`` from ``uns["spatial"]``; None where they are not stated."""
    factors = stored_images(adata, name if n_slides > 1 else "", n_slides).factors
    return _micrometres("", xy, factors, None, None, placed=None).value if factors else None


def _micrometres(
    where: str,
    xy: np.ndarray,
    factors: Mapping[str, float],
    given: Any,
    spot_distance_um: float | None,
    *,
    placed: Placed | None,
) -> _Micrometres:
    """Find the µm in a unit of the coordinates; ``given`` is the argument ``um_per_px`` of the slide."""
    from scipy.spatial import cKDTree

    if given is not None:
        check_real("um_per_px", given)
        return _Micrometres(float(given), f"{given:.4g} µm/px as given")
    if spot_distance_um is None and "microns_per_pixel" in factors:
        um = factors["microns_per_pixel"]
        return _Micrometres(um, f"{um:.4g} µm/px in scalefactors")
    # A table may hold a part of the array only: all spots of the array give the distance between neighbours.
    places = np.unique(xy if placed is None else placed.neighbours, axis=0)
    apart = float(np.median(cKDTree(places).query(places, k=2)[0][:, 1])) if len(places) > 1 else math.inf
    if spot_distance_um is not None:
        if math.isinf(apart):
            msg = f"{where}: spot_distance_um needs spots at two locations at least; pass um_per_px="
            raise ValueError(msg)
        um = spot_distance_um / apart
        return _Micrometres(um, f"{um:.4g} µm/px from {spot_distance_um:g} µm between spots")
    return _visium_micrometres(factors.get("spot_diameter_fullres", 0.0), apart, placed)


def _visium_micrometres(spot: float, apart: float, placed: Placed | None) -> _Micrometres:
    """Recognise a Visium array by the diameter of its spots and the distance between neighbours, both in pixels."""
    unknown = "µm a pixel not known: "
    if not spot > 0 and placed is not None:
        return _Micrometres(None, f"{unknown}{placed.region!r} does not hold the equal circles of a Visium array")
    if not spot > 0:
        reason = "uns['spatial'] states neither microns_per_pixel nor spot_diameter_fullres"
        return _Micrometres(None, unknown + reason)
    ratio = spot / apart
    if ratio > _VISIUM_RATIO[1] or (placed is not None and ratio < _VISIUM_RATIO[0]):
        return _Micrometres(None, f"{unknown}spots {apart:.4g} px apart of {spot:.4g} px are no Visium array")
    if ratio < _VISIUM_RATIO[0]:
        um = _VISIUM_SPOT / spot
        return _Micrometres(um, f"{um:.4g} µm/px from Visium's {_VISIUM_SPOT:g} µm spot diameter")
    um = _VISIUM_PITCH / apart
    return _Micrometres(um, f"{um:.4g} µm/px from Visium's {_VISIUM_PITCH:g} µm between spots")


def of_slide(argument: str, value: Any, name: str) -> Any:
    """Read the value for one slide of an argument that may be a mapping from slides."""
    if not isinstance(value, Mapping) or is_element(value):  # a pyramid is a mapping too
        return value
    if name not in value:
        msg = f"{argument} has nothing for slide {name!r}; it names {list(value)}" + (
            "" if name else ". Pass library_key= with the column that names each spot's slide"
        )
        raise KeyError(msg)
    return value[name]


def check_real(name: str, value: Any) -> None:
    """Raise unless ``value`` is None or a positive number."""
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf
    ):
        msg = f"{name} must be a positive number, got {value!r}"
        raise ValueError(msg)
