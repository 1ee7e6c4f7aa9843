"""Patches of the tissue image around spots."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatialfm._checks import check_positive, checked
from spatialfm._data._adata import get_coordinates, get_libraries
from spatialfm._data._images import Image, open_image, stored_images
from spatialfm._data._spatialdata import Placed, is_element, is_spatialdata, place
from spatialfm._settings import logger, progress

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData
    from xarray import DataArray, DataTree

_SIZE_UM = 112.0  # 224 pixels of 0.5 µm, about a 20x scan
_CHUNK = 16  # patches of a chunk of the store
_FORMAT = 1
# Of 255 levels. On nine real slides 0 to 1.3% of the spots, and 59 to 98% of windows far from any spot, where fiducials and debris lie too.
_FLAT = 10.0
_CORNER = 0.35  # spots at a wrong scale of 0.3 (lowres for hires) reach no further; tissue hardly ever covers so little
_CORNER_SPOTS = 20
_VISIUM_PITCH = 100.0  # µm between centres
_VISIUM_SPOT = 65.0  # µm, what Space Ranger means by spot_diameter_fullres
_VISIUM_RATIO = (0.6, 0.75)  # of that to the distance between spots, 0.65 to 0.70 in files of all versions


@checked
def patches(
    adata: AnnData,
    image: (
        str
        | Path
        | np.ndarray
        | SpatialData
        | tuple[SpatialData, str]
        | DataArray
        | DataTree
        | Mapping[str, Any]
        | None
    ) = None,
    *,
    size_um: float | None = None,
    size_px: float | None = None,
    out_px: int = 224,
    out: str | Path | None = None,
    scale: float | Mapping[str, float] | None = None,
    um_per_px: float | Mapping[str, float] | None = None,
    spot_distance_um: float | None = None,
    library_key: str | None = None,
    coordinate_system: str | None = None,
    basis: str = "spatial",
) -> TissuePatches:
    """Cut a square patch of the tissue image (H&E) around each spot.

    Nothing is read until patches are asked for, one batch at a time, or streamed to a store with `out`. Of a tiled TIFF (OME-TIFF, SVS and other
    kinds of TIFF, pyramids too) and of an image of a SpatialData object (one scale or several) only the tiles or chunks under a patch are
    decoded, from the coarsest level that still has `out_px` pixels. JPEG and PNG know no windows: they are decoded whole, once, into 4 bytes a
    pixel, and one slide at a time. AnnData is not changed.

    Parameters
    ----------
    adata
        Spots or cells with coordinates in ``obsm[basis]``, in pixels of the full-resolution image (or see `scale`). With a SpatialData object as
        image, its table, whole or a part: coordinates are the centroids of the shapes, labels or points that its rows annotate, and ``obsm`` is not used.
    image
        None: ``uns["spatial"][slide]["images"]``, ``"hires"`` before others; the name of one of these; a file; an array (height, width),
        (height, width, 3) or with alpha; a SpatialData object, of which the only image with 3 or 4 channels in a coordinate system of the spots is
        taken, or ``(sdata, name)``; an image element (an array or tree of xarray) by itself, for coordinates in its own pixels; or, for several
        slides, a mapping from the slide to any of these. Grey becomes RGB, alpha is laid on white, uint16 and floats from 0 to 1 become uint8.
    size_um
        Side of a patch on the tissue, in µm. 112 where `size_px` is not given either: 0.5 µm a pixel.
    size_px
        Side of a patch in units of the coordinates, that is full-resolution pixels, instead of `size_um`. With a SpatialData object, in pixels of
        the image's largest scale.
    out_px
        Side of a patch in its own pixels; resampled bicubically with antialiasing, or copied where no pixel changes size.
    out
        Folder of a zarr store to write, which must not exist; it is complete or not there. Read it later with :meth:`TissuePatches.read`.
    scale
        Pixels of the image a unit of the coordinates, one for all or a mapping from the slide. By default the ``tissue_*_scalef`` of images in ``uns``, and 1 for
        files and arrays; not for a SpatialData object, whose transformations say it.
    um_per_px
        µm a unit of the coordinates, one for all or a mapping from the slide; needed for `size_um`. By default from `spot_distance_um`, else from ``scalefactors`` in
        ``uns["spatial"]``: ``microns_per_pixel``, or Visium's 100 µm between spots (65 µm of the spot diameter where spots have no neighbours). Of a SpatialData
        object, circles of one radius that lie as on a Visium array are recognised.
    spot_distance_um
        µm between neighbouring spots, of which the median gives `um_per_px`: 200 for the first Spatial Transcriptomics arrays.
    library_key
        Column of ``obs`` with the slide of each spot, which names it in ``uns["spatial"]`` and in mappings. Slides should follow each other in
        the rows: a batch of several slides opens the image of each.
    coordinate_system
        Of a SpatialData object, the coordinate system through which spots are brought to pixels: ``"global"`` by default, or else the only one that
        the annotated element and the image share.
    basis
        Key of ``obsm`` with the coordinates; the first two columns are x and y.

    Returns
    -------
    :class:`TissuePatches`, in the order of the rows. A window that reaches beyond the image is filled up with its mirror image.

    Raises
    ------
    KeyError
        If coordinates, a column, an image or its scale factor are missing, or `adata` is no table of the SpatialData object.
    FileNotFoundError, FileExistsError
        If the image file is missing, or `out` exists.
    ValueError
        If spots lie outside their image, or all in its upper left third (as with a wrong scale factor; pass `scale` where they do lie
        there), the µm a pixel are not known, a number is out of range, a patch covers less than two pixels, or the image cannot be read. Of a
        SpatialData object: if no image or several match, no coordinate system is shared, rows of a slide annotate several elements, or the
        transformation to pixels is not one scale and a translation.
    TypeError
        If `adata` is a SpatialData object.

    Notes
    -----
    Windows use the convention of image editors: the coordinate 0 is the border of the image, so that coordinates scale without a shift, and a
    patch of even size around an integer coordinate is ``image[y - size // 2 : y + size // 2, x - size // 2 : x + size // 2]``.

    Examples
    --------
    >>> import anndata as ad, numpy as np, spatialfm as sfm
    >>> adata = ad.AnnData(np.ones((2, 1), np.float32), obsm={"spatial": np.array([[30, 40], [50, 60]])})
    >>> patches = sfm.pp.patches(adata, np.full((100, 100, 3), 200, np.uint8), size_px=32)
    >>> [batch.shape for batch in patches.batches(2)]
    [(2, 224, 224, 3)]
    """
    check_positive("out_px", out_px)
    if size_um is not None and size_px is not None:
        msg = f"size_um={size_um!r} and size_px={size_px!r} are two sizes of a patch; give one"
        raise ValueError(msg)
    if size_px is None and size_um is None:
        size_um = _SIZE_UM
    for name, value in (("size_um", size_um), ("size_px", size_px), ("spot_distance_um", spot_distance_um)):
        _check_real(name, value)
    if adata.n_obs == 0:
        msg = "adata holds no spots; there is nothing to cut patches around"
        raise ValueError(msg)
    if out is not None and Path(out).exists():
        msg = f"out={str(out)!r} exists; read it with sfm.pp.TissuePatches.read, delete it, or name another"
        raise FileExistsError(msg)
    xy = np.full((adata.n_obs, 2), np.nan)
    slides, codes, lines = [], np.zeros(adata.n_obs, dtype=np.intp), []
    libraries = get_libraries(adata, library_key)
    for k, (name, rows) in enumerate(libraries):
        codes[rows] = k
        source = _source(
            adata, name, rows, image=image, scale=scale, library_key=library_key, coordinate_system=coordinate_system
        )
        xy[rows] = source.xy if isinstance(source, Placed) else get_coordinates(adata, basis)[rows, :2]
        slide, line = _slide(
            adata, name, rows, xy[rows], n_slides=len(libraries), source=source, scale=scale, um_per_px=um_per_px, spot_distance_um=spot_distance_um,
            size_um=size_um, size_px=size_px, out_px=out_px,
        )  # fmt: skip
        slides.append(slide)
        lines.append(line)
    for line in lines:
        logger.info("patches: %s", line)
    result = TissuePatches(
        _Images(slides, xy, codes, int(out_px)),
        obs_names=pd.Index(adata.obs_names.astype(str)),
        coordinates=xy,
        slides=pd.Categorical.from_codes(codes, [s.name for s in slides]),
        windows=[s.window for s in slides],
        out_px=int(out_px),
        um_per_px=[math.nan if s.um_per_px is None else s.window * s.um_per_px / out_px for s in slides],
    )
    if out is None:
        return result
    _write(result, Path(out))
    return TissuePatches.read(out)


class TissuePatches:
    """Patches of a tissue image around spots, read when asked for: from the image, or from a store.

    ``len(patches)``; ``patches[3]`` or ``patches["AACT-1"]``, uint8 (out_px, out_px, 3); ``patches[10:20]``, ``patches[rows]`` or
    ``patches[mask]``, uint8 (n, out_px, out_px, 3). Made by :func:`spatialfm.pp.patches`.

    Attributes
    ----------
    obs_names
        Names of the spots.
    coordinates
        Their places, float64 (n, 2), as in ``obsm``; with a SpatialData object, in pixels of the image.
    slides
        Slide of each, categorical; of one category ``""`` where there was no ``library_key``.
    windows
        Side of a patch in units of the coordinates, for each slide.
    out_px
        Side of a patch in its own pixels.
    um_per_px
        µm of the tissue a pixel of a patch, for each slide; NaN where not known.
    """

    def __init__(
        self,
        source: _Images | _Store,
        *,
        obs_names: pd.Index,
        coordinates: np.ndarray,
        slides: pd.Categorical,
        windows: list[float],
        out_px: int,
        um_per_px: list[float],
    ) -> None:
        self._source = source
        self._blank: np.ndarray | None = None
        self.obs_names = obs_names
        self.coordinates = coordinates
        self.slides = slides
        self.windows = windows
        self.out_px = out_px
        self.um_per_px = um_per_px

    @classmethod
    def read(cls, path: str | Path) -> TissuePatches:
        """Open a store that :func:`spatialfm.pp.patches` wrote with ``out=``; patches stay on disk until asked for."""
        import zarr

        if not Path(path).is_dir():
            msg = f"there is no store {str(path)!r}; write one with sfm.pp.patches(adata, out=...)"
            raise FileNotFoundError(msg)
        try:
            store: Any = zarr.open_group(str(path), mode="r")
            attrs: dict[str, Any] = dict(store.attrs)
        except FileNotFoundError:
            attrs = {}
        if attrs.get("spatialfm_patches") != _FORMAT:
            msg = (
                f"{str(path)!r} is no store of patches in format {_FORMAT} (spatialfm_patches={attrs.get('spatialfm_patches')!r}); "
                "write it anew with sfm.pp.patches(adata, out=...)"
            )
            raise ValueError(msg)
        return cls(
            _Store(store),
            obs_names=pd.Index(attrs["obs_names"], dtype=object),
            coordinates=store["coordinates"][:],
            slides=pd.Categorical.from_codes(store["slide"][:], attrs["slides"]),
            windows=attrs["windows"],
            out_px=attrs["out_px"],
            um_per_px=[math.nan if v is None else v for v in attrs["um_per_px"]],
        )

    def __len__(self) -> int:
        return len(self.obs_names)

    def __repr__(self) -> str:
        sides = sorted({f"{v * self.out_px:.4g} µm" if v == v else "unknown size" for v in self.um_per_px})
        return f"TissuePatches of {len(self)} spots: {self.out_px} x {self.out_px} pixels, {' or '.join(sides)}"

    def __getitem__(self, key: Any) -> np.ndarray:
        if isinstance(key, str):
            key = self.obs_names.get_loc(key)
            if not isinstance(key, int):
                msg = "several spots have this name; make names unique with adata.obs_names_make_unique()"
                raise KeyError(msg)
        rows = np.arange(len(self))[key]
        read = self._source.fetch(np.atleast_1d(rows))
        return read[0] if np.ndim(rows) == 0 else read

    def __iter__(self) -> Iterator[np.ndarray]:
        for batch in self.batches(_CHUNK):
            yield from batch

    def batches(self, n: int = 64) -> Iterator[np.ndarray]:
        """Yield patches in the order of the spots, uint8 (at most `n`, out_px, out_px, 3)."""
        check_positive("n", n)
        for start in range(0, len(self), n):
            yield self[start : start + n]

    @property
    def blank(self) -> np.ndarray:
        """Whether each patch shows nothing, bool (n,): 5th and 95th percentile lie within 10 of 255 levels in each channel, whatever the colour.

        A store holds it. Otherwise all patches are read for it, once.
        """
        if self._blank is None:
            stored = self._source.blank()
            self._blank = np.concatenate([is_blank(b) for b in self.batches()]) if stored is None else stored
        return self._blank

    def overview(self, slide: str = "") -> tuple[np.ndarray, np.ndarray]:
        """Return the image of a slide with at most 1,000 pixels a side, and its pixels a unit of the coordinates in x and y."""
        return self._source.overview(self.slides.categories.get_loc(slide))


@dataclass
class _Slide:
    name: str
    source: Any  # what open_image takes
    scale: float  # pixels of the image a unit of the coordinates
    window: float  # side of a patch in units of the coordinates
    um_per_px: float | None  # a unit of the coordinates


class _Images:
    """Patches from the images of the slides, of which one is open at a time."""

    def __init__(self, slides: list[_Slide], xy: np.ndarray, codes: np.ndarray, out_px: int) -> None:
        self.slides, self.xy, self.codes, self.out_px = slides, xy, codes, out_px
        self._open: tuple[int, Image] | None = None

    def image(self, k: int) -> Image:
        if self._open is None or self._open[0] != k:
            self._open = None  # before the next is opened: both may be large
            self._open = k, open_image(self.slides[k].source)
        return self._open[1]

    def fetch(self, rows: np.ndarray) -> np.ndarray:
        found = np.empty((len(rows), self.out_px, self.out_px, 3), dtype=np.uint8)
        # Slide by slide, the open one first, and from top to bottom, so that neighbours find their tiles decoded.
        first = -1 if self._open is None else self._open[0]
        codes = self.codes[rows]
        for i in np.lexsort((*self.xy[rows].T, codes, codes != first)):
            slide = self.slides[codes[i]]
            found[i] = cut(
                self.image(codes[i]), self.xy[rows[i]] * slide.scale, slide.window * slide.scale, self.out_px
            )
        return found

    def blank(self) -> None:
        return None

    def overview(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        image = self.image(k)
        pixels = image.overview()
        height, width = image.shapes[0]
        return pixels, self.slides[k].scale * np.array([pixels.shape[1] / width, pixels.shape[0] / height])


class _Store:
    """Patches from a zarr store."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def fetch(self, rows: np.ndarray) -> np.ndarray:
        if len(rows) and (np.diff(rows) == 1).all():
            return self.group["patches"][rows[0] : rows[-1] + 1]
        return self.group["patches"].oindex[rows]

    def blank(self) -> np.ndarray:
        return self.group["blank"][:]

    def overview(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        stored = self.group[f"overview/{k}"]
        return stored[:], np.array(stored.attrs["pixels_a_unit"])


def cut(image: Image, center: np.ndarray, side: float, out_px: int) -> np.ndarray:
    """Resample the square of ``side`` pixels around ``center`` (x, y; pixels of the largest level) to (out_px, out_px, 3)."""
    import PIL.Image

    full = np.array(image.shapes[0][::-1])
    finest = [k for k, shape in enumerate(image.shapes) if side * (shape[::-1] / full).min() >= out_px * 0.999]
    level = finest[-1] if finest else 0
    ratio = image.shapes[level][::-1] / full
    sides, middle = side * ratio, center * ratio
    if np.abs(sides - out_px).max() < 0.05:
        left, top = np.floor(middle - out_px / 2 + 0.5).astype(int)
        return image.read(level, top, top + out_px, left, left + out_px)
    corner = middle - sides / 2
    # The bicubic kernel reaches two pixels of the coarser grid beyond the window.
    margin = np.ceil(2 * np.maximum(sides / out_px, 1)) + 1
    start = (np.floor(corner) - margin).astype(int)
    stop = (np.ceil(corner + sides) + margin).astype(int)
    pixels = PIL.Image.fromarray(image.read(level, start[1], stop[1], start[0], stop[0]))
    box = (*(corner - start), *(corner + sides - start))
    return np.asarray(pixels.resize((out_px, out_px), PIL.Image.Resampling.BICUBIC, box=box))


def is_blank(batch: np.ndarray) -> np.ndarray:
    """Whether nothing is seen on each patch of (n, size, size, 3)."""
    import PIL.Image

    # Small, so that the grain of the scan does not count.
    size, how = (56, 56), PIL.Image.Resampling.BICUBIC
    small = np.stack([np.asarray(PIL.Image.fromarray(p).resize(size, how)) for p in batch])
    low, high = np.percentile(small.reshape(len(small), -1, 3), [5, 95], axis=1)
    return (high - low).max(axis=1) < _FLAT


def _write(patches: TissuePatches, out: Path) -> None:
    import zarr

    partial = out.with_name(out.name + ".partial")
    n, side = len(patches), patches.out_px
    try:
        store: Any = zarr.open_group(str(partial), mode="w")
        store.create_array("coordinates", data=patches.coordinates)
        store.create_array("slide", data=patches.slides.codes.astype(np.int32))
        array = store.create_array("patches", shape=(n, side, side, 3), chunks=(_CHUNK, side, side, 3), dtype="uint8")
        blank = np.zeros(n, dtype=bool)
        # Slide by slide: each image is opened once, even where the rows of slides alternate.
        blocks = []
        for k in range(len(patches.slides.categories)):
            rows = np.flatnonzero(patches.slides.codes == k)
            blocks += np.split(rows, np.flatnonzero(np.diff(rows // _CHUNK)) + 1)
        seen = -1
        for rows in progress(blocks, desc="patches", unit="chunk"):
            batch = patches[rows]
            blank[rows] = is_blank(batch)
            array.oindex[rows] = batch
            k = int(patches.slides.codes[rows[0]])
            if k != seen:
                pixels, ratio = patches.overview(patches.slides.categories[k])
                stored = store.create_array(f"overview/{k}", data=pixels)
                stored.attrs["pixels_a_unit"] = ratio.tolist()
                seen = k
        store.create_array("blank", data=blank)
        store.attrs.update(
            {
                "spatialfm_patches": _FORMAT,
                "obs_names": patches.obs_names.tolist(),
                "slides": patches.slides.categories.tolist(),
                "windows": [float(w) for w in patches.windows],
                "out_px": side,
                "um_per_px": [None if math.isnan(v) else float(v) for v in patches.um_per_px],
            }
        )
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    logger.info("patches: %d patches written to %s, %d of them blank", n, out, blank.sum())


def _source(
    adata: AnnData,
    name: str,
    rows: np.ndarray,
    *,
    image: Any,
    scale: Any,
    library_key: str | None,
    coordinate_system: str | None,
) -> Any:
    """Image of a slide as given, in a SpatialData object together with the places of the spots."""
    source = _of_slide("image", image, name)
    if is_spatialdata(source):
        sdata, element = source, None
    elif isinstance(source, tuple) and len(source) == 2 and is_spatialdata(source[0]):
        sdata, element = source
    elif coordinate_system is not None:
        msg = (
            f"coordinate_system={coordinate_system!r} is for a SpatialData object as image, got {type(source).__name__}"
        )
        raise ValueError(msg)
    else:
        return source
    if _of_slide("scale", scale, name) is not None:
        msg = (
            f"scale={scale!r} and a SpatialData object: its transformations say where spots lie. Leave scale out, or pass "
            "the image alone, sdata.images[name], for coordinates in obsm"
        )
        raise ValueError(msg)
    return place(
        adata,
        rows,
        sdata,
        element,
        where=_where(name),
        coordinate_system=coordinate_system,
        library_key=library_key,
    )


def _where(name: str) -> str:
    return f"slide {name!r}" if name else "the slide"


def _slide(
    adata: AnnData,
    name: str,
    rows: np.ndarray,
    xy: np.ndarray,
    *,
    n_slides: int,
    source: Any,
    scale: Any,
    um_per_px: Any,
    spot_distance_um: float | None,
    size_um: float | None,
    size_px: float | None,
    out_px: int,
) -> tuple[_Slide, str]:
    """Find image, scale and size of a slide's patches, check that they fit, and say in words what was assumed."""
    where = _where(name)
    key, images, factors = stored_images(adata, name, n_slides)

    placed = source if isinstance(source, Placed) else None
    label = "image" if source is not None and not isinstance(source, str | Path) else str(source)
    given = _of_slide("scale", scale, name)
    _check_real("scale", given)
    if placed is not None:
        # What uns states is in pixels of another image.
        source, label, factor, factors = placed.image, placed.label, 1.0, {"spot_diameter_fullres": placed.diameter}
    elif source is None or (isinstance(source, str) and source in images):
        usable = [k for k in images if given is not None or f"tissue_{k}_scalef" in factors]
        choice = source or next((k for k in ("hires", *usable) if k in usable), None)
        if choice not in usable:
            found = (
                f"uns['spatial'][{key!r}] holds the images {list(images)} and the scalefactors {list(factors)}"
                if images or factors
                else f"uns['spatial'] holds {list(stored) if isinstance(stored := adata.uns.get('spatial', {}), Mapping) else stored!r}"
            )
            msg = (
                f"{where}: there is no image with its scale factor: {found}. Pass image= (a file or an array), or library_key= with "
                "the column whose values name the slides in uns['spatial']"
            )
            raise KeyError(msg)
        source, label = np.asarray(images[choice]), f"uns image {choice!r}"
        factor = given if given is not None else factors[f"tissue_{choice}_scalef"]
    else:
        if isinstance(source, str) and images and not Path(source).exists():
            msg = f"image={source!r} is neither a file nor an image of uns['spatial'][{key!r}], which holds {list(images)}"
            raise FileNotFoundError(msg)
        factor = given if given is not None else 1.0
    opened = open_image(source)
    names = adata.obs_names[rows]
    _check_fit(
        where, label, xy, names, float(factor), opened.shapes[0], factors, asked=given is not None, placed=placed
    )

    um, basis_of_um = _micrometres(
        where, xy, factors, _of_slide("um_per_px", um_per_px, name), spot_distance_um, placed=placed
    )
    if size_um is not None and um is None:
        msg = (
            f"{where}: size_um={size_um:g} needs the µm a pixel, but {basis_of_um}. Pass um_per_px=, spot_distance_um= "
            "(200 for the first Spatial Transcriptomics arrays, 100 for Visium) or size_px="
        )
        raise ValueError(msg)
    window = float(size_px) if size_px is not None else float(size_um or 0) / float(um or 1)
    seen = window * factor
    height, width = opened.shapes[0]
    if not 2 <= seen <= 16 * max(height, width):
        msg = (
            f"{where}: a patch covers {window:.4g} units of the coordinates, {seen:.3g} pixels of {label} ({width} x {height}) at scale "
            f"{factor:.4g}; it must be at least 2 pixels, and no more than 16 times the image. Give another size_um= or size_px=, a finer image or the scale"
        )
        raise ValueError(msg)
    line = (
        f"{where}: {len(rows)} spots, patches of {window:.4g} px"
        + (f" = {window * um:.4g} µm ({basis_of_um})" if um is not None else f" ({basis_of_um})")
        + f", {seen:.4g} pixels of {label} ({width} x {height}, scale {factor:.4g})"
        + (f", enlarged {out_px / seen:.2g}-fold: a finer image shows more" if seen < out_px / 2 else "")
    )
    return _Slide(name, source, float(factor), window, um), line


def _check_fit(
    where: str,
    label: str,
    xy: np.ndarray,
    names: pd.Index,
    scale: float,
    shape: tuple[int, int],
    factors: Mapping[str, float],
    *,
    asked: bool,
    placed: Placed | None,
) -> None:
    size = np.array(shape[::-1])
    outside = ((xy < 0) | (xy * scale > size)).any(axis=1)
    reach = (xy * scale / size).max()
    corner = not asked and placed is None and len(xy) >= _CORNER_SPOTS and reach < _CORNER
    if not outside.any() and not corner:
        return
    known = {"1 (full resolution)": 1.0, **{k: v for k, v in factors.items() if k.startswith("tissue_")}}
    fits = [
        f"{k} = {v:.4g}"
        for k, v in known.items()
        if v != scale and _CORNER <= (xy * v / size).max() <= 1 and (xy >= 0).all()
    ]
    if placed is not None:
        hint = (
            f"Look at the transformations of {placed.region!r} and of the image to {placed.system!r} "
            "(spatialdata.transformations.get_transformation)"
        )
    elif fits:
        hint = f"All would fit at {' or '.join(fits)}: pass it as scale=, or the image that belongs to {scale:.4g}"
    elif (xy < 0).any():
        hint = f"Coordinates from {xy.min():.4g} on are no pixels: bring obsm to pixels of the full-resolution image"
    else:
        hint = f"All would fit at scales up to {(size / np.maximum(xy.max(axis=0), 1e-300)).min():.3g}"
    size_text = f"{label} ({size[0]} x {size[1]} pixels) at scale {scale:.4g}"
    if outside.any():
        msg = (
            f"{where}: {int(outside.sum())} of {len(xy)} spots lie outside {size_text}, such as {list(names[outside][:3])}. {hint}"
            + (". If only these are beyond the image, drop them" if outside.mean() < 0.5 else "")
        )
    else:
        msg = (
            f"{where}: all {len(xy)} spots lie in the upper left {reach:.0%} of {size_text}; a wrong scale? {hint}. Where they do lie "
            f"there, pass scale={scale:.4g}"
        )
    raise ValueError(msg)


def stated_micrometres(adata: AnnData, name: str, xy: np.ndarray, n_slides: int = 1) -> float | None:
    """µm a unit of the coordinates of a slide, ``xy``, by what ``uns["spatial"]`` states; None where it states nothing."""
    factors = stored_images(adata, name if n_slides > 1 else "", n_slides)[2]
    return _micrometres("", xy, factors, None, None, placed=None)[0] if factors else None


def _micrometres(
    where: str,
    xy: np.ndarray,
    factors: Mapping[str, float],
    given: Any,
    spot_distance_um: float | None,
    *,
    placed: Placed | None,
) -> tuple[float | None, str]:
    """µm a unit of the coordinates, None where not known, and on what that rests."""
    from scipy.spatial import cKDTree

    if given is not None:
        _check_real("um_per_px", given)
        return float(given), f"{given:.4g} µm/px as given"
    if spot_distance_um is None and "microns_per_pixel" in factors:
        um = factors["microns_per_pixel"]
        return um, f"{um:.4g} µm/px in scalefactors"
    places = np.unique(xy if placed is None else placed.neighbours, axis=0)  # a table may be a part of the array
    apart = float(np.median(cKDTree(places).query(places, k=2)[0][:, 1])) if len(places) > 1 else math.inf
    if spot_distance_um is not None:
        if math.isinf(apart):
            msg = f"{where}: spot_distance_um needs spots at two places at least; pass um_per_px="
            raise ValueError(msg)
        return (
            spot_distance_um / apart,
            f"{spot_distance_um / apart:.4g} µm/px from {spot_distance_um:g} µm between spots",
        )
    spot = factors.get("spot_diameter_fullres", 0.0)
    if not spot > 0 and placed is not None:
        return None, f"µm a pixel not known: {placed.region!r} does not hold the equal circles of a Visium array"
    if not spot > 0:
        return None, "µm a pixel not known: uns['spatial'] states neither microns_per_pixel nor spot_diameter_fullres"
    if spot / apart > _VISIUM_RATIO[1] or (placed is not None and spot / apart < _VISIUM_RATIO[0]):
        return None, f"µm a pixel not known: spots {apart:.4g} px apart of {spot:.4g} px are no Visium array"
    if spot / apart < _VISIUM_RATIO[0]:
        return _VISIUM_SPOT / spot, f"{_VISIUM_SPOT / spot:.4g} µm/px from Visium's {_VISIUM_SPOT:g} µm spot diameter"
    return _VISIUM_PITCH / apart, f"{_VISIUM_PITCH / apart:.4g} µm/px from Visium's {_VISIUM_PITCH:g} µm between spots"


def _of_slide(argument: str, value: Any, name: str) -> Any:
    """Value for one slide of an argument that may be a mapping from slides."""
    if not isinstance(value, Mapping) or is_element(value):  # a pyramid is a mapping too
        return value
    if name not in value:
        msg = f"{argument} has nothing for slide {name!r}; it names {list(value)}" + (
            "" if name else ". Pass library_key= with the column that names each spot's slide"
        )
        raise KeyError(msg)
    return value[name]


def _check_real(name: str, value: Any) -> None:
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf
    ):
        msg = f"{name} must be a positive number, got {value!r}"
        raise ValueError(msg)
