"""Simple baselines: principal components of the expression, their means over the tissue graph, and the location."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

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


class PrincipalComponents(NamedTuple):
    """Principal components of the expression."""

    scores: np.ndarray
    """(n_obs, at most 30), float32."""
    kind: str
    """What the values are."""


def principal_components(
    adata: AnnData, layer: str | None, values: ValuesKind, slides: Sequence[tuple[str, np.ndarray]] = ()
) -> PrincipalComponents:
    """First 30 principal components of the log-normalised, standardised 3,000 most variable features."""
    read = read_values(adata, layer, values, slides=slides)
    x = read.logged()
    x = x[:, _variable_genes(x, read.kind, _N_GENES)]
    # Without edges, these are plain components.
    no_edges = sp.csr_matrix((adata.n_obs, adata.n_obs), dtype=np.float32)
    try:
        found = spatial_components(x, no_edges, n_components=_N_COMPONENTS)
    except ValueError:
        msg = (
            f"none of the {x.shape[1]} features varies between the {adata.n_obs} cells, so there are no principal "
            "components; leave 'pca', 'neighbors' and 'hops' out of baselines="
        )
        raise ValueError(msg) from None
    return PrincipalComponents(found.scores, read.kind)


def hop_means(x: np.ndarray, graph: csr_matrix, steps: tuple[int, ...]) -> np.ndarray:
    """Means over so many steps on the tissue graph, side by side; 0 is the cell itself."""
    step, means = transition_matrix(graph), [x]
    for _ in range(max(steps)):
        means.append(step @ means[-1])
    return np.hstack([means[s] for s in steps])


def location_terms(xy: np.ndarray, slide: np.ndarray) -> np.ndarray:
    """Polynomial (n, 9) of degree three of the coordinates, standardised on each slide."""
    scaled = np.zeros((len(xy), 2))
    for s in np.unique(slide):
        here = xy[slide == s, :2]
        scaled[slide == s] = (here - here.mean(axis=0)) / np.maximum(here.std(axis=0), 1e-12)
    x, y = scaled.T
    return np.column_stack([x**i * y**j for i in range(4) for j in range(4 - i) if i + j]).astype(np.float32)
