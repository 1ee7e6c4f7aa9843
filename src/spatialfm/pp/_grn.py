"""Gene networks of groups of cells from the mutual information of binned expression."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from spatialfm._checks import check_n_jobs, check_text, checked
from spatialfm._data._adata import get_known_labels, get_libraries, get_obs_labels
from spatialfm._data._expression import ValuesKind, hash_cells, intensity_scale, log_normalize, read_values
from spatialfm._data._leiden import leiden, process_state
from spatialfm._data._write import check_free, write
from spatialfm._settings import logger, progress, warn

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData

    from spatialfm._data._expression import Kind

MIN_CELLS = 10
_EPS = 1e-12
# Bytes a block of genes may take: its levels (1 byte a cell and gene), its lists of cells (4), and one dense slice.
_BLOCK_BYTES = 1 << 28
_PAIRS_A_JOB = 1024
# Unsupervised groups
_SAMPLE = 20_000
_MIN_GROUP, _MIN_SHARE = 20, 0.02
_N_VARIABLE = 2000
_N_COMPS = 30
_N_NEIGHBORS = 15
_RESOLUTION = 0.8
_MAX_DENSE_EIGEN = 500
_NO_GROUP = "no group"


@checked
def grn(
    adata: AnnData,
    *,
    groupby: str | None = "auto",
    n_genes: int = 200,
    n_bins: int = 32,
    n_candidates: int | None = 200,
    edge_fraction: float = 0.25,
    layer: str | None = None,
    values: ValuesKind = "auto",
    library_key: str | None = None,
    key_added: str = "grn",
    n_jobs: int | None = None,
    rng: int | np.random.Generator | None = 0,
    copy: bool = False,
) -> AnnData | None:
    """Infer a gene network for each group of cells.

    Two genes are joined by an edge weighted by the mutual information of their expression over the group's cells, from equal-width bins
    between the gene's smallest and largest value there: with ``p = counts / n_cells + 1e-12`` over the joint bins, ``MI = H(x) + H(y)
    - H(x, y)`` in nats (HEIST, Madhu et al. 2025). Candidates are each gene's ``n_candidates`` partners of largest absolute Pearson
    correlation, from either side; the ``edge_fraction`` of them with the largest mutual information stays. The values are taken as they
    stand in ``X`` or ``layer``. A gene that is constant in a group has no edge there.

    Parameters
    ----------
    adata
        Cells by genes; dense or sparse, any real values.
    groupby
        Column of ``obs`` with the groups, cells without one being left out with a warning; ``None`` for one network over all cells; ``"auto"`` to find groups without labels: Leiden
        communities of the expression (log-normalised, at most 2,000 variable genes, 30 principal components), found on at most 20,000
        cells drawn by content rather than position and extended to the others by the vote of 15 neighbours. Communities of fewer than 20
        cells, or 2 % of the cells, join the nearest larger one; some 5 to 15 groups remain.
    n_genes
        At most so many genes: all of them where there are no more, otherwise the most variable (of the log-normalised values, Seurat's
        normalised dispersion; plain variance for values with negatives), in the order of ``var``.
    n_bins
        Number of bins of a gene, 2 to 256.
    n_candidates
        Partners a gene proposes; ``None`` for all pairs.
    edge_fraction
        Share of the candidate pairs that becomes edges, above 0 and up to 1, rounded up to whole edges. ``n_candidates=None,
        edge_fraction=1.0`` keeps the mutual information of every pair of genes.
    layer
        Layer to use instead of ``X``.
    values
        What the values are, as for :func:`spatialfm.tl.embed`: for the groups that ``groupby="auto"`` finds and the choice of variable genes. The networks are
        of the values as they stand.
    library_key
        Column of ``obs`` with the slide of each cell; genes that a slide lacks are left out. Bins and joint counts are then made within each slide and the mutual information
        averaged over slides by number of cells, which is the mutual information conditional on the slide; correlations are of values
        centred within slide. Differences between slides (batch effects) so make no edges.
    key_added
        Key of ``uns``, and beginning of the name of the ``obs`` column for ``groupby="auto"``.
    n_jobs
        Threads; ``settings.n_jobs`` by default, -1 for all cores. The result does not depend on it.
    rng
        Seed or generator for the Leiden algorithm; unused unless ``groupby="auto"``.
    copy
        Return a copy instead of writing to ``adata``.

    Returns
    -------
    ``None``, or the copy. Written:

    ``adata.uns[key_added]`` : dict
        ``"genes"``: names of the g genes; ``"names"``: names of the groups; ``"groups"``: for the k-th name, under the key ``str(k)``
        (a name may hold a slash, a key may not), a symmetric csr matrix of float32 (g, g) with the mutual information of each edge in
        nats and an empty diagonal; ``"groupby"``: the ``obs`` column of the groups, ``""`` where there is one group, called ``"all"``;
        ``"auto"``: whether the groups were found without labels; ``"params"``: the arguments. A group of fewer than 10 cells has a
        network without edges, and a warning names it.
    ``adata.obs[f"{key_added}_group"]`` : categorical
        With ``groupby="auto"`` only: the group of each cell, ``"0"`` being the largest.

    Raises
    ------
    KeyError
        If ``groupby``, ``library_key`` or ``layer`` does not exist.
    ValueError
        If an argument is out of range, gene names repeat, there are no cells or genes, or values are NaN or infinite.
    """
    keys = {"uns": [key_added], "obs": [f"{key_added}_group"] if groupby == "auto" else []}
    check_free(adata, "pp.grn", keys)
    for name, value, least, most in (
        ("n_genes", n_genes, 2, np.inf),
        ("n_bins", n_bins, 2, 256),
        ("n_candidates", 1 if n_candidates is None else n_candidates, 1, np.inf),
    ):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= most:
            msg = f"{name} must be an integer of at least {least}{'' if np.isinf(most) else f' and at most {most}'}, got {value!r}"
            raise ValueError(msg)
    if not 0 < edge_fraction <= 1:
        msg = f"edge_fraction must be above 0 and at most 1, got {edge_fraction!r}"
        raise ValueError(msg)
    n_threads = check_n_jobs(n_jobs)
    if 0 in adata.shape:
        msg = f"adata has {adata.n_obs} cells and {adata.n_vars} genes; there is nothing to make a network of"
        raise ValueError(msg)
    if not adata.var_names.is_unique:
        msg = "gene names repeat in adata.var_names; call adata.var_names_make_unique() first"
        raise ValueError(msg)
    check_text("adata.var_names", adata.var_names)
    libraries = get_libraries(adata, library_key)
    labels = (
        None
        if groupby in (None, "auto")
        else get_known_labels(adata, str(groupby), name="groupby", effect="these cells are in no network")
    )
    read = read_values(adata, layer, values, slides=libraries)
    x, kind = read.x, read.kind

    columns = np.arange(x.shape[1])
    if groupby == "auto" or x.shape[1] > n_genes:
        # Each profile once, in an order that depends on content alone: identical cells share their group, and would otherwise
        # fill each other's neighbour lists.
        _, profiles, profile_of = np.unique(hash_cells(x), return_index=True, return_inverse=True)
        first = x[profiles[:_SAMPLE]]
        scale = intensity_scale(first) if kind == "intensity" else None
        first = log_normalize(first, kind, scale=scale)
        columns = _variable_genes(first, kind, n_genes)
        if groupby == "auto":
            seed = int(np.random.default_rng(rng).integers(2**31))
            rest = profiles[_SAMPLE:]
            with process_state():
                groups = _find_groups(
                    first, lambda s: log_normalize(x[rest[s]], kind, scale=scale), len(rest), kind, seed
                )
            codes = _by_size(groups[profile_of])
            names = [str(k) for k in range(codes.max() + 1)]
    if groupby is None:
        codes, names = np.zeros(adata.n_obs, np.int64), ["all"]
    elif labels is not None:
        codes, names = labels.codes.astype(np.int64), list(labels.categories)

    x = x[:, columns]
    slide_of = np.empty(adata.n_obs, np.int64)
    for s, (_, rows) in enumerate(libraries):
        slide_of[rows] = s
    networks, small = {}, []
    for k in progress(range(len(names)), desc="gene networks", unit="group"):
        rows = np.flatnonzero(codes == k)
        if len(rows) < MIN_CELLS:
            small.append(f"{names[k]} ({len(rows)})")
            networks[str(k)] = sp.csr_matrix((len(columns), len(columns)), dtype=np.float32)
            continue
        networks[str(k)] = mutual_information_network(
            x[rows],
            n_bins=n_bins,
            n_candidates=n_candidates,
            edge_fraction=edge_fraction,
            slides=slide_of[rows],
            n_jobs=n_threads,
        )
    if small:
        fix = f" Merge them with related groups in obs[{groupby!r}] where that matters." if labels is not None else ""
        warn(f"grn: groups of fewer than {MIN_CELLS} cells have a network without edges: {', '.join(small)}.{fix}")

    column = groupby or ""
    fields: dict[str, dict[str, Any]] = {}
    if groupby == "auto":
        column = f"{key_added}_group"
        fields["obs"] = {column: pd.Categorical.from_codes(codes, categories=names)}
    entry = {
        "params": {
            "n_genes": int(n_genes),
            "n_bins": int(n_bins),
            "n_candidates": "all" if n_candidates is None else int(n_candidates),
            "edge_fraction": float(edge_fraction),
            "layer": layer or "",
            "values": kind,
            "library_key": library_key or "",
        },
        "genes": [str(g) for g in adata.var_names[read.features[columns]]],
        "groupby": column,
        "auto": groupby == "auto",
        "names": names,
        "groups": networks,
    }
    target = write(adata, "pp.grn", key_added, {**fields, "uns": {key_added: entry}}, copy=copy)
    logger.info(
        f"grn: {len(names)} group(s), {len(columns)} genes, "
        f"{sum(m.nnz for m in networks.values()) // 2:,} edges -> uns[{key_added!r}]"
        + (f", obs[{column!r}] (found without labels; values taken as {kind})" if groupby == "auto" else "")
    )
    return target if copy else None


def mutual_information_network(
    x: Any,
    *,
    n_bins: int = 32,
    n_candidates: int | None = 200,
    edge_fraction: float = 0.25,
    slides: np.ndarray | None = None,
    n_jobs: int = 1,
) -> sp.csr_matrix:
    """Network of one group: ``x`` (n_cells, n_genes), ``slides`` (n_cells,) integer slide of each cell; see :func:`grn`."""
    n, g = x.shape
    slides = np.zeros(n, np.int64) if slides is None else slides
    parts = [x[slides == s] for s in np.unique(slides)] if len(np.unique(slides)) > 1 else [x]
    parts = [p.tocsc() if sp.issparse(p) else p for p in parts]

    varies = np.zeros(g, bool)
    for part in parts:
        varies |= _extreme(part, "max") > _extreme(part, "min")
    if n_candidates is None or n_candidates >= g - 1:
        is_candidate = np.ones((g, g), bool)
    else:
        # Rounded, so that the order in which the cells were summed decides no tie.
        r = np.round(np.abs(_correlation(parts)), 10)
        r[:, ~varies] = -1
        np.fill_diagonal(r, -1)
        best = np.argsort(-r, axis=1, kind="stable")[:, :n_candidates]
        is_candidate = np.zeros((g, g), bool)
        np.put_along_axis(is_candidate, best, True, axis=1)
        is_candidate |= is_candidate.T
    is_candidate &= varies[:, None] & varies[None, :]
    i, j = np.nonzero(np.triu(is_candidate, 1))

    mi = np.zeros(len(i))
    with ThreadPoolExecutor(n_jobs) as pool:
        for part in parts:
            mi += part.shape[0] / n * _mutual_information(part, i, j, n_bins, pool)
    n_edges = int(np.ceil(round(edge_fraction * len(i), 6)))
    best = np.argsort(-mi, kind="stable")[:n_edges]
    i, j, weight = i[best], j[best], np.maximum(mi[best], 0).astype(np.float32)
    network = sp.coo_matrix((np.r_[weight, weight], (np.r_[i, j], np.r_[j, i])), shape=(g, g)).tocsr()
    network.sort_indices()
    return network


def get_networks(adata: AnnData, key: str = "grn") -> tuple[list[str], list[str], list[sp.csr_matrix], np.ndarray]:
    """Read what :func:`grn` wrote: genes, names of the groups, their networks, and the position of each cell's group (n_obs,) int64.

    Cells without a group come last, with a network without edges.

    Raises
    ------
    KeyError, ValueError
        If it is missing or does not fit ``adata`` any more.
    """
    fix = f"run sfm.pp.grn(adata{'' if key == 'grn' else f', key_added={key!r}'}) first"
    if key not in adata.uns:
        msg = f"uns[{key!r}] is missing; {fix}"
        raise KeyError(msg)
    stored = adata.uns[key]
    if not {"genes", "names", "groups", "groupby"} <= set(stored):
        msg = f"uns[{key!r}] was not written by sfm.pp.grn (it holds {list(stored)}); {fix}"
        raise ValueError(msg)
    genes, names = [str(v) for v in stored["genes"]], [str(v) for v in stored["names"]]
    missing = [v for v in genes if v not in adata.var_names]
    if missing:
        msg = f"uns[{key!r}] names {len(missing)} genes that adata.var_names lacks (first: {missing[:3]}); {fix}"
        raise ValueError(msg)
    networks = [sp.csr_matrix(stored["groups"][str(k)]) for k in range(len(names))]
    column = str(stored["groupby"])
    if not column:
        return genes, names, networks, np.zeros(adata.n_obs, np.int64)
    if column not in adata.obs:
        msg = f"uns[{key!r}] has a network for each group of obs[{column!r}], which is missing; {fix}"
        raise ValueError(msg)
    labels = get_obs_labels(adata, column, name="groupby")
    position = {name: k for k, name in enumerate(names)}
    unknown = [c for c in labels.categories if c not in position]
    if unknown:
        msg = f"obs[{column!r}] holds groups without a network in uns[{key!r}]: {unknown[:5]}; {fix}"
        raise ValueError(msg)
    if (labels.codes < 0).any():
        # Cells without a group have a network without edges.
        networks = [*networks, sp.csr_matrix((len(genes), len(genes)), dtype=np.float32)]
        names = [*names, _NO_GROUP]
    return genes, names, networks, np.array([*(position[c] for c in labels.categories), len(names) - 1])[labels.codes]


def _extreme(x: Any, which: str) -> np.ndarray:
    values = getattr(x, which)(axis=0)
    return values.toarray().ravel() if sp.issparse(values) else values


def _dense(x: Any) -> np.ndarray:
    return (x.toarray() if sp.issparse(x) else np.asarray(x)).astype(np.float64)


def _correlation(parts: list[Any]) -> np.ndarray:
    """Pearson correlation of all pairs of columns (g, g), of values centred within each part; 0 for constant columns."""
    g = parts[0].shape[1]
    products = np.zeros((g, g))
    for part in parts:
        rows = part.tocsr() if sp.issparse(part) else part
        mean = np.asarray(rows.mean(axis=0, dtype=np.float64)).ravel()
        step = max(1, (1 << 22) // g)
        for s in range(0, rows.shape[0], step):
            centred = _dense(rows[s : s + step]) - mean
            products += centred.T @ centred
    norm = np.sqrt(np.diag(products))
    return np.divide(products, np.outer(norm, norm), out=np.zeros_like(products), where=np.outer(norm, norm) > 0)


def _levels(x: Any, n_bins: int) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Bin the columns of ``x``: the tuple the kernels take, and each gene's entropy H(x) in nats."""
    from spatialfm.pp import _mutual_information as kernels

    n, g = x.shape
    bins = np.empty((g, n), np.uint8)
    step = max(1, _BLOCK_BYTES // (16 * n))
    for s in range(0, g, step):
        values = np.ascontiguousarray(_dense(x[:, s : s + step]).T)
        low = values.min(axis=1, keepdims=True)
        width = np.maximum(values.max(axis=1, keepdims=True) - low, 1e-6)
        values -= low
        values /= width
        values *= n_bins
        bins[s : s + step] = np.minimum(values, n_bins - 1)  # the cast is the floor: nothing is negative
    counts, n_levels = np.empty((g, n_bins), np.int32), np.empty(g, np.int64)
    kernels.compact_bins(bins, n_bins, counts, n_levels)
    start = np.r_[0, np.cumsum(n - counts[:, 0])].astype(np.int64)
    cells = np.empty(start[-1], np.int32)
    kernels.list_cells(bins, start, cells)
    p = counts / n + n_bins * _EPS
    return (bins, counts, n_levels, start, cells), -(p * np.log(p + _EPS)).sum(axis=1)


def _mutual_information(x: Any, i: np.ndarray, j: np.ndarray, n_bins: int, pool: ThreadPoolExecutor) -> np.ndarray:
    """Mutual information in nats of the pairs of columns ``i < j``, two blocks of genes at a time."""
    from spatialfm.pp import _mutual_information as kernels

    n, g = x.shape
    p = np.arange(n + 1) / n + _EPS
    plogp = p * np.log(p)
    block = max(8, _BLOCK_BYTES // (5 * n))
    mi = np.empty(len(i))
    for s in range(0, g, block):
        a, entropy_a = _levels(x[:, s : s + block], n_bins)
        for t in range(s, g, block):
            inside = np.flatnonzero((i // block == s // block) & (j // block == t // block))
            if not len(inside):
                continue
            b, entropy_b = (a, entropy_a) if s == t else _levels(x[:, t : t + block], n_bins)
            pairs = np.stack([i[inside] - s, j[inside] - t], axis=1)
            sums = np.empty(len(pairs))
            cuts = range(0, len(pairs), _PAIRS_A_JOB)
            jobs = [
                pool.submit(kernels.joint_sums, a, b, plogp, pairs[c : c + _PAIRS_A_JOB], sums[c : c + _PAIRS_A_JOB])
                for c in cuts
            ]
            for job in jobs:
                job.result()
            empty = n_bins**2 - a[2][pairs[:, 0]] * b[2][pairs[:, 1]]
            mi[inside] = entropy_a[pairs[:, 0]] + entropy_b[pairs[:, 1]] + sums + empty * plogp[0]
    return mi


def _variable_genes(logged: Any, kind: Kind, n_genes: int) -> np.ndarray:
    """Columns of the ``n_genes`` most variable genes, ascending."""
    if logged.shape[1] <= n_genes:
        return np.arange(logged.shape[1])
    if kind in ("intensity", "scaled"):
        score = _dense(logged).var(axis=0)
    else:
        import scanpy as sc
        from anndata import AnnData

        with process_state(), np.errstate(invalid="ignore", divide="ignore"):  # a constant gene has no dispersion
            table = sc.pp.highly_variable_genes(AnnData(logged), flavor="seurat", inplace=False)
        score = table["dispersions_norm"].to_numpy()
    score = np.where(np.isfinite(score), score, -np.inf)
    return np.sort(np.argsort(-score, kind="stable")[:n_genes])


def _find_groups(first: Any, others: Callable[[slice], Any], n_others: int, kind: Kind, seed: int) -> np.ndarray:
    """Leiden communities of the ``first`` cells (log-like values), extended to ``n_others`` that ``others`` yields slice by slice."""
    from scipy.linalg import eigh
    from scipy.sparse.linalg import eigsh

    genes = _variable_genes(first, kind, _N_VARIABLE)
    centred = _dense(first[:, genes])
    mean = centred.mean(axis=0)
    centred -= mean
    covariance = centred.T @ centred
    n_comps = min(_N_COMPS, len(genes), len(centred) - 1)
    if n_comps < 1 or not covariance.any():
        return np.zeros(len(centred) + n_others, np.int64)
    if len(genes) > _MAX_DENSE_EIGEN:
        axes = eigsh(covariance, n_comps, v0=np.ones(len(genes)))[1]
    else:
        axes = eigh(covariance, subset_by_index=[len(genes) - n_comps, len(genes) - 1])[1]
    scores = (centred @ axes).astype(np.float32)
    labels = _merge_small(scores, _leiden(scores, seed))
    if not n_others:
        return labels
    if labels.max() == 0:
        return np.zeros(len(centred) + n_others, np.int64)

    # The vote agrees with Leiden on 93 to 98 % of held-out cells of real tissues, linear discriminants or centroids on 80 to 90 %.
    from sklearn.neighbors import KNeighborsClassifier

    model = KNeighborsClassifier(_N_NEIGHBORS, algorithm="brute").fit(scores, labels)
    step = max(1, (1 << 24) // len(genes))
    predicted = [
        model.predict(((_dense(others(slice(s, s + step))[:, genes]) - mean) @ axes).astype(np.float32))
        for s in range(0, n_others, step)
    ]
    return np.concatenate([labels, *predicted])


def _by_size(labels: np.ndarray) -> np.ndarray:
    """Renumber labels by falling size; equal sizes keep their order."""
    values, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    rank = np.empty(len(values), np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(values))
    return rank[inverse]


def _leiden(scores: np.ndarray, seed: int) -> np.ndarray:
    """Leiden communities of the graph of shared nearest neighbours (Jaccard weights)."""
    from sklearn.neighbors import NearestNeighbors

    n = len(scores)
    k = min(_N_NEIGHBORS, n - 1)
    if k < 1:
        return np.zeros(n, np.int64)
    near = NearestNeighbors(n_neighbors=k).fit(scores).kneighbors(return_distance=False)
    near = sp.csr_matrix(
        (np.ones(n * (k + 1), np.float32), np.c_[np.arange(n), near].ravel(), np.arange(n + 1) * (k + 1)), shape=(n, n)
    )
    shared = (near @ near.T).multiply((near + near.T) > 0).tocsr()
    shared.data = shared.data / (2 * (k + 1) - shared.data)
    return leiden(shared, resolution=_RESOLUTION, seed=seed, n_iterations=5)


def _merge_small(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Give each group of fewer than 20 cells, or 2 % of them, to the large group of the nearest centroid."""
    labels = _by_size(labels)
    n_large = max(1, int((np.bincount(labels) >= max(_MIN_GROUP, _MIN_SHARE * len(labels))).sum()))
    centroids = np.stack([scores[labels == k].mean(axis=0) for k in range(labels.max() + 1)])
    distance = ((centroids[:, None] - centroids[None, :n_large]) ** 2).sum(axis=2)
    return np.argmin(distance, axis=1)[labels]
