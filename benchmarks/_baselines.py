"""Simple embeddings by expression and coordinates alone, to compare others with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import scanpy as sc
import scipy.sparse as sp
from sklearn.decomposition import PCA

from spatialfm._data._components import transition_matrix
from spatialfm._data._expression import log_normalize, value_kind
from spatialfm.pp import spatial_neighbors
from spatialfm.tl._baselines import hop_means as hops
from spatialfm.tl._baselines import principal_components

if TYPE_CHECKING:
    from anndata import AnnData


def log_values(adata: AnnData) -> AnnData:
    """Bring values to a log-like scale by what they are; ``var["highly_variable"]`` names at most 3,000 features."""
    a = sc.AnnData(log_normalize(adata.X, value_kind(adata.X)), obs=adata.obs[[]], var=adata.var[[]])
    if a.n_vars > 3000:
        sc.pp.highly_variable_genes(a, n_top_genes=3000)
    else:
        a.var["highly_variable"] = True
    return a


def scaled(adata: AnnData) -> np.ndarray:
    """Standardise the variable features, clipped at 10."""
    a = log_values(adata)
    x = a.X[:, a.var["highly_variable"].to_numpy()]
    return sc.pp.scale(np.asarray(x.toarray() if sp.issparse(x) else x), max_value=10)


def components(adata: AnnData) -> np.ndarray:
    """Principal components (n_cells, 30), or as many as there are: the baseline ``"pca"`` of ``tl.evaluate``."""
    return principal_components(adata, None, "auto").scores


def graph(adata: AnnData, slide: str | None) -> Any:
    """Delaunay graph, long edges cut; it is not stored."""
    return spatial_neighbors(
        sc.AnnData(obs=adata.obs, obsm={"spatial": adata.obsm["spatial"]}), library_key=slide, copy=True
    ).obsp["spatial_connectivities"]


def rings(x: np.ndarray, edges: Any, n: int = 3) -> np.ndarray:
    """Cells, and means over those exactly 1, ..., n steps away (CellCharter's aggregation)."""
    edges = edges.astype(bool)
    ring, near, found = edges, (edges + sp.eye(len(x), dtype=bool)).tocsr(), [x]
    for _ in range(n):
        count = np.asarray(ring.sum(axis=1), np.float32).ravel()
        found.append(sp.diags(1 / np.maximum(count, 1)) @ ring.astype(np.float32) @ x)
        ring = (ring @ edges) > near
        near = near + ring
    return np.hstack(found)


def smoothed(x: np.ndarray, edges: Any) -> np.ndarray:
    """Components after four lazy steps on the graph."""
    mean = transition_matrix(edges)
    for _ in range(4):
        x = (x + mean @ x) / 2
    return PCA(min(15, *np.subtract(x.shape, 1)), random_state=0).fit_transform(x)


def add_baselines(adata: AnnData, slide: str | None) -> None:
    """Write ``X_pca``, ``X_hop1``, ``X_hops`` and ``X_smooth``."""
    edges, pca = graph(adata, slide), components(adata)
    adata.obsm["X_pca"] = pca
    adata.obsm["X_hop1"] = hops(pca, edges, (0, 1))
    adata.obsm["X_hops"] = hops(pca, edges, (1, 3, 8))
    adata.obsm["X_smooth"] = smoothed(scaled(adata), edges)
