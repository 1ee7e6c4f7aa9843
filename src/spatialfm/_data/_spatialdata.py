"""Locate the spots of a table on an image of a SpatialData object."""

from __future__ import annotations

import math
import sys
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from anndata import AnnData

_UNEVEN = 0.01  # of the scale; placement is exact in any case, only the shape of a patch on the tissue suffers
_RGB = (3, 4)  # channels


@dataclass
class Placed:
    """Spots of a slide on an image element; all lengths and coordinates are in pixels of its largest level."""

    image: Any
    label: str
    system: str
    region: str
    xy: np.ndarray  # of the spots asked for
    neighbours: np.ndarray  # of all instances of the region
    diameter: float  # of its circles; 0 where they are none, or of several sizes


def is_spatialdata(value: Any) -> bool:
    """Whether ``value`` is a SpatialData object; spatialdata, which takes seconds to load, is not imported for it."""
    module = sys.modules.get("spatialdata")
    return module is not None and isinstance(value, module.SpatialData)


def is_element(value: Any) -> bool:
    """Whether ``value`` is an image element: an array of xarray, or a tree of such, which is a mapping too."""
    module = sys.modules.get("xarray")
    return module is not None and isinstance(value, module.DataArray | module.DataTree)


def element_levels(element: Any) -> list[Any]:
    """Levels of an image element as arrays of xarray, the largest first."""
    import xarray as xr

    if isinstance(element, xr.DataArray):
        return [element]
    from spatialdata import get_pyramid_levels

    return get_pyramid_levels(element)


def place(
    adata: AnnData,
    rows: np.ndarray,
    sdata: Any,
    image: str | None,
    *,
    where: str,
    coordinate_system: str | None,
    library_key: str | None,
) -> Placed:
    """Locate the spots of ``rows`` on an image.

    Finds the element that the rows of the table annotate, and the image that shares a coordinate system with it.
    """
    from spatialdata.transformations import Sequence, get_transformation

    region, instances = _annotated(adata, rows, sdata, where, library_key)
    element = sdata[region]
    transformations = get_transformation(element, get_all=True)
    if coordinate_system is not None and coordinate_system not in transformations:
        msg = (
            f"{where}: coordinate_system={coordinate_system!r} is no coordinate system of {region!r}, which has "
            f"{list(transformations)}"
        )
        raise ValueError(msg)
    usable = set(transformations) if coordinate_system is None else {coordinate_system}
    image = _image(sdata, image, region, usable, where)
    system = _system(usable & set(get_transformation(sdata.images[image], get_all=True)), region, image, where)

    to_pixels = get_transformation(sdata.images[image], system).inverse()
    axes = ("x", "y")
    linear = Sequence([transformations[system], to_pixels]).to_affine_matrix(axes, axes)[:2, :2]
    size = math.sqrt(abs(np.linalg.det(linear)))
    if np.abs(np.abs(linear) - size * np.eye(2)).max() > _UNEVEN * size:
        msg = (
            f"{where}: from {region!r} to the pixels of {image!r}, coordinate system {system!r} rotates, shears or "
            f"stretches (x, y become {np.array2string(linear, precision=4, separator=', ').replace(chr(10), '')} x, "
            "y); only one scale and a translation "
            "keep patches upright squares. Resample the image first: "
            f"sdata[{image!r} + '_upright'] = spatialdata.transform(sdata[{image!r}], to_coordinate_system={system!r})"
        )
        raise ValueError(msg)
    index, places = _centroids(element, system, to_pixels)
    found = index.get_indexer(instances) if index.is_unique else None
    if found is None or (found < 0).any():
        if found is None:
            what = f"has several instances of one name, such as {index[index.duplicated()].tolist()[0]!r}"
        else:
            lost = instances[found < 0]
            what = (
                f"has no instance for {len(lost)} of {len(rows)} spots, such as {lost[:3].tolist()}; it names them "
                f"like {index[:3].tolist()}"
            )
        msg = (
            f"{where}: element {region!r} {what}. Bring table and element together with "
            "spatialdata.match_element_to_table"
        )
        raise ValueError(msg)
    xy = places[found]
    if not np.isfinite(xy).all():
        names = list(adata.obs_names[rows][~np.isfinite(xy).all(axis=1)][:3])
        msg = f"{where}: spots have no centroid in element {region!r}, such as {names}; drop them"
        raise ValueError(msg)
    radii = np.asarray(getattr(element, "radius", 0.0), dtype=float)
    even = radii.size > 0 and radii.min() > 0 and np.ptp(radii) < 1e-3 * radii.min()
    return Placed(
        image=sdata.images[image],
        label=f"SpatialData image {image!r}",
        system=system,
        region=region,
        xy=xy,
        neighbours=places[np.isfinite(places).all(axis=1)],
        diameter=2 * float(radii.max()) * size if even else 0.0,
    )


