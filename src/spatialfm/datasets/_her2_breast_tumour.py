"""Spatial Transcriptomics of a breast tumour with its H&E image."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from anndata import AnnData


def her2_breast_tumour() -> AnnData:
    """Spatial Transcriptomics of a HER2-positive breast tumour with its H&E image, 187 spots x 12,687 genes.

    Section C2 of the study. The image has half the resolution of the scan, 1.5 µm a pixel. The bundled model
    ``"hibio"`` was trained on four other sections of the same tumour, but not on this one.

    Returns
    -------
    AnnData with

    ``X``
        Counts, csr float32; ``var_names`` are gene symbols.
    ``obs["array_row"]``, ``obs["array_col"]``
        Position on the array; spots are 100 µm wide and 200 µm apart.
    ``obsm["spatial"]``
        Coordinates in pixels of the scan (0.74 µm), with the origin at the corner of the bundled image. A pixel of the
        image is two of these.
    ``uns["spatial"]["C2"]``
        ``images["hires"]``, uint8 (2464, 2903, 3), and ``scalefactors``: ``tissue_hires_scalef``,
        ``spot_diameter_fullres``, and ``microns_per_pixel`` of the coordinates, which :func:`spatialfm.pp.patches`
        reads.
    ``uns["source"]``
        Citation, licence and changes made.

    References
    ----------
    Andersson et al. 2021, `Spatial deconvolution of HER2-positive breast cancer delineates tumor-associated immune cell
    type interactions <https://doi.org/10.1038/s41467-021-26271-2>`__. CC BY 4.0.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.her2_breast_tumour()
    >>> adata.shape
    (187, 12687)
    >>> adata.uns["spatial"]["C2"]["images"]["hires"].shape
    (2464, 2903, 3)
    """
    import PIL.Image
    from anndata import read_h5ad
    from scipy.sparse import csr_matrix

    folder = files("spatialfm.datasets")
    adata = read_h5ad(str(folder / "her2_breast_tumour.h5ad"))
    adata.X = csr_matrix(adata.X, dtype=np.float32)
    with PIL.Image.open(str(folder / "her2_breast_tumour.jpg")) as image:
        adata.uns["spatial"]["C2"]["images"] = {"hires": np.array(image)}
    return adata
