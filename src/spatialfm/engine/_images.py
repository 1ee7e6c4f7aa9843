"""Features of H&E patches: those of an image network, and statistics of their stain."""

from __future__ import annotations

import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from spatialfm._checks import check_positive
from spatialfm._data._adata import get_coordinates, get_libraries, slide_codes
from spatialfm._data._write import record_params
from spatialfm._settings import logger, progress, warn
from spatialfm.engine._device import choose_device, choose_dtype, in_evaluation, torch_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import Future
    from pathlib import Path

    from anndata import AnnData

    from spatialfm.models import ImageTower
    from spatialfm.pp import TissuePatches

    R = TypeVar("R")

# Patches of a batch; on a CPU, few enough for activations to stay in cache.
_CPU_BATCH = 16
_BATCH = 128
# Optical density of each of the 256 levels of a channel.
_DENSITY = -np.log((np.arange(256) + 1) / 256).astype(np.float32)
N_STAIN = 10


class Patches(Protocol):
    """The part of :class:`spatialfm.pp.TissuePatches` that a tower needs."""

    def __len__(self) -> int: ...

    def batches(self, n: int = ...) -> Iterator[np.ndarray]:
        """Yield patches in order, uint8 (at most n, side, side, 3)."""


def encode_patches(
    tower: ImageTower,
    patches: Patches,
    *,
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int | None = None,
    beside: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Compute features of patches, decoding the next batch while the tower computes.

    Two batches are in memory at a time; on a CPU, one more than the number of threads.

    Parameters
    ----------
    tower
        Image tower; it is moved to the device, and back afterwards.
    patches
        Patches; their ``batches(n)`` are read once.
    device
        As for :func:`choose_device`.
    dtype
        ``"float32"`` or ``"bfloat16"`` (autocast). None is float32 on every device, because bfloat16 changes the
        features of the built-in tower by a tenth.
    batch_size
        Patches in a batch; None is 16 on a CPU and 128 on other devices. It changes results by rounding only.
    beside
        Function that computes further columns of a batch, such as :func:`stain`. It runs in the calling thread.

    Returns
    -------
    float32 (patches, features), in the order of the patches; the columns of ``beside`` come last.
    """
    import torch

    chosen = choose_device(device)
    low = choose_dtype(dtype or "float32", chosen) == "bfloat16"
    if batch_size is None:
        batch_size = _CPU_BATCH if chosen.type == "cpu" else _BATCH
    check_positive("batch_size", batch_size)
    found = np.empty((0, tower.n_features), dtype=np.float32)

    def encode(batch: np.ndarray, more: np.ndarray | None) -> np.ndarray:
        # The modes of torch are set for each thread.
        with torch.autocast(chosen.type, dtype=torch.bfloat16, enabled=low):
            rows = tower.encode(batch).cpu().numpy()
        return rows if more is None else np.hstack([rows, more])

    # One thread for each batch: threads that share a batch wait for each other after every layer.
    n_threads = torch.get_num_threads() if chosen.type == "cpu" else 1
    arguments = ((b, None if beside is None else beside(b)) for b in patches.batches(batch_size))
    start = 0
    with in_evaluation(tower, chosen), torch_threads(1):
        for rows in progress(
            _in_threads(encode, arguments, n_threads),
            desc="image features",
            total=math.ceil(len(patches) / batch_size),
            unit="batch",
        ):
            if start == 0:
                found = np.empty((len(patches), rows.shape[1]), dtype=np.float32)
            found[start : start + len(rows)] = rows
            start += len(rows)
    return found


def stain(batch: np.ndarray) -> np.ndarray:
    """Compute statistics of the optical density -ln((pixel + 1) / 256) of patches, uint8 (n, height, width, 3).

    Returns
    -------
    float32 (n, 10). Columns: means of red, green and blue; their standard deviations; then, for the mean of the three
    channels, the mean absolute difference of neighbouring rows, and the 10th, 50th and 90th percentile. The height must
    be at least 2.
    """
    found = np.empty((len(batch), N_STAIN), np.float32)
    # One patch at a time fits into the cache, and its result does not depend on the batch.
    for row, patch in zip(found, batch, strict=True):
        density = _DENSITY.take(patch.transpose(2, 0, 1))  # (3, height, width)
        channels = density.reshape(3, -1)
        grey = (density[0] + density[1] + density[2]) / 3
        row[:3] = channels.mean(axis=1)
        row[3:6] = channels.std(axis=1)
        row[6] = np.abs(np.diff(grey, axis=0)).mean()
        row[7:] = np.percentile(grey, [10, 50, 90])
    return found


def _in_threads(function: Callable[..., R], arguments: Iterable[tuple[Any, ...]], n_threads: int) -> Iterator[R]:
    """Yield results in order, computed in threads (one torch thread each) while the caller prepares arguments."""
    import torch

    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for args in arguments:
            pending.append(pool.submit(function, *args))
            if len(pending) > n_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


# Arguments that pp.patches has and tl.image_features does not.
_FURTHER = ("scale=", "um_per_px=", "spot_distance_um=", "size_px=")


def compute_image_features(
    adata: AnnData,
    image: Any = None,
    *,
    tower: str | Path | ImageTower = "efficientnet-lite0",
    size_um: float | None = None,
    library_key: str | None = None,
    basis: str = "spatial",
    device: str | None = None,
    batch_size: int | None = None,
    dtype: str | None = None,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Compute what :func:`spatialfm.tl.image_features` writes to ``obsm`` and ``uns``; see there for the arguments."""
    from spatialfm.models import ImageTower, fingerprint, load_tower
    from spatialfm.pp._patches import TissuePatches, is_blank

    chosen = choose_device(device)
    precision = choose_dtype(dtype or "float32", chosen)
    if isinstance(image, TissuePatches):
        patches = image
        _check_patches(adata, patches, size_um=size_um, library_key=library_key, basis=basis)
    else:
        patches = _cut(adata, image, size_um=size_um, library_key=library_key, basis=basis)
    network = tower if isinstance(tower, ImageTower) else load_tower(tower)

    blank: list[np.ndarray] = []

    def beside(batch: np.ndarray) -> np.ndarray:
        blank.append(is_blank(batch))
        return stain(batch)

    features = encode_patches(network, patches, device=device, dtype=precision, batch_size=batch_size, beside=beside)
    if not np.isfinite(features).all():
        n_bad = int((~np.isfinite(features).all(axis=1)).sum())
        msg = (
            f"the features by {network.name!r} are not finite for {n_bad} of {adata.n_obs} patches; "
            "try dtype='float32', or another tower"
        )
        raise ValueError(msg)
    # Keep the result, so that the patches need not be read again for it.
    patches._blank = np.concatenate(blank)
    n_blank = int(patches._blank.sum())
    if n_blank:
        names = list(patches.obs_names[patches._blank][:3])
        logger.info(
            "image_features: %d of %d patches are blank (glass or background), such as %s",
            n_blank, len(patches), names,
        )  # fmt: skip
    d = network.n_features
    sizes = [float(um * patches.out_px) for um in patches.um_per_px]
    return features, {
        "tower": network.name,
        "tower_sha256": fingerprint(network.network),
        "columns": {"tower": [0, d], "stain": [d, d + N_STAIN]},
        "n_blank": n_blank,
        "params": {
            "slides": list(patches.slides.categories),
            "size_px": [float(w) for w in patches.windows],
            **({} if all(map(math.isnan, sizes)) else {"size_um": sizes}),
            "out_px": int(patches.out_px),
            **record_params(library_key=library_key, basis=basis, device=chosen.type, dtype=precision),
        },
    }


def _cut(adata: AnnData, image: Any, *, size_um: float | None, library_key: str | None, basis: str) -> TissuePatches:
    from spatialfm.pp._patches import patches

    try:
        return patches(adata, image, size_um=size_um, library_key=library_key, basis=basis)
    except (KeyError, ValueError) as error:
        message = str(error.args[0])
        if type(error) not in (KeyError, ValueError) or not any(name in message for name in _FURTHER):
            raise
        msg = (
            f"{message}. These are arguments of sfm.pp.patches: pass its result here, image=sfm.pp.patches(adata, ...)"
        )
        raise type(error)(msg) from error


def _check_patches(
    adata: AnnData, patches: TissuePatches, *, size_um: float | None, library_key: str | None, basis: str
) -> None:
    """Raise if the patches are clearly not those of these spots."""
    again = "cut them again with sfm.pp.patches(adata, ...)"
    if size_um is not None:
        msg = (
            f"size_um={size_um!r}, but the patches already have a size ({patches!r}): leave size_um out, or pass it to "
            "sfm.pp.patches"
        )
        raise ValueError(msg)
    if patches.out_px < 2:
        msg = f"image={patches!r}: a patch of one pixel has no texture; {again} and out_px=224"
        raise ValueError(msg)
    if len(patches) != adata.n_obs:
        msg = f"image holds {len(patches)} patches and adata {adata.n_obs} spots; {again}"
        raise ValueError(msg)
    other = np.flatnonzero(patches.obs_names != adata.obs_names.astype(str))
    if len(other):
        i = other[0]
        msg = (
            f"image holds the patches of other spots, or in another order: row {i} is {patches.obs_names[i]!r} in the "
            f"patches and {adata.obs_names[i]!r} in adata; {again}"
        )
        raise ValueError(msg)
    if library_key is not None and len(patches.slides.categories) > 1:
        libraries = get_libraries(adata, library_key)
        slides = np.array([name for name, _ in libraries])[slide_codes(libraries)]
        if (slides != np.asarray(patches.slides)).any():
            msg = (
                f"the slides of the patches, {list(patches.slides.categories)}, differ from "
                f"library_key={library_key!r}; {again}"
            )
            raise ValueError(msg)
    # A warning only, because patches of a SpatialData object have coordinates in pixels of the image.
    if basis in adata.obsm and not np.allclose(get_coordinates(adata, basis)[:, :2], patches.coordinates):
        warn(
            "image_features: the patches were not cut at basis=%r. That is expected for patches of a SpatialData "
            "object; otherwise pass the right coordinates with basis=, or %s",
            basis,
            again,
        )
