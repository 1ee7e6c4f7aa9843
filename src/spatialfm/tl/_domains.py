"""Tissue domains: clusters of an embedding, smoothed over the tissue graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pandas as pd

from spatialfm._checks import check_choice, checked
from spatialfm._data._adata import canonical_order, get_coordinates, get_libraries, slide_codes
from spatialfm._data._embeddings import NICHE, get_embedding, rep_name
from spatialfm._data._leiden import leiden, neighbor_graph, number_by_size
from spatialfm._data._write import check_free, record_params, write
from spatialfm._settings import logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from scipy.sparse import csr_matrix

_N_COMPONENTS = 20
_N_STARTS = 10
_RESOLUTION = 0.2
# A smaller component is mostly a few outliers, which raise the likelihood more than tissue does.
_SMALLEST = 0.01


@checked
def domains(
    adata: AnnData,
    n_domains: int | None = None,
    *,
    use_rep: str | Sequence[str] = NICHE,
    method: Literal["mixture", "kmeans", "leiden"] | None = None,
    resolution: float | None = None,
    refine: float = 1.0,
    library_key: str | None = None,
    neighbors_key: str = "spatial_neighbors",
    basis: str = "spatial",
    key_added: str = "domain",
    rng: int | np.random.Generator | None = 0,
    copy: bool = False,
) -> AnnData | None:
    r"""Divide tissues into domains: clusters of an embedding, smoothed over the tissue graph.

    All slides are clustered together. Then each cell takes the most common domain among its neighbours and itself.

    Parameters
    ----------
    %(adata)s
    n_domains
        Number of domains before refinement, on all slides; None for as many as Leiden clustering finds.
    %(use_rep)s
        Distances are Euclidean; of more than 20 columns, the first 20 principal components are used.
    method
        ``"mixture"`` (Gaussian, one covariance for all domains), ``"kmeans"``, or ``"leiden"`` on the graph of 15
        nearest neighbours in the embedding. None: ``"mixture"`` with `n_domains`, ``"leiden"`` without.
    resolution
        Resolution of Leiden clustering; 0.2 where None.
    refine
        Weight of a neighbour's domain, where the cell's own has 1; 0 for no refinement.
    %(library_key)s
    %(neighbors_key)s
        Built if missing.
    %(basis)s
    %(key_added)s
    %(rng)s
    %(copy)s

    Returns
    -------
    None, or the copy. Written are

    ``obs[key_added]``
        Categorical: ``"0"`` (the largest domain), ``"1"``, ...
    ``uns[key_added]``
        ``params``; ``n_refined``, the number of cells whose domain the neighbours changed.

    Raises
    ------
    KeyError
        If the embedding, a column or the coordinates are missing.
    ValueError
        If `n_domains`, `method` and `resolution` do not go together.

    Notes
    -----
    The mixture (model EEE of mclust) is fitted by expectation-maximisation from 10 runs of k-means. Refinement lowers
    the energy of a Potts model over labels :math:`l`, with those of the clustering :math:`c` and the edges :math:`E`:

    .. math:: \sum_i [l_i \ne c_i] - \text{refine} \sum_{(i,j) \in E} [l_i = l_j].

    See Besag (1986), J. R. Stat. Soc. B 48, 259-302; Chou & Brown (1990), Int. J. Comput. Vis. 4, 185-210.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()[::3].copy()
    >>> sfm.tl.embed(adata, library_key="mouse_id")
    >>> sfm.tl.domains(adata, 6, library_key="mouse_id")
    >>> adata.obs["domain"].nunique()
    6
    """
    from spatialfm.pp._spatial_neighbors import find_graph

    method = method or ("leiden" if n_domains is None else "mixture")
    check_free(adata, "tl.domains", {"obs": [key_added], "uns": [key_added]})
    _check_arguments(adata.n_obs, n_domains, method, resolution, refine)
    if method == "leiden" and resolution is None:
        resolution = _RESOLUTION
    cells = _read(adata, use_rep, library_key, basis)
    _check_rows(cells.points, n_domains, use_rep)
    neighbors = None
    if refine > 0:
        neighbors = find_graph(adata, neighbors_key=neighbors_key, basis=basis, library_key=library_key)

    seed = int(np.random.default_rng(rng).integers(2**31))
    if method == "leiden":
        found = number_by_size(leiden(neighbor_graph(cells.points), resolution=float(resolution or 0), seed=seed))
    else:
        found = _mixture_labels(cells.points, int(n_domains or 0), seed, fit=method == "mixture")
    refined = found
    if neighbors is not None:
        refined = refine_labels(found, neighbors.edges[cells.order][:, cells.order], refine)
    codes = np.empty(adata.n_obs, np.int64)
    codes[cells.order] = number_by_size(refined)
    sizes = np.bincount(codes)
    n_refined = int((refined != found).sum())

    params = record_params(
        n_domains=n_domains, use_rep=rep_name(use_rep), method=method, resolution=resolution, refine=refine,
        library_key=library_key, neighbors_key=neighbors_key, basis=basis, rng=rng,
    )  # fmt: skip
    labels = pd.Categorical.from_codes(codes.tolist(), categories=[str(k) for k in range(len(sizes))])
    fields = {"obs": {key_added: labels}, "uns": {key_added: {"params": params, "n_refined": n_refined}}}
    adata = write(adata, "tl.domains", key_added, fields, copy=copy)
    if neighbors is not None:
        neighbors.store(adata)
    logger.info(
        "domains: %d by %s of obsm[%r] on %d slide(s), %d to %d cells; neighbours changed %d of %d cells "
        "-> obs[%r], uns[%r]",
        len(sizes), method, rep_name(use_rep), cells.n_slides, sizes.min(), sizes.max(), n_refined, adata.n_obs,
        key_added, key_added,
    )  # fmt: skip
    return adata if copy else None


class _Cells(NamedTuple):
    order: np.ndarray
    """(n_obs,) rows in an order that only their content decides."""
    points: np.ndarray
    """(n_obs, at most 20) the embedding in this order, as it is clustered."""
    n_slides: int


def _read(adata: AnnData, use_rep: str | Sequence[str], library_key: str | None, basis: str) -> _Cells:
    rep = get_embedding(adata, use_rep).astype(np.float64)
    xy = get_coordinates(adata, basis)
    libraries = get_libraries(adata, library_key)
    order = canonical_order(np.column_stack([rep, slide_codes(libraries), xy]))
    return _Cells(order, _principal_components(rep[order]), len(libraries))


def _check_arguments(n: int, n_domains: int | None, method: str, resolution: float | None, refine: float) -> None:
    check_choice("method", method, ("mixture", "kmeans", "leiden"))
    if method == "leiden" and n_domains is not None:
        msg = f"n_domains={n_domains!r} cannot be used with method='leiden'; give resolution=, or method='mixture'"
        raise ValueError(msg)
    if method != "leiden" and resolution is not None:
        msg = f"resolution={resolution!r} belongs to method='leiden', not to {method!r}; leave it or n_domains= away"
        raise ValueError(msg)
    if method != "leiden" and n_domains is None:
        msg = f"method={method!r} needs n_domains=; method='leiden' finds the number itself"
        raise ValueError(msg)
    whole = isinstance(n_domains, int | np.integer) and not isinstance(n_domains, bool)
    if n_domains is not None and not (whole and 2 <= n_domains < n):
        msg = f"n_domains={n_domains!r} must be an integer of at least 2 and less than the {n} cells"
        raise ValueError(msg)
    if resolution is not None and not resolution > 0:
        msg = f"resolution={resolution!r} must be positive"
        raise ValueError(msg)
    if not (0 <= refine < np.inf):
        msg = f"refine={refine!r} must be 0 (no refinement) or a positive number"
        raise ValueError(msg)


def _check_rows(points: np.ndarray, n_domains: int | None, use_rep: str | Sequence[str]) -> None:
    n_different, needed = len(np.unique(points, axis=0)), n_domains or 2
    if n_different < needed:
        msg = (
            f"obsm[{rep_name(use_rep)!r}] has {n_different} different rows, too few for {needed} domains; "
            "lower n_domains or use another embedding"
        )
        raise ValueError(msg)


def _principal_components(x: np.ndarray) -> np.ndarray:
    """Scores (n, at most 20) of the components that vary."""
    from sklearn.decomposition import PCA

    pca = PCA(min(_N_COMPONENTS, *x.shape), svd_solver="covariance_eigh")
    with np.errstate(invalid="ignore", divide="ignore"):  # where nothing varies
        scores = pca.fit_transform(x)
    return scores[:, pca.explained_variance_ > 1e-9 * max(pca.explained_variance_[0], 1e-300)]


def _mixture_labels(points: np.ndarray, k: int, seed: int, *, fit: bool) -> np.ndarray:
    """Labels (n,) of a mixture, or of k-means unless ``fit``."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    seeds = np.random.default_rng(seed).integers(2**31, size=_N_STARTS)
    # On two threads these small products took 4 times as long on a quiet machine, and up to 60 times on a busy one.
    with threadpool_limits(1):
        starts = [KMeans(k, n_init=1, random_state=int(s)).fit(points) for s in seeds]
        if not fit:
            return min(starts, key=lambda start: start.inertia_).labels_.astype(np.int64)
        fits = [fit_mixture(points, start.labels_, k) for start in starts]
    large = [np.bincount(found, minlength=k).min() >= _SMALLEST * len(points) for _, found in fits]
    return fits[max(range(len(fits)), key=lambda i: (large[i], fits[i][0]))][1]