def _annotated(
    adata: AnnData, rows: np.ndarray, sdata: Any, where: str, library_key: str | None
) -> tuple[str, np.ndarray]:
    """Region and instances that rows of a table annotate."""
    from spatialdata.models import get_table_keys

    if not adata.uns.get("spatialdata_attrs"):
        msg = (
            "adata is no table of a SpatialData object: uns['spatialdata_attrs'], which says what its rows annotate, "
            f"is missing. Pass one of sdata.tables ({list(sdata.tables)}); where anndata.concat dropped it, "
            "concatenate with uns_merge='same'"
        )
        raise KeyError(msg)
    _, region_key, instance_key = get_table_keys(adata)
    regions = list(dict.fromkeys(adata.obs[region_key].iloc[rows].astype(str)))
    if len(regions) > 1:
        msg = f"{where}: rows annotate several elements: {regions}. " + (
            f"Pass library_key={region_key!r}, the column that names them"
            if library_key is None
            else f"obs[{library_key!r}] must distinguish them, as obs[{region_key!r}] does"
        )
        raise ValueError(msg)
    region = regions[0]
    if region not in sdata:
        msg = (
            f"{where}: rows annotate element {region!r}, which the SpatialData object does not hold; is adata a table "
            "of another one?"
        )
        raise KeyError(msg)
    return region, adata.obs[instance_key].to_numpy()[rows]


def _image(sdata: Any, image: str | None, region: str, usable: set[str], where: str) -> str:
    """Name of the image: as given, or the only one with colours that shares a coordinate system with the region."""
    from spatialdata.transformations import get_transformation

    if image is not None:
        if image not in sdata.images:
            msg = f"{where}: the SpatialData object has no image {image!r}; it holds {list(sdata.images)}"
            raise KeyError(msg)
        return image
    colours = {k: element_levels(v)[0].sizes.get("c", 1) for k, v in sdata.images.items()}
    shared = [k for k, v in sdata.images.items() if usable & set(get_transformation(v, get_all=True))]
    matching = [k for k in shared if colours[k] in _RGB]
    if len(matching) == 1:
        return matching[0]
    if matching:
        msg = f"{where}: several images share a coordinate system with {region!r}: {matching}"
    else:
        found = [f"{k} ({n} channels{'' if k in shared else ', other coordinate systems'})" for k, n in colours.items()]
        msg = (
            f"{where}: no image with 3 or 4 channels shares a coordinate system with {region!r} ({sorted(usable)}); "
            f"the object holds {found}"
        )
    msg += ". Name one: image=(sdata, 'name'), or a mapping from the slide to such pairs"
    raise ValueError(msg)


def _system(common: set[str], region: str, image: str, where: str) -> str:
    if "global" in common:
        return "global"
    if len(common) == 1:
        return next(iter(common))
    if common:
        msg = (
            f"{where}: {region!r} and {image!r} share several coordinate systems; choose one with coordinate_system=: "
            f"{sorted(common)}"
        )
    else:
        msg = (
            f"{where}: {region!r} and {image!r} share no coordinate system (or not the one asked for); align them and "
            "say so with spatialdata.transformations.set_transformation"
        )
    raise ValueError(msg)


def _centroids(element: Any, system: str, to_pixels: Any) -> tuple[Any, np.ndarray]:
    """Names of all instances of an element, and the pixels (n, 2) of their centroids."""
    from spatialdata import get_centroids, transform
    from spatialdata.transformations import set_transformation

    with warnings.catch_warnings():
        # Centroids are looked up by name, so their order does not matter.
        warnings.filterwarnings("ignore", message="The index of the dataframe is not monotonic", category=UserWarning)
        points = get_centroids(element, coordinate_system=system)
        set_transformation(points, to_pixels, "pixels")
        found = transform(points, to_coordinate_system="pixels").compute()
    return found.index, found[["x", "y"]].to_numpy(dtype=np.float64)
