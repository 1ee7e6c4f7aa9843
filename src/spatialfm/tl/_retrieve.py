"""Retrieval of spots across modalities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from spatialfm._checks import check_choice, check_positive, check_text, checked
from spatialfm._data._embeddings import find_record, get_embedding
from spatialfm._data._write import check_free, record_params, write
from spatialfm._settings import logger, progress

if TYPE_CHECKING:
    from anndata import AnnData

_DIRECTIONS = ("image->gene", "gene->image", "gene->gene", "image->image")
_BLOCK = 2**24  # similarities in memory at once, 64 MB
_GROUP = 64  # similarities of which only the largest is compared at first
_ROUNDING = 2e-6  # more than the error of a float32 cosine


@checked
def retrieve(
    adata: AnnData,
    reference: AnnData,
    direction: Literal["image->gene", "gene->image", "gene->gene", "image->image"] = "image->gene",
    *,
    n: int = 10,
    use_rep: str = "X_hibio",
    paired: bool | None = None,
    key_added: str = "retrieved",
    copy: bool = False,
) -> AnnData | None:
    """Find for each spot the spots of a reference whose other modality is most similar.

    ``"image->gene"`` compares the image embedding of each spot of ``adata`` with the gene embedding of each spot of
    ``reference`` by cosine. The search is exact, and memory does not grow with the number of spots beyond the
    embeddings and the result.

    Parameters
    ----------
    adata
        Spots to find something for.
    reference
        Spots to search, with unique names; not changed. It may be ``adata`` itself.
    direction
        Modality of ``adata``, then that of ``reference``.
    n
        Number of spots to retrieve for each spot.
    use_rep
        Beginning of the keys in ``obsm``: ``"{use_rep}_image"`` and ``"{use_rep}_gene"``, of one model. Rows of zeros
        have a similarity of 0 to everything.
    paired
        Whether spots of the same name in ``adata`` and ``reference`` are the same spot. Where None, only if
        ``reference`` is ``adata``, because barcodes recur on different Visium slides.
    %(key_added)s
    %(copy)s

    Returns
    -------
    ``None``, or the copy. Written:

    ``obsm[key_added]``
        Table (n_obs, n) of names in ``reference``, from column ``"1"`` (most similar) on; ties are sorted by name. See
        :func:`spatialfm.get.retrieved_df`.
    ``obsm["{key_added}_similarity"]``
        float32 (n_obs, n), cosine similarities.
    ``obs["{key_added}_rank"]``
        If paired: rank of the spot itself among all spots of the reference, 1 for the most similar, the mean rank where
        similarities are equal within 2e-6; NaN where the reference lacks the spot. See
        :func:`spatialfm.get.retrieval_recall_df`.
    ``uns[key_added]``
        ``params`` and ``n_reference``, the number of spots searched.

    Raises
    ------
    KeyError, ValueError
        An embedding is missing or not finite, the embeddings come from different models, or names are not unique.

    Examples
    --------
    >>> import anndata as ad, numpy as np, spatialfm as sfm
    >>> adata = ad.AnnData(obsm={"X_hibio_image": np.eye(3), "X_hibio_gene": np.eye(3)[[1, 0, 2]]})
    >>> sfm.tl.retrieve(adata, adata, n=1)
    >>> adata.obsm["retrieved"]["1"].tolist()
    ['1', '0', '2']
    >>> adata.obs["retrieved_rank"].tolist()
    [2.5, 2.5, 1.0]
    """
    similarities, ranks = f"{key_added}_similarity", f"{key_added}_rank"
    check_free(adata, "tl.retrieve", {"obsm": [key_added, similarities], "obs": [ranks], "uns": [key_added]})
    check_choice("direction", direction, _DIRECTIONS)
    check_positive("n", n)
    _check_reference(reference, n)

    sides = _read(adata, reference, direction, use_rep)
    if paired is None:
        paired = reference is adata
    partner = _partners(adata, sides.names) if paired else None

    found = _search(sides.queries, sides.targets, int(n), partner)

    names = sides.names.to_numpy(dtype=object)[found.targets]
    table = pd.DataFrame(names, index=adata.obs_names, columns=[str(k + 1) for k in range(n)])
    params = record_params(direction=direction, n=int(n), use_rep=use_rep, paired=bool(paired))
    fields: dict[str, dict[str, Any]] = {
        "obsm": {key_added: table, similarities: found.similarity},
        "uns": {key_added: {"params": params, "n_reference": len(sides.names)}},
        "obs": {} if found.rank is None else {ranks: found.rank},
    }
    adata = write(adata, "tl.retrieve", key_added, fields, copy=copy)
    written = f"obsm[{key_added!r}], obsm[{similarities!r}]"
    if found.rank is not None:
        written += f", obs[{ranks!r}] (median {np.nanmedian(found.rank):.6g})"
    logger.info(
        "retrieve: %s, %d of %d spots for each of %d -> %s",
        direction, n, len(sides.names), len(sides.queries), written,
    )  # fmt: skip
    return adata if copy else None


class _Sides(NamedTuple):
    queries: np.ndarray
    """(n_obs, d) rows of length 1."""
    targets: np.ndarray
    """(n_reference, d) rows of length 1, sorted by name."""
    names: pd.Index
    """Names of the targets."""


class _Found(NamedTuple):
    targets: np.ndarray
    """(queries, n) positions of the most similar targets."""
    similarity: np.ndarray
    """(queries, n) float32."""
    rank: np.ndarray | None
    """(queries,) rank of each query's partner, NaN where it has none."""


