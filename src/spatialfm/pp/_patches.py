"""Patches of the tissue image around spots."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatialfm._checks import check_positive, checked
from spatialfm._data._adata import get_libraries
from spatialfm._data._images import Image, open_image
from spatialfm._settings import logger, progress
from spatialfm.pp._patch_images import PatchOptions, SlideImage, check_real, slide_patches

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData
    from xarray import DataArray, DataTree

_SIZE_UM = 112.0  # 224 pixels of 0.5 µm, about a 20x scan
_CHUNK = 16  # patches in a chunk of the store
_FORMAT = 1
# Of 255 levels. On nine real slides this calls 0 to 1.3% of the spots blank, and 59 to 98% of windows far from any
# spot, which also show fiducials and debris.
_FLAT = 10.0


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

    Patches are read when they are asked for, in batches, or are written to a store with `out`. Of a tiled TIFF and of
    an image in a SpatialData object only the tiles or chunks that a patch needs are read; JPEG and PNG are decoded
    whole, one slide at a time. AnnData is not changed.

    Parameters
    ----------
    adata
        Spots or cells with coordinates in ``obsm[basis]``, in pixels of the full-resolution image (or see `scale`).
        With a SpatialData object, its table: coordinates are then the centroids of the elements that the rows annotate.
    image
        None: ``uns["spatial"][slide]["images"]``, ``"hires"`` if available. The name of one of these; a file; an array
        (height, width[, channels]); a SpatialData object with one RGB image, or ``(sdata, name)``; an image element of
        it; or a mapping from slides to any of these.
    size_um
        Side of a patch on the tissue in µm; by default 112, which is 0.5 µm a pixel.
    size_px
        Side of a patch in units of the coordinates instead (SpatialData: in pixels of the image).
    out_px
        Side of a patch in pixels; patches are resampled bicubically with antialiasing.
    out
        Folder for a zarr store, which must not exist; :meth:`TissuePatches.read` opens it.
    scale
        Pixels of the image in a unit of the coordinates, one number or a mapping from slides. By default the
        ``tissue_*_scalef`` of images in ``uns`` and 1 for files and arrays.
    um_per_px
        µm in a unit of the coordinates, one number or a mapping from slides, for `size_um`. By default from
        `spot_distance_um`, or from the ``scalefactors`` in ``uns["spatial"]``: ``microns_per_pixel``, or the size of a
        Visium array.
    spot_distance_um
        µm between neighbouring spots, such as 200 for the first Spatial Transcriptomics arrays.
    %(library_key)s
    coordinate_system
        Coordinate system of the SpatialData object that spots and image share; ``"global"``, or the only one, by
        default.
    %(basis)s

    Returns
    -------
    :class:`TissuePatches`, in the order of the rows. Beyond its border, the image is mirrored.

    Raises
    ------
    KeyError
        If coordinates, a column, an image or its scale factor are missing.
    FileNotFoundError, FileExistsError
        If the image file is missing, or `out` exists.
    ValueError
        If an argument is out of range, spots lie outside their image or all in its upper left corner (a wrong scale),
        the size in µm is unknown, or images or coordinate systems of a SpatialData object are ambiguous.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.her2_breast_tumour()
    >>> patches = sfm.pp.patches(adata)
    >>> patches[:2].shape
    (2, 224, 224, 3)
    """
    size_um = _check_arguments(size_um, size_px, out_px, spot_distance_um, out)
    if adata.n_obs == 0:
        msg = "adata holds no spots; there is nothing to cut patches around"
        raise ValueError(msg)
    libraries = get_libraries(adata, library_key)
    options = PatchOptions(
        image=image,
        size_um=size_um,
        size_px=size_px,
        out_px=out_px,
        scale=scale,
        um_per_px=um_per_px,
        spot_distance_um=spot_distance_um,
        library_key=library_key,
        coordinate_system=coordinate_system,
        basis=basis,
        n_slides=len(libraries),
    )
    found = [slide_patches(adata, name, rows, options) for name, rows in libraries]
    xy, codes = np.full((adata.n_obs, 2), np.nan), np.zeros(adata.n_obs, dtype=np.intp)
    for k, (_, rows) in enumerate(libraries):
        codes[rows], xy[rows] = k, found[k].xy
        logger.info("patches: %s", found[k].summary)

    slides = [slide.image for slide in found]
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


