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
