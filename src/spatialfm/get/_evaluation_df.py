"""Scores of embeddings, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spatialfm._checks import checked
from spatialfm._data._adata import get_result

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData


@checked
def evaluation_df(adata: AnnData, *, key: str = "evaluation", differences: bool = False) -> pd.DataFrame:
    """Give the scores of embeddings and baselines, or the differences between them.

    Parameters
    ----------
    adata
        Cells after :func:`spatialfm.tl.evaluate`; not changed.
    key
        Its ``key_added``.
    differences
        Give the differences of each embedding to those after it and to each baseline.

    Returns
    -------
    A row for each embedding and metric: ``embedding``, ``is_baseline``, ``metric`` (``"accuracy"``, ``"macro_f1"``, or ``"f1"`` of one label),
    ``label`` (``""`` but for ``"f1"``), ``value``, ``low`` and ``high`` (95 % interval, NaN where there are too few units), ``n_cells``, ``n_units``. With
    ``differences`` a row for each pair and overall metric: ``embedding``, ``reference`` (an embedding that stands after it in ``use_rep``, or a baseline), ``metric``,
    ``difference`` (embedding less reference), ``low``, ``high``. Where the interval holds 0, neither has been shown to be better.

    Raises
    ------
    KeyError
        If nothing was evaluated under this key.
    """
    entry = get_result(adata, key, "tl.evaluate(adata, groupby)", default="evaluation", field="differences")
    return entry["differences" if differences else "scores"].reset_index(drop=True)
