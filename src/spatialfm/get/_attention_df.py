"""Attention, as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp

from spatialfm._checks import check_choice, checked

if TYPE_CHECKING:
    from anndata import AnnData


@checked
def attention_df(
    adata: AnnData,
    *,
    key: str = "attention",
    level: Literal["types", "differences", "genes", "cells"] = "types",
) -> pd.DataFrame:
    """Table of attention between cell types, genes or cells.

    Parameters
    ----------
    adata
        Cells after :func:`spatialfm.tl.attention`, or a subset of them; not changed.
    %(result_key)s
    level
        ``"types"``: the test of each pair of cell types (in each condition). ``"differences"``: pairs of conditions.
        ``"genes"``: edges of the gene networks. ``"cells"``: edges of the tissue graph.

    Returns
    -------
    ``"types"``, ``"differences"``
        The table that :func:`spatialfm.tl.attention` describes.
    ``"genes"``
        A row for each edge of a network, with the largest attention of each group first: ``group``, ``gene`` (which
        attends), ``neighbor``, ``attention``.
    ``"cells"``
        A row for each edge between cells of ``adata``: ``cell`` (which attends), ``neighbor``, ``attention``.

    Raises
    ------
    KeyError
        If there is no such result, or not this table.
    ValueError
        If ``level`` is unknown.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()[:200].copy()
    >>> sfm.tl.attention(adata, groupby="region", n_permutations=9)
    >>> list(sfm.get.attention_df(adata, level="cells"))
    ['cell', 'neighbor', 'attention']
    """
    check_choice("level", level, ("types", "differences", "genes", "cells"))
    call = f"sfm.tl.attention(adata, ...{'' if key == 'attention' else f', key_added={key!r}'})"
    if key not in adata.uns or key not in adata.obsp:
        msg = f"key={key!r}: obsp[{key!r}] and uns[{key!r}] are missing; run {call} first"
        raise KeyError(msg)
    entry = adata.uns[key]
    if level in ("types", "differences"):
        if level not in entry:
            needed = "groupby=" if level == "types" else "groupby=, library_key= and condition_key="
            msg = f"level={level!r}: uns[{key!r}] holds no such table; run {call} with {needed}"
            raise KeyError(msg)
        return entry[level].reset_index(drop=True)
    if level == "cells":
        edges = sp.csr_matrix(adata.obsp[key]).tocoo()
        names = adata.obs_names.to_numpy(dtype=object)
        return pd.DataFrame({"cell": names[edges.row], "neighbor": names[edges.col], "attention": edges.data})
    genes, groups = np.asarray(entry["genes"]["genes"], dtype=object), [str(v) for v in entry["genes"]["names"]]
    tables = []
    for k in range(len(groups)):
        edges = sp.csr_matrix(entry["genes"]["groups"][str(k)]).tocoo()
        order = np.lexsort((edges.col, edges.row, -edges.data))
        tables.append(
            pd.DataFrame(
                {
                    "group": pd.Categorical.from_codes(np.full(edges.nnz, k), categories=groups),
                    "gene": genes[edges.row[order]],
                    "neighbor": genes[edges.col[order]],
                    "attention": edges.data[order],
                }
            )
        )
    return pd.concat(tables, ignore_index=True)
