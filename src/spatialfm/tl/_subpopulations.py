"""Spatially informed subpopulations of one cell type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from spatialfm._checks import check_positive, checked
from spatialfm._data._adata import (
    as_label,
    canonical_order,
    check_within_slides,
    get_graph,
    get_known_labels,
    get_libraries,
    slide_codes,
)
from spatialfm._data._embeddings import NICHE_AND_STATE, get_embedding, rep_name
from spatialfm._data._leiden import leiden, neighbor_graph, number_by_size
from spatialfm._data._write import check_free, record_params, write
from spatialfm._settings import logger, warn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

_N_NEIGHBORS = 15  # of the graph on the embedding, scanpy's default
_RESOLUTION = 0.5
_SMALLEST = 0.01  # share of the cells of a type, below which a part is mostly a few outliers
_OUTLIERS, _ROUNDS = 0.05, 5  # share of them that may be set aside, in so many rounds
_CHUNK = 4_000_000  # numbers of an array at a time


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

    The cells of one type are clustered on the graph of 15 nearest neighbours of an embedding. For each subpopulation,
    the mean fraction of every cell type among its neighbours in the tissue is compared with that of random
    subpopulations of the same sizes, by permutations within each slide.

    An embedding that includes the neighbourhood separates cells by it, so a small p-value says in what the
    subpopulations differ. It is not evidence from independent data that they exist.

    Parameters
    ----------
    %(adata)s
    groupby
        Column of ``obs`` with the cell types. Cells without one do not count as neighbours.
    group
        The type to split; at least 16 cells.
    %(use_rep)s
    n_clusters
        Number of subpopulations, found by spectral clustering. Outliers join the part with the nearest mean.
    resolution
        Resolution of Leiden clustering, instead of `n_clusters`; 0.5 where neither is given.
    library_key
        Column of ``obs`` with the slide of each cell. All slides are clustered together.
    %(neighbors_key)s
    %(key_added)s
    n_permutations
        Number of permutations; the smallest p-value is ``1 / (1 + n_permutations)``.
    %(rng)s
    %(copy)s

    Returns
    -------
    None, or the copy. Written are

    ``obs[key_added]``
        Categorical: ``"<group> 1"`` (the largest), ``"<group> 2"``, ...; NaN for cells of other types.
    ``uns[key_added]``
        ``params``, with the number ``n_outliers`` that joined a part; ``names``; ``cell_types``; ``composition``,
        float64 (n_subpopulations, n_cell_types), mean fraction of each type among a cell's neighbours; and
        ``enrichment``, a table with a row for each subpopulation and cell type: ``fraction``, ``expected`` by chance,
        ``z``, ``p`` (two-sided) and ``fdr`` (Benjamini-Hochberg over all rows).

    Raises
    ------
    KeyError
        If a column, the embedding or the tissue graph is missing.
    ValueError
        If ``group`` is unknown or too small, or both ``n_clusters`` and ``resolution`` are given.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()[::3].copy()
    >>> sfm.tl.embed(adata, library_key="mouse_id")
    >>> sfm.tl.subpopulations(adata, "celltype", "Astrocyte", n_clusters=2, library_key="mouse_id", n_permutations=99)
    >>> sfm.get.subpopulations_df(adata)["subpopulation"].unique().tolist()
    ['Astrocyte 1', 'Astrocyte 2']
    """
    check_free(adata, "tl.subpopulations", {"obs": [key_added], "uns": [key_added]})
    check_positive("n_permutations", n_permutations)
    cells = _read(adata, groupby, group, use_rep, library_key, neighbors_key)
    _check_clusters(len(cells.rows), cells.group, n_clusters, resolution)
    if n_clusters is None and resolution is None:
        resolution = _RESOLUTION

    generator = np.random.default_rng(rng)
    seed = int(generator.integers(2**31))
    labels, n_outliers = cluster(cells.rep, seed=seed, resolution=resolution, n_clusters=n_clusters)
    # "0 1" would read as two numbers.
    between = "-" if cells.group[-1:].isdigit() else " "
    names = [f"{cells.group}{between}{i + 1}" for i in range(labels.max() + 1)]
    _warn_of_outliers(labels, names, cells.group, use_rep, n_clusters)
    table = enrichment(labels, cells.composition, cells.slides, n_permutations=n_permutations, generator=generator)

    codes = np.full(adata.n_obs, -1)
    codes[cells.rows] = labels
    params = record_params(
        groupby=groupby, group=cells.group, use_rep=rep_name(use_rep), n_clusters=n_clusters, resolution=resolution,
        method="leiden" if n_clusters is None else "spectral", library_key=library_key, neighbors_key=neighbors_key,
        n_permutations=n_permutations, rng=rng, n_outliers=n_outliers,
    )  # fmt: skip
    entry = {
        "params": params,
        "names": names,
        "cell_types": cells.types,
        "composition": table["fraction"],
        "enrichment": _long_table(table, names, cells.types),
    }
    fields = {
        "obs": {key_added: pd.Categorical.from_codes(codes.tolist(), categories=names)},
        "uns": {key_added: entry},
    }
    adata = write(adata, "tl.subpopulations", key_added, fields, copy=copy)
    logger.info(
        "subpopulations: %d of %r: %s%s -> obs[%r], uns[%r]",
        len(names), cells.group, _sizes(labels, names, range(len(names))),
        f"; {n_outliers} outliers joined the nearest" if n_outliers else "", key_added, key_added,
    )  # fmt: skip
    return adata if copy else None


