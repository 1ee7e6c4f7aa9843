"""Ligands and receptors of neighbouring cells, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from spatialfm._checks import check_choice, checked
from spatialfm._data._adata import as_label, get_result
from spatialfm._settings import warn

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData


@checked
def ligand_receptor_df(
    adata: AnnData,
    *,
    source: str | Sequence[str] | None = None,
    target: str | Sequence[str] | None = None,
    max_fdr: float | None = None,
    null: Literal["specific", "local", "both"] = "local",
    key: str = "ligand_receptor",
) -> pd.DataFrame:
    """Table of the tests of ligands and receptors, sorted by ``z_local``.

    Parameters
    ----------
    adata
        Cells after :func:`spatialfm.tl.ligand_receptor`; not changed.
    source, target
        Cell types of the sender and of the receiver to keep; all where None.
    max_fdr
        Largest false discovery rate to keep; all tests where None.
    null
        Which null hypothesis ``max_fdr`` is about: ``"local"`` (locations within cell types), ``"specific"`` (cell
        types) or ``"both"``. If no test is left, a warning tells whether the other null has some.
    %(result_key)s

    Returns
    -------
    A row for each ligand, receptor, source and target, with the columns that :func:`spatialfm.tl.ligand_receptor`
    describes.

    Raises
    ------
    KeyError
        If there is no such result.
    ValueError
        If a cell type or ``null`` is unknown.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()[:800].copy()
    >>> sfm.tl.ligand_receptor(adata, "celltype", n_permutations=99)
    >>> table = sfm.get.ligand_receptor_df(adata, source="Astrocyte")
    >>> table["source"].unique().tolist()
    ['Astrocyte']
    """
    entry = get_result(adata, key, "tl.ligand_receptor(adata, groupby)", default="ligand_receptor", field="table")
    check_choice("null", null, ("specific", "local", "both"))
    table = entry["table"]
    for column, wanted in (("source", source), ("target", target)):
        if wanted is not None:
            known = tuple(table[column].cat.categories)
            kept = [as_label(name, known) for name in ([wanted] if isinstance(wanted, str) else wanted)]
            for name in kept:
                check_choice(column, name, known)
            table = table[table[column].isin(kept)]
    if max_fdr is not None:
        found = {name: table[f"fdr_{name}"] <= max_fdr for name in ("specific", "local")}
        hits = found["specific"] & found["local"] if null == "both" else found[null]
        if not hits.any():
            _explain_none(entry, found, null, max_fdr)
        table = table[hits]
    return table.reset_index(drop=True)


def _explain_none(entry: Mapping[str, Any], found: Mapping[str, pd.Series], null: str, max_fdr: float) -> None:
    """Warn where an empty table may be taken for the absence of any signal."""
    others = {name: int(own.sum()) for name, own in found.items() if name != null and own.any()}
    told = [f"{n:,} are under null={name!r}" for name, n in others.items()]
    tried = entry.get("n_undecided", {})
    told += [
        f"{int(n):,} are not decided under null={name!r} by {int(entry['n_permutations'][name]):,} permutations, more "
        "with sfm.tl.ligand_receptor(n_permutations=)"
        for name, n in tried.items()
        if null in (name, "both") and n
    ]
    if told:
        warn("no test has a false discovery rate of at most %g under null=%r; %s", max_fdr, null, "; ".join(told))
