"""Check that data suit a model of histology: spots rather than cells, of a tissue like that of the training data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from spatialfm._data._adata import get_coordinates, get_libraries, get_matrix, slide_codes
from spatialfm._data._expression import check_finite, log_normalize, value_kind
from spatialfm._settings import warn

if TYPE_CHECKING:
    from anndata import AnnData

    from spatialfm.models import HiBio

# Smallest correlation of the mean profile with that of the training data. All genes: held-out sections of breast
# tumours of five patients 0.74 to 0.88, human cortex 0.44 and 0.46. With 2,000 to 4,000 variable genes, which differ
# between files: tumours at least 0.35, mouse brain 0.10. With fewer genes the correlation is not informative.
_ALIKE, _ALIKE_FEW = 0.6, 0.25
_MIN_GENES = 1000
# Genes detected in the median spot: 900 to 5,000 on Visium and Spatial Transcriptomics; 40 to 110 in single cells of
# CosMx and Xenium.
_FEW_DETECTED = 200
_MIN_PANEL = 100
# Panels with at least this many genes count as the whole transcriptome.
_WHOLE = 5000
# Coefficient of variation of the distances to the nearest neighbour: below 0.1 on arrays of spots, about 0.4 for cells.
_IRREGULAR = 0.2


def describe_tissue(adata: AnnData, model: HiBio, position: dict[str, int]) -> dict[str, Any]:
    """Describe what a model was trained on, and how similar the measured expression is to it.

    Parameters
    ----------
    position
        Position among the genes of the model of each feature that is one of them.

    Returns
    -------
    ``trained_on``; if enough genes were measured, also ``similarity``, the correlation of the mean profiles, and
    ``alike``, whether it is large enough.
    """
    kinds = dict.fromkeys(str(slide["tissue"]) for slide in model.record.get("data", []) if "tissue" in slide)
    found: dict[str, Any] = {"trained_on": ", ".join(kinds)}
    if len(position) < _MIN_GENES or adata.X is None:
        return found
    x = get_matrix(adata)
    try:
        check_finite(x)
        kind = value_kind(x)
    except (TypeError, ValueError):
        # Predictions do not use the measured values, so invalid values are not an error here.
        return found
    if kind not in ("counts", "normalized", "log"):
        return found
    values = log_normalize(x, kind)
    columns = adata.var_names.get_indexer(list(position))
    # float64, and rounded, so that the order of the spots does not matter.
    own = np.asarray(values.mean(axis=0, dtype=np.float64)).ravel()[columns]
    known = model.mean_expression.cpu().numpy().astype(np.float64)[list(position.values())]
    if own.std() > 0 and known.std() > 0:
        found["similarity"] = round(float(np.corrcoef(own, known)[0, 1]), 3)
        found["alike"] = bool(found["similarity"] >= (_ALIKE if len(position) >= _WHOLE else _ALIKE_FEW))
    return found


def warn_of_single_cells(adata: AnnData, x: Any, *, library_key: str | None, basis: str, model: HiBio) -> None:
    """Warn if the rows of the expression ``x`` (n, genes) look like single cells, by their genes and coordinates."""
    n_genes = x.shape[1]
    if x.shape[0] < 2 or n_genes < _MIN_PANEL:
        return
    detected = float(np.median(np.diff(sp.csr_matrix(x).indptr) if sp.issparse(x) else np.count_nonzero(x, axis=1)))
    if detected >= _FEW_DETECTED:
        return
    libraries = get_libraries(adata, library_key)
    irregular = _irregularity(get_coordinates(adata, basis), slide_codes(libraries), len(libraries))
    if n_genes < _WHOLE and irregular < _IRREGULAR:
        return
    warn(
        "%d genes are detected in the median row of adata%s: these look like single cells or small bins. model=%r "
        "is for spots of many cells, with several hundred detected genes or more. For cells use the default, "
        "sfm.tl.embed(adata), or aggregate them into spots first",
        int(detected),
        ", and the rows are not on a regular array" if irregular >= _IRREGULAR else "",
        model.name,
    )


def _irregularity(xy: np.ndarray, slide: np.ndarray, n_slides: int) -> float:
    """Coefficient of variation of the distances to the nearest neighbour, median over slides."""
    from scipy.spatial import cKDTree

    found = []
    for k in range(n_slides):
        locations = np.unique(xy[slide == k], axis=0)
        if len(locations) > 2:
            nearest = cKDTree(locations).query(locations, k=2)[0][:, 1]
            found.append(float(nearest.std() / nearest.mean()))
    return float(np.median(found)) if found else 0.0
