"""What subpopulations live next to, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spatialfm._checks import checked
from spatialfm._data._adata import get_result

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData


@checked
def subpopulations_df(adata: AnnData, *, key: str = "subpopulation", max_fdr: float | None = None) -> pd.DataFrame:
    """Give the neighbourhood of each subpopulation beside what permutation expects, as a long table.

    Parameters
    ----------
    adata
        Cells after :func:`spatialfm.tl.subpopulations`, or a part of them; not changed.
    key
        Its ``key_added``.
    max_fdr
        Largest false discovery rate of the rows to keep; all of them where it is None.

    Returns
    -------
    A row for each subpopulation and cell type, subpopulations from the largest, in each the types from the most to the least enriched (by ``z``):
    ``subpopulation``, ``cell_type``, ``fraction`` (mean fraction of the type among a cell's neighbours), ``expected`` (its mean under permutation), ``z``, ``p``,
    ``fdr``; see :func:`spatialfm.tl.subpopulations`.

    Raises
    ------
    KeyError
        If there are no subpopulations under this key.
    ValueError
        If ``max_fdr`` is not between 0 and 1.
    """
    entry = get_result(
        adata, key, "tl.subpopulations(adata, groupby, group)", default="subpopulation", field="enrichment"
    )
    if max_fdr is not None and not 0 <= max_fdr <= 1:
        msg = f"max_fdr={max_fdr!r} must be between 0 and 1, or None to keep all rows"
        raise ValueError(msg)
    # Categories of subpopulations stand in their order.
    table = entry["enrichment"].sort_values(["subpopulation", "z"], ascending=[True, False], kind="stable")
    if max_fdr is not None:
        table = table[table["fdr"] <= max_fdr]
    return table.reset_index(drop=True)
