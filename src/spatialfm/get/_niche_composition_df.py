"""Niches of samples, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, get_args

from spatialfm._checks import check_choice, checked

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

Table = Literal["composition", "cell_types", "differences"]


@checked
def niche_composition_df(
    adata: AnnData, *, key: str = "niche_composition", table: Table = "composition"
) -> pd.DataFrame:
    """Table of the niches of each sample, of their cell types, or of the differences between conditions.

    Parameters
    ----------
    adata
        Cells after :func:`spatialfm.tl.niche_composition`; not changed.
    %(result_key)s
    table
        ``"composition"``, ``"cell_types"`` or ``"differences"``.

    Returns
    -------
    ``"composition"``
        A row for each sample and niche: ``sample``, ``patient`` and ``condition`` if given, ``niche``, ``n_cells``,
        ``proportion``, ``clr`` (centred log-ratio).
    ``"cell_types"``
        A row for each sample, niche and cell type: the same without ``clr``, and ``cell_type``.
    ``"differences"``
        A row for each pair of conditions and niche: ``condition``, ``reference``, ``niche``, ``difference`` (of mean
        centred log-ratios), ``low`` and ``high`` (95 % interval), ``p``, ``fdr``, ``smallest_p``, ``n_condition``,
        ``n_reference``.

    Raises
    ------
    KeyError
        If there is no such result, or not this table.
    ValueError
        If ``table`` is unknown.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()
    >>> sfm.tl.niche_composition(adata, "region", sample_key="mouse_id")
    >>> list(sfm.get.niche_composition_df(adata))
    ['sample', 'niche', 'n_cells', 'proportion', 'clr']
    """
    check_choice("table", table, get_args(Table))
    entry = adata.uns.get(key)
    if not isinstance(entry, Mapping) or table not in entry:
        needs = {
            "composition": "",
            "cell_types": ", groupby=...",
            "differences": ", sample_key=..., condition_key=...",
        }[table]
        also = " with at least two samples (patients) in each of two conditions" if table == "differences" else ""
        msg = (
            f"key={key!r}: no table {table!r} in adata.uns[{key!r}]; run "
            f"sfm.tl.niche_composition(adata, niche_key{needs}){also} first"
        )
        raise KeyError(msg)
    return entry[table].reset_index(drop=True)
