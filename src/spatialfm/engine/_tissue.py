"""A tissue as encoders read it: arrays from an AnnData; missing graphs are built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from spatialfm._data._adata import get_coordinates, get_libraries, get_table, slide_codes, warn_off_tissue
from spatialfm._data._expression import Expression, location_order, read_values
from spatialfm._data._write import adopt, record_params
from spatialfm.pp._grn import get_networks, grn
from spatialfm.pp._patch_images import stated_micrometres
from spatialfm.pp._spatial_neighbors import find_graph

if TYPE_CHECKING:
    from anndata import AnnData

    from spatialfm._data._expression import ValuesKind


@dataclass
class Tissue:
    """Cells in a canonical order (by slide, coordinates and values), so that results do not depend on the row order."""

    rows: np.ndarray
    """(n,) row of the AnnData of each cell."""
    slide: np.ndarray
    """(n,) position in ``slides`` of the slide of each cell."""
    slides: list[str]
    """Names of the slides."""
    um: list[float | None]
    """Micrometres per unit of the coordinates on each slide, None if unknown."""
    xy: np.ndarray
    """(n, 2) float64 coordinates in the unit of the AnnData."""
    coords: np.ndarray
    """(n, 2) float32 coordinates, standardised per slide and axis."""
    graph: sp.csr_matrix
    """(n, n) tissue graph, symmetric, of ones."""
    expression: Any
    """(n, g) float32 on a log-like scale, dense or csr."""
    genes: list[str]
    n_features: int
    """Number of features of the AnnData."""
    networks: list[sp.csr_matrix]
    """One (g, g) gene network for each group; empty if they were not requested."""
    network_groups: str
    """Column of ``obs`` with the groups of the networks; empty if there are none."""
    group: np.ndarray
    """(n,) int64 position in ``networks`` of the network of each cell; zero if there are none."""
    kind: str
    """Kind of the values, see ``value_kind``; ``"none"`` without features."""
    unmeasured: list[str]
    """Features that were left out, because they were not measured on all slides."""
    params: dict[str, str]
    """Arguments of the reading: ``library_key``, ``layer``, ``basis``, ``values``."""
    built: AnnData
    """Holds the graphs in the order of the AnnData, in ``obs``, ``obsp`` and ``uns``."""
    built_keys: dict[str, list[str]]
    """Fields of ``built`` that the AnnData does not have: ``{"obs": [...], "obsp": [...], "uns": [...]}``."""

    @property
    def slide_size(self) -> float:
        """Number of cells of a slide; the mean if there are several."""
        return len(self.rows) / len(np.unique(self.slide))

    def in_order(self, x: np.ndarray) -> np.ndarray:
        """Reorder values of the cells to the row order of the AnnData."""
        out = np.empty_like(x)
        out[self.rows] = x
        return out

    def store_built(self, adata: AnnData) -> None:
        """Write the graphs that were built to the AnnData."""
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
    """Read a tissue without changing ``adata``; see :func:`spatialfm.tl.embed` for the arguments and errors.

    Without ``networks``, no gene networks are read or built, and the expression has all features instead of the genes
    of the networks. Without ``features``, values are not read, and ``adata`` may have no features.
    """
    from anndata import AnnData

    if adata.n_obs == 0 or (features and adata.n_vars == 0):
        msg = f"adata has {adata.n_obs} cells and {adata.n_vars} features; at least one of each is needed"
        raise ValueError(msg)
    xy = get_coordinates(adata, basis)
    if xy.shape[1] != 2:
        msg = (
            f"obsm[{basis!r}] has {xy.shape[1]} columns, but the coordinates of a section must have two: keep x and y, "
            "and pass the column of obs with the section of each cell as library_key="
        )
        raise ValueError(msg)
    libraries = get_libraries(adata, library_key)
    if features:
        read = read_values(adata, layer, values, slides=libraries)
    else:
        warn_off_tissue(adata)
        read = Expression(np.zeros((adata.n_obs, 0), np.float32), "log", np.zeros(0, np.int64), [])
    logged = read.logged()

    # Graphs are built in a second AnnData, so that adata is not changed until everything has succeeded.
    shell = AnnData(X=logged, obs=get_table(adata.obs), obsm={basis: xy})
    shell.var_names = adata.var_names[read.features]
    built_keys: dict[str, list[str]] = {"obs": [], "obsp": [], "uns": []}
    neighbors = find_graph(adata, neighbors_key="spatial_neighbors", basis=basis, library_key=library_key)
    neighbors.store(shell)
    built_keys |= neighbors.new
    found = _Networks(list(map(str, shell.var_names)), [], "", np.zeros(adata.n_obs, np.int64))
    if networks:
        found = _find_networks(adata, shell, read, built_keys, groupby=groupby, library_key=library_key, rng=rng)

    slide = slide_codes(libraries)
    order = location_order(read.x, np.column_stack([slide, xy]))
    xy, slide = xy[order], slide[order]
    graph = neighbors.edges[order][:, order]
    graph.sort_indices()
    columns = shell.var_names.get_indexer(found.genes) if networks else slice(None)
    own = [xy[slide == k] for k in range(len(libraries))]
    return Tissue(
        rows=order,
        slide=slide,
        slides=[name for name, _ in libraries],
        um=[stated_micrometres(adata, name, at, len(libraries)) for (name, _), at in zip(libraries, own, strict=True)],
        xy=xy,
        coords=np.concatenate(list(map(_standardised, own))).astype(np.float32),
        graph=graph,
        expression=logged[:, columns][order],
        genes=found.genes,
        n_features=adata.n_vars,
        networks=found.matrices,
        network_groups=found.groupby,
        group=found.group[order],
        kind=read.kind if features else "none",
        unmeasured=read.unmeasured,
        params=record_params(
            library_key=library_key, layer=layer, basis=basis, values=read.kind if features else "none"
        ),
        built=shell,
        built_keys=built_keys,
    )


class _Networks(NamedTuple):
    genes: list[str]
    matrices: list[sp.csr_matrix]
    groupby: str
    group: np.ndarray


def _find_networks(
    adata: AnnData,
    shell: AnnData,
    read: Expression,
    built_keys: dict[str, list[str]],
    *,
    groupby: str | None,
    library_key: str | None,
    rng: int | np.random.Generator | None,
) -> _Networks:
    """Get the gene networks of ``adata``, or build them in ``shell`` and add their fields to ``built_keys``."""
    if "grn" not in adata.uns:
        on_log: ValuesKind = "scaled" if read.kind in ("intensity", "scaled") else "log"
        grn(shell, groupby=groupby, library_key=library_key, rng=rng, values=on_log)
        genes, _, matrices, group = get_networks(shell)
        built_keys["uns"].append("grn")
        if groupby == "auto":
            built_keys["obs"].append("grn_group")
        return _Networks(genes, matrices, str(shell.uns["grn"]["groupby"]), group)
    genes, _, matrices, group = get_networks(adata)
    stored = str(adata.uns["grn"].get("groupby", ""))
    if groupby != "auto" and stored != (groupby or ""):
        msg = (
            f"groupby={groupby!r}, but uns['grn'] holds networks of groupby={stored or None!r}; "
            f"call sfm.pp.grn(adata, groupby={groupby!r}) first, or leave groupby out to use the stored networks"
        )
        raise ValueError(msg)
    lost = [name for name in genes if name in set(read.unmeasured)]
    if lost:
        msg = (
            f"uns['grn'] holds networks of {len(lost)} genes that were not measured on every slide (first: "
            f"{lost[:3]}); build them again with sfm.pp.grn(adata, library_key={library_key!r})"
        )
        raise ValueError(msg)
    return _Networks(genes, matrices, stored, group)


def _standardised(xy: np.ndarray) -> np.ndarray:
    spread = xy.std(axis=0)
    return (xy - xy.mean(axis=0)) / np.where(spread > 0, spread, 1)
