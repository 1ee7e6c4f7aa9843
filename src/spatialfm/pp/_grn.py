"""Gene networks of groups of cells from the mutual information of binned expression."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp

from spatialfm._checks import check_text, checked
from spatialfm._data._adata import get_known_labels, get_libraries, get_obs_labels, slide_codes
from spatialfm._data._expression import ValuesKind, hash_cells, intensity_scale, log_normalize, read_values
from spatialfm._data._leiden import leiden, process_state
from spatialfm._data._write import check_free, record_params, write
from spatialfm._settings import logger, progress, settings, warn

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData

    from spatialfm._data._expression import Expression, Kind

MIN_CELLS = 10
_EPS = 1e-12
# Bytes for a block of genes: bins (1 byte for each cell and gene), lists of cells (4 bytes) and a dense slice.
_BLOCK_BYTES = 1 << 28
_PAIRS_A_JOB = 1024
# Groups found without labels
_SAMPLE = 20_000
_MIN_GROUP, _MIN_SHARE = 20, 0.02
_N_VARIABLE = 2000
_N_COMPS = 30
_N_NEIGHBORS = 15
_RESOLUTION = 0.8
_MAX_DENSE_EIGEN = 500
_NO_GROUP = "no group"


class _Groups(NamedTuple):
    """Group of each cell."""

    codes: np.ndarray
    """(n_obs,) position in `names`, -1 for cells without a group."""
    names: list[str]


@checked
def grn(
    adata: AnnData,
    *,
    groupby: str | None = "auto",
    n_genes: int | None = 200,
    n_bins: int = 32,
    n_candidates: int | None = 200,
    edge_fraction: float = 0.25,
    layer: str | None = None,
    values: ValuesKind = "auto",
    library_key: str | None = None,
    key_added: str = "grn",
    rng: int | np.random.Generator | None = 0,
    copy: bool = False,
) -> AnnData | None:
    """Infer a gene network for each group of cells, as HEIST reads it (Madhu et al. 2025).

    An edge joins two genes and is weighted by the mutual information (in nats) of their expression in the cells of the
    group, with expression in bins of equal width between the smallest and the largest value. Candidates for edges are
    the ``n_candidates`` genes most correlated with each gene (absolute Pearson correlation); of these pairs, the
    ``edge_fraction`` with the largest mutual information is kept. Genes that are constant in a group have no edges.

    Parameters
    ----------
    %(adata)s
    groupby
        Column of ``obs`` with the groups; cells without a label are left out. None: one network of all cells.
        ``"auto"``: Leiden clusters of the expression, found on at most 20,000 cells and extended to the others; small
        clusters (20 cells, or 2 % of the cells) join the nearest larger one.
    n_genes
        Number of genes in the networks, the most variable ones; None for every gene.
    n_bins
        Number of bins for each gene, 2 to 256.
    n_candidates
        Number of candidate partners of each gene; None for all pairs.
    edge_fraction
        Share of the candidate pairs that become edges, above 0 and up to 1.
    %(layer)s
    values
        What the values are, see :func:`spatialfm.tl.embed`; only for ``groupby="auto"`` and the choice of genes.
    library_key
        Column of ``obs`` with the slide of each cell. Mutual information is then conditional on the slide, so that
        differences between slides (batch effects) do not make edges. Genes that a slide lacks are left out.
    key_added
        Key of ``uns``, and prefix of the column of ``obs`` for ``groupby="auto"``.
    %(rng)s
    %(copy)s

    Returns
    -------
    None, or the changed copy. Written:

    ``uns[key_added]``
        ``genes``; ``names`` of the groups; ``groups``, the networks: ``groups[str(k)]`` is that of ``names[k]``, csr
        float32 (n_genes, n_genes), symmetric; ``groupby``, the column of the groups, ``""`` for a single group called
        ``"all"``; ``auto``, whether the groups were found; ``params``. Groups of fewer than 10 cells have no edges.
    ``obs["{key_added}_group"]``
        Only for ``groupby="auto"``: categorical, ``"0"`` is the largest group.

    Raises
    ------
    KeyError
        If a column or the layer is missing.
    ValueError
        If an argument is out of range, names of genes repeat, or values are NaN or infinite.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()[:500].copy()
    >>> sfm.pp.grn(adata, groupby="region", n_genes=50)
    >>> adata.uns["grn"]["groups"]["0"].shape
    (50, 50)
    """
    column = f"{key_added}_group" if groupby == "auto" else groupby or ""
    check_free(adata, "pp.grn", {"uns": [key_added], "obs": [column] if groupby == "auto" else []})
    _check_arguments(n_genes=n_genes, n_bins=n_bins, n_candidates=n_candidates, edge_fraction=edge_fraction)
    _check_genes(adata)

    libraries = get_libraries(adata, library_key)
    given = _given_groups(adata, groupby)
    read = read_values(adata, layer, values, slides=libraries)

    columns, groups = _genes_and_groups(read, n_genes, given, rng)
    networks = _networks(
        read.x[:, columns],
        groups,
        slide_codes(libraries),
        column=groupby if groupby != "auto" else None,
        n_bins=n_bins,
        n_candidates=n_candidates,
        edge_fraction=edge_fraction,
        n_jobs=settings.n_jobs,
    )

    fields: dict[str, dict[str, Any]] = {}
    if groupby == "auto":
        fields["obs"] = {column: pd.Categorical.from_codes(groups.codes, categories=groups.names)}
    entry = {
        "params": record_params(
            n_genes="all" if n_genes is None else int(n_genes),
            n_bins=int(n_bins),
            n_candidates="all" if n_candidates is None else int(n_candidates),
            edge_fraction=float(edge_fraction),
            layer=layer,
            values=read.kind,
            library_key=library_key,
        ),
        "genes": [str(g) for g in adata.var_names[read.features[columns]]],
        "groupby": column,
        "auto": groupby == "auto",
        "names": groups.names,
        "groups": networks,
    }
    target = write(adata, "pp.grn", key_added, {**fields, "uns": {key_added: entry}}, copy=copy)
    logger.info(
        "grn: %d group(s), %d genes, %s edges -> uns[%r]%s",
        len(groups.names),
        len(columns),
        f"{sum(m.nnz for m in networks.values()) // 2:,}",
        key_added,
        f", obs[{column!r}] (found without labels; values taken as {read.kind})" if groupby == "auto" else "",
    )
    return target if copy else None


def _check_arguments(*, n_genes: int | None, n_bins: int, n_candidates: int | None, edge_fraction: float) -> None:
    for name, value, least, most in (
        ("n_genes", n_genes, 2, np.inf),
        ("n_bins", n_bins, 2, 256),
        ("n_candidates", n_candidates, 1, np.inf),
    ):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= most:
            limits = f"at least {least}" + ("" if np.isinf(most) else f" and at most {most}")
            msg = f"{name} must be an integer of {limits}, got {value!r}"
            raise ValueError(msg)
    if not 0 < edge_fraction <= 1:
        msg = f"edge_fraction must be above 0 and at most 1, got {edge_fraction!r}"
        raise ValueError(msg)


def _check_genes(adata: AnnData) -> None:
    if 0 in adata.shape:
        msg = f"adata has {adata.n_obs} cells and {adata.n_vars} genes; a gene network needs both"
        raise ValueError(msg)
    if not adata.var_names.is_unique:
        msg = "gene names repeat in adata.var_names; call adata.var_names_make_unique() first"
        raise ValueError(msg)
    check_text("adata.var_names", adata.var_names)


def _given_groups(adata: AnnData, groupby: str | None) -> _Groups | None:
    """Read the groups that ``groupby`` names; None where they have to be found."""
    if groupby == "auto":
        return None
    if groupby is None:
        return _Groups(np.zeros(adata.n_obs, np.int64), ["all"])
    labels = get_known_labels(adata, groupby, name="groupby", effect="these cells are in no network")
    return _Groups(labels.codes.astype(np.int64), list(labels.categories))


def _genes_and_groups(
    read: Expression, n_genes: int | None, given: _Groups | None, rng: int | np.random.Generator | None
) -> tuple[np.ndarray, _Groups]:
    """Columns of the most variable genes, and the ``given`` groups or, for None, groups found without labels."""
    n_all = read.x.shape[1]
    n_genes = n_all if n_genes is None else n_genes
    if given is not None and n_genes >= n_all:
        return np.arange(n_all), given
    # Each distinct profile once, in an order that depends on its content alone: identical cells share their group, and
    # would otherwise fill each other's neighbour lists.
    _, profiles, profile_of = np.unique(hash_cells(read.x), return_index=True, return_inverse=True)
    first, rest = read.x[profiles[:_SAMPLE]], profiles[_SAMPLE:]
    scale = intensity_scale(first) if read.kind == "intensity" else None
    first = log_normalize(first, read.kind, scale=scale)
    columns = _variable_genes(first, read.kind, n_genes)
    if given is not None:
        return columns, given
    seed = int(np.random.default_rng(rng).integers(2**31))
    with process_state():
        labels = _find_groups(
            first, lambda s: log_normalize(read.x[rest[s]], read.kind, scale=scale), len(rest), read.kind, seed
        )
    codes = _by_size(labels[profile_of])
    return columns, _Groups(codes, [str(k) for k in range(codes.max() + 1)])


def _networks(
    x: Any, groups: _Groups, slides: np.ndarray, *, column: str | None, **how: Any
) -> dict[str, sp.csr_matrix]:
    """Network of each group, under its position; ``column`` of ``obs`` names the groups in a warning."""
    networks, small = {}, []
    for k in progress(range(len(groups.names)), desc="gene networks", unit="group"):
        rows = np.flatnonzero(groups.codes == k)
        if len(rows) < MIN_CELLS:
            small.append(f"{groups.names[k]} ({len(rows)})")
            networks[str(k)] = sp.csr_matrix((x.shape[1], x.shape[1]), dtype=np.float32)
        else:
            networks[str(k)] = mutual_information_network(x[rows], slides=slides[rows], **how)
    if small:
        fix = f" Merge them with related groups in obs[{column!r}] where that matters." if column else ""
        warn(f"grn: groups of fewer than {MIN_CELLS} cells have a network without edges: {', '.join(small)}.{fix}")
    return networks


def mutual_information_network(
    x: Any,
    *,
    n_bins: int = 32,
    n_candidates: int | None = 200,
    edge_fraction: float = 0.25,
    slides: np.ndarray | None = None,
    n_jobs: int = 1,
) -> sp.csr_matrix:
    """Network of one group, see :func:`grn`; ``x`` is (n_cells, n_genes), ``slides`` the slide of each cell."""
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
        # Rounded, so that ties do not depend on the order in which the cells were summed.
        r = np.round(np.abs(correlation(parts)), 10)
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


class Networks(NamedTuple):
    """What :func:`grn` wrote. Cells without a group form the last one, whose network has no edges."""

    genes: list[str]
    names: list[str]
    """Names of the groups."""
    matrices: list[sp.csr_matrix]
    """Network of each group, (n_genes, n_genes)."""
    group: np.ndarray
    """(n_obs,) int64, position of each cell's group in `names`."""


def get_networks(adata: AnnData, key: str = "grn") -> Networks:
    """Read what :func:`grn` wrote.

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
        return Networks(genes, names, networks, np.zeros(adata.n_obs, np.int64))
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
    group = np.array([*(position[c] for c in labels.categories), len(names) - 1])[labels.codes]
    return Networks(genes, names, networks, group)


def _extreme(x: Any, which: str) -> np.ndarray:
    values = getattr(x, which)(axis=0)
    return values.toarray().ravel() if sp.issparse(values) else values


def _dense(x: Any) -> np.ndarray:
    return (x.toarray() if sp.issparse(x) else np.asarray(x)).astype(np.float64)


def correlation(parts: list[Any]) -> np.ndarray:
    """Pearson correlation of all pairs of columns, after centring within each part; 0 for constant columns."""
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
    """Leiden communities of the ``first`` cells (log-like values), extended to all other cells.

    ``others`` returns the values of a slice of the ``n_others`` other cells.
    """
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

    # On held-out cells of real tissues, neighbours agree with Leiden on 93 to 98 % of the cells; linear discriminants
    # or centroids on 80 to 90 %.
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
