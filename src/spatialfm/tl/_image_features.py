"""Features of the tissue image around spots."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from spatialfm._checks import checked
from spatialfm._data._adata import get_coordinates, get_libraries, slide_codes
from spatialfm._data._write import check_free, write
from spatialfm._settings import logger

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from anndata import AnnData
    from spatialdata import SpatialData
    from xarray import DataArray, DataTree

    from spatialfm.models import ImageTower
    from spatialfm.pp import TissuePatches

# What pp.patches knows beyond the arguments of image_features.
_FURTHER = ("scale=", "um_per_px=", "spot_distance_um=", "size_px=")


@checked
def image_features(
    adata: AnnData,
    image: (
        str
        | Path
        | np.ndarray
        | TissuePatches
        | SpatialData
        | tuple[SpatialData, str]
        | DataArray
        | DataTree
        | Mapping[str, Any]
        | None
    ) = None,
    *,
    tower: str | Path | ImageTower = "efficientnet-lite0",
    size_um: float | None = None,
    library_key: str | None = None,
    basis: str = "spatial",
    key_added: str = "image_features",
    device: str | None = None,
    batch_size: int | None = None,
    dtype: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Describe the H&E patch around each spot by an image network and by its stain.

    Computed once and stored, this is what models of histology read; no model of this package changes it. A batch of patches is decoded, once, while
    the network computes the one before, so that memory does not grow with the spots.

    Parameters
    ----------
    adata
        Spots or cells with coordinates in ``obsm[basis]``.
    image
        What :func:`spatialfm.pp.patches` takes: None for ``uns["spatial"]``, the name of an image in it, a file, an array, a SpatialData object or a
        mapping from the slides. Or the patches that it returned for the same rows: for its further arguments, such as ``spot_distance_um=200``
        for the first Spatial Transcriptomics arrays, and for patches in a store.
    tower
        Image network: a name or folder for :func:`spatialfm.models.load_tower`, or a tower.
    size_um
        Side of a patch on the tissue in µm, 112 where None. Not with patches, which have a size.
    library_key
        Column of ``obs`` with the slide of each spot, as for :func:`spatialfm.pp.patches`.
    basis
        Key of ``obsm`` with the coordinates.
    key_added
        Name of what is written.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``; ``settings.device`` where None.
    batch_size
        Patches of a batch; 16 on a CPU and 128 elsewhere where None. It changes nothing but rounding.
    dtype
        ``"float32"``, also where None, or ``"bfloat16"``, which moves the features of the built-in tower by a tenth.
    copy
        Return a copy instead of writing to ``adata``.

    Returns
    -------
    ``None``, or the copy. Written:

    ``obsm[key_added]``
        float32 (n_obs, n_features + 10), (n_obs, 1290) by the built-in tower: the features of the tower as they are, then the statistics of the
        stain. These are of the optical density -ln((pixel + 1) / 256): mean of the red, green and blue channel; their standard deviations; then
        of the mean of the channels: the mean absolute difference of pixels one above the other (texture), and the 10th, 50th and 90th
        percentile.
    ``uns[key_added]``
        ``tower``, ``tower_sha256`` of its weights, ``columns`` (ranges of ``tower`` and ``stain``), ``n_blank`` (patches that show nothing), and
        ``params``, of which ``size_px`` (in units of the coordinates) and ``size_um`` hold a number for each of
        ``slides``; ``size_um`` is NaN where it is not known, and left out where it is known of none.

    Raises
    ------
    KeyError
        Coordinates, ``library_key``, or an image with its scale factor is missing.
    FileNotFoundError
        There is no such file or tower.
    ValueError
        Spots lie outside the image, the µm a pixel are not known, patches are of other spots or slides or come with ``size_um``, features are
        not finite, or an argument is out of range. ``adata`` is as it was.
    ImportError
        The tower needs an extra that is not installed.

    Examples
    --------
    >>> import anndata as ad, numpy as np, spatialfm as sfm
    >>> adata = ad.AnnData(np.ones((2, 1), np.float32), obsm={"spatial": np.array([[30, 40], [50, 60]])})
    >>> image = np.full((100, 100, 3), 200, np.uint8)
    >>> patches = sfm.pp.patches(adata, image, size_px=32)  # for an image of known µm a pixel, pass the image itself
    >>> sfm.tl.image_features(adata, patches)
    >>> adata.obsm["image_features"].shape
    (2, 1290)
    """
    check_free(adata, "tl.image_features", {"obsm": [key_added], "uns": [key_added]})
    features, facts = compute(
        adata, image, tower=tower, size_um=size_um, library_key=library_key, basis=basis,
        device=device, batch_size=batch_size, dtype=dtype,
    )  # fmt: skip
    fields: dict[str, dict[str, Any]] = {"obsm": {key_added: features}, "uns": {key_added: facts}}
    adata = write(adata, "tl.image_features", key_added, fields, copy=copy)
    logger.info(
        "image_features: %d patches by %s on %s -> obsm[%r] (%d columns), uns[%r]",
        len(features), facts["tower"], facts["params"]["device"], key_added, features.shape[1], key_added,
    )  # fmt: skip
    return adata if copy else None


