"""Whether spots are such as a model of histology was trained on: spots at all, and of a tissue like that of the training data."""

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

# Correlation of mean profiles with that of the training data. Sections of breast tumours of five patients that were left out: 0.74 to 0.88; cortex of
# man: 0.44 and 0.46. Of 2,000 to 4,000 variable genes, which differ from file to file: tumours from 0.35 on, brain of the mouse 0.10. Of fewer genes it
# tells nothing.
_ALIKE, _ALIKE_FEW = 0.6, 0.25
_MIN_GENES = 1000
# Genes detected in the median spot: 900 to 5,000 on Visium and Spatial Transcriptomics; 40 to 110 in single cells by CosMx and Xenium.
_FEW_DETECTED = 200
_MIN_PANEL = 100
_WHOLE = 5000  # genes from which on they are not chosen ones
# Coefficient of variation of the distances to the nearest neighbours: below 0.1 on arrays of spots, about 0.4 between cells.
_IRREGULAR = 0.2


def describe_tissue(adata: AnnData, model: HiBio, position: dict[str, int]) -> dict[str, Any]:
    """Tell what a model was trained on, and how like it the measured expression is; ``position`` is that of each known feature among the model's genes.

    ``trained_on``; where enough genes were measured, ``similarity``, the correlation of the mean profiles, and ``alike``, whether it suffices.
    """
    kinds = dict.fromkeys(str(slide["tissue"]) for slide in model.record.get("data", []) if "tissue" in slide)
    told: dict[str, Any] = {"trained_on": ", ".join(kinds)}
    if len(position) < _MIN_GENES or adata.X is None:
        return told
    x = get_matrix(adata)
    try:
        check_finite(x)
        kind = value_kind(x)
    except (TypeError, ValueError):
        # Measured values play no part in a prediction; whatever is wrong with them is told where they do.
        return told
    if kind not in ("counts", "normalized", "log"):
        return told
    values = log_normalize(x, kind)
    columns = adata.var_names.get_indexer(list(position))
    # float64, and rounded, so that the order of the spots plays no part.
    own = np.asarray(values.mean(axis=0, dtype=np.float64)).ravel()[columns]
    known = model.mean_expression.cpu().numpy().astype(np.float64)[list(position.values())]
    if own.std() > 0 and known.std() > 0:
        told["similarity"] = round(float(np.corrcoef(own, known)[0, 1]), 3)
        told["alike"] = bool(told["similarity"] >= (_ALIKE if len(position) >= _WHOLE else _ALIKE_FEW))
    return told


def warn_of_single_cells(adata: AnnData, x: Any, *, library_key: str | None, basis: str, model: HiBio) -> None:
    """Warn where the rows of ``x`` (n, genes), zero where nothing was measured, look like single cells; ``adata`` tells where they are."""
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
        "%d genes are detected in the median row of adata%s: these look like single cells, or bins as small. model=%r reads spots of many cells, in which "
        "several hundred and more are detected; for cells take the default, sfm.tl.embed(adata), or sum them up in spots first",
        int(detected), ", and the rows lie on no array" if irregular >= _IRREGULAR else "", model.name,
    )  # fmt: skip


def _irregularity(xy: np.ndarray, slide: np.ndarray, n_slides: int) -> float:
    """Coefficient of variation of the distances to the nearest neighbour, the median of the slides."""
    from scipy.spatial import cKDTree

    found = []
    for k in range(n_slides):
        places = np.unique(xy[slide == k], axis=0)
        if len(places) > 2:
            nearest = cKDTree(places).query(places, k=2)[0][:, 1]
            found.append(float(nearest.std() / nearest.mean()))
    return float(np.median(found)) if found else 0.0