class _Cells(NamedTuple):
    """Cells of the type to split, in an order that only their content decides."""

    group: str
    types: list[str]
    rows: np.ndarray
    """Their rows in ``adata``."""
    rep: np.ndarray
    """(n, columns) embedding."""
    composition: np.ndarray
    """(n, types) fraction of each type among the neighbours; NaN without neighbours."""
    slides: np.ndarray


def _read(
    adata: AnnData,
    groupby: str,
    group: str | int,
    use_rep: str | Sequence[str],
    library_key: str | None,
    neighbors_key: str,
) -> _Cells:
    types = get_known_labels(
        adata, groupby, name="groupby", effect="these cells are in no subpopulation, and do not count as neighbours"
    )
    name = as_label(group, types.categories)
    if name not in types.categories:
        msg = f"group={name!r} is not in obs[{groupby!r}]; choose from {list(types.categories)}"
        raise ValueError(msg)
    rows = np.flatnonzero(types == name)
    if len(rows) <= _N_NEIGHBORS:
        msg = (
            f"group={name!r} has {len(rows)} cells; the graph of {_N_NEIGHBORS} nearest neighbours needs at least "
            f"{_N_NEIGHBORS + 1}. Merge it with a related type in obs[{groupby!r}]"
        )
        raise ValueError(msg)
    rep = get_embedding(adata, use_rep)[rows]
    graph, _ = get_graph(adata, neighbors_key)
    slides = slide_codes(get_libraries(adata, library_key))
    check_within_slides(adata, graph, slides, library_key, neighbors_key)
    composition = neighbour_fractions(graph[rows], rows, np.asarray(types.codes), len(types.categories))
    order = canonical_order(np.column_stack([rep, np.nan_to_num(composition, nan=-1.0), slides[rows]]))
    return _Cells(name, list(types.categories), rows[order], rep[order], composition[order], slides[rows[order]])


def _check_clusters(n: int, group: str, n_clusters: int | None, resolution: float | None) -> None:
    if n_clusters is not None and resolution is not None:
        msg = f"n_clusters={n_clusters!r} and resolution={resolution!r} exclude each other; give one of them"
        raise ValueError(msg)
    if n_clusters is not None and not 2 <= n_clusters < n:
        msg = f"n_clusters={n_clusters!r} must be at least 2 and less than the {n} cells of {group!r}"
        raise ValueError(msg)
    if resolution is not None and not resolution > 0:
        msg = f"resolution={resolution!r} must be positive"
        raise ValueError(msg)


def _warn_of_outliers(
    labels: np.ndarray, names: list[str], group: str, use_rep: str | Sequence[str], n_clusters: int | None
) -> None:
    tiny = _tiny(labels, len(names))
    if not len(tiny):
        return
    warn(
        "subpopulations: %d of the %d parts of %r are a few of its %d cells: %s. They lie apart from all others in "
        "obsm[%r], as outliers do; %s, or leave them out",
        len(tiny), len(names), group, len(labels), _sizes(labels, names, tiny), rep_name(use_rep),
        "lower n_clusters=" if n_clusters is not None else "lower resolution=, or give n_clusters=",
    )  # fmt: skip