def compute(
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
    """Return what :func:`image_features` writes to ``obsm`` and to ``uns``."""
    from spatialfm.engine._device import choose_device, choose_dtype
    from spatialfm.engine._images import N_STAIN, encode_patches, stain
    from spatialfm.models import ImageTower, fingerprint, load_tower
    from spatialfm.pp._patches import TissuePatches, is_blank

    place = choose_device(device)
    precision = choose_dtype(dtype or "float32", place)
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
        msg = f"{network.name!r} gives features that are not finite for {n_bad} of {adata.n_obs} patches; try dtype='float32', or another tower"
        raise ValueError(msg)
    # Known from here on: asked for later, the patches need not be read again.
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
            "library_key": library_key or "",
            "basis": basis,
            "device": place.type,
            "dtype": precision,
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
        msg = f"{message}. These are arguments of sfm.pp.patches: give them to it, and what it returns here, image=sfm.pp.patches(adata, ...)"
        raise type(error)(msg) from error


def _check_patches(
    adata: AnnData, patches: TissuePatches, *, size_um: float | None, library_key: str | None, basis: str
) -> None:
    """Raise unless the patches are of these spots, as far as can be told."""
    again = "cut them anew with sfm.pp.patches(adata, ...)"
    if size_um is not None:
        msg = f"size_um={size_um!r} and patches that have a size ({patches!r}): leave size_um out, or give it to sfm.pp.patches"
        raise ValueError(msg)
    if patches.out_px < 2:
        msg = f"image={patches!r}: of a patch of one pixel there is no texture; {again} and out_px=224"
        raise ValueError(msg)
    if len(patches) != adata.n_obs:
        msg = f"image holds {len(patches)} patches and adata {adata.n_obs} spots; {again}"
        raise ValueError(msg)
    other = np.flatnonzero(patches.obs_names != adata.obs_names.astype(str))
    if len(other):
        i = other[0]
        msg = (
            f"image holds the patches of other spots, or in another order: row {i} is {patches.obs_names[i]!r} in the patches and "
            f"{adata.obs_names[i]!r} in adata; {again}"
        )
        raise ValueError(msg)
    if library_key is not None and len(patches.slides.categories) > 1:
        libraries = get_libraries(adata, library_key)
        slides = np.array([name for name, _ in libraries])[slide_codes(libraries)]
        if (slides != np.asarray(patches.slides)).any():
            msg = f"the patches are of the slides {list(patches.slides.categories)}, not as obs[{library_key!r}] says; {again}"
            raise ValueError(msg)
    # No error: of a SpatialData object, places are in pixels of the image.
    if basis in adata.obsm and not np.allclose(get_coordinates(adata, basis)[:, :2], patches.coordinates):
        logger.warning(
            "image_features: the patches were not cut at obsm[%r]; right for patches of a SpatialData object, else %s",
            basis, again,
        )  # fmt: skip
