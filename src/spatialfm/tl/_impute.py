"""Genes that were not measured, or measured badly, predicted from the other genes and the tissue around."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp

from spatialfm._checks import check_choice, check_text, checked
from spatialfm._data._adata import (
    check_cells,
    get_coordinates,
    get_libraries,
    get_matrix,
    get_table,
    raw_hint,
    warn_off_tissue,
)
from spatialfm._data._expression import (
    ValuesKind,
    check_finite,
    find_unmeasured,
    intensity_scale,
    log_normalize,
    resolve_kind,
)
from spatialfm._data._splits import check_folds
from spatialfm._data._write import check_free, record_params, write
from spatialfm._settings import logger, progress, warn
from spatialfm.tl._predictors import SCORES, Location, Prediction, predict_hidden

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

    from spatialfm._data._expression import Kind
    from spatialfm.engine import Tissue
    from spatialfm.models import HEISTNiche

# Of the panel, hidden at once.
_SHARE = 0.2
# Weight of the niche beside the cell's state, where distances between cells are taken.
_NICHE = 0.5


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
    rng: int | np.random.Generator | None = 0,
    copy: bool = False,
) -> AnnData | None:
    """Predict genes from the other genes and the tissue around, and score each gene on cells that were held out.

    A gene that some cells lack (NaN, or the cells of ``mask``, or slides that did not measure it) is filled in these
    cells. A gene that no cell lacks is predicted in every cell, from tissue blocks other than the cell's own, to see
    how well it can be predicted; at most a fifth of the panel is hidden at once. Embeddings are computed without the
    hidden genes. Predictions vary less than measurements: do not test for differential expression on them. Values that
    were normalised by the total predict each other to some degree; a gene shuffled over the cells shows how much.

    Parameters
    ----------
    %(adata)s
    genes
        Genes to impute. Where None, those that some cells lack, or all if none does, without constant genes.
    mask
        Boolean column of ``obs``, true for the cells that lack ``genes``. Needs ``genes``.
    method
        ``"zero_shot"``: mean over the 30 cells that are most similar in state and niche; nothing is trained.
        ``"fine_tune"``: ridge regression from the embedding, trained on the measured cells.
    model
        ``"heist-niche"``, or another model of that architecture: a name, folder, file or model.
    %(library_key)s
    %(layer)s
    %(basis)s
    %(values)s
    n_folds
        Number of folds. Blocks are held out, 36 in a slide, or whole slides where whole slides lack the gene.
    %(key_added)s
    %(rng)s
    %(copy)s

    Returns
    -------
    ``None``, or the copy. Written, besides a missing tissue graph:

    ``layers[key_added]``
        float32 (n_obs, n_vars), log-normalised: predictions where a value was imputed, measured values elsewhere.
    ``uns[key_added]``
        ``params``, ``genes``, and arrays with a number for each gene, on held-out cells: Pearson ``correlation`` with
        its 95 % interval (``correlation_low``, ``correlation_high``; bootstrap over blocks or slides) and
        ``correlation_smoothing``, that of the mean of the 20 nearest measured cells; ``skill`` and ``skill_smoothing``,
        1 minus squared error over that of the gene's mean; ``n_held_out``, ``n_units``, ``n_imputed``.

    Raises
    ------
    KeyError
        A gene, column, layer or the coordinates are missing.
    ValueError
        No gene is left to predict from, a gene is constant or measured in too few cells, or other genes hold NaN.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()
    >>> sfm.tl.impute(adata, ["Gad1", "Slc1a3"], library_key="mouse_id")
    >>> table = sfm.get.imputation_df(adata)
    """
    check_cells(adata)
    check_free(adata, "tl.impute", {"layers": [key_added], "uns": [key_added]})
    check_choice("method", method, ("zero_shot", "fine_tune"))
    check_folds(n_folds)
    if layer == key_added:
        msg = f"layer={layer!r} would be overwritten by the result; choose another key_added="
        raise ValueError(msg)
    encoder = _load(model)
    check_text("adata.var_names", adata.var_names)

    hidden = _read_genes(adata, genes, mask, layer, library_key)
    tissue = _read_tissue(adata, hidden, library_key=library_key, basis=basis)
    kind = resolve_kind(hidden.x[:, hidden.complete], values, "X" if layer is None else f"layers[{layer!r}]")
    scale = _scales(hidden) if kind == "intensity" else None
    logged = log_normalize(hidden.x, kind, scale=scale, counted=hidden.complete)
    found = _predict(
        encoder,
        hidden,
        tissue,
        logged,
        kind=kind,
        method=method,
        n_folds=n_folds,
        rng=np.random.default_rng(rng),
        names=list(map(str, adata.var_names)),
    )

    filled, n_imputed = _fill(logged, hidden, tissue, found.values)
    scores = dict(zip(SCORES, found.scores, strict=True))
    counts = {name: scores.pop(name).astype(np.int64) for name in ("n_held_out", "n_units")}
    entry = {
        "genes": list(map(str, adata.var_names[hidden.wanted])),
        **scores,
        **counts,
        "n_imputed": n_imputed,
        "params": record_params(
            method=method,
            model=encoder.name,
            mask=mask,
            library_key=library_key,
            layer=layer,
            basis=basis,
            values=kind,
            unmeasured=list(map(str, adata.var_names[hidden.unmeasured])),
            n_folds=int(n_folds),
            device=encoder.device,
        ),
    }
    adata = write(adata, "tl.impute", key_added, {"layers": {key_added: filled}, "uns": {key_added: entry}}, copy=copy)
    tissue.store_built(adata)
    _log(entry, key_added)
    return adata if copy else None


class _Hidden(NamedTuple):
    """Expression, and what of it is to be predicted."""

    x: Any
    """(n_obs, n_vars) expression; missing values hold what does not matter."""
    wanted: np.ndarray
    """Positions of the genes to impute, ascending."""
    lacks: np.ndarray
    """(n_obs, wanted) where a value is missing."""
    unmeasured: np.ndarray
    """Positions of other genes that a slide did not measure."""

    @property
    def partly(self) -> np.ndarray:
        """Which of the wanted genes are missing in some cells."""
        return np.asarray(self.lacks.any(axis=0))

    @property
    def complete(self) -> np.ndarray:
        """Positions of the genes that no cell lacks."""
        missing = np.union1d(self.wanted[self.partly], self.unmeasured)
        return np.setdiff1d(np.arange(self.x.shape[1]), missing)


class _Encoder(NamedTuple):
    name: str
    device: str
    embed: Callable[[Tissue, Any], np.ndarray]
    """Features (n, d) of the cells of a tissue from an expression (n, genes)."""


def _load(model: str | Path | HEISTNiche) -> _Encoder:
    from spatialfm.engine import choose_device, find_encoder

    on = choose_device()
    lacks = "cannot embed cells from any part of a panel"
    encoder = find_encoder(model, needs="encode_panel", lacks=lacks, dtype="float32")

    def embed(tissue: Tissue, expression: Any) -> np.ndarray:
        niche, state = encoder.encode_panel(tissue, expression, device=on)
        return np.hstack([state, _NICHE * niche])

    return _Encoder(encoder.model.name, on.type, embed)


def _read_tissue(adata: AnnData, hidden: _Hidden, *, library_key: str | None, basis: str) -> Tissue:
    """Read the tissue of the genes that no cell lacks, which decide its graph and the order of its cells."""
    from anndata import AnnData

    from spatialfm.engine import read_tissue

    complete = hidden.complete
    seen = AnnData(
        hidden.x[:, complete].astype(np.float32),
        obs=get_table(adata.obs).drop(columns="in_tissue", errors="ignore"),
        obsm={basis: get_coordinates(adata, basis)},
        obsp=dict(adata.obsp),
    )
    warn_off_tissue(adata)
    if "spatial_neighbors" in adata.uns:
        seen.uns["spatial_neighbors"] = adata.uns["spatial_neighbors"]
    return read_tissue(seen, library_key=library_key, basis=basis, values="log", networks=False)


def _read_genes(
    adata: AnnData, genes: str | Sequence[str] | None, mask: str | None, layer: str | None, library_key: str | None
) -> _Hidden:
    """Read the expression, and find the genes to impute and the cells that lack them."""
    if mask is not None and genes is None:
        msg = f"mask={mask!r} says which cells lack a gene, but not which; name them in genes="
        raise ValueError(msg)
    x: Any = get_matrix(adata, layer)
    x = sp.csc_matrix(x) if sp.issparse(x) else np.asarray(x)
    nan: Any = sp.csc_matrix((np.isnan(x.data), x.indices, x.indptr), shape=x.shape) if sp.issparse(x) else np.isnan(x)
    holds_nan = np.asarray(nan.sum(axis=0)).ravel() > 0
    libraries = get_libraries(adata, library_key)
    lacking = find_unmeasured([(x, libraries)])
    if genes is None:
        partly = holds_nan | lacking.any(axis=0)
        wanted = np.flatnonzero(partly) if partly.any() else np.arange(adata.n_vars)
    else:
        wanted = _positions(adata, [genes] if isinstance(genes, str) else list(map(str, genes)))
    others = np.setdiff1d(np.flatnonzero(holds_nan), wanted)
    if len(others):
        msg = (
            f"{len(others)} genes hold NaN and are not to be imputed: {list(adata.var_names[others[:3]])}; "
            "name them in genes= too, or drop them"
        )
        raise ValueError(msg)
    lacks = nan[:, wanted]
    lacks = lacks.toarray() if sp.issparse(lacks) else lacks.copy()
    for own, (_, rows) in zip(lacking, libraries, strict=True):
        lacks[rows] |= own[wanted]
    unmeasured = np.setdiff1d(np.flatnonzero(lacking.any(axis=0)), wanted)
    _warn_of_zeros(adata, np.flatnonzero(lacking.any(axis=0) & ~holds_nan), len(unmeasured) > 0)
    if mask is not None:
        lacks |= _mask(adata, mask)[:, None]
    if lacks.all(axis=0).any():
        names = list(adata.var_names[wanted[lacks.all(axis=0)]][:3])
        msg = f"no cell has a value of {names}; there is nothing to learn these genes from"
        raise ValueError(msg)
    varies = _varying(adata, x, wanted, lacks, named=genes is not None)
    hidden = _Hidden(_blank(x, wanted, lacks), wanted[varies], lacks[:, varies], unmeasured)
    check_finite(hidden.x)
    if len(hidden.complete) < 1 + bool((~hidden.partly).any()):
        msg = (
            f"{adata.n_vars - len(hidden.complete)} of the {adata.n_vars} genes are missing in some cells or hidden; "
            "none is left to predict from, name fewer genes"
        )
        raise ValueError(msg)
    return hidden


def _warn_of_zeros(adata: AnnData, zero: np.ndarray, some_unwanted: bool) -> None:
    if not len(zero):
        return
    names = ", ".join(map(str, adata.var_names[zero[:5]])) + (", ..." if len(zero) > 5 else "")
    warn(
        "impute: %d genes (%s) are zero in all cells of a slide, though other slides have them: taken as not measured "
        "there, and %s. Name in genes= what to predict, or drop them",
        len(zero),
        names,
        "nothing is predicted from them" if some_unwanted else "predicted there",
    )


def _varying(adata: AnnData, x: Any, wanted: np.ndarray, lacks: np.ndarray, *, named: bool) -> np.ndarray:
    """Which of the wanted genes vary between the cells that measured them; raises where one must and does not."""
    varies = np.array([np.ptp(_column(x, j)[~lacks[:, k]]) > 0 for k, j in enumerate(wanted)])
    constant = list(adata.var_names[wanted[~varies]][:3])
    if named and not varies.all():
        msg = (
            f"genes {constant} have one value in all cells that measured them; there is nothing to predict, "
            "leave them out"
        )
        raise ValueError(msg)
    if not varies.any():
        msg = "no gene varies between the cells; there is nothing to impute"
        raise ValueError(msg)
    if (lacks.any(axis=0) & ~varies).any():
        msg = f"genes {constant} are missing in some cells and constant in the others; drop them first"
        raise ValueError(msg)
    return varies


def _column(x: Any, j: int) -> np.ndarray:
    return x[:, [j]].toarray().ravel() if sp.issparse(x) else x[:, j]


def _blank(x: Any, wanted: np.ndarray, lacks: np.ndarray) -> Any:
    """Put zeros (sparse) or medians in the place of missing values, as float."""
    x = x.astype(np.float32) if x.dtype.kind != "f" else x.copy()
    if not sp.issparse(x):
        for k in np.flatnonzero(lacks.any(axis=0)):
            x[lacks[:, k], wanted[k]] = np.median(x[~lacks[:, k], wanted[k]])
        return x
    column = np.repeat(np.arange(x.shape[1]), np.diff(x.indptr))
    at = np.full(x.shape[1], -1)
    at[wanted] = np.arange(len(wanted))
    missing = at[column] >= 0
    missing[missing] = lacks[x.indices[missing], at[column[missing]]]
    x.data[missing] = 0
    x.eliminate_zeros()
    return x.tocsr()


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
            count = "several" if name in available else "none"
            msg = f"genes: {name!r} is {count} of the {len(available)} genes of adata"
            msg += f"; did you mean {near}?" if near and name not in available else ""
            msg += raw_hint(adata, name)
            raise KeyError(msg)
    return np.flatnonzero(np.isin(available, names))


def _mask(adata: AnnData, mask: str) -> np.ndarray:
    if mask not in adata.obs:
        msg = f"mask={mask!r} is not a column of adata.obs; it holds {list(adata.obs.columns)}"
        raise KeyError(msg)
    column = pd.Series(adata.obs[mask].to_numpy())  # booleans too where they are categories
    if not pd.api.types.is_bool_dtype(column) or column.isna().any() or not column.any():
        msg = (
            f"obs[{mask!r}] must be boolean, true for at least one cell (one that lacks the genes), "
            "without missing values"
        )
        raise ValueError(msg)
    return column.to_numpy(dtype=bool)


def _scales(hidden: _Hidden) -> np.ndarray:
    """Units of intensities, from the cells that measured them."""
    scale = intensity_scale(hidden.x)
    for k in np.flatnonzero(hidden.partly):
        scale[hidden.wanted[k]] = intensity_scale(hidden.x[~hidden.lacks[:, k]][:, [hidden.wanted[k]]])[0]
    return scale


class _Job(NamedTuple):
    shown: np.ndarray
    """Positions of the genes to embed from."""
    parts: list[np.ndarray]
    """Positions among the wanted genes, of genes that the same cells lack."""


def _jobs(hidden: _Hidden) -> list[_Job]:
    """Divide the wanted genes into jobs, each of which embeds the cells once."""
    complete, jobs = hidden.complete, []
    at = np.flatnonzero(hidden.partly)
    if len(at):
        _, pattern = np.unique(np.packbits(hidden.lacks[:, at], axis=0), axis=1, return_inverse=True)
        pattern = pattern.ravel()
        jobs.append(_Job(complete, [at[pattern == p] for p in range(pattern.max() + 1)]))
    at = np.flatnonzero(~hidden.partly)
    if len(at):
        # Every n-th, since genes that stand together in a list are often of one family and predict each other.
        n_parts = -(-len(at) // max(1, int(_SHARE * len(complete))))
        parts = [at[p::n_parts] for p in range(n_parts)]
        jobs += [_Job(np.setdiff1d(complete, hidden.wanted[part]), [part]) for part in parts]
    return jobs


def _predict(
    encoder: _Encoder,
    hidden: _Hidden,
    tissue: Tissue,
    logged: Any,
    *,
    kind: Kind,
    method: str,
    n_folds: int,
    rng: np.random.Generator,
    names: list[str],
) -> Prediction:
    """Predict the wanted genes in the cells of the tissue."""
    from threadpoolctl import threadpool_limits

    lacks, at = hidden.lacks[tissue.rows], Location(tissue.xy, tissue.slide)
    predicted = np.empty(lacks.shape, np.float32)
    scores = np.full((len(SCORES), lacks.shape[1]), np.nan)
    for shown, parts in progress(_jobs(hidden), desc="imputing", unit="part"):
        # Normalised among themselves: a hidden gene would be in the totals.
        expression = log_normalize(tissue.expression[:, np.searchsorted(hidden.complete, shown)], kind)
        features = encoder.embed(tissue, expression)
        for part in parts:
            y = logged[:, hidden.wanted[part]]
            y = (y.toarray() if sp.issparse(y) else np.asarray(y))[tissue.rows].astype(np.float32)
            # On two threads of a busy machine the decompositions were 10 times slower.
            with threadpool_limits(1, user_api="blas"):
                predicted[:, part], scores[:, part] = predict_hidden(
                    features, y, lacks[:, part[0]], at, method=method, n_folds=n_folds,
                    name=names[hidden.wanted[part[0]]], rng=rng,
                )  # fmt: skip
    return Prediction(predicted, scores)


def _fill(logged: Any, hidden: _Hidden, tissue: Tissue, predicted: np.ndarray) -> tuple[Any, np.ndarray]:
    """Put predictions in the place of missing values, or of all values of a gene that no cell lacks.

    Returns the expression and the number of predictions for each gene.
    """
    wanted, written = hidden.wanted, hidden.lacks | ~hidden.partly
    imputed = tissue.in_order(predicted)
    if sp.issparse(logged) and 2 * len(wanted) <= logged.shape[1]:
        columns = logged.tocsc()
        new = np.where(written, imputed, columns[:, wanted].toarray())
        others = np.setdiff1d(np.arange(logged.shape[1]), wanted)
        both = sp.hstack([columns[:, others], sp.csc_matrix(new)], format="csc")
        out = both[:, np.argsort(np.r_[others, wanted])].tocsr().astype(np.float32)
    else:
        out = logged.toarray() if sp.issparse(logged) else logged.copy()
        out[:, wanted] = np.where(written, imputed, out[:, wanted])
    return out, written.sum(axis=0)


def _log(entry: dict[str, Any], key_added: str) -> None:
    names, own, smoothing = (entry[name] for name in ("genes", "correlation", "correlation_smoothing"))
    smoothing = np.nan_to_num(smoothing, nan=-1)
    doubtful = [name for name, better in zip(names, own > smoothing, strict=True) if not better]
    if doubtful:
        logger.info(
            "impute: do not trust %d of %d genes, predicted on hidden cells no better than by the mean of the nearest "
            "measured cells: %s%s",
            len(doubtful), len(names), ", ".join(doubtful[:10]), ", ..." if len(doubtful) > 10 else "",
        )  # fmt: skip
    logger.info(
        "impute: %d values of %d genes, median correlation on hidden cells %.2f (nearest cells: %.2f) -> layers[%r], "
        "uns[%r]",
        entry["n_imputed"].sum(), len(names), np.nanmedian(own) if np.isfinite(own).any() else np.nan,
        np.median(np.nan_to_num(entry["correlation_smoothing"])), key_added, key_added,
    )  # fmt: skip
