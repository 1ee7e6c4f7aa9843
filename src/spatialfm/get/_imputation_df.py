"""Scores of imputed genes, as a table."""

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
    """Table of the scores of imputed genes on held-out cells.

    Parameters
    ----------
    adata
        Cells after :func:`spatialfm.tl.impute`, or a subset of them; not changed.
    %(result_key)s

    Returns
    -------
    A row for each imputed gene, the best predicted first: ``gene``; ``correlation`` with its interval
    ``correlation_low`` and ``correlation_high``; ``correlation_smoothing`` of the mean of the nearest cells; ``skill``,
    ``skill_smoothing``, ``n_held_out``, ``n_units`` and ``n_imputed`` (see :func:`spatialfm.tl.impute`); and
    ``better``, whether ``correlation`` is above ``correlation_smoothing``. A constant prediction has no correlation
    (NaN).

    Raises
    ------
    KeyError
        If there is no such result.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()[::4].copy()
    >>> sfm.tl.impute(adata, ["Gad1", "Slc1a3"], library_key="mouse_id")
    >>> sorted(sfm.get.imputation_df(adata)["gene"])
    ['Gad1', 'Slc1a3']
    """
    entry = get_result(adata, key, "tl.impute(adata)", default="imputed", field="correlation_smoothing")
    columns = (
        "correlation",
        "correlation_low",
        "correlation_high",
        "correlation_smoothing",
        "skill",
        "skill_smoothing",
        "n_held_out",
        "n_units",
        "n_imputed",
    )
    table = pd.DataFrame(
        {"gene": list(map(str, entry["genes"])), **{name: np.asarray(entry[name]) for name in columns}}
    )
    table["better"] = table["correlation"] > table["correlation_smoothing"].fillna(-1)
    return table.sort_values("correlation", ascending=False, kind="stable", ignore_index=True)
