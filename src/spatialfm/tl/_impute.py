"""Genes that were not measured, or measured badly, from the others and the tissue around."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp

from spatialfm._checks import check_choice, check_text, checked
from spatialfm._data._adata import (
    get_coordinates,
    get_libraries,
    get_matrix,
    get_table,
    raw_hint,
    warn_off_tissue,
)
from spatialfm._data._expression import ValuesKind
from spatialfm._data._splits import check_folds, group_folds, spatial_blocks
from spatialfm._data._write import check_free, write
from spatialfm._settings import logger, progress, warn

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

    from spatialfm.engine import Tissue
    from spatialfm.models import HEISTNiche

_SHARE = 0.2  # of the panel, hidden at once
_NICHE = 0.5  # weight of the niche beside the cell's own state, where distances are taken
_N_NEAREST = 30
_MAX_REFERENCE = 4096  # measured cells to search, so that time grows with the cells and not with their square
_N_SMOOTH = 20
_N_FREQUENCIES = 150
_STRENGTHS = np.array([1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0])
_N_BOOTSTRAP = 500
_MIN_CELLS = 10  # a fold


@checked
def impute(
    adata: AnnData,
    genes: str | Sequence[str] | None = None,
    *,
    mask: str | None = None,
    method: Literal["zero_shot", "fine_tune"] = "zero_shot",
    model: str | Path | HEISTNiche = "heist-niche",
    library_key: str | None = None,
    layer: str | None = None,
    basis: str = "spatial",
    values: ValuesKind = "auto",
    n_folds: int = 5,
    key_added: str = "imputed",
    device: str | None = None,
    rng: int | np.random.Generator | None = 0,
    copy: bool = False,
) -> AnnData | None:
    """Predict genes from the other genes and the tissue around, and say for each gene how far to trust it.

    Two uses, told apart gene by gene:

    A gene that no cell lacks (measured badly, to be checked)
        Every cell gets a prediction that looks neither at its own value nor at those of the cells around it: the tissue is cut into blocks, and
        for the blocks of each fold the gene is hidden. At most a fifth of the panel is hidden at once.
    A gene that some cells lack (NaN, or the cells of ``mask``, or those of a slide that did not measure it: zero there, and found on other slides)
        Those cells are filled from the cells that have it. The genes that cells lack are predicted from the genes that no cell lacks.

    Either way the cells are embedded from the genes that are not hidden.

    Parameters
    ----------
    adata
        Cells with coordinates in ``obsm[basis]``. Only the genes to impute may hold NaN.
    genes
        Genes to impute. Where None, those that some cells lack, or all if none does; constant genes are left out then.
    mask
        Boolean column of ``obs``, true for the cells that lack ``genes``, whatever stands there. Needs ``genes``.
    method
        ``"zero_shot"``: the mean of the measured values over the 30 cells most alike in embedding and niche; nothing is trained on this tissue.
        ``"fine_tune"``: a decoder from the embedding to each gene is trained on the measured cells.
    model
        A model that embeds cells from any panel, as for :func:`spatialfm.tl.embed`: ``"heist-niche"``, a folder, a file, or the model itself.
    library_key
        Column of ``obs`` naming each cell's slide. Cells of different slides are never neighbours. Of genes that a slide did not measure nothing is predicted.
    layer
        Layer to use instead of ``X``.
    basis
        Key of the coordinates in ``obsm``.
    values
        What the values are, as for :func:`spatialfm.tl.embed`; recognised by default. Values that were normalised before carry each gene in the totals of
        all; give counts to be strict.
    n_folds
        Folds of blocks, 36 blocks a slide.
    key_added
        Where the result is written, in ``layers`` and ``uns``.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``; ``settings.device`` where None.
    rng
        Seed or generator: of the cells searched where there are more than 4,096, and of the decoder's random features.
    copy
        Return a copy instead of writing to ``adata``.

    Returns
    -------
    ``None``, or the copy. Written:

    ``layers[key_added]``
        float32 (n_obs, n_vars) on the logarithmic scale: predictions where a value was imputed, **the measured values, log-normalised, everywhere else**. csr
        where the expression is sparse and at most half of its genes are imputed, otherwise dense.
    ``uns[key_added]``
        ``params``; ``genes``, list of those imputed; and arrays, one number a gene, over cells whose value was measured and hidden: ``correlation``
        (Pearson, of predicted and measured) with ``correlation_low`` and ``correlation_high`` (95 %, bootstrap over the blocks or slides held out),
        ``correlation_smoothing`` (of the mean of the 20 nearest cells that are not hidden), ``skill`` and ``skill_smoothing`` (1 minus squared error over
        that of the gene's mean; 0 is no better than the mean), ``n_held_out``, ``n_units`` (blocks or slides held out), ``n_imputed`` (values).
    ``obsp["spatial_connectivities"]``, ``obsp["spatial_distances"]``, ``uns["spatial_neighbors"]``
        Where they were missing.

    Raises
    ------
    KeyError
        A gene, ``mask``, ``layer``, ``library_key`` or ``obsm[basis]`` does not exist.
    ValueError
        No gene is left to predict from, a gene is constant or measured in too few cells or in none, other genes hold NaN, the model cannot embed cells so,
        ``layer`` is the one to be written, or an argument is out of range. ``adata`` is as it was.

    Notes
    -----
    Where all cells of some slides lack a gene and at least two slides have it, whole slides are held out, otherwise blocks. Where single cells are
    missing among measured ones, the figures are those of blocks, which is harder. Predictions vary less than measurements: do not test for
    differential expression on them.

    Correlations after normalisation by the total have a compositional part: a gene's share of a cell falls where the others rise, and that can be predicted from
    them. In a simulated tissue a gene of pure noise reached a correlation of 0.43. How large it is in yours, a gene shuffled over the cells tells.

    The decoder is a ridge regression from the embedding and 300 random Fourier features of it (Rahimi & Recht 2007), its strength chosen gene by gene on
    held-out blocks of the training cells.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()
    >>> sfm.tl.impute(adata, ["Gad1", "Slc17a7"], library_key="mouse_id")  # doctest: +SKIP
    >>> sfm.get.imputation_df(adata)  # doctest: +SKIP
    """
    from anndata import AnnData
    from threadpoolctl import threadpool_limits

    from spatialfm._data._expression import check_finite, log_normalize, resolve_kind
    from spatialfm.engine import choose_device, find_encoder, read_tissue

    check_free(adata, "tl.impute", {"layers": [key_added], "uns": [key_added]})
    check_choice("method", method, ("zero_shot", "fine_tune"))
    check_folds(n_folds)
    if layer == key_added:
        msg = f"layer={layer!r} would be overwritten by the result; choose another key_added="
        raise ValueError(msg)
    place = choose_device(device)
    encoder = find_encoder(
        model, needs="encode_panel", lacks="cannot embed cells from any part of a panel", dtype="float32"
    )
    xy = get_coordinates(adata, basis)
    warn_off_tissue(adata)
    check_text("adata.var_names", adata.var_names)
    x, wanted, lacks, unmeasured = _read(adata, genes, mask, layer, get_libraries(adata, library_key))
    check_finite(x)
    complete = np.setdiff1d(np.arange(adata.n_vars), np.union1d(wanted[lacks.any(axis=0)], unmeasured))
    if len(complete) < 1 + bool(~lacks.any(axis=0).all()):
        msg = f"{adata.n_vars - len(complete)} of the {adata.n_vars} genes are missing in some cells or hidden; none is left to predict from, name fewer genes"
        raise ValueError(msg)

    # The graph and the order of the cells come from what no cell lacks.
    seen = AnnData(
        x[:, complete].astype(np.float32),
        obs=get_table(adata.obs).drop(columns="in_tissue", errors="ignore"),
        obsm={basis: xy},
        obsp=dict(adata.obsp),
    )

    if "spatial_neighbors" in adata.uns:
        seen.uns["spatial_neighbors"] = adata.uns["spatial_neighbors"]
    tissue = read_tissue(seen, library_key=library_key, basis=basis, values="log", networks=False)
    kind = resolve_kind(x[:, complete], values, "X" if layer is None else f"layers[{layer!r}]")
    scale = _scales(x, wanted, lacks) if kind == "intensity" else None
    logged = log_normalize(x, kind, scale=scale, counted=complete)
    order, lacks = tissue.rows, lacks[tissue.rows]

    generator = np.random.default_rng(rng)
    jobs = _jobs(wanted, lacks, complete)
    predicted = np.empty((adata.n_obs, len(wanted)), np.float32)
    scores = np.full((len(_SCORES), len(wanted)), np.nan)
    for known, parts in progress(jobs, desc="imputing", unit="part"):
        # Normalised among themselves: a hidden gene would be in the totals.
        shown = log_normalize(tissue.expression[:, np.searchsorted(complete, known)], kind)
        niche, state = encoder.encode_panel(tissue, shown, device=place)
        features = np.hstack([state, _NICHE * niche])
        for part in parts:
            y = logged[:, wanted[part]]
            y = (y.toarray() if sp.issparse(y) else np.asarray(y))[order].astype(np.float32)
            names = list(map(str, adata.var_names[wanted[part]]))
            # On two threads of a busy machine the decompositions were 10 times slower.
            with threadpool_limits(1, user_api="blas"):
                predicted[:, part], scores[:, part] = _predict(
                    features, y, lacks[:, part[0]], tissue, names, method=method, n_folds=n_folds, rng=generator
                )

    imputed = np.empty_like(predicted)
    imputed[order] = predicted
    written = np.empty_like(lacks)
    written[order] = lacks | ~lacks.any(axis=0)
    filled = _fill(logged, wanted, imputed, written)
    table = dict(zip(_SCORES, scores, strict=True)) | {"n_imputed": written.sum(axis=0).astype(np.float64)}
    names = list(map(str, adata.var_names[wanted]))

    entry = {
        "genes": names,
        **{name: v.astype(np.int64) if name.startswith("n_") else v for name, v in table.items()},
        "params": {
            "method": method,
            "model": encoder.model.name,
            "mask": mask or "",
            "library_key": library_key or "",
            "layer": layer or "",
            "basis": basis,
            "values": kind,
            "unmeasured": [str(name) for name in adata.var_names[unmeasured]],
            "n_folds": int(n_folds),
            "device": place.type,
        },
    }
    fields = {"layers": {key_added: filled}, "uns": {key_added: entry}}
    adata = write(adata, "tl.impute", key_added, fields, copy=copy)
    tissue.store_built(adata)
    beaten = ~(table["correlation"] > np.nan_to_num(table["correlation_smoothing"], nan=-1))
    doubtful = [name for name, bad in zip(names, beaten, strict=True) if bad]
    if doubtful:
        logger.warning(
            "impute: do not trust %d of %d genes, no better on hidden cells than the mean of the nearest measured cells: %s%s",
            len(doubtful), len(names), ", ".join(doubtful[:10]), ", ..." if len(doubtful) > 10 else "",
        )  # fmt: skip
    logger.info(
        "impute: %d values of %d genes, median correlation on hidden cells %.2f (nearest cells: %.2f) -> layers[%r], uns[%r]",
        written.sum(), len(names), np.nanmedian(table["correlation"]) if np.isfinite(table["correlation"]).any() else np.nan,
        np.median(np.nan_to_num(table["correlation_smoothing"])), key_added, key_added,
    )  # fmt: skip
    return adata if copy else None


def _read(
    adata: AnnData,
    genes: str | Sequence[str] | None,
    mask: str | None,
    layer: str | None,
    libraries: list[tuple[str, np.ndarray]],
) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
    """Expression with what is lacking filled by what says nothing, positions of the wanted genes, and which cells lack them (n_obs, wanted).

    Last, positions of genes that are not wanted and that a slide did not measure.
    """
    from spatialfm._data._expression import find_unmeasured

    if mask is not None and genes is None:
        msg = f"mask={mask!r} says which cells lack a gene, but not which; name them in genes="
        raise ValueError(msg)
    x: Any = get_matrix(adata, layer)
    x = sp.csc_matrix(x) if sp.issparse(x) else np.asarray(x)
    nan: Any = sp.csc_matrix((np.isnan(x.data), x.indices, x.indptr), shape=x.shape) if sp.issparse(x) else np.isnan(x)
    holds = np.asarray(nan.sum(axis=0)).ravel() > 0
    lacking = find_unmeasured([(x, libraries)])
    if genes is None:
        partly = holds | lacking.any(axis=0)
        wanted = np.flatnonzero(partly) if partly.any() else np.arange(adata.n_vars)
    else:
        wanted = _positions(adata, [genes] if isinstance(genes, str) else list(map(str, genes)))
    others = np.setdiff1d(np.flatnonzero(holds), wanted)
    if len(others):
        msg = f"{len(others)} genes hold NaN and are not to be imputed: {list(adata.var_names[others[:3]])}; name them in genes= too, or drop them"
        raise ValueError(msg)
    lacks = nan[:, wanted]
    lacks = lacks.toarray() if sp.issparse(lacks) else lacks.copy()
    for own, (_, rows) in zip(lacking, libraries, strict=True):
        lacks[rows] |= own[wanted]
    unmeasured = np.setdiff1d(np.flatnonzero(lacking.any(axis=0)), wanted)
    zero = np.flatnonzero((lacking.any(axis=0)) & ~holds)
    if len(zero):
        warn(
            "impute: %d genes (%s%s) are zero in all cells of a slide, though other slides have them: taken as not measured there, and %s. Name in genes= "
            "what to predict, or drop them",
            len(zero), ", ".join(map(str, adata.var_names[zero[:5]])), ", ..." if len(zero) > 5 else "",
            "nothing is predicted from them" if len(unmeasured) else "predicted there",
        )  # fmt: skip
    if mask is not None:
        lacks |= _mask(adata, mask)[:, None]
    if lacks.all(axis=0).any():
        msg = f"no cell has a value of {list(adata.var_names[wanted[lacks.all(axis=0)]][:3])}; there is nothing to learn these genes from"
        raise ValueError(msg)

    x = x.astype(np.float32) if x.dtype.kind != "f" else x.copy()
    varies = np.ones(len(wanted), bool)
    for k, j in enumerate(wanted):
        column = x[:, [j]].toarray().ravel() if sp.issparse(x) else x[:, j]
        varies[k] = np.ptp(column[~lacks[:, k]]) > 0
        if not sp.issparse(x) and lacks[:, k].any():
            x[lacks[:, k], j] = np.median(column[~lacks[:, k]])
    if sp.issparse(x):
        entry = np.repeat(np.arange(x.shape[1]), np.diff(x.indptr))
        at = np.full(x.shape[1], -1)
        at[wanted] = np.arange(len(wanted))
        hidden = at[entry] >= 0
        hidden[hidden] = lacks[x.indices[hidden], at[entry[hidden]]]
        x.data[hidden] = 0
        x.eliminate_zeros()
        x = x.tocsr()
    if genes is not None and not varies.all():
        msg = f"genes {list(adata.var_names[wanted[~varies]][:3])} have one value in all cells that measured them; there is nothing to predict, leave them out"
        raise ValueError(msg)
    if not varies.any():
        msg = "no gene varies between the cells; there is nothing to impute"
        raise ValueError(msg)
    if (lacks.any(axis=0) & ~varies).any():
        msg = f"genes {list(adata.var_names[wanted[~varies]][:3])} are missing in some cells and constant in the others; drop them first"
        raise ValueError(msg)
    return x, wanted[varies], lacks[:, varies], unmeasured


def _positions(adata: AnnData, names: list[str]) -> np.ndarray:
    """Positions of genes, ascending."""
    import difflib

    available = list(map(str, adata.var_names))
    if not names or len(set(names)) < len(names):
        msg = f"genes={names[:5]} must name at least one gene, and each once"
        raise ValueError(msg)
    for name in names:
        if available.count(name) != 1:
            alike = {known.casefold(): known for known in available}
            near = [alike[found] for found in difflib.get_close_matches(str(name).casefold(), list(alike))]
            msg = f"genes: {name!r} is {'several' if name in available else 'none'} of the {len(available)} genes of adata" + (
                f"; did you mean {near}?" if near and name not in available else ""
            ) + raw_hint(adata, name)  # fmt: skip
            raise KeyError(msg)
    return np.flatnonzero(np.isin(available, names))


def _mask(adata: AnnData, mask: str) -> np.ndarray:
    if mask not in adata.obs:
        msg = f"mask={mask!r} is not a column of adata.obs; it holds {list(adata.obs.columns)}"
        raise KeyError(msg)
    column = pd.Series(adata.obs[mask].to_numpy())  # booleans too where they are categories
    if not pd.api.types.is_bool_dtype(column) or column.isna().any() or not column.any():
        msg = f"obs[{mask!r}] must be boolean, true for at least one cell (one that lacks the genes), without missing values"
        raise ValueError(msg)
    return column.to_numpy(dtype=bool)


def _scales(x: Any, wanted: np.ndarray, lacks: np.ndarray) -> np.ndarray:
    """Units of intensities, of cells that measured them."""
    from spatialfm._data._expression import intensity_scale

    scale = intensity_scale(x)
    for k in np.flatnonzero(lacks.any(axis=0)):
        scale[wanted[k]] = intensity_scale(x[~lacks[:, k]][:, [wanted[k]]])[0]
    return scale


def _jobs(
    wanted: np.ndarray, lacks: np.ndarray, complete: np.ndarray
) -> list[tuple[np.ndarray, list[np.ndarray]]]:  # fmt: skip
    """Genes to embed from, and parts of the wanted ones (positions) that the same cells lack, to be predicted from these."""
    partly = lacks.any(axis=0)
    jobs: list[tuple[np.ndarray, list[np.ndarray]]] = []
    if partly.any():
        at = np.flatnonzero(partly)
        _, pattern = np.unique(np.packbits(lacks[:, at], axis=0), axis=1, return_inverse=True)
        pattern = pattern.ravel()
        jobs.append((complete, [at[pattern == p] for p in range(pattern.max() + 1)]))
    at = np.flatnonzero(~partly)
    if len(at):
        # Every n-th, since neighbours in a list are often of one family and tell of each other.
        n_parts = -(-len(at) // max(1, int(_SHARE * len(complete))))
        jobs += [(np.setdiff1d(complete, wanted[at[p::n_parts]]), [at[p::n_parts]]) for p in range(n_parts)]
    return jobs


_SCORES = (
    *("correlation", "correlation_low", "correlation_high", "correlation_smoothing", "skill", "skill_smoothing"),
    *("n_held_out", "n_units"),
)


def _predict(
    features: np.ndarray,
    y: np.ndarray,
    lacks: np.ndarray,
    tissue: Tissue,
    names: list[str],
    *,
    method: str,
    n_folds: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Predictions (n, m), held out where the cells have a value, and their scores (scores, m)."""
    have, lack = np.flatnonzero(~lacks), np.flatnonzero(lacks)
    slides = np.unique(tissue.slide[have])
    whole = len(lack) and not np.isin(tissue.slide[lack], slides).any() and len(slides) > 1
    units = tissue.slide if whole else spatial_blocks(tissue.xy, tissue.slide)
    n_units = len(np.unique(units[have]))
    n_folds = min(n_folds, n_units) if whole else n_folds
    if len(have) < _MIN_CELLS * n_folds or n_units < n_folds:
        msg = (
            f"{names[0]!r} was measured in {len(have)} cells in {n_units} blocks; {n_folds} folds need {_MIN_CELLS * n_folds} cells. Lower n_folds, "
            "or leave the gene out"
        )
        raise ValueError(msg)
    fold = np.full(len(y), -1)
    fold[have] = group_folds(units[have], n_folds)
    predict = (_decoder if method == "fine_tune" else _nearest)(features, y, fold, rng)
    predicted, smooth, mean = (np.empty_like(y) for _ in range(3))
    for f in range(-1 if len(lack) else 0, n_folds):
        known, hidden = np.flatnonzero((fold != f) & (fold >= 0)), np.flatnonzero(fold == f)
        # Nothing below what was measured: no negative expression.
        predicted[hidden] = np.maximum(predict(f, hidden), y[known].min(axis=0))
        if f >= 0:
            mean[hidden] = y[known].mean(axis=0, dtype=np.float64)
            smooth[hidden] = mean[hidden]
            for s in slides:
                at, near = hidden[tissue.slide[hidden] == s], known[tissue.slide[known] == s]
                if len(at) and len(near):
                    smooth[at] = _mean_nearest(tissue.xy, near, at, _N_SMOOTH) @ y[near]

    truth = y[have].astype(np.float64)
    sums = [_moments(p[have].astype(np.float64), truth, units[have]) for p in (predicted, smooth)]
    own, smoothing = (_pearson(s.sum(axis=0)) for s in sums)
    draws = rng.multinomial(n_units, np.full(n_units, 1 / n_units), size=_N_BOOTSTRAP)
    spread = _pearson(np.tensordot(draws, sums[0], axes=1).swapaxes(0, 1))
    known_spread = np.where(np.isfinite(spread).all(axis=0), spread, np.nan)
    low, high = np.percentile(known_spread, [2.5, 97.5], axis=0)
    error = np.square(mean[have] - truth).sum(axis=0)
    skills = [1 - np.square(p[have] - truth).sum(axis=0) / error for p in (predicted, smooth)]
    counts = [np.full(y.shape[1], float(n)) for n in (len(have), n_units)]
    return predicted, np.stack([own, low, high, smoothing, *skills, *counts])


def _averages(near: np.ndarray, n_known: int) -> sp.csr_matrix:
    """Mean over ``near`` (n, k), positions among the known, as a matrix (n, n_known)."""
    n, k = near.shape
    shares = np.full(near.size, 1 / k, np.float32)
    return sp.csr_matrix((shares, near.ravel(), np.arange(0, near.size + 1, k)), shape=(n, n_known))


def _mean_nearest(points: np.ndarray, known: np.ndarray, rows: np.ndarray, k: int) -> sp.csr_matrix:
    from scipy.spatial import cKDTree

    near = cKDTree(points[known]).query(points[rows], k=np.arange(1, min(k, len(known)) + 1))[1]
    return _averages(near, len(known))


Predict = Callable[[int, np.ndarray], np.ndarray]


def _nearest(features: np.ndarray, y: np.ndarray, fold: np.ndarray, rng: np.random.Generator) -> Predict:
    """Mean of the measured values over the most similar cells of other folds than ``f``."""
    from sklearn.neighbors import NearestNeighbors

    def predict(f: int, rows: np.ndarray) -> np.ndarray:
        known = np.flatnonzero((fold != f) & (fold >= 0))
        if len(known) > _MAX_REFERENCE:
            known = np.sort(rng.choice(known, _MAX_REFERENCE, replace=False))
        search = NearestNeighbors(n_neighbors=min(_N_NEAREST, len(known)), algorithm="brute").fit(features[known])
        return _averages(search.kneighbors(features[rows], return_distance=False), len(known)) @ y[known]

    return predict


def _decoder(features: np.ndarray, y: np.ndarray, fold: np.ndarray, rng: np.random.Generator) -> Predict:
    """Ridge regression on the features and random Fourier features of them, trained on other folds than ``f``.

    All fits come from sums over the folds: cells are gone through once.
    """
    # Of a pair of cells the typical squared distance, twice the total variance.
    distance = 2 * max(float(features.var(axis=0, dtype=np.float64).sum()), 1e-12)
    angles = features @ rng.normal(0, (0.3 * distance) ** -0.5, (features.shape[1], _N_FREQUENCIES)).astype(np.float32)
    x = np.hstack([features, np.cos(angles), np.sin(angles)]).astype(np.float64)
    x -= x.mean(axis=0)
    x /= np.maximum(x.std(axis=0), 1e-9)
    folds = [np.flatnonzero(fold == f) for f in range(fold.max() + 1)]
    y = y.astype(np.float64)
    sums = [(len(r), x[r].sum(0), y[r].sum(0), x[r].T @ x[r], x[r].T @ y[r], np.square(y[r]).sum(0)) for r in folds]

    def fit(known: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        n, sx, sy, xx, xy, _ = (sum(parts[1:], parts[0]) for parts in zip(*(sums[f] for f in known), strict=True))
        mx, my = sx / n, sy / n
        sizes, axes = np.linalg.eigh(xx / n - np.outer(mx, mx))
        return mx, my, np.maximum(sizes, 0), axes, axes.T @ (xy / n - np.outer(mx, my))

    def errors(known: list[int], f: int) -> np.ndarray:
        """Squared error (strengths, genes) in fold ``f``."""
        mx, my, sizes, axes, turned = fit(known)
        n, sx, sy, xx, xy, yy = sums[f]
        out = []
        for strength in _STRENGTHS:
            slope = axes @ (turned / (sizes + strength)[:, None])
            start = my - mx @ slope
            out.append(
                yy - 2 * (slope * xy).sum(0) - 2 * start * sy + (slope * (xx @ slope)).sum(0)
                + 2 * start * (sx @ slope) + n * start**2
            )  # fmt: skip
        return np.array(out)

    def predict(f: int, rows: np.ndarray) -> np.ndarray:
        known = [g for g in range(len(folds)) if g != f]
        strength = np.full(y.shape[1], 0.01)
        if len(known) > 1:
            total = np.sum([errors([h for h in known if h != g], g) for g in known], axis=0)
            strength = _STRENGTHS[total.argmin(axis=0)]
        mx, my, sizes, axes, turned = fit(known)
        return my + (x[rows] - mx) @ (axes @ (turned / (sizes[:, None] + strength)))

    return predict


def _moments(a: np.ndarray, b: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Sum up (units, 6, m) 1, a, b, aa, bb, ab over the cells of each unit, both centred first."""
    _, codes = np.unique(units, return_inverse=True)
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    member = sp.csr_matrix((np.ones(len(codes)), (codes, np.arange(len(codes)))))
    return np.stack([member @ v for v in (np.ones_like(a), a, b, a * a, b * b, a * b)], axis=1)


def _pearson(sums: np.ndarray) -> np.ndarray:
    """Correlation from sums (6, ...) of 1, a, b, aa, bb, ab; NaN where one is constant."""
    n, a, b, aa, bb, ab = sums
    va, vb = aa - a * a / n, bb - b * b / n
    flat = (va <= 1e-9 * n) | (vb <= 1e-9 * n)
    return np.divide(ab - a * b / n, np.sqrt(np.maximum(va * vb, 0)), out=np.full(n.shape, np.nan), where=~flat)


def _fill(values: Any, wanted: np.ndarray, imputed: np.ndarray, written: np.ndarray) -> Any:
    """Put what was imputed into the measured values; see ``layers`` in :func:`impute`."""
    if sp.issparse(values) and 2 * len(wanted) <= values.shape[1]:
        columns = values.tocsc()
        new = np.where(written, imputed, columns[:, wanted].toarray())
        others = np.setdiff1d(np.arange(values.shape[1]), wanted)
        both = sp.hstack([columns[:, others], sp.csc_matrix(new)], format="csc")
        return both[:, np.argsort(np.r_[others, wanted])].tocsr().astype(np.float32)
    out = values.toarray() if sp.issparse(values) else values.copy()
    out[:, wanted] = np.where(written, imputed, out[:, wanted])
    return out
