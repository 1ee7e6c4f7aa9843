"""What an embedding has to beat: principal components of the expression, and their means over the tissue graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from spatialfm._data._components import spatial_components, transition_matrix
from spatialfm._data._expression import read_values
from spatialfm.pp._grn import _variable_genes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from scipy.sparse import csr_matrix

    from spatialfm._data._expression import ValuesKind

_N_COMPONENTS = 30
_N_GENES = 3000


def principal_components(
    adata: AnnData, layer: str | None, values: ValuesKind, slides: Sequence[tuple[str, np.ndarray]] = ()
) -> tuple[np.ndarray, str]:
    """First 30 principal components (n_obs, 30) of the log-normalised, standardised 3,000 most variable features, float32; and what the values are."""
    read = read_values(adata, layer, values, slides=slides)
    x = read.logged()
    x = x[:, _variable_genes(x, read.kind, _N_GENES)]
    # Without edges no feature counts more for varying over the tissue: these are plain components.
    no_edges = sp.csr_matrix((adata.n_obs, adata.n_obs), dtype=np.float32)
    return spatial_components(x, no_edges, n_components=_N_COMPONENTS).scores, read.kind


def hop_means(x: np.ndarray, graph: csr_matrix, steps: tuple[int, ...]) -> np.ndarray:
    """Means over so many steps on the tissue graph, side by side; 0 is the cell itself."""
    step, means = transition_matrix(graph), [x]
    for _ in range(max(steps)):
        means.append(step @ means[-1])
    return np.hstack([means[s] for s in steps])


def location_terms(xy: np.ndarray, slide: np.ndarray) -> np.ndarray:
    """Polynomial (n, 9) of degree three of the coordinates, which are standardised on each slide: a smooth map, without any expression."""
    scaled = np.zeros((len(xy), 2))
    for s in np.unique(slide):
        here = xy[slide == s, :2]
        scaled[slide == s] = (here - here.mean(axis=0)) / np.maximum(here.std(axis=0), 1e-12)
    x, y = scaled.T
    return np.column_stack([x**i * y**j for i in range(4) for j in range(4 - i) if i + j]).astype(np.float32)
