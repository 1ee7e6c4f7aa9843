"""Spatially informed subpopulations of one cell type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatialfm._checks import checked
from spatialfm._data._adata import (
    as_label,
    canonical_order,
    check_within_slides,
    get_embedding,
    get_graph,
    get_known_labels,
    get_libraries,
    slide_codes,
)
from spatialfm._data._embeddings import NICHE_AND_STATE, rep_name
from spatialfm._data._leiden import leiden, process_state
from spatialfm._data._write import check_free, write
from spatialfm._settings import logger, warn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

_N_NEIGHBORS = 15  # of the graph on the embedding, scanpy's default
_SMALLEST = 0.01  # share of the cells of a type, below which a part is mostly a few outliers
_OUTLIERS, _ROUNDS = 0.05, 5  # share of them that may be set aside, in so many rounds


@checked
def subpopulations(
    adata: AnnData,
    groupby: str,
    group: str | int,
    *,
    use_rep: str | Sequence[str] = NICHE_AND_STATE,
    n_clusters: int | None = None,
    resolution: float | None = None,
    library_key: str | None = None,
    neighbors_key: str = "spatial_neighbors",
    key_added: str = "subpopulation",
    n_permutations: int = 1000,
    rng: int | np.random.Generator | None = 0,
    copy: bool = False,
) -> AnnData | None:
    """Split one cell type into subpopulations, and test what each of them lives next to.

    The cells of one type are clustered on the 15-nearest-neighbour graph of an embedding. For each subpopulation, the mean fraction of
    every cell type among its neighbours in the tissue graph is compared with what random subpopulations of the same sizes would have:
    labels are permuted among the cells of the type, within each slide where ``library_key`` is given.

    The permutation takes cells as exchangeable. An embedding that saw the neighbourhood separates cells by it, and neighbouring cells share
    neighbours, so a small p-value says in what the subpopulations differ; it is not evidence from independent data that they exist.

    Parameters
    ----------
    adata
        Cells with an embedding (:func:`spatialfm.tl.embed`) and a tissue graph (:func:`spatialfm.pp.spatial_neighbors`).
    groupby
        Column of ``obs`` with the cell types. Cells without one are in no part and do not count as neighbours, with a warning.
    group
        The type to split; at least 16 cells.
    use_rep
        Key of ``obsm`` with the embedding, or several, whose columns are put side by side.
    n_clusters
        Number of subpopulations, found by spectral clustering. Outliers, parts of less than 1 % of the cells, do not count: the others are clustered, and each
        outlier joins the part with the nearest mean. Excludes ``resolution``.
    resolution
        Resolution of Leiden clustering; 0.5 where neither is given.
    library_key
        Column of ``obs`` with the slide of each cell. Clustering runs over all slides together, permutations within each.
    neighbors_key
        Key of ``uns`` that names the tissue graph.
    key_added
        Where the result is written, in ``obs`` and ``uns``.
    n_permutations
        Number of permutations; the smallest p-value is ``1 / (1 + n_permutations)``.
    rng
        Seed or generator of clustering and permutations.
    copy
        Whether to return a changed copy instead of changing ``adata``.

    Returns
    -------
    None, or the copy. Written are

    ``obs[key_added]``
        Categorical: ``"<group> 1"`` (the largest), ``"<group> 2"``, ..., or ``"<group>-1"`` where the group's name ends in a digit; NaN for cells of other
        types. A warning names parts of less than 1 % of the cells.
    ``uns[key_added]["params"]``
        The arguments, ``method``, and ``n_outliers`` that joined a part.
    ``uns[key_added]["names"]``, ``["cell_types"]``
        Lists: the subpopulations and the types of neighbours.
    ``uns[key_added]["composition"]``
        float64 (subpopulations, cell types): mean over cells of the fraction of each type among a cell's neighbours. Cells without a
        neighbour do not count; NaN for a part of such cells.
    ``uns[key_added]["enrichment"]``
        Table, one row for each subpopulation and cell type: ``fraction`` (the composition again), ``expected`` (its mean under all
        permutations, exact), ``z`` (the difference in units of the permutations' exact standard deviation, 0 where that is 0), ``p``
        (two-sided, ``(1 + b) / (1 + n_permutations)`` where b permutations differ from ``expected`` at least as much), ``fdr``
        (Benjamini-Hochberg over all rows).

    Raises
    ------
    KeyError
        If a column, the embedding or the tissue graph is missing.
    ValueError
        If ``group`` is unknown or too small, or both or impossible ``n_clusters`` and ``resolution`` are given.
    """
    check_free(adata, "tl.subpopulations", {"obs": [key_added], "uns": [key_added]})
    types = get_known_labels(
        adata, groupby, name="groupby", effect="these cells are in no subpopulation, and do not count as neighbours"
    )
    group = as_label(group, types.categories)
    if group not in types.categories:
        msg = f"group={group!r} is not in obs[{groupby!r}]; choose from {list(types.categories)}"
        raise ValueError(msg)
    rows = np.flatnonzero(types == group)
    if len(rows) <= _N_NEIGHBORS:
        msg = (
            f"group={group!r} has {len(rows)} cells; the graph of {_N_NEIGHBORS} nearest neighbours needs at least "
            f"{_N_NEIGHBORS + 1}. Merge it with a related type in obs[{groupby!r}]"
        )
        raise ValueError(msg)
    if n_clusters is not None and resolution is not None:
        msg = f"n_clusters={n_clusters!r} and resolution={resolution!r} exclude each other; give one of them"
        raise ValueError(msg)
    if n_clusters is not None and not 2 <= n_clusters < len(rows):
        msg = f"n_clusters={n_clusters!r} must be at least 2 and less than the {len(rows)} cells of {group!r}"
        raise ValueError(msg)
    if resolution is not None and not resolution > 0:
        msg = f"resolution={resolution!r} must be positive"
        raise ValueError(msg)
    if n_permutations < 1:
        msg = f"n_permutations={n_permutations!r} must be at least 1"
        raise ValueError(msg)
    rep = get_embedding(adata, use_rep)[rows]
    graph, _ = get_graph(adata, neighbors_key)
    slides = slide_codes(get_libraries(adata, library_key))
    check_within_slides(adata, graph, slides, library_key, neighbors_key)
    composition = _neighbour_fractions(graph[rows], rows, np.asarray(types.codes), len(types.categories))

    # Both the clustering and the permutations go through the cells in an order that only their content decides.
    order = canonical_order(np.column_stack([rep, np.nan_to_num(composition, nan=-1.0), slides[rows]]))
    rows, rep, composition = rows[order], rep[order], composition[order]
    generator = np.random.default_rng(rng)
    params: dict[str, Any] = {
        "groupby": groupby,
        "group": group,
        "use_rep": rep_name(use_rep),
        "neighbors_key": neighbors_key,
        "n_permutations": int(n_permutations),
    }
    if n_clusters is not None:
        params |= {"method": "spectral", "n_clusters": int(n_clusters)}
    else:
        params |= {"method": "leiden", "resolution": float(0.5 if resolution is None else resolution)}
    if library_key is not None:
        params["library_key"] = library_key
    if isinstance(rng, int | np.integer):
        params["rng"] = int(rng)
    labels, n_outliers = cluster(
        rep, seed=int(generator.integers(2**31)), resolution=params.get("resolution"), n_clusters=n_clusters
    )
    params["n_outliers"] = n_outliers
    # "0 1" would read as two numbers.
    names = [f"{group}{'-' if group[-1:].isdigit() else ' '}{i + 1}" for i in range(labels.max() + 1)]
    tiny = [f"{names[k]!r} ({n})" for k in _tiny(labels, len(names)) for n in [int((labels == k).sum())]]
    if tiny:
        fix = "lower n_clusters=" if n_clusters is not None else "lower resolution=, or give n_clusters="
        warn(
            "subpopulations: %d of the %d parts of %r are a few of its %d cells: %s. They lie apart from all others in obsm[%r], as outliers do; %s, or leave "
            "them out", len(tiny), len(names), group, len(labels), ", ".join(tiny), rep_name(use_rep), fix,
        )  # fmt: skip

    table = _enrichment(labels, composition, slides[rows], n_permutations=n_permutations, generator=generator)
    cell_types = [str(c) for c in types.categories]
    index = pd.MultiIndex.from_product([names, cell_types])
    enrichment = pd.DataFrame(
        {
            "subpopulation": pd.Categorical(index.get_level_values(0), categories=names),
            "cell_type": pd.Categorical(index.get_level_values(1), categories=cell_types),
            **{name: values.ravel() for name, values in table.items()},
        }
    )
    enrichment.index = enrichment.index.astype(str)
    codes = np.full(adata.n_obs, -1)
    codes[rows] = labels

    entry = {
        "params": params,
        "names": names,
        "cell_types": cell_types,
        "composition": table["fraction"],
        "enrichment": enrichment,
    }
    found = pd.Categorical.from_codes(codes.tolist(), categories=names)
    fields = {"obs": {key_added: found}, "uns": {key_added: entry}}
    adata = write(adata, "tl.subpopulations", key_added, fields, copy=copy)
    apart = f"; {n_outliers} outliers joined the nearest" if n_outliers else ""
    sizes = ", ".join(f"{name!r} ({n})" for name, n in zip(names, np.bincount(labels), strict=True))
    logger.info(f"subpopulations: {len(names)} of {group!r}: {sizes}{apart} -> obs[{key_added!r}], uns[{key_added!r}]")
    return adata if copy else None


def _neighbour_fractions(graph: Any, rows: np.ndarray, codes: np.ndarray, n_types: int) -> np.ndarray:
    """Fraction of each type among the neighbours of ``rows`` that have one; a row of NaN where a cell has none."""
    edges = graph.tocoo()
    real = (edges.data != 0) & (edges.col != rows[edges.row]) & (codes[edges.col] >= 0)
    flat = edges.row[real].astype(np.int64) * n_types + codes[edges.col[real]]
    counts = np.bincount(flat, minlength=len(rows) * n_types).reshape(len(rows), n_types)
    degree = counts.sum(axis=1, keepdims=True)
    return np.divide(counts, degree, out=np.full(counts.shape, np.nan), where=degree > 0)


def cluster(
    rep: np.ndarray, *, seed: int, resolution: float | None = None, n_clusters: int | None = None
) -> tuple[np.ndarray, int]:
    """Cluster labels, 0 for the largest cluster, by Leiden or into ``n_clusters``; and how many outliers the latter gave to the cluster of the nearest mean."""
    kept = np.arange(len(rep))
    if n_clusters is None:
        labels = leiden(_neighbours(rep), resolution=float(resolution or 0), seed=seed)
    else:
        labels = _spectral(_neighbours(rep), n_clusters, seed)
        for _ in range(_ROUNDS):
            # A few cells that are no neighbours of the others are the best cut of a graph, and leave all others in one part.
            rest = kept[~np.isin(labels, _tiny(labels, n_clusters))]
            if len(rest) == len(kept) or len(rest) < (1 - _OUTLIERS) * len(rep):
                break
            kept, labels = rest, _spectral(_neighbours(rep[rest]), n_clusters, seed)
        if len(kept) < len(rep):
            means = np.stack([rep[kept[labels == k]].mean(axis=0) for k in range(labels.max() + 1)])
            everyone = ((rep[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
            everyone[kept] = labels
            labels = everyone
    # Clusters of the same size keep the order of their first cells.
    _, first, inverse, counts = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), dtype=np.intp)
    rank[np.lexsort((first, -counts))] = np.arange(len(counts))
    return rank[inverse], len(rep) - len(kept)


def _neighbours(rep: np.ndarray) -> Any:
    """Weights of the graph of the nearest neighbours."""
    import scanpy as sc
    from anndata import AnnData

    cells = AnnData(rep)
    with process_state():
        # Exact neighbours: the approximate ones that scanpy takes above 8,192 cells depend on more than the data.
        sc.pp.neighbors(cells, n_neighbors=_N_NEIGHBORS, use_rep="X", transformer="sklearn")
    return cells.obsp["connectivities"]


def _tiny(labels: np.ndarray, n_clusters: int) -> np.ndarray:
    """Clusters of less than 1 % of the cells, or a tenth of an even share where they are many."""
    size = np.bincount(labels)
    return np.flatnonzero((size > 0) & (size < min(_SMALLEST, 0.1 / n_clusters) * len(labels)))


def _spectral(graph: Any, n_clusters: int, seed: int) -> np.ndarray:
    """Normalised spectral clustering (Ng, Jordan & Weiss 2001).

    LOBPCG, a block method, because separate clusters are separate components, whose eigenvalues coincide: single-vector Lanczos misses some
    of them, and scikit-learn's shift-invert took minutes and gigabytes at 30,000 cells.
    """
    import warnings

    from scipy import sparse
    from scipy.sparse.linalg import lobpcg
    from sklearn.cluster import KMeans

    n = graph.shape[0]
    scale = sparse.diags(1 / np.sqrt(np.asarray(graph.sum(axis=1), dtype=np.float64).ravel()))
    start = np.random.default_rng(seed).normal(size=(n, min(n_clusters + 4, n)))
    with warnings.catch_warnings():
        # It warns where it takes the dense solution instead, and where vectors beyond those used have not converged.
        warnings.simplefilter("ignore", UserWarning)
        _, vectors = lobpcg(scale @ graph @ scale, start, largest=True, tol=1e-4, maxiter=300)
    points = vectors[:, :n_clusters]
    points = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    return KMeans(n_clusters, n_init=10, random_state=seed).fit_predict(points)


def _enrichment(
    labels: np.ndarray,
    composition: np.ndarray,
    slides: np.ndarray,
    *,
    n_permutations: int,
    generator: np.random.Generator,
) -> dict[str, np.ndarray]:
    """Compare the mean composition of each label with permuted labels; every array is (labels, types).

    Mean and variance under permutation are those of sampling without replacement within each slide, so only the p-values carry
    sampling noise.
    """
    from scipy import sparse
    from scipy.stats import false_discovery_control

    n_labels = labels.max() + 1
    known = np.isfinite(composition).all(axis=1)
    labels, composition, slides = labels[known], composition[known], slides[known]
    n, n_types = composition.shape
    counts = np.bincount(labels, minlength=n_labels)[:, None].astype(np.float64)
    counts[counts == 0] = np.nan  # a subpopulation of isolated cells only: no composition, p = 1
    slide_rows = [np.flatnonzero(slides == s) for s in np.unique(slides)]

    fraction = np.stack([np.bincount(labels, column, minlength=n_labels) for column in composition.T], axis=1) / counts
    expected = np.zeros((n_labels, n_types))
    variance = np.zeros((n_labels, n_types))
    for members in slide_rows:
        here = np.bincount(labels[members], minlength=n_labels)[:, None]
        expected += here * composition[members].mean(axis=0) / counts
        if len(members) > 1:
            variance += here * (1 - here / len(members)) * composition[members].var(axis=0, ddof=1) / counts**2
    sd = np.sqrt(variance)
    z = np.divide(fraction - expected, sd, out=np.zeros_like(sd), where=~(sd < 1e-12))

    deviation = np.abs(fraction - expected) - 1e-9  # ties count, whatever the rounding of the sums
    extreme = np.zeros((n_labels, n_types), dtype=np.int64)
    block = max(1, 4_000_000 // max(n, 1))
    for start in range(0, n_permutations, block):
        size = min(block, n_permutations - start)
        permuted = np.empty((size, n), dtype=np.int64)
        for members in slide_rows:
            permuted[:, members] = generator.permuted(np.tile(labels[members], (size, 1)), axis=1)
        columns = (permuted + n_labels * np.arange(size)[:, None]).T.ravel()
        indicator = sparse.csr_array(
            (np.ones(n * size), columns, np.arange(0, n * size + 1, size)), shape=(n, size * n_labels)
        )
        means = (indicator.T @ composition).reshape(size, n_labels, n_types) / counts
        extreme += (~(np.abs(means - expected) < deviation)).sum(axis=0)
    p = (1 + extreme) / (1 + n_permutations)
    fdr = false_discovery_control(p.ravel()).reshape(p.shape)
    return {"fraction": fraction, "expected": expected, "z": z, "p": p, "fdr": fdr}
