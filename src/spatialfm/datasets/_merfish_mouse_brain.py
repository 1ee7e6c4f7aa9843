"""MERFISH of mouse brain."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anndata import AnnData


def merfish_mouse_brain() -> AnnData:
    """MERFISH of coronal brain sections of two mice, 4,788 cells x 200 genes.

    Returns
    -------
    AnnData with

    ``X``
        Normalised counts, not logged, float32.
    ``obs["mouse_id"]``
        The animal; one section each. Pass ``library_key="mouse_id"``.
    ``obs["age"]``, ``obs["celltype"]``, ``obs["region"]``
        Age, one of 15 cell types, one of 6 regions.
    ``obsm["spatial"]``
        Coordinates in micrometres.
    ``uns["source"]``
        Citation and licence.

    References
    ----------
    Sun et al. 2024, Spatial transcriptomic clocks reveal cell proximity effects in brain ageing. MIT licence.
    """
    from anndata import read_h5ad

    return read_h5ad(str(files("spatialfm.datasets") / "merfish_mouse_brain.h5ad"))
