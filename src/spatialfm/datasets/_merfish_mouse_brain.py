"""MERFISH of mouse brain."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anndata import AnnData


def merfish_mouse_brain() -> AnnData:
    """MERFISH of coronal brain sections of two mice, 4,788 cells x 200 genes.

    The two sections lie side by side, 200 µm apart, which is far more than the distance between neighbouring cells, so
    that a graph of all cells does not join them. In the files of the study their coordinates overlap.

    Returns
    -------
    AnnData with

    ``X``
        Normalised counts, not logged, float32.
    ``obs["mouse_id"]``
        The mouse, one section each: ``"OC1"``, 19 months old, and ``"YC1"``, 3 months old. Pass it as
        ``library_key="mouse_id"`` to keep the sections strictly apart.
    ``obs["age"]``, ``obs["celltype"]``, ``obs["region"]``
        Age in months, as text; one of 15 cell types; one of 6 regions.
    ``obsm["spatial"]``
        Coordinates in micrometres, float32; 700 µm are added to the x of YC1.
    ``uns["source"]``
        Citation and licence.

    References
    ----------
    Sun et al. 2024, Spatial transcriptomic clocks reveal cell proximity effects in brain ageing. MIT licence.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()
    >>> adata.shape
    (4788, 200)
    """
    from anndata import read_h5ad

    adata = read_h5ad(str(files("spatialfm.datasets") / "merfish_mouse_brain.h5ad"))
    # Each section is 500 µm wide.
    adata.obsm["spatial"][adata.obs["mouse_id"] == "YC1", 0] += 700
    return adata