def _sizes(labels: np.ndarray, names: list[str], which: Any) -> str:
    sizes = np.bincount(labels)
    return ", ".join(f"{names[k]!r} ({sizes[k]})" for k in which)


def _long_table(table: dict[str, np.ndarray], names: list[str], types: list[str]) -> pd.DataFrame:
    """Rows for subpopulations and cell types, in the layout that files give back."""
    index = pd.MultiIndex.from_product([names, types])
    result = pd.DataFrame(
        {
            "subpopulation": pd.Categorical(index.get_level_values(0), categories=names),
            "cell_type": pd.Categorical(index.get_level_values(1), categories=types),
            **{name: values.ravel() for name, values in table.items()},
        }
    )
    result.index = result.index.astype(str)
    return result


def neighbour_fractions(graph: Any, rows: np.ndarray, codes: np.ndarray, n_types: int) -> np.ndarray:
    """Fraction of each type among the neighbours with a type, of the cells ``rows``; NaN where a cell has none."""
    edges = graph.tocoo()
    real = (edges.data != 0) & (edges.col != rows[edges.row]) & (codes[edges.col] >= 0)
    flat = edges.row[real].astype(np.int64) * n_types + codes[edges.col[real]]
    counts = np.bincount(flat, minlength=len(rows) * n_types).reshape(len(rows), n_types)
    degree = counts.sum(axis=1, keepdims=True)
    return np.divide(counts, degree, out=np.full(counts.shape, np.nan), where=degree > 0)


def cluster(rep: np.ndarray, *, seed: int, resolution: float | None, n_clusters: int | None) -> tuple[np.ndarray, int]:
    """Cluster by Leiden, or into ``n_clusters``; also how many outliers joined the cluster of the nearest mean.

    Clusters are numbered by size. A few cells that are far from all others are the best cut of a graph, and leave the
    others in one part: they are set aside first.
    """
    if n_clusters is None:
        return number_by_size(
            leiden(neighbor_graph(rep, _N_NEIGHBORS), resolution=float(resolution or 0), seed=seed)
        ), 0
    kept = np.arange(len(rep))
    labels = _spectral(neighbor_graph(rep, _N_NEIGHBORS), n_clusters, seed)
    for _ in range(_ROUNDS):
        rest = kept[~np.isin(labels, _tiny(labels, n_clusters))]
        if len(rest) == len(kept) or len(rest) < (1 - _OUTLIERS) * len(rep):
            break
        kept, labels = rest, _spectral(neighbor_graph(rep[rest], _N_NEIGHBORS), n_clusters, seed)
    if len(kept) < len(rep):
        means = np.stack([rep[kept[labels == k]].mean(axis=0) for k in range(labels.max() + 1)])
        everyone = ((rep[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
        everyone[kept] = labels
        labels = everyone
    return number_by_size(labels), len(rep) - len(kept)


def _tiny(labels: np.ndarray, n_clusters: int) -> np.ndarray:
    """Clusters of less than 1 % of the cells, or a tenth of an even share where they are many."""
    size = np.bincount(labels)
    return np.flatnonzero((size > 0) & (size < min(_SMALLEST, 0.1 / n_clusters) * len(labels)))


def _spectral(graph: Any, n_clusters: int, seed: int) -> np.ndarray:
    """Normalised spectral clustering (Ng, Jordan & Weiss 2001).

    LOBPCG, a block method, because separate clusters are separate components, whose eigenvalues coincide:
    single-vector Lanczos misses some of them, and scikit-learn's shift-invert took minutes and gigabytes at 30,000
    cells.
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


def enrichment(
    labels: np.ndarray,
    composition: np.ndarray,
    slides: np.ndarray,
    *,
    n_permutations: int,
    generator: np.random.Generator,
) -> dict[str, np.ndarray]:
    """Compare the mean composition of each label with permuted labels; every array is (labels, types).

    Mean and variance under permutation are exact, those of sampling without replacement within each slide.
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

    deviation = np.abs(fraction - expected) - 1e-9  # ties count in spite of rounding
    extreme = np.zeros((n_labels, n_types), dtype=np.int64)
    block = max(1, _CHUNK // max(n, 1))
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
