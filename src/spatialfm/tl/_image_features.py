"""Features of the tissue image around spots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spatialfm._checks import checked
from spatialfm._data._write import check_free, write
from spatialfm._settings import logger

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    from anndata import AnnData
    from spatialdata import SpatialData
    from xarray import DataArray, DataTree

    from spatialfm.models import ImageTower
    from spatialfm.pp import TissuePatches


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

    These features are what models of histology read; no model changes them. Patches are decoded batch by batch, so
    memory does not grow with the number of spots.

    Parameters
    ----------
    %(adata)s
    image
        What :func:`spatialfm.pp.patches` takes: None for ``uns["spatial"]``, the name of an image in it, a file, an
        array, a SpatialData object, or a mapping from slides to images. Or patches that it returned for the same
        spots, for its further arguments.
    tower
        Image network: a name or folder for :func:`spatialfm.models.load_tower`, or a tower.
    size_um
        Side of a patch on the tissue in µm; 112 where None. Not with patches, which have a size.
    %(library_key)s
    %(basis)s
    %(key_added)s
    %(device)s
    batch_size
        Patches in a batch; 16 on a CPU and 128 elsewhere where None. It changes rounding only.
    dtype
        ``"float32"`` (also where None) or ``"bfloat16"``, which changes the built-in tower's features by a tenth.
    %(copy)s

    Returns
    -------
    ``None``, or the copy. Written:

    ``obsm[key_added]``
        float32 (n_obs, n_features + 10), (n_obs, 1290) by the built-in tower: features of the tower, then statistics of
        the optical density -ln((pixel + 1) / 256): means and standard deviations of red, green and blue; of the mean of
        the channels, the mean absolute difference of neighbouring rows and the 10th, 50th and 90th percentiles.
    ``uns[key_added]``
        ``tower``, ``tower_sha256``, ``columns`` (ranges of ``tower`` and ``stain``), ``n_blank`` (patches of glass or
        background), and ``params``, with ``size_px`` and ``size_um`` of each of the ``slides``.

    Raises
    ------
    KeyError, FileNotFoundError
        Coordinates, ``library_key``, an image, its scale factor or the tower is missing.
    ValueError
        Spots lie outside the image, its µm a pixel are not known, patches are of other spots, or features are not
        finite.
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
    from spatialfm.engine import compute_image_features

    features, facts = compute_image_features(
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
