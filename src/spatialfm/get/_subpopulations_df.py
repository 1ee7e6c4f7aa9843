"""Neighbourhoods of subpopulations, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spatialfm._checks import checked
from spatialfm._data._adata import get_result

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData


@checked
def subpopulations_df(adata: AnnData, *, key: str = "subpopulation", max_fdr: float | None = None) -> pd.DataFrame:
    """Table of the neighbourhood of each subpopulation, compared with permutations.

    Parameters
    ----------
    adata
        Cells after :func:`spatialfm.tl.subpopulations`, or a subset of them; not changed.
    %(result_key)s
    max_fdr
        Largest false discovery rate of the rows to keep; all where None.

    Returns
    -------
    A row for each subpopulation and cell type, with the most enriched type of each subpopulation first:
    ``subpopulation``, ``cell_type``, ``fraction`` (mean fraction of the type among the neighbours of a cell),
    ``expected`` (its mean under permutation), ``z``, ``p``, ``fdr``; see :func:`spatialfm.tl.subpopulations`.

    Raises
    ------
    KeyError
        If there is no such result.
    ValueError
        If ``max_fdr`` is not between 0 and 1.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()[::3].copy()
    >>> adata.obsm["X_counts"] = adata.X.toarray()
    >>> sfm.pp.spatial_neighbors(adata, library_key="mouse_id")
    >>> how = {"use_rep": "X_counts", "n_clusters": 2, "library_key": "mouse_id", "n_permutations": 99}
    >>> sfm.tl.subpopulations(adata, "celltype", "Astrocyte", **how)
    >>> sfm.get.subpopulations_df(adata)["subpopulation"].unique().tolist()
    ['Astrocyte 1', 'Astrocyte 2']
    """
    entry = get_result(
        adata, key, "tl.subpopulations(adata, groupby, group)", default="subpopulation", field="enrichment"
    )
    if max_fdr is not None and not 0 <= max_fdr <= 1:
        msg = f"max_fdr={max_fdr!r} must be between 0 and 1, or None to keep all rows"
        raise ValueError(msg)
    # The categories of subpopulations are in order.
    table = entry["enrichment"].sort_values(["subpopulation", "z"], ascending=[True, False], kind="stable")
    if max_fdr is not None:
        table = table[table["fdr"] <= max_fdr]
    return table.reset_index(drop=True)
