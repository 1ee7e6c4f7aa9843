"""Records of embeddings: which model made them, and whether their columns mean the same for all cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp

from spatialfm._data._adata import check_cells, get_obs_labels, in_memory
from spatialfm._settings import warn

if TYPE_CHECKING:
    from anndata import AnnData

# Fewer cells give no reliable means and variances.
_MIN_CELLS = 20
# Columns with more values than this name no slides.
_MAX_SLIDES = 1000
_ROUNDING = 2e-3


NICHE = "X_niche"
"""Default embedding for what describes the surroundings of a cell: domains, niches, regions."""
NICHE_AND_STATE = ("X_niche", "X_state")
"""Default embeddings for what describes a cell: its surroundings, and what it is."""
RECORDS = "embeddings"
"""Key of ``uns`` with a record of each embedding in ``obsm``."""
# What versions before 0.2 wrote.
_OUTDATED = {"X_heist_cell": "X_niche", "X_heist_gene": "X_state"}
_MAX_EMBEDDING = 1e15


def rep_keys(use_rep: str | Sequence[str]) -> list[str]:
    """Keys of ``obsm`` that ``use_rep`` names."""
    return [use_rep] if isinstance(use_rep, str) else list(use_rep)


def rep_name(use_rep: str | Sequence[str]) -> str:
    """Name of an embedding, of one or several keys of ``obsm``, for tables and messages."""
    return " + ".join(rep_keys(use_rep))


def find_record(adata: AnnData, use_rep: str) -> Mapping[str, Any] | None:
    """Find what :func:`spatialfm.tl.embed` noted about ``obsm[use_rep]``; None where it did not make it."""
    records = adata.uns.get(RECORDS)
    entry = records.get(use_rep) if isinstance(records, Mapping) else None
    return entry if isinstance(entry, Mapping) and "model" in entry and "params" in entry else None


def axes_of(record: Mapping[str, Any]) -> Literal["model", "data"]:
    """Whether columns are comparable wherever the model was used, or are axes of the data set they were computed on."""
    return "model" if str(record.get("axes", "data")) == "model" else "data"


def check_not_outdated(adata: AnnData, use_rep: str) -> None:
    """Raise where ``use_rep`` is, or could be, an embedding under the name that earlier versions gave it."""
    old = adata.uns.get("heist")
    joint = use_rep == "X_heist" and isinstance(old, Mapping) and "blocks" in old
    found = [name for name in _OUTDATED if name in adata.obsm]
    if joint or use_rep in found or (use_rep in _OUTDATED.values() and use_rep not in adata.obsm and found):
        msg = (
            f"this file was embedded by spatialfm 0.1, under the names {found or [use_rep]}. Run sfm.tl.embed(adata) "
            f"again: it writes obsm['X_niche'] (was 'X_heist_cell') and obsm['X_state'] (was 'X_heist_gene')"
        )
        raise ValueError(msg)


def check_embedded_together(adata: AnnData, use_rep: str, rep: np.ndarray) -> None:
    """Raise where ``rep``, read from ``obsm[use_rep]``, was computed in several parts with different axes."""
    record = find_record(adata, use_rep)
    if record is not None and axes_of(record) == "model":
        return
    if record is not None and "axes" in record:
        _check_record(adata, use_rep, record)
        return
    # Embeddings of older versions, and those whose record was lost, as by ad.concat.
    column = _embedded_apart_by(adata.obs, rep)
    if column is None:
        return
    found = (
        f"its columns have mean 0 and the same total variance on each value of obs[{column!r}], as where each is "
        f"embedded by itself: they are axes of each alone. {_fix(column)}"
    )
    if use_rep in (*NICHE_AND_STATE, "X_hibio"):
        msg = f"obsm[{use_rep!r}]: {found}"
        raise ValueError(msg)
    warn("obsm[%r]: %s. Right only if its columns mean the same everywhere", use_rep, found)


def _fix(column: str) -> str:
    given = f"library_key={column!r}" if column else "library_key= and the column of obs that names the slides"
    return f"Embed them together, on the AnnData of all of them: sfm.tl.embed(adata, ...) with {given}"


def _check_record(adata: AnnData, use_rep: str, record: Mapping[str, Any]) -> None:
    """Raise unless all cells were embedded together; a subset of them has the same axes."""
    column = str(record["params"].get("library_key", ""))
    apart = (
        f"obsm[{use_rep!r}] by {str(record['model'])!r} was computed in several parts, and its columns are axes of "
        "each part alone, as principal components are"
    )
    if "id" not in record or "n_cells" not in record.get("slides", {}):
        # ad.concat(uns_merge="same") keeps what is the same in all parts.
        msg = f"{apart}: only what their records have in common is left in uns. {_fix(column)}"
        raise ValueError(msg)
    slides = record["slides"]
    n_embedded = int(np.sum(slides["n_cells"]))
    if adata.n_obs > n_embedded:
        msg = f"{apart}: its record is of {n_embedded} cells, and adata has {adata.n_obs}. {_fix(column)}"
        raise ValueError(msg)
    if column in adata.obs:
        known = set(map(str, slides["names"]))
        own = set(get_obs_labels(adata, column, name="library_key").categories)
        if own & known and own - known:
            warn(
                "obsm[%r] was computed on the slides %s of obs[%r], and %s are none of them. If they were embedded by "
                "themselves, their columns mean "
                "something else. %s",
                use_rep, sorted(known)[:5], column, sorted(own - known)[:5], _fix(column),
            )  # fmt: skip


def _embedded_apart_by(obs: pd.DataFrame, rep: np.ndarray) -> str | None:
    """Find a column of ``obs`` by whose values the cells of ``rep`` (n, d) were embedded separately.

    Our models centre the columns and scale them to a total variance of about 1 (or 2, for both blocks). If this holds,
    up to rounding, for the cells of one value and also for all other cells, they were embedded separately. In a joint
    embedding, it holds only for all cells at once.
    """
    n = len(rep)

    def standard(count: Any, total: np.ndarray, squares: Any) -> Any:
        """Whether sums over ``count`` cells are those of a whole embedding."""
        mean = total / np.maximum(count, 1)[..., None]
        variance = squares / np.maximum(count, 1)
        like_ours = ((variance > 0.99) & (variance < 1.06)) | ((variance > 1.99) & (variance < 2.12))
        return like_ours & (np.abs(mean).max(axis=-1) < _ROUNDING * np.sqrt(variance)) & (count >= _MIN_CELLS)

    if not n or not rep.shape[1]:
        return None
    squares = np.einsum("ij,ij->i", rep, rep, dtype=np.float64)
    total, whole = rep.sum(axis=0, dtype=np.float64), squares.sum()
    if not standard(np.array(n), total, whole):
        return None
    for column in obs.columns:
        codes, names = pd.factorize(obs[column])
        if not 2 <= len(names) <= _MAX_SLIDES or (codes < 0).any():
            continue
        member = sp.csr_matrix((np.ones(n), (codes, np.arange(n))), shape=(len(names), n))
        count = np.bincount(codes)
        sums, own = np.asarray(member @ rep), member @ squares
        same = np.abs(own / count / (whole / n) - 1) < _ROUNDING
        if (same & standard(count, sums, own) & standard(n - count, total - sums, whole - own)).any():
            return str(column)
    return None


def get_embedding(adata: AnnData, use_rep: str | Sequence[str], *, instead: str = "") -> np.ndarray:
    """Read ``obsm[use_rep]`` as a float array (n_obs, n_columns), the columns of several keys side by side.

    Raises unless all values are finite and columns mean the same for all cells. Where a key is missing, the message
    names what to do ``instead``.
    """
    check_cells(adata)
    keys = rep_keys(use_rep)
    if not keys:
        msg = "use_rep is empty; name at least one embedding in obsm"
        raise ValueError(msg)
    reps = [_get_one_embedding(adata, key, instead) for key in keys]
    return reps[0] if len(reps) == 1 else np.hstack(reps)


def _get_one_embedding(adata: AnnData, use_rep: str, instead: str) -> np.ndarray:
    check_not_outdated(adata, use_rep)
    if use_rep not in adata.obsm:
        call = "sfm.tl.embed(adata, model='hibio')" if use_rep.startswith("X_hibio") else "sfm.tl.embed(adata)"
        msg = (
            f"obsm[{use_rep!r}] is missing; run {call} first, {f'{instead}, ' if instead else ''}or name another "
            f"embedding with use_rep=, one of {list(adata.obsm)}"
        )
        raise KeyError(msg)
    rep = in_memory(adata.obsm[use_rep])
    rep = np.asarray(rep.to_numpy() if isinstance(rep, pd.DataFrame) else rep)
    if rep.ndim != 2 or not np.issubdtype(rep.dtype, np.floating):
        msg = f"obsm[{use_rep!r}] has shape {rep.shape} and dtype {rep.dtype}; an embedding is a matrix of floats"
        raise ValueError(msg)
    bad = int((~np.isfinite(rep).all(axis=1)).sum())
    if bad:
        msg = f"obsm[{use_rep!r}] holds NaN or infinite values for {bad} of {adata.n_obs} cells; drop these cells first"
        raise ValueError(msg)
    largest = float(np.abs(rep).max(initial=0))
    if largest > _MAX_EMBEDDING:
        msg = (
            f"obsm[{use_rep!r}] holds values up to {largest:.3g}, whose squares overflow; scale it, or use "
            "another embedding"
        )
        raise ValueError(msg)
    check_embedded_together(adata, use_rep, rep)
    return rep
