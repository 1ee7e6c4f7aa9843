"""Retrieval of spots across modalities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from spatialfm._checks import check_choice, check_positive, check_text, checked
from spatialfm._data._adata import get_embedding
from spatialfm._data._embeddings import find_record
from spatialfm._data._write import check_free, write
from spatialfm._settings import logger, progress

if TYPE_CHECKING:
    from anndata import AnnData

_DIRECTIONS = ("image->gene", "gene->image", "gene->gene", "image->image")
_BLOCK = 2**24  # similarities held at once, 64 MB
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

    ``"image->gene"`` asks which expression fits the histology of each spot of ``adata``: its image embedding is compared with the gene embedding of
    every spot of ``reference`` by cosine. The search is exact. Neither file needs the modality that is not compared.

    Where a spot's true partner is in the reference (the same spot, whose image and expression were both measured), its rank is counted too, among all
    spots of the reference; :func:`spatialfm.get.retrieval_recall_df` sums it up.

    Parameters
    ----------
    adata
        Spots to find something for.
    reference
        Spots to search, with unique names; not changed. It may be ``adata`` itself.
    direction
        Modality of ``adata``, then that of ``reference``.
    n
        Spots to retrieve for each spot.
    use_rep
        What the keys of both embeddings in ``obsm`` begin with: ``obsm["{use_rep}_image"]`` and ``obsm["{use_rep}_gene"]``, of the same width and space. Rows of
        zeros have similarity 0 to everything.
    paired
        Whether spots of the same name in ``adata`` and ``reference`` are the same spot. Where None, only if ``reference`` is ``adata``: barcodes
        recur from one Visium slide to the next.
    key_added
        Where the result is written, in ``obsm``, ``uns`` and, if paired, ``obs``.
    copy
        Whether to return a changed copy instead of changing ``adata``.

    Returns
    -------
    None, or the copy. Written are

    ``obsm[key_added]``
        Table (n_obs, n) of names in ``reference``, columns ``"1"`` (most similar), ``"2"``, ... Spots of the same embedding follow each other by name.
        :func:`spatialfm.get.retrieved_df` gives it as a long table.
    ``obsm["{key_added}_similarity"]``
        float32 (n_obs, n), their cosine similarities.
    ``obs["{key_added}_rank"]``
        If paired: float64, rank of the spot's own partner among all spots of the reference, 1 for the most similar; the mean rank among those as
        similar (within 2e-6, the rounding of float32); NaN where the reference lacks the spot. An earlier one is removed if not paired.
    ``uns[key_added]``
        ``params`` (the arguments) and ``n_reference``, the number of spots searched.

    Raises
    ------
    KeyError
        If an embedding is missing.
    ValueError
        If the embeddings differ in width or come from different models (``sha256`` in ``uns["embeddings"]``), are not finite, names are not unique, no name is
        shared where ``paired=True``, or ``n`` or ``direction`` is out of range.

    Notes
    -----
    The result depends neither on the order of the rows of either file nor on the number of threads. Memory beyond the embeddings is about 120 MB and the
    result, whatever the number of spots (more where most cosines lie within 2e-6 of each other without being of the same embedding).

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
    check_free(
        adata,
        "tl.retrieve",
        {"obsm": [key_added, f"{key_added}_similarity"], "obs": [f"{key_added}_rank"], "uns": [key_added]},
    )
    check_choice("direction", direction, _DIRECTIONS)
    check_positive("n", n)
    if n > reference.n_obs:
        msg = f"n={n} spots cannot be retrieved from a reference of {reference.n_obs}; pass n={reference.n_obs} or less"
        raise ValueError(msg)
    if not reference.obs_names.is_unique:
        msg = "names of the reference recur, so that none says which spot was retrieved; call reference.obs_names_make_unique() first"
        raise ValueError(msg)
    check_text("reference.obs_names", reference.obs_names)
    source, target = direction.split("->")
    _check_same_model((adata, f"{use_rep}_{source}"), (reference, f"{use_rep}_{target}"))
    queries = _unit_rows(adata, f"{use_rep}_{source}", "adata")
    # By name, so that ties are broken by it and the order of the rows plays no part.
    order = np.argsort(reference.obs_names.to_numpy(dtype=str), kind="stable")
    targets = _unit_rows(reference, f"{use_rep}_{target}", "reference")[order]
    if queries.shape[1] != targets.shape[1]:
        msg = (
            f"obsm['{use_rep}_{source}'] of adata has {queries.shape[1]} columns and obsm['{use_rep}_{target}'] of the reference "
            f"{targets.shape[1]}; embed both with the same model"
        )
        raise ValueError(msg)
    names = reference.obs_names[order]
    if paired is None:
        paired = reference is adata
    partner = _partners(adata, names) if paired else None
    found, similarity, rank = _search(queries, targets, int(n), partner)

    table = pd.DataFrame(
        names.to_numpy(dtype=object)[found], index=adata.obs_names, columns=[str(k + 1) for k in range(n)]
    )
    entry = {
        "params": {"direction": direction, "n": int(n), "use_rep": use_rep, "paired": bool(paired)},
        "n_reference": len(names),
    }
    fields: dict[str, dict[str, Any]] = {
        "obsm": {key_added: table, f"{key_added}_similarity": similarity},
        "uns": {key_added: entry},
        "obs": {} if rank is None else {f"{key_added}_rank": rank},
    }
    adata = write(adata, "tl.retrieve", key_added, fields, copy=copy)
    written = f"obsm[{key_added!r}], obsm['{key_added}_similarity']"
    if rank is not None:
        written += f", obs['{key_added}_rank'] (median {np.nanmedian(rank):.6g})"
    logger.info(f"retrieve: {direction}, {n} of {len(names)} spots for each of {len(queries)} -> {written}")
    return adata if copy else None


def _check_same_model(queries: tuple[AnnData, str], targets: tuple[AnnData, str]) -> None:
    records = [find_record(*side) for side in (queries, targets)]
    hashes = [str(record["sha256"]) for record in records if record is not None and "sha256" in record]
    if len(hashes) == 2 and hashes[0] != hashes[1]:
        msg = (
            f"adata and reference were embedded by different models (sha256 {hashes[0][:12]}... and {hashes[1][:12]}...), "
            "whose spaces have nothing to do with each other; embed both with the same"
        )
        raise ValueError(msg)


def _unit_rows(adata: AnnData, key: str, which: str) -> np.ndarray:
    """Rows of an embedding at length 1, float32; rows of zeros stay."""
    if key not in adata.obsm:
        msg = (
            f"obsm[{key!r}] of {which} is missing, it holds {list(adata.obsm)}; run sfm.tl.embed({which}, model='hibio') first (with an image where "
            "that modality is asked for), or name what other keys begin with in use_rep="
        )
        raise KeyError(msg)
    rep = get_embedding(adata, key).astype(np.float64)
    length = np.linalg.norm(rep, axis=1, keepdims=True)
    return np.divide(rep, length, out=np.zeros_like(rep), where=length > 0).astype(np.float32)


def _partners(adata: AnnData, names: pd.Index) -> np.ndarray:
    """Position among ``names`` of each spot, -1 where it is not there."""
    if not adata.obs_names.is_unique:
        msg = "names of adata recur, so that spots cannot be paired by name; call adata.obs_names_make_unique() first, or pass paired=False"
        raise ValueError(msg)
    partner = names.get_indexer(adata.obs_names)
    if (partner < 0).all():
        msg = (
            f"paired=True, but no spot of adata is in the reference by name: {list(adata.obs_names[:2])} and {list(names[:2])}; "
            "bring the names together, or leave paired out"
        )
        raise ValueError(msg)
    return partner


def _search(
    queries: np.ndarray, targets: np.ndarray, n: int, partner: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Positions of the ``n`` most similar targets and their similarities (queries, n), and the rank of each partner.

    A column belongs to one of many groups, and the n-th largest maximum of a group is no more than the n-th largest similarity. So only groups
    that reach it are looked into, much less work than a partition of whole rows. Candidates are then compared by a sum in float64,
    whose value does not depend on the shape of the block, as that of a matrix product does.
    """
    n_targets = len(targets)
    size = int(np.clip(n_targets // (4 * n), 1, _GROUP))
    n_groups = -(-n_targets // size)
    padded = np.zeros((size * n_groups, targets.shape[1]), np.float32)
    padded[:n_targets] = targets
    # Of targets of the same embedding, such as empty patches, only the first n can be found: the others would all be candidates.
    # The first n of all targets are never among them, and in n groups, so that the n-th largest maximum is finite.
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
            for i in np.flatnonzero(partner[start:stop] >= 0):
                own = values[i, partner[start + i]]
                above = np.count_nonzero(values[i] > own + _ROUNDING)
                tied = np.count_nonzero(values[i] >= own - _ROUNDING) - above  # the partner is one of them
                rank[start + i] = above + (tied + 1) / 2
        values[:, spare] = -np.inf
        grouped = values.reshape(len(part), size, n_groups)  # a group is every n_groups-th column
        largest = grouped.max(axis=1)
        least = np.partition(largest, n_groups - n, axis=1)[:, n_groups - n] - _ROUNDING
        row, group = np.nonzero(largest >= least[:, None])
        pick, place = np.nonzero(grouped[row, :, group] >= least[row, None])
        row, column = row[pick], place * n_groups + group[pick]
        score = _dot(part, targets, row, column)
        best = np.lexsort((column, -score, row))
        # Rows are sorted now, and each has at least n.
        best = best[np.searchsorted(row[best], np.arange(len(part)))[:, None] + np.arange(n)]
        found[start:stop], similarity[start:stop] = column[best], score[best]
    return found, similarity, rank


def _dot(a: np.ndarray, b: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Products of pairs of rows, as the nearest float32 to their float64 sum."""
    result = np.empty(len(i), np.float32)
    for start in range(0, len(i), 2**15):
        pairs = slice(start, start + 2**15)
        result[pairs] = (a[i[pairs]].astype(np.float64) * b[j[pairs]]).sum(axis=1)
    return result
