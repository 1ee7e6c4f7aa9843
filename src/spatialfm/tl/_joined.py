"""Two AnnData as one, on the genes that they share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from spatialfm._data._adata import get_coordinates, get_graph, get_libraries, slide_codes
from spatialfm._data._expression import find_unmeasured, log_normalize, read_values, warn_unmeasured
from spatialfm._data._genes import gene_keys, known_organism
from spatialfm._settings import logger
from spatialfm.pp._spatial_neighbors import find_graph

if TYPE_CHECKING:
    from anndata import AnnData

    from spatialfm._data._expression import ValuesKind

_MIN_SHARED = 10
_SCALE = {"counts": "log", "normalized": "log"}


def shared_features(adata: AnnData, reference: AnnData) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the features that both have, in the order of ``adata``.

    Symbols of human and mouse match Ensembl ids, and genes of one organism their orthologs in the other; other features
    match by name. Of several features of one gene, the first counts.
    """
    names = [list(map(str, a.var_names)) for a in (adata, reference)]
    own, other = (known_organism(n) for n in names)
    if own is None or other is None:
        own = other = None
    positions: list[dict[str, int]] = []
    for values, organism in zip(names, (own, other), strict=True):
        first: dict[str, int] = {}
        for k, key in enumerate(gene_keys(values, organism, own)):
            first.setdefault(key, k)
        positions.append(first)
    shared = [(k, positions[1][key]) for key, k in positions[0].items() if key in positions[1]]
    if len(shared) < _MIN_SHARED:
        msg = (
            f"adata and reference share {len(shared)} features, at least {_MIN_SHARED} are needed: adata has "
            f"{adata.n_vars} such as {names[0][:3]}, reference {reference.n_vars} such as {names[1][:3]}; bring "
            "var_names to gene symbols or Ensembl ids of human or mouse"
        )
        raise ValueError(msg)
    left, right = np.array(shared).T
    return left, right


def _positions(features: np.ndarray, n_vars: int) -> np.ndarray:
    """Position (n_vars,) of each feature among ``features``, -1 where it is missing."""
    at = np.full(n_vars, -1)
    at[features] = np.arange(len(features))
    return at


class _Shared(NamedTuple):
    """Values of the features that two files share."""

    scaled: list[Any]
    """(n, features) of each file, on a log-like scale."""
    kinds: list[str]
    """What the values of each file were."""
    columns: np.ndarray
    """Positions of the features in the first file."""


def _read_shared(
    both: tuple[AnnData, AnnData],
    libraries: list[list[tuple[str, np.ndarray]]],
    layer: str | None,
    values: ValuesKind,
) -> _Shared:
    """Read the features that both share and all slides measured."""
    columns = list(shared_features(*both))
    reads = [read_values(a, layer, values, slides=own) for a, own in zip(both, libraries, strict=True)]
    kinds = [read.kind for read in reads]
    if len({_SCALE.get(kind, kind) for kind in kinds}) > 1:
        msg = (
            f"adata holds {kinds[0]} values and reference {kinds[1]} values, which are on no common scale; name layers "
            "of the same kind with layer=, or bring both to one scale yourself and pass values='log'"
        )
        raise ValueError(msg)
    # Positions among the features that were read.
    at = [_positions(read.features, a.n_vars)[c] for read, a, c in zip(reads, both, columns, strict=True)]
    known = (at[0] >= 0) & (at[1] >= 0)
    parts = [(read.x[:, c[known]], own) for read, c, own in zip(reads, at, libraries, strict=True)]
    lacking = find_unmeasured(parts)
    lost = lacking.any(axis=0)
    if lost.any():
        files = [
            f"{name} {slide}".strip()
            for name, own in zip(("adata", "reference"), libraries, strict=True)
            for slide, _ in own
        ]
        warn_unmeasured(list(both[0].var_names[columns[0][known][lost]]), lacking[:, lost], files)
    scaled = [log_normalize(x[:, ~lost], kind) for (x, _), kind in zip(parts, kinds, strict=True)]
    return _Shared(scaled, list(map(str, kinds)), columns[0][known][~lost])


def join(
    adata: AnnData, reference: AnnData, *, library_key: str | None, layer: str | None, basis: str, values: ValuesKind
) -> AnnData:
    """Cells of both, ``adata`` first, on a log-like scale, with tissue graphs and ``obs["slide"]``.

    Slides of the same name in both are different slides. Counts are normalised to 10,000 over the genes that all
    slides share. ``uns["values"]`` says what the values of each are. Both stay unchanged.
    """
    from anndata import AnnData
    from scipy import sparse

    both = (adata, reference)
    libraries = [get_libraries(a, library_key) for a in both]
    shared = _read_shared(both, libraries, layer, values)
    logger.info("values of adata are %s, of reference %s", *shared.kinds)
    logger.info(
        "%d features are in both, of %d in adata and %d in reference",
        len(shared.columns), adata.n_vars, reference.n_vars,
    )  # fmt: skip
    stacked = (
        sparse.vstack(list(map(sparse.csr_matrix, shared.scaled)), format="csr")
        if any(map(sparse.issparse, shared.scaled))
        else np.vstack(shared.scaled)
    )
    slides = [slide_codes(own) for own in libraries]
    joined = AnnData(stacked, obsm={basis: np.vstack([get_coordinates(a, basis) for a in both])})
    joined.var_names = adata.var_names[shared.columns]
    joined.uns["values"] = ", ".join(dict.fromkeys(shared.kinds))
    joined.obs["slide"] = [f"{which}{slide}" for which, own in zip("ar", slides, strict=True) for slide in own]
    graphs = [
        get_graph(
            find_graph(a, neighbors_key="spatial_neighbors", basis=basis, library_key=library_key).carrier, basis=basis
        )
        for a in both
    ]
    joined.obsp["spatial_connectivities"], joined.obsp["spatial_distances"] = (
        sparse.block_diag(pair, format="csr") for pair in zip(*graphs, strict=True)
    )
    joined.uns["spatial_neighbors"] = {
        "connectivities_key": "spatial_connectivities", "distances_key": "spatial_distances",
        "params": {"method": "joined", "basis": basis, "library_key": "slide"},
    }  # fmt: skip
    return joined
