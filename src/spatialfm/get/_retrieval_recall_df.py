"""Recall of retrieval, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from spatialfm._checks import checked
from spatialfm._data._adata import get_known_labels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData


@checked
def retrieval_recall_df(
    adata: AnnData,
    groupby: str | None = None,
    *,
    at: Sequence[int | float] = (1, 10, 0.1),
    key: str = "retrieved",
) -> pd.DataFrame:
    """Table of the recall of retrieval: how many spots find their true partner by a given rank.

    Parameters
    ----------
    adata
        Spots after ``spatialfm.tl.retrieve(paired=True)``, or a subset of them; not changed.
    groupby
        Column of ``obs`` with groups to score separately, such as slides; spots without a label are left out, with a
        warning. Ranks are always those in the whole reference.
    at
        Ranks up to which a partner counts as found: integers, or fractions of the reference below 1.
    %(result_key)s

    Returns
    -------
    A row for each value of ``at``, in each group: ``group`` (with ``groupby``); ``at``; ``rank``, the last that counts;
    ``recall``, the fraction of spots whose partner is found; ``chance``, the same for a random order; ``n``, the number
    of spots with a partner; ``median_rank`` of the partners. Partners in a tie have its mean rank.

    Raises
    ------
    KeyError
        If there is no such result, or ``obs[groupby]`` is missing.
    ValueError
        If ``at`` holds anything but positive integers and fractions below 1.

    Examples
    --------
    >>> import anndata as ad, numpy as np, spatialfm as sfm
    >>> rep = np.random.default_rng(0).normal(size=(50, 8))
    >>> adata = ad.AnnData(obsm={"X_hibio_image": rep, "X_hibio_gene": rep})
    >>> sfm.tl.retrieve(adata, adata, n=1)
    >>> sfm.get.retrieval_recall_df(adata)["recall"].tolist()
    [1.0, 1.0, 1.0]
    """
    if key not in adata.uns or f"{key}_rank" not in adata.obs:
        added = "" if key == "retrieved" else f", key_added={key!r}"
        msg = (
            f"key={key!r}: obs['{key}_rank'] or uns[{key!r}] is missing; run "
            f"sfm.tl.retrieve(adata, reference, paired=True{added}) with a reference that holds the same spots"
        )
        raise KeyError(msg)
    size = int(adata.uns[key]["n_reference"])
    lasts = [_last(value, size) for value in at]
    ranks = adata.obs[f"{key}_rank"].to_numpy(dtype=np.float64)
    groups = None
    if groupby is not None:
        groups = get_known_labels(adata, groupby, name="groupby", effect="these spots are in no group")
    names = [None] if groups is None else list(groups.categories)
    rows = []
    for name in names:
        own = ranks if groups is None else ranks[np.asarray(groups == name)]
        own = own[np.isfinite(own)]
        for value, last in zip(at, lasts, strict=True):
            recall, median = ((own <= last).mean(), np.median(own)) if len(own) else (np.nan, np.nan)
            rows.append((name, value, last, recall, last / size, len(own), median))
    table = pd.DataFrame(rows, columns=["group", "at", "rank", "recall", "chance", "n", "median_rank"])
    if groups is None:
        return table.drop(columns="group")
    return table.assign(group=pd.Categorical(table["group"], categories=names))


def _last(value: float, size: int) -> int:
    """Last rank that counts among ``size``."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not (value >= 1 if whole else isinstance(value, float | np.floating) and 0 < value < 1):
        msg = f"at={value!r} must be a positive integer (a rank) or a fraction of the reference between 0 and 1"
        raise ValueError(msg)
    # In floats, 0.29 * 100 is a little less than 29.
    return min(int(value), size) if whole else int(value * size + 1e-9)
