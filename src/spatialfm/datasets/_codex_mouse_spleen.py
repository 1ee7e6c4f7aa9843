"""CODEX of mouse spleen."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anndata import AnnData


def codex_mouse_spleen() -> AnnData:
    """CODEX of a mouse spleen, 15,829 cells x 29 proteins.

    A rectangle of 4 x 3 tiles (1.0 x 0.57 mm) of the sample BALBc-1 that contains whole follicles.

    Returns
    -------
    AnnData with

    ``X``
        Compensated intensities, float32; compensation makes some negative. Rounded to integers and to 7 significant
        bits.
    ``obs["cell_type"]``
        One of 26 cell types, as annotated in the study.
    ``obs["compartment"]``
        B-zone, PALS, marginal zone or red pulp; NoAnnotation for 39 cells.
    ``obs["tile"]``
        Number of the microscope's field of view.
    ``obsm["spatial"]``
        Coordinates in micrometres, float32.
    ``uns["source"]``, ``uns["eval"]``
        Citation, licence and changes made; the columns with cell types and tissue regions.

    References
    ----------
    Goltsev et al. 2018, `Deep profiling of mouse splenic architecture with CODEX multiplexed imaging
    <https://doi.org/10.1016/j.cell.2018.07.010>`__. BSD-3-Clause, as distributed with cellcharter; compartments MIT, as
    distributed with CytoCommunity.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.codex_mouse_spleen()
    >>> adata.shape
    (15829, 29)
    """
    from anndata import read_h5ad

    return read_h5ad(str(files("spatialfm.datasets") / "codex_mouse_spleen.h5ad"))
