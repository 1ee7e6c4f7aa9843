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
    """Table of the scores of embeddings and baselines, or of the differences between them.

    Parameters
    ----------
    adata
        Cells after :func:`spatialfm.tl.evaluate`; not changed.
    %(result_key)s
    differences
        Return the differences between each embedding and the later ones, and between each embedding and each baseline.

    Returns
    -------
    Scores: a row for each embedding and metric, with ``embedding``, ``is_baseline``, ``metric`` (``"accuracy"``,
    ``"macro_f1"``, or ``"f1"`` of one label), ``label`` (only for ``"f1"``), ``value``, ``low`` and ``high`` (95 %
    interval, NaN for too few units), ``n_cells`` and ``n_units``. Differences: a row for each pair and metric, with
    ``embedding``, ``reference``, ``metric``, ``difference`` (embedding minus reference), ``low`` and ``high``.

    Raises
    ------
    KeyError
        If there is no such result.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()[::4].copy()
    >>> adata.obsm["X_counts"] = adata.X.toarray()
    >>> sfm.tl.evaluate(adata, "region", use_rep="X_counts", library_key="mouse_id", baselines=["majority"])
    >>> table = sfm.get.evaluation_df(adata)
    >>> table["embedding"].unique().tolist()
    ['X_counts', 'majority']
    """
    entry = get_result(adata, key, "tl.evaluate(adata, groupby)", default="evaluation", field="differences")
    return entry["differences" if differences else "scores"].reset_index(drop=True)
