"""Read windows of tissue images: arrays, JPEG and PNG as a whole, TIFF and dask arrays tile by tile."""

from __future__ import annotations

import warnings
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from spatialfm._data._spatialdata import element_levels, is_element
from spatialfm._settings import warn

if TYPE_CHECKING:
    from anndata import AnnData

_CACHE = 64 * 2**20  # bytes of decoded tiles that a TIFF keeps
_CHUNKS = 256 * 2**20  # bytes that an element keeps: a row of the common chunks of 4096 x 4096
_WHITE = 255
# Formats of pixels. PostScript is a program, which Pillow passes to Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "JPEG2000", "TIFF")


class Image(ABC):
    """An image with levels of decreasing resolution, of which windows can be read.

    ``shapes`` are (height, width) of each level, the largest first.
    """

    shapes: list[tuple[int, int]]

    @abstractmethod
    def _read(self, level: int, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """Pixels of a window inside the image, of any dtype, with any number of channels."""

    def read(self, level: int, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """Pixels of a window as uint8 (height, width, 3); beyond the border the image is mirrored."""
        height, width = self.shapes[level]
        rows, columns = _mirrored(top, bottom, height), _mirrored(left, right, width)
        y, x = rows.min(), columns.min()
        pixels = to_rgb(self._read(level, y, rows.max() + 1, x, columns.max() + 1))
        return pixels[np.ix_(rows - y, columns - x)] if pixels.shape[:2] != (bottom - top, right - left) else pixels

    def overview(self, largest: int = 1000) -> np.ndarray:
        """Return the image with at most ``largest`` pixels a side, uint8 (height, width, 3); tiled files in parts."""
        level = next((k for k in reversed(range(len(self.shapes))) if max(self.shapes[k]) >= largest), 0)
        height, width = self.shapes[level]
        step = -(-max(height, width) // largest)
        band = step * max(1, 512 // step)
        bands = (self.read(level, y, min(y + band, height), 0, width) for y in range(0, height, band))
        return np.concatenate([pixels[::step, ::step].copy() for pixels in bands])  # a view would keep the band


class ArrayImage(Image):
    """An array in memory, or a memory map."""

    def __init__(self, pixels: np.ndarray) -> None:
        if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] > 4) or 0 in pixels.shape:
            msg = (
                f"an image of shape {pixels.shape} is not supported; it must be (height, width) or (height, width, 3 "
                "or 4)"
            )
            raise ValueError(msg)
        self.pixels = pixels
        self.shapes = [pixels.shape[:2]]

    def _read(self, level: int, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        return self.pixels[top:bottom, left:right]


class DecodedImage(Image):
    """A file that Pillow decodes as a whole, once."""

    def __init__(self, path: Path) -> None:
        import PIL.Image

        try:
            with warnings.catch_warnings():
                # Pillow raises at twice the limit; below that, the user asked for this slide.
                warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
                self.image = PIL.Image.open(path, formats=_FORMATS)
        except PIL.Image.DecompressionBombError as error:
            msg = (
                f"{path}: {error}. Such a file would be decoded whole. Convert it to a tiled TIFF, which is read by "
                "windows, or, if you trust it and have the memory, set PIL.Image.MAX_IMAGE_PIXELS = None"
            )
            raise ValueError(msg) from error
        except PIL.UnidentifiedImageError as error:
            msg = f"{path} is no image that can be read; {', '.join(_FORMATS)} can, TIFF also as pyramidal OME-TIFF"
            raise ValueError(msg) from error
        weakref.finalize(self, self.image.close)
        self.shapes = [self.image.size[::-1]]

    def _read(self, level: int, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        window = self.image.crop((left, top, right, bottom))
        if window.mode in ("P", "PA", "La", "RGBa") or (window.mode == "RGB" and "transparency" in window.info):
            window = window.convert("RGBA")
        elif window.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
            window = window.convert("RGB")
        return np.asarray(window)


class TiffImage(Image):
    """A TIFF of which only the tiles or strips that a window touches are decoded."""

    def __init__(self, path: Path) -> None:
        import tifffile

        self.file = tifffile.TiffFile(path)
        weakref.finalize(self, self.file.close)
        flat = [
            s
            for s in self.file.series
            if s.axes in ("YX", "YXS") or (s.axes in ("SYX", "CYX") and s.shape[0] in (3, 4))
        ]
        if not flat:
            msg = (
                f"{path} holds {[f'{s.axes} {s.shape}' for s in self.file.series]}, not an RGB or grey image "
                "(YX, YXS, SYX or CYX with 3 or 4 channels); write the H&E image alone as an RGB TIFF"
            )
            raise ValueError(msg)
        series = max(flat, key=lambda s: s.shape[s.axes.index("Y")] * s.shape[s.axes.index("X")])
        # Of each level a page, or one for each channel.
        self.levels: list[list[Any]] = [list(level.pages) for level in series.levels]
        self.shapes = [(int(p[0].keyframe.imagelength), int(p[0].keyframe.imagewidth)) for p in self.levels]
        self._cache = _Cache(_CACHE)

    def _read(self, level: int, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        return np.concatenate(
            [self._read_page(level, c, top, bottom, left, right) for c in range(len(self.levels[level]))], axis=2
        )

    def _read_page(self, level: int, channel: int, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        page = self.levels[level][channel].keyframe
        high = page.tilelength if page.is_tiled else min(page.rowsperstrip, page.imagelength)
        wide = page.tilewidth if page.is_tiled else page.imagewidth
        across, down = -(-page.imagewidth // wide), -(-page.imagelength // high)
        planes = 1 if page.planarconfig == 1 else page.samplesperpixel
        window = np.empty((bottom - top, right - left, page.samplesperpixel), dtype=page.dtype)
        for row in range(top // high, -(-bottom // high)):
            for column in range(left // wide, -(-right // wide)):
                y, x = row * high, column * wide
                t, b, u, v = max(top, y), min(bottom, y + high), max(left, x), min(right, x + wide)
                for plane in range(planes):
                    part = self._segment(level, channel, (plane * down + row) * across + column)
                    where = slice(None) if planes == 1 else slice(plane, plane + 1)
                    window[t - top : b - top, u - left : v - left, where] = (
                        _WHITE if part is None else part[t - y : b - y, u - x : v - x]
                    )
        return window

    def _segment(self, level: int, channel: int, index: int) -> np.ndarray | None:
        """Decode a tile or strip (height, width, samples), unless it is cached; None where the file has none."""
        key = (level, channel, index)
        if (kept := self._cache.get(key)) is not None:
            return kept
        page = self.levels[level][channel]
        if not page.databytecounts[index]:
            return None
        more: dict[str, Any] = {}
        if page.keyframe.compression in (6, 7, 33007, 34892):  # JPEG, whose tables are outside the tiles
            more = {"jpegtables": page.jpegtables, "jpegheader": page.keyframe.jpegheader}
        decode, handle = page.keyframe.decode, self.file.filehandle  # the decoder looks into the file when it is made
        handle.seek(page.dataoffsets[index])
        decoded = decode(handle.read(page.databytecounts[index]), index, **more)[0]
        return self._cache.keep(key, np.asarray(decoded)[0])


class ElementImage(Image):
    """An image element of a SpatialData object, of which only the chunks that a window touches are computed."""

    def __init__(self, element: Any) -> None:
        levels = element_levels(element)
        if not levels or not {"y", "x"} <= set(levels[0].dims) <= {"c", "y", "x"}:
            msg = (
                f"an image of dimensions {dict(levels[0].sizes) if levels else {}} is not supported; it must have y "
                "and x, "
                "and may have c (channels), as images of spatialdata.models.Image2DModel"
            )
            raise ValueError(msg)
        if levels[0].sizes.get("c", 1) > 4:
            msg = f"an image of {levels[0].sizes['c']} channels is not supported; H&E has 3, with alpha 4"
            raise ValueError(msg)
        self.levels = [level.transpose("y", "x", ...).data for level in levels]
        self.shapes = [level.shape[:2] for level in self.levels]
        self._cache = _Cache(_CHUNKS)

    def _read(self, level: int, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        pixels = self.levels[level]
        if isinstance(pixels, np.ndarray):
            return pixels[top:bottom, left:right]
        rows, columns = (np.concatenate([[0], np.cumsum(chunks)]) for chunks in pixels.chunks[:2])
        window = np.empty((bottom - top, right - left, *pixels.shape[2:]), dtype=pixels.dtype)
        for i in range(np.searchsorted(rows, top, "right") - 1, np.searchsorted(rows, bottom)):
            for j in range(np.searchsorted(columns, left, "right") - 1, np.searchsorted(columns, right)):
                (y, below), (x, beyond) = rows[i : i + 2], columns[j : j + 2]
                part = self._cache.get((level, i, j))
                if part is None:
                    # In this thread: what reads patches may run in several processes already.
                    part = self._cache.keep((level, i, j), pixels[y:below, x:beyond].compute(scheduler="synchronous"))
                t, b, u, v = max(top, y), min(bottom, below), max(left, x), min(right, beyond)
                window[t - top : b - top, u - left : v - left] = part[t - y : b - y, u - x : v - x]
        return window


class _Cache:
    """Decoded tiles; above ``limit`` bytes, the least recently used are dropped, except the last one."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self.tiles: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()

    def get(self, key: tuple[int, int, int]) -> np.ndarray | None:
        if key in self.tiles:
            self.tiles.move_to_end(key)
        return self.tiles.get(key)

    def keep(self, key: tuple[int, int, int], tile: np.ndarray) -> np.ndarray:
        self.tiles[key] = tile
        self.bytes += tile.nbytes
        while self.bytes > self.limit and len(self.tiles) > 1:
            self.bytes -= self.tiles.popitem(last=False)[1].nbytes
        return tile


class StoredImages(NamedTuple):
    """What ``uns["spatial"]`` holds for a slide."""

    key: str
    """Key of the slide in ``uns["spatial"]``."""
    images: Mapping[str, Any]
    factors: dict[str, float]
    """Numbers among the ``scalefactors``."""


def image_entries(adata: AnnData) -> dict[str, Mapping[str, Any]]:
    """Entries of ``uns["spatial"]``, one for each slide; none where it does not hold what squidpy writes there."""
    stored = adata.uns.get("spatial")
    stored = stored if isinstance(stored, Mapping) else {}
    return {str(key): entry for key, entry in stored.items() if isinstance(entry, Mapping)}


def stored_images(adata: AnnData, slide: str, n_slides: int = 1) -> StoredImages:
    """Read the images of a slide from ``uns["spatial"]``; a single entry belongs to a single slide of any name."""
    entries = image_entries(adata)
    key = next(iter(entries)) if slide not in entries and n_slides == 1 and len(entries) == 1 else slide
    entry = entries.get(key, {})
    if slide and key != slide and entry.get("images"):
        warn(
            "slide %r takes the only image in uns['spatial'], that of %r; give both the same name, or name the image",
            slide,
            key,
        )
    images, scales = (
        value if isinstance(value := entry.get(name), Mapping) else {} for name in ("images", "scalefactors")
    )
    factors = {}
    for name, value in scales.items():
        # R writes scalars as arrays of length one.
        number = np.asarray(value)
        if number.size == 1 and number.dtype.kind in "iuf":
            factors[str(name)] = float(number.item())
    return StoredImages(key, images, factors)


def open_image(source: Any) -> Image:
    """Open an array, an element or a file, whose format is recognised from its content."""
    if is_element(source):
        return ElementImage(source)
    if not isinstance(source, str | Path):
        return ArrayImage(np.asarray(source))
    path = Path(source)
    if not path.is_file():
        msg = f"there is no image file {str(path)!r}" + (
            "; that is a folder: of a SpatialData store, pass image=spatialdata.read_zarr(path)"
            if path.is_dir()
            else ""
        )
        raise FileNotFoundError(msg)
    with path.open("rb") as file:
        magic = file.read(4)
    return (TiffImage if magic in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") else DecodedImage)(path)


def to_rgb(pixels: np.ndarray) -> np.ndarray:
    """Convert grey, RGB, each with or without alpha (laid on white), of any dtype, to uint8 (height, width, 3)."""
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2:  # of any byte order
        pixels = ((pixels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    elif pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    elif pixels.dtype.kind == "f" and pixels.size and pixels.min() >= 0 and pixels.max() <= 1:  # false for NaN
        pixels = np.rint(pixels * 255).astype(np.uint8)
    elif pixels.dtype != np.uint8:
        bounds = f" from {pixels.min()} to {pixels.max()}" if pixels.size else ""
        msg = (
            f"an image of {pixels.dtype}{bounds} is not supported; it must be uint8, uint16, bool or float from 0 to 1"
        )
        raise ValueError(msg)
    if pixels.shape[2] in (2, 4):
        alpha = pixels[:, :, -1:].astype(np.uint32)
        pixels = ((pixels[:, :, :-1] * alpha + _WHITE * (255 - alpha) + 127) // 255).astype(np.uint8)
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


def _mirrored(start: int, stop: int, size: int) -> np.ndarray:
    """Return indices from ``start`` to ``stop``, those beyond the border mirrored at it (c b a | a b c | c b a)."""
    index = np.arange(start, stop) % (2 * size)
    return np.minimum(index, 2 * size - 1 - index)
