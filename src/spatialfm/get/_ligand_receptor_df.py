"""Ligands and receptors of neighbouring cells, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from spatialfm._checks import check_choice
from spatialfm._data._adata import get_result

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData


def ligand_receptor_df(
    adata: AnnData,
    *,
    source: str | Sequence[str] | None = None,
    target: str | Sequence[str] | None = None,
    max_fdr: float | None = None,
    null: Literal["specific", "local", "both"] = "both",
    key: str = "ligand_receptor",
) -> pd.DataFrame:
    """Give the tests of ligands and receptors as a table, from the largest ``z_local`` down.

    Parameters
    ----------
    adata
        Cells after :func:`spatialfm.tl.ligand_receptor`; not changed.
    source, target
        Types of the sender and of the receiver to keep; all where None.
    max_fdr
        Keep tests of at most this false discovery rate; all where None. Rates were computed over all tests.
    null
        Under which null.
    key
        Its ``key_added``.

    Returns
    -------
    A row for each ligand, receptor, source and target, with the columns that :func:`spatialfm.tl.ligand_receptor` describes.

    Raises
    ------
    KeyError
        If there is no such result.
    ValueError
        If a type or ``null`` is unknown.
    """
    entry = get_result(adata, key, "tl.ligand_receptor(adata, groupby)", default="ligand_receptor", field="table")
    check_choice("null", null, ("specific", "local", "both"))
    table = entry["table"]
    for column, wanted in (("source", source), ("target", target)):
        if wanted is not None:
            kept = [wanted] if isinstance(wanted, str) else list(wanted)
            for name in kept:
                check_choice(column, name, tuple(table[column].cat.categories))
            table = table[table[column].isin(kept)]
    if max_fdr is not None:
        nulls = ("specific", "local") if null == "both" else (null,)
        table = table[(table[[f"fdr_{name}" for name in nulls]] <= max_fdr).all(axis=1)]
    return table.reset_index(drop=True)