def _check_reference(reference: AnnData, n: int) -> None:
    if n > reference.n_obs:
        msg = f"n={n} spots cannot be retrieved from a reference of {reference.n_obs}; pass n={reference.n_obs} or less"
        raise ValueError(msg)
    if not reference.obs_names.is_unique:
        msg = (
            "names of the reference are not unique, so none says which spot was retrieved; call "
            "reference.obs_names_make_unique() first"
        )
        raise ValueError(msg)
    check_text("reference.obs_names", reference.obs_names)


def _read(adata: AnnData, reference: AnnData, direction: str, use_rep: str) -> _Sides:
    """Read both embeddings, of the same model and width."""
    source, target = direction.split("->")
    _check_same_model((adata, f"{use_rep}_{source}"), (reference, f"{use_rep}_{target}"))
    queries = _unit_rows(adata, f"{use_rep}_{source}", "adata")
    # By name, so that ties are broken by it and the order of the rows does not matter.
    order = np.argsort(reference.obs_names.to_numpy(dtype=str), kind="stable")
    targets = _unit_rows(reference, f"{use_rep}_{target}", "reference")[order]
    if queries.shape[1] != targets.shape[1]:
        msg = (
            f"obsm['{use_rep}_{source}'] of adata has {queries.shape[1]} columns and obsm['{use_rep}_{target}'] of the "
            f"reference {targets.shape[1]}; embed both with the same model"
        )
        raise ValueError(msg)
    return _Sides(queries, targets, reference.obs_names[order])


def _check_same_model(queries: tuple[AnnData, str], targets: tuple[AnnData, str]) -> None:
    records = [find_record(*side) for side in (queries, targets)]
    hashes = [str(record["sha256"]) for record in records if record is not None and "sha256" in record]
    if len(hashes) == 2 and hashes[0] != hashes[1]:
        msg = (
            f"adata and reference were embedded by different models (sha256 {hashes[0][:12]}... and "
            f"{hashes[1][:12]}...), whose spaces are not comparable; embed both with the same"
        )
        raise ValueError(msg)


def _unit_rows(adata: AnnData, key: str, which: str) -> np.ndarray:
    """Rows of an embedding at length 1, float32; rows of zeros stay."""
    if key not in adata.obsm:
        msg = (
            f"obsm[{key!r}] of {which} is missing, it holds {list(adata.obsm)}; run sfm.tl.embed({which}, "
            "model='hibio') first (with an image for image embeddings), or name the beginning of other keys in use_rep="
        )
        raise KeyError(msg)
    rep = get_embedding(adata, key).astype(np.float64)
    length = np.linalg.norm(rep, axis=1, keepdims=True)
    return np.divide(rep, length, out=np.zeros_like(rep), where=length > 0).astype(np.float32)


