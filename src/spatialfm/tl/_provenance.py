"""Origin of embeddings: whether they have seen the labels, and whether columns of several files mean the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spatialfm._data._adata import get_obs_labels
from spatialfm._data._embeddings import axes_of, find_record, rep_keys, rep_name
from spatialfm._settings import warn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

_SAME = 0.9  # adjusted mutual information from which two columns are taken as the same


def check_networks(adata: AnnData, use_rep: str | Sequence[str], groupby: str) -> None:
    """Raise where an embedding comes from gene networks of the groups of ``obs[groupby]``, so that it has seen them.

    Warn where the networks were built from another column with nearly the same groups. Groups that were found without
    labels are fine, and so are embeddings that read no gene networks.
    """
    for key in rep_keys(use_rep):
        _check_networks(adata, key, groupby)


def _check_networks(adata: AnnData, use_rep: str, groupby: str) -> None:
    column = _network_column(adata, use_rep)
    if not column:
        return
    if column == groupby:
        msg = (
            f"use_rep={use_rep!r} comes from gene networks of the groups of obs[{groupby!r}], so it has seen these "
            "labels. Build networks without them and embed again: sfm.pp.grn(adata, groupby='auto'); "
            "sfm.tl.embed(adata, model='heist')"
        )
        raise ValueError(msg)
    networks = adata.uns.get("grn", {})
    if (str(networks.get("groupby", "")) == column and networks.get("auto", False)) or column not in adata.obs:
        return
    from sklearn.metrics import adjusted_mutual_info_score

    groups, labels = (get_obs_labels(adata, c, name="groupby").codes for c in (column, groupby))
    known = (groups >= 0) & (labels >= 0)
    agreement = adjusted_mutual_info_score(labels[known], groups[known])
    if agreement > _SAME:
        warn(
            "use_rep=%r comes from gene networks of the groups of obs[%r], which nearly are those of obs[%r] (adjusted "
            "mutual information %.2f), so it has all but seen these labels; sfm.pp.grn(adata, groupby='auto') builds "
            "networks without labels",
            use_rep,
            column,
            groupby,
            agreement,
        )


def check_same_axes(parts: Sequence[AnnData], use_rep: str | Sequence[str], *, fix: str) -> None:
    """Raise where the columns of an embedding cannot mean the same in all parts; warn where its origin is unknown."""
    unknown = [key for key in rep_keys(use_rep) if not _same_axes(parts, key, fix)]
    if unknown:
        warn(
            "the origin of obsm[%r] is unknown: its columns must mean the same in all %d AnnData, as those of one "
            "model or one joint decomposition do",
            rep_name(unknown),
            len(parts),
        )


def _same_axes(parts: Sequence[AnnData], use_rep: str, fix: str) -> bool:
    """Whether records say that columns mean the same in all parts; raises where they say that they do not."""
    widths = [part.obsm[use_rep].shape[1] for part in parts]
    if len(set(widths)) > 1:
        msg = f"obsm[{use_rep!r}] has different numbers of columns, {widths}; {fix}"
        raise ValueError(msg)
    found = [find_record(part, use_rep) for part in parts]
    records = [record for record in found if record is not None]
    # Parts of what was embedded together.
    if len(records) == len(found) and len({str(record.get("id", k)) for k, record in enumerate(records)}) == 1:
        return True
    for record in records:
        if axes_of(record) == "data":
            msg = (
                f"obsm[{use_rep!r}] by {str(record['model'])!r} has different axes in each of the {len(parts)} "
                "AnnData, as principal components have: the columns of one do not match those of another. "
                f"{fix[:1].upper()}{fix[1:]}"
            )
            raise ValueError(msg)
    if len({str(record["sha256"]) for record in records}) > 1:
        models = sorted({str(record["model"]) for record in records})
        msg = f"obsm[{use_rep!r}] was made by {models} of different weights; {fix}"
        raise ValueError(msg)
    return len(records) == len(found)


def check_slides(adata: AnnData, use_rep: str | Sequence[str], library_key: str | None) -> None:
    """Warn where an embedding was made with a ``library_key`` that is not given here."""
    for key in rep_keys(use_rep):
        if _check_slides(adata, key, library_key):
            return


def _check_slides(adata: AnnData, use_rep: str, library_key: str | None) -> bool:
    """Whether it warned."""
    record = find_record(adata, use_rep)
    column = "" if record is None else str(record["params"].get("library_key", ""))
    if library_key is not None or column not in adata.obs:
        return False
    if len(get_obs_labels(adata, column, name="library_key").categories) < 2:
        return False
    warn(
        "obsm[%r] was made with library_key=%r, which is not given here, so all cells count as one slide; "
        "pass library_key=%r to hold out whole slides",
        use_rep,
        column,
        column,
    )
    return True


def _network_column(adata: AnnData, use_rep: str) -> str:
    """Column of ``obs`` whose groups' networks made the embedding; an empty string where none did."""
    record = find_record(adata, use_rep)
    if record is not None:
        return str(record["params"].get("groupby", ""))
    # The record was lost, as by ad.concat: the stored networks are probably those of the embedding.
    return str(adata.uns.get("grn", {}).get("groupby", "")) if use_rep == "X_heist" else ""
