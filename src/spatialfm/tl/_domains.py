"""Tissue domains: clusters of an embedding, refined on the tissue graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from spatialfm._checks import check_choice, checked
from spatialfm._data._adata import canonical_order, get_coordinates, get_embedding, get_libraries, slide_codes
from spatialfm._data._embeddings import NICHE, rep_name
from spatialfm._data._write import check_free, write
from spatialfm._settings import logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from scipy.sparse import csr_matrix

_N_COMPONENTS = 20
_N_STARTS = 10
# A component of fewer cells is mostly a few outliers, which raise the likelihood more than any tissue does.
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
    r"""Divide tissues into domains: clusters of an embedding, made to agree with the neighbours in the tissue.

    All slides are clustered together, so that a domain means the same on each of them. Then each cell takes the domain most common among itself
    and its neighbours in the tissue graph, until nothing changes.

    Parameters
    ----------
    adata
        Cells or spots with an embedding (:func:`spatialfm.tl.embed`) and coordinates; a tissue graph (:func:`spatialfm.pp.spatial_neighbors`)
        is built where there is none.
    n_domains
        Number of domains, on all slides together; refinement may leave fewer, where a domain is scattered single cells. None: as many as Leiden
        clustering finds.
    use_rep
        Key of ``obsm`` with the embedding, or several, whose columns are put side by side. Distances are Euclidean; of more
        than 20 columns, the first 20 principal components are used.
    method
        ``"mixture"``: Gaussian mixture with one covariance that the domains share. ``"kmeans"``. ``"leiden"``: Leiden clustering of the graph of the 15
        nearest neighbours in the embedding. None: ``"mixture"`` with `n_domains`, ``"leiden"`` without.
    resolution
        Of Leiden clustering, 0.2 by default: 4 to 11 domains on nine labelled tissues of 2 to 7.
    refine
        What the vote of a neighbour weighs beside the cell's own from the clustering; 0 for no refinement. It matters for embeddings that do not
        know the tissue, such as PCA, and hardly for those that do.
    library_key
        Column of ``obs`` with the slide of each cell.
    neighbors_key
        Key of ``uns`` that names the tissue graph.
    basis
        Key of ``obsm`` with the coordinates.
    key_added
        Where the result is written, in ``obs`` and ``uns``.
    rng
        Seed or generator of the clustering.
    copy
        Whether to return a changed copy instead of changing ``adata``.

    Returns
    -------
    None, or the copy. Written are

    ``obs[key_added]``
        Categorical: ``"0"`` (the largest domain), ``"1"``, ...
    ``uns[key_added]``
        ``params``; ``n_refined``, the number of cells whose domain the neighbours changed.
    ``obsp``, ``uns["spatial_neighbors"]``
        The tissue graph, where it was missing and `refine` needs it.

    Raises
    ------
    KeyError
        If the embedding, a column, the coordinates or a tissue graph of another name are missing.
    ValueError
        If `n_domains`, `method` and `resolution` do not go together or are out of range, the embedding has fewer different rows than
        domains, or the graph joins slides.

    Notes
    -----
    The mixture is fitted by expectation-maximisation from 10 runs of k-means; the most likely fit is taken among those whose smallest domain has
    at least 1 % of the cells (any, where none has).

    Refinement lowers the energy of a Potts model over labels :math:`l`, with those of the clustering :math:`c` and the edges :math:`E` of the graph,

    .. math:: \sum_i [l_i \ne c_i] - \text{refine} \sum_{(i,j) \in E} [l_i = l_j].

    In each round the cells that gain most change, no two of them neighbours, until none gains (iterated conditional modes in the order of Chou &
    Brown): each change lowers the energy. On nine labelled tissues and five embeddings a plain vote was somewhat better than the
    probabilities of the mixture in its place, which are too sure of outlying cells.

    Besag (1986), On the statistical analysis of dirty pictures, J. R. Stat. Soc. B 48, 259-302. Chou & Brown (1990), The theory and
    practice of Bayesian image labeling, Int. J. Comput. Vis. 4, 185-210. The mixture is the model EEE of mclust.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()
    >>> sfm.tl.embed(adata, library_key="mouse_id")
    >>> sfm.tl.domains(adata, 6, use_rep="X_niche", library_key="mouse_id")
    """
    from spatialfm.pp._spatial_neighbors import find_graph

    method = method or ("leiden" if n_domains is None else "mixture")
    check_free(adata, "tl.domains", {"obs": [key_added], "uns": [key_added]})
    _check_numbers(adata.n_obs, n_domains, method, resolution, refine)
    rep = get_embedding(adata, use_rep).astype(np.float64)
    xy = get_coordinates(adata, basis)
    libraries = get_libraries(adata, library_key)
    slide = slide_codes(libraries)
    order = canonical_order(np.column_stack([rep, slide, xy]))
    points = _principal_components(rep[order])
    n_different = len(np.unique(points, axis=0))
    if n_different < (n_domains or 2):
        msg = f"obsm[{rep_name(use_rep)!r}] has {n_different} different rows, too few for {n_domains or 2} domains; lower n_domains or use another embedding"
        raise ValueError(msg)

    neighbors = None
    if refine > 0:
        neighbors = find_graph(adata, neighbors_key=neighbors_key, basis=basis, library_key=library_key)

    params: dict[str, Any] = {"method": method, "use_rep": rep_name(use_rep), "refine": float(refine), "basis": basis}
    params |= {"neighbors_key": neighbors_key} if refine > 0 else {}
    seed = int(np.random.default_rng(rng).integers(2**31))
    if method == "leiden":
        params["resolution"] = float(0.2 if resolution is None else resolution)
        labels = _leiden_labels(points, params["resolution"], seed)
    else:
        params["n_domains"] = int(n_domains)  # type: ignore[arg-type]
        labels = _mixture_labels(points, params["n_domains"], seed, fit=method == "mixture")
    params |= {"library_key": library_key} if library_key is not None else {}
    params |= {"rng": int(rng)} if isinstance(rng, int | np.integer) else {}

    refined = labels
    if neighbors is not None:
        refined = refine_labels(labels, neighbors.edges[order][:, order], refine)
    n_refined = int((refined != labels).sum())
    # Domains of the same size keep the order of their first cells.
    _, first, inverse, counts = np.unique(refined, return_index=True, return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), np.int64)
    rank[np.lexsort((first, -counts))] = np.arange(len(counts))
    codes = np.empty(adata.n_obs, np.int64)
    codes[order] = rank[inverse]

    logger.info(
        "domains: %d by %s of obsm[%r] on %d slide(s), %d to %d cells; neighbours changed %d of %d cells; written to obs[%r] and uns[%r]",
        len(counts),
        method,
        rep_name(use_rep),
        len(libraries),
        counts.min(),
        counts.max(),
        n_refined,
        adata.n_obs,
        key_added,
        key_added,
    )
    found = pd.Categorical.from_codes(codes.tolist(), categories=[str(k) for k in range(len(counts))])
    fields = {"obs": {key_added: found}, "uns": {key_added: {"params": params, "n_refined": n_refined}}}
    adata = write(adata, "tl.domains", key_added, fields, copy=copy)
    if neighbors is not None:
        neighbors.store(adata)
    return adata if copy else None


def _check_numbers(n: int, n_domains: int | None, method: str, resolution: float | None, refine: float) -> None:
    check_choice("method", method, ("mixture", "kmeans", "leiden"))
    if method == "leiden" and n_domains is not None:
        msg = f"n_domains={n_domains!r} cannot be asked of method='leiden'; give resolution=, or method='mixture'"
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


def _principal_components(x: np.ndarray) -> np.ndarray:
    """Scores (n, at most 20), of those columns or components that vary."""
    x = x - x.mean(axis=0)
    variance, axes = np.linalg.eigh(x.T @ x / len(x))
    kept = np.flatnonzero(variance > 1e-9 * max(variance[-1], 1e-300))[::-1][:_N_COMPONENTS]
    return x @ axes[:, kept]


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
        fits = [_fit(points, start.labels_, k) for start in starts]
    large = [np.bincount(found, minlength=k).min() >= _SMALLEST * len(points) for _, found in fits]
    return fits[max(range(len(fits)), key=lambda i: (large[i], fits[i][0]))][1]


def _fit(points: np.ndarray, labels: np.ndarray, k: int) -> tuple[float, np.ndarray]:
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


def _leiden_labels(points: np.ndarray, resolution: float, seed: int) -> np.ndarray:
    from spatialfm.tl._subpopulations import cluster

    return cluster(points, resolution=resolution, seed=seed)[0]


def refine_labels(labels: np.ndarray, graph: csr_matrix, strength: float) -> np.ndarray:
    """Lower ``sum_i [l_i != labels_i] - strength * sum_edges [l_i = l_j]``, beginning with ``labels``, until no single change does.

    Parameters
    ----------
    labels
        (n,) from 0.
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
