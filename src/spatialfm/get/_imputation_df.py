"""How far imputed genes can be trusted, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from spatialfm._checks import checked
from spatialfm._data._adata import get_result

if TYPE_CHECKING:
    from anndata import AnnData


@checked
def imputation_df(adata: AnnData, *, key: str = "imputed") -> pd.DataFrame:
    """Give the scores of imputed genes on hidden cells, beside the mean of the nearest cells.

    Parameters
    ----------
    adata
        Cells after :func:`spatialfm.tl.impute`, or a part of them; not changed.
    key
        Its ``key_added``.

    Returns
    -------
    A row for each imputed gene, the best predicted first: ``gene`` and the scores that :func:`spatialfm.tl.impute` describes, ``correlation``,
    ``correlation_low``, ``correlation_high``, ``correlation_smoothing``, ``skill``, ``skill_smoothing``, ``n_held_out``, ``n_units``, ``n_imputed``; and
    ``better``, whether ``correlation`` is above ``correlation_smoothing``. A prediction that is the same everywhere, such as the gene's mean, has no
    correlation (NaN) and a skill of 0.

    Raises
    ------
    KeyError
        If nothing was imputed under this key.
    """
    entry = get_result(adata, key, "tl.impute(adata)", default="imputed", field="correlation_smoothing")
    columns = ("correlation", "correlation_low", "correlation_high", "correlation_smoothing", "skill", "skill_smoothing",
               "n_held_out", "n_units", "n_imputed")  # fmt: skip
    table = pd.DataFrame(
        {"gene": list(map(str, entry["genes"])), **{name: np.asarray(entry[name]) for name in columns}}
    )
    table["better"] = table["correlation"] > table["correlation_smoothing"].fillna(-1)
    return table.sort_values("correlation", ascending=False, kind="stable", ignore_index=True)
