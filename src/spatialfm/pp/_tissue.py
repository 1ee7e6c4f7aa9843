"""A tissue as a hierarchical model reads it: arrays taken from an AnnData, what is missing built on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from spatialfm._data._adata import (
    get_coordinates,
    get_libraries,
    get_table,
    slide_codes,
    warn_off_tissue,
)
from spatialfm._data._expression import Expression, place_order, read_values
from spatialfm._data._write import adopt
from spatialfm.pp._grn import get_networks, grn
from spatialfm.pp._spatial_neighbors import find_graph

if TYPE_CHECKING:
    from anndata import AnnData

    from spatialfm._data._expression import ValuesKind


@dataclass
class Tissue:
    """Cells in a canonical order (slide by slide, then by place and content), so that nothing depends on the rows of the AnnData."""

    rows: np.ndarray
    """(n,) row of the AnnData that each cell came from."""
    slide: np.ndarray
    """(n,) position of each cell's slide."""
    xy: np.ndarray
    """(n, 2) float64 coordinates in their own unit."""
    coords: np.ndarray
    """(n, 2) float32 coordinates, standardised per slide and axis."""
    graph: sp.csr_matrix
    """(n, n) tissue graph, symmetric, of ones."""
    expression: Any
    """(n, g) float32 on a log-like scale, dense or csr."""
    genes: list[str]
    networks: list[sp.csr_matrix]
    """One (g, g) gene network a group; none where they were not asked for."""
    group: np.ndarray
    """(n,) int64 position of each cell's network; zero where there is none."""
    kind: str
    """What the values are, see ``value_kind``; ``"none"`` without features."""
    unmeasured: list[str]
    """Features left out, since a slide lacks them."""
    built: AnnData
    """Carries the graphs in the order of the AnnData, in ``obs``, ``obsp`` and ``uns``."""
    built_keys: dict[str, list[str]]
    """The fields of ``built`` that the AnnData lacked: ``{"obs": [...], "obsp": [...], "uns": [...]}``."""

    def store_built(self, adata: AnnData) -> None:
        """Write what the AnnData lacked."""
        adopt(adata, self.built, self.built_keys)


def read_tissue(
    adata: AnnData,
    *,
    library_key: str | None = None,
    layer: str | None = None,
    groupby: str | None = "auto",
    basis: str = "spatial",
    values: ValuesKind = "auto",
    networks: bool = True,
    features: bool = True,
    rng: int | np.random.Generator | None = 0,
) -> Tissue:
    """Read a tissue, with ``adata`` untouched; see :func:`spatialfm.tl.embed` for the arguments and errors.

    Without ``networks``, no gene network is read or built, and the expression is that of all features instead of the networks' genes. Without
    ``features`` there may be none, and their values are not looked at.
    """
    from anndata import AnnData

    if adata.n_obs == 0 or (features and adata.n_vars == 0):
        msg = f"adata has {adata.n_obs} cells and {adata.n_vars} genes; there is nothing to embed"
        raise ValueError(msg)
    xy = get_coordinates(adata, basis)
    if xy.shape[1] != 2:
        msg = f"obsm[{basis!r}] has {xy.shape[1]} columns; HEIST reads sections: keep x and y, and name the section in library_key="
        raise ValueError(msg)
    libraries = get_libraries(adata, library_key)
    slide = slide_codes(libraries)
    if features:
        read = read_values(adata, layer, values, slides=libraries)
    else:
        warn_off_tissue(adata)
        read = Expression(np.zeros((adata.n_obs, 0), np.float32), "log", np.zeros(0, np.int64), [])
    logged = read.logged()

    # A shell shares what it does not change, so that nothing reaches adata before all has worked.
    shell = AnnData(X=logged, obs=get_table(adata.obs), obsm={basis: xy})
    shell.var_names = adata.var_names[read.features]
    built_keys: dict[str, list[str]] = {"obs": [], "obsp": [], "uns": []}
    neighbors = find_graph(adata, neighbors_key="spatial_neighbors", basis=basis, library_key=library_key)
    neighbors.store(shell)
    built_keys |= neighbors.new
    if not networks:
        genes, group = list(map(str, shell.var_names)), np.zeros(adata.n_obs, np.int64)
        matrices: list[sp.csr_matrix] = []
    elif "grn" in adata.uns:
        genes, _, matrices, group = get_networks(adata)
        stored = str(adata.uns["grn"].get("groupby", ""))
        if groupby != "auto" and stored != (groupby or ""):
            msg = (
                f"groupby={groupby!r}, but uns['grn'] holds networks of groupby={stored or None!r}; "
                f"call sfm.pp.grn(adata, groupby={groupby!r}) first, or leave groupby alone to use the stored networks"
            )
            raise ValueError(msg)
        lost = [name for name in genes if name in set(read.unmeasured)]
        if lost:
            msg = (
                f"uns['grn'] holds networks of {len(lost)} genes that were not measured on every slide (first: {lost[:3]}); "
                f"build them again with sfm.pp.grn(adata, library_key={library_key!r})"
            )
            raise ValueError(msg)
    else:
        on_log: ValuesKind = "scaled" if read.kind in ("intensity", "scaled") else "log"
        grn(shell, groupby=groupby, library_key=library_key, rng=rng, values=on_log)
        genes, _, matrices, group = get_networks(shell)
        built_keys["uns"].append("grn")
        if groupby == "auto":
            built_keys["obs"].append("grn_group")

    coords = np.empty((adata.n_obs, 2))
    order = place_order(read.x, np.column_stack([slide, xy]))
    xy, slide, group = xy[order], slide[order], group[order]
    for i in range(len(libraries)):
        here = slide == i
        spread = xy[here].std(axis=0)
        coords[here] = (xy[here] - xy[here].mean(axis=0)) / np.where(spread > 0, spread, 1)
    graph = neighbors.edges[order][:, order]
    graph.sort_indices()
    columns = shell.var_names.get_indexer(genes) if networks else slice(None)
    return Tissue(
        rows=order,
        slide=slide,
        xy=xy,
        coords=coords.astype(np.float32),
        graph=graph,
        expression=logged[:, columns][order],
        genes=genes,
        networks=matrices,
        group=group,
        kind=read.kind if features else "none",
        unmeasured=read.unmeasured,
        built=shell,
        built_keys=built_keys,
    )