def fit_mixture(points: np.ndarray, labels: np.ndarray, k: int) -> tuple[float, np.ndarray]:
    """Fit a mixture of Gaussians with one covariance, from labels; mean log-likelihood and labels (n,)."""
    from scipy.linalg import solve_triangular
    from scipy.special import logsumexp

    n, d = points.shape
    total = points.T @ points / n
    share = np.eye(k)[labels]
    before = -np.inf
    for _ in range(200):
        size = share.sum(axis=0) + 1e-9
        mean = (share.T @ points) / size[:, None]
        # The scatter within is the total one less that of the means: no pass over cells and domains.
        covariance = total - (mean.T * size) @ mean / n
        covariance[np.diag_indices(d)] += 1e-6 * np.trace(total) / d
        root = np.linalg.cholesky(covariance)
        a, b = (solve_triangular(root, v.T, lower=True) for v in (points, mean))
        joint = np.log(size / n) + a.T @ b - 0.5 * (b**2).sum(axis=0)
        evidence = logsumexp(joint, axis=1)
        share = np.exp(joint - evidence[:, None])
        constant = 0.5 * d * np.log(2 * np.pi) + np.log(np.diag(root)).sum()
        now = float(np.mean(evidence - 0.5 * (a**2).sum(axis=0)) - constant)
        if abs(now - before) < 1e-4:
            break
        before = now
    return now, share.argmax(axis=1)


