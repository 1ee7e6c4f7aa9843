"""Visium of human cortex with its H&E image."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from anndata import AnnData


def visium_human_dlpfc() -> AnnData:
    """Visium of human dorsolateral prefrontal cortex with a small H&E image, 2,929 spots x 8,916 genes.

    Part of sample 151673 of the study, with the genes detected in more than 5 % of its spots.

    Returns
    -------
    AnnData with

    ``X``
        Counts, csr float32; ``var_names`` are gene symbols.
    ``obs["layer"]``
        Cortical layer 1 to 6 or white matter (WM), as annotated in the study.
    ``obs["n_counts"]``
        Total counts of the spot before genes were left out.
    ``obs["array_row"]``, ``obs["array_col"]``
        Position on the array; spots are 55 µm wide and 100 µm apart.
    ``obsm["spatial"]``
        Coordinates in pixels of the full-resolution image, about 0.73 µm.
    ``uns["spatial"]["151673"]``
        ``images["lowres"]``, uint8 (600, 600, 3), and ``scalefactors``. At 16 µm a pixel it shows grey and white matter
        but no cells: good as the background of maps, too coarse for models of histology.
    ``uns["source"]``, ``uns["eval"]``
        Citation, licence and changes made; the column with tissue regions.

    References
    ----------
    Maynard et al. 2021, `Transcriptome-scale spatial gene expression in the human dorsolateral prefrontal cortex
    <https://doi.org/10.1038/s41593-020-00787-0>`__. BSD-3-Clause, as distributed with paste2; the image Artistic-2.0,
    as distributed with HumanPilot.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.visium_human_dlpfc()
    >>> adata.shape
    (2929, 8916)
    >>> adata.obs["layer"].nunique()
    7
    """
    import PIL.Image
    from anndata import read_h5ad
    from scipy.sparse import csr_matrix

    folder = files("spatialfm.datasets")
    adata = read_h5ad(str(folder / "visium_human_dlpfc.h5ad"))
    adata.X = csr_matrix(adata.X, dtype=np.float32)
    with PIL.Image.open(str(folder / "visium_human_dlpfc.jpg")) as image:
        adata.uns["spatial"]["151673"]["images"] = {"lowres": np.array(image)}
    return adata
