"""How often retrieval finds the true partner."""

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
    """Score retrieval by the rank of each spot's true partner, beside chance.

    Parameters
    ----------
    adata
        Spots after :func:`spatialfm.tl.retrieve` with partners in the reference (``paired``), or a part of them; not changed.
    groupby
        Column of ``obs`` to score the groups of, such as slides; spots without one are left out, with a warning. Ranks remain those among the whole reference.
    at
        Ranks up to which a partner counts as found: integers, or fractions of the reference below 1.
    key
        The ``key_added`` of :func:`spatialfm.tl.retrieve`.

    Returns
    -------
    A row for each of ``at``, in each group: ``group`` (where there is ``groupby``); ``at``; ``rank``, the last that counts (a fraction is rounded down);
    ``recall``, the fraction of spots whose partner is found by then; ``chance``, what random order reaches; ``n``, the number of spots with a
    partner; ``median_rank`` of their partners (it and ``recall`` NaN where none has one). Where many are equally similar, the partner has their mean rank: an embedding that is the same
    everywhere recalls nothing below the middle.

    Raises
    ------
    KeyError
        If no ranks were written, or ``obs[groupby]`` is missing.
    ValueError
        If ``at`` holds something else than positive integers and fractions below 1.
    """
    if key not in adata.uns or f"{key}_rank" not in adata.obs:
        msg = (
            f"key={key!r}: obs['{key}_rank'] and uns[{key!r}] are not there; run sfm.tl.retrieve(adata, reference, paired=True"
            f"{'' if key == 'retrieved' else f', key_added={key!r}'}) with a reference that holds the same spots"
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
    # The nudge, because in floats 0.29 * 100 is a little less than 29.
    return min(int(value), size) if whole else int(value * size + 1e-9)