def refine_labels(labels: np.ndarray, graph: csr_matrix, strength: float) -> np.ndarray:
    """Lower ``sum_i [l_i != labels_i] - strength * sum_edges [l_i = l_j]`` until no single change does.

    Parameters
    ----------
    labels
        (n,) from 0; the start.
    graph
        (n, n) symmetric, ones, empty diagonal.
    strength
        Weight of an edge.
    """
    one_hot = np.eye(labels.max() + 1)
    edges = graph.tocoo()
    votes = one_hot[labels] + strength * (graph @ one_hot[labels])
    labels, everyone = labels.copy(), np.arange(len(labels))
    while True:
        wanted = votes.argmax(axis=1)
        gain = votes[everyone, wanted] - votes[everyone, labels]
        gain[gain < 1e-9] = 0
        if not gain.any():
            return labels
        # Neighbours do not change at once: the one that gains more, or comes first, goes first.
        here, there = gain[edges.row], gain[edges.col]
        yields = (there > here) | ((there == here) & (edges.col < edges.row))
        moves = gain > 0
        moves[edges.row[yields]] = False
        chosen = np.flatnonzero(moves)
        votes += strength * (graph[chosen].T @ (one_hot[wanted[chosen]] - one_hot[labels[chosen]]))
        labels[chosen] = wanted[chosen]