def _check_arguments(
    size_um: float | None,
    size_px: float | None,
    out_px: int,
    spot_distance_um: float | None,
    out: str | Path | None,
) -> float | None:
    """Check arguments that concern all slides; returns ``size_um`` with its default."""
    check_positive("out_px", out_px)
    if size_um is not None and size_px is not None:
        msg = f"size_um={size_um!r} and size_px={size_px!r} are two sizes of a patch; give one"
        raise ValueError(msg)
    for name, value in (("size_um", size_um), ("size_px", size_px), ("spot_distance_um", spot_distance_um)):
        check_real(name, value)
    if out is not None and Path(out).exists():
        msg = f"out={str(out)!r} exists; read it with sfm.pp.TissuePatches.read, delete it, or name another"
        raise FileExistsError(msg)
    return _SIZE_UM if size_px is None and size_um is None else size_um


class TissuePatches:
    """Patches of a tissue image around spots, read from the image or from a store when they are asked for.

    Made by :func:`spatialfm.pp.patches`. ``patches[3]`` and ``patches["AACT-1"]`` are uint8 (out_px, out_px, 3);
    ``patches[10:20]``, ``patches[rows]`` and ``patches[mask]`` are uint8 (n, out_px, out_px, 3).

    Attributes
    ----------
    obs_names
        Names of the spots.
    coordinates
        Their coordinates, float64 (n, 2), as in ``obsm``; with a SpatialData object, in pixels of the image.
    slides
        Slide of each spot, categorical; ``""`` without ``library_key``.
    windows
        Side of a patch in units of the coordinates, for each slide.
    out_px
        Side of a patch in pixels.
    um_per_px
        µm of the tissue in a pixel of a patch, for each slide; NaN where unknown.
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
                f"{str(path)!r} is no store of patches in format {_FORMAT} "
                f"(spatialfm_patches={attrs.get('spatialfm_patches')!r}); write it again with "
                "sfm.pp.patches(adata, out=...)"
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
        """Whether each patch shows no tissue, bool (n,).

        In each channel of such a patch, the 5th and the 95th percentile are less than 10 of 255 levels apart. Without a
        store, all patches are read for it, once.
        """
        if self._blank is None:
            stored = self._source.blank()
            self._blank = np.concatenate([is_blank(b) for b in self.batches()]) if stored is None else stored
        return self._blank

    def overview(self, slide: str = "") -> tuple[np.ndarray, np.ndarray]:
        """Return the image of a slide with at most 1,000 pixels a side, and its scale in x and y.

        The scale is the number of pixels in a unit of the coordinates.
        """
        return self._source.overview(self.slides.categories.get_loc(slide))


class _Images:
    """Patches from the images of the slides; one image is open at a time."""

    def __init__(self, slides: list[SlideImage], xy: np.ndarray, codes: np.ndarray, out_px: int) -> None:
        self.slides, self.xy, self.codes, self.out_px = slides, xy, codes, out_px
        self._open: tuple[int, Image] | None = None

    def image(self, k: int) -> Image:
        if self._open is None or self._open[0] != k:
            self._open = None  # closed before the next is opened, as both may be large
            self._open = k, open_image(self.slides[k].source)
        return self._open[1]

    def fetch(self, rows: np.ndarray) -> np.ndarray:
        found = np.empty((len(rows), self.out_px, self.out_px, 3), dtype=np.uint8)
        # Slide by slide, the open one first, and from top to bottom, so that neighbours share decoded tiles.
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
    """Resample the square of ``side`` pixels around ``center`` (x, y) to (out_px, out_px, 3).

    ``side`` and ``center`` are in pixels of the largest level.
    """
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
    """Whether each patch of (n, size, size, 3) shows no tissue."""
    import PIL.Image

    # Scaled down, so that noise of the scan does not count.
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