def _partners(adata: AnnData, names: pd.Index) -> np.ndarray:
    """Position among ``names`` of each spot, -1 where it is not there."""
    if not adata.obs_names.is_unique:
        msg = (
            "names of adata are not unique, so spots cannot be paired by name; call adata.obs_names_make_unique() "
            "first, or pass paired=False"
        )
        raise ValueError(msg)
    partner = names.get_indexer(adata.obs_names)
    if (partner < 0).all():
        msg = (
            f"paired=True, but adata and reference share no name: {list(adata.obs_names[:2])} and {list(names[:2])}; "
            "rename the spots of one, or leave paired out"
        )
        raise ValueError(msg)
    return partner


def _search(queries: np.ndarray, targets: np.ndarray, n: int, partner: np.ndarray | None) -> _Found:
    """Find the ``n`` most similar targets of each query, and the rank of its ``partner``.

    Each column belongs to one of many groups, and the n-th largest maximum of a group is at most the n-th largest
    similarity. So only groups that reach it are searched, which is much faster than a partition of whole rows. The
    similarities of candidates are then sums in float64, which do not depend on the shape of the block, as those of a
    matrix product do.
    """
    n_targets = len(targets)
    size = int(np.clip(n_targets // (4 * n), 1, _GROUP))
    n_groups = -(-n_targets // size)
    padded = np.zeros((size * n_groups, targets.shape[1]), np.float32)
    padded[:n_targets] = targets
    # Of targets with the same embedding, such as empty patches, only the first n can be found; the others would all be
    # candidates. The first n of all targets are never among them, and lie in n groups, so the n-th largest maximum is
    # finite.
    rows = pd.Series([row.tobytes() for row in targets])
    spare = np.flatnonzero(rows.groupby(rows).cumcount() >= n)
    found = np.empty((len(queries), n), np.intp)
    similarity = np.empty((len(queries), n), np.float32)
    rank = None if partner is None else np.full(len(queries), np.nan)
    block = max(1, _BLOCK // len(padded))
    buffer = np.empty((block, len(padded)), np.float32)
    for start in progress(range(0, len(queries), block), desc="retrieve", unit="block"):
        stop = min(start + block, len(queries))
        part = queries[start:stop]
        values = np.matmul(part, padded.T, out=buffer[: stop - start])
        values[:, n_targets:] = -np.inf
        if rank is not None and partner is not None:
            rank[start:stop] = _ranks(values, partner[start:stop])
        values[:, spare] = -np.inf
        grouped = values.reshape(len(part), size, n_groups)  # a group is every n_groups-th column
        largest = grouped.max(axis=1)
        least = np.partition(largest, n_groups - n, axis=1)[:, n_groups - n] - _ROUNDING
        row, group = np.nonzero(largest >= least[:, None])
        pick, member = np.nonzero(grouped[row, :, group] >= least[row, None])
        row, column = row[pick], member * n_groups + group[pick]
        score = _dot(part, targets, row, column)
        best = np.lexsort((column, -score, row))
        # Rows are sorted now, and each has at least n.
        best = best[np.searchsorted(row[best], np.arange(len(part)))[:, None] + np.arange(n)]
        found[start:stop], similarity[start:stop] = column[best], score[best]
    return _Found(found, similarity, rank)


def _ranks(values: np.ndarray, partner: np.ndarray) -> np.ndarray:
    """Rank (queries,) of each partner's similarity in a row of ``values``; the mean rank among those as similar."""
    rank = np.full(len(partner), np.nan)
    for i in np.flatnonzero(partner >= 0):
        own = values[i, partner[i]]
        above = np.count_nonzero(values[i] > own + _ROUNDING)
        tied = np.count_nonzero(values[i] >= own - _ROUNDING) - above  # the partner is one of them
        rank[i] = above + (tied + 1) / 2
    return rank


def _dot(a: np.ndarray, b: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Products of pairs of rows, as the nearest float32 to their float64 sum."""
    result = np.empty(len(i), np.float32)
    for start in range(0, len(i), 2**15):
        pairs = slice(start, start + 2**15)
        result[pairs] = (a[i[pairs]].astype(np.float64) * b[j[pairs]]).sum(axis=1)
    return result
