"""Quality of transferred labels, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from spatialfm._checks import checked
from spatialfm._data._adata import get_result

if TYPE_CHECKING:
    from anndata import AnnData


@checked
def annotation_df(adata: AnnData, *, key: str = "annotation") -> pd.DataFrame:
    """Table of the quality of transferred labels on held-out cells.

    Parameters
    ----------
    adata
        Cells after :func:`spatialfm.tl.annotate`; not changed.
    %(result_key)s

    Returns
    -------
    A row for each label: ``label``; ``n_labelled``, labelled cells; ``precision``, ``recall`` and ``f1`` of the most
    probable label of held-out cells (``precision`` is NaN where no cell got the label); ``unsure``, the share of the
    label's held-out cells that stay unsure; ``precision_sure`` and ``recall_sure``, with unsure cells as cells without
    a label; ``n_assigned``, unlabelled cells that got the label.

    Raises
    ------
    KeyError
        If there is no such result.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()[::4].copy()
    >>> adata.obs["known"] = adata.obs["region"].where(adata.obs["mouse_id"] == "OC1")
    >>> adata.obsm["X_counts"] = adata.X.toarray()
    >>> sfm.tl.annotate(adata, groupby="known", use_rep="X_counts", library_key="mouse_id")
    >>> table = sfm.get.annotation_df(adata)
    >>> list(table.columns[:5])
    ['label', 'n_labelled', 'precision', 'recall', 'f1']
    """
    entry = get_result(adata, key, "tl.annotate(adata, groupby=...)", default="annotation", field="best_guess")
    guess, confusion = np.asarray(entry["best_guess"], float), np.asarray(entry["confusion"], float)
    with np.errstate(invalid="ignore"):
        precision, recall = np.diag(guess) / guess.sum(axis=0), np.diag(guess) / guess.sum(axis=1)
        precision_sure = np.diag(confusion) / confusion[:, :-1].sum(axis=0)
    return pd.DataFrame(
        {
            "label": [str(name) for name in entry["names"]],
            "n_labelled": np.asarray(entry["n_labelled"]),
            "precision": precision,
            "recall": recall,
            "f1": 2 * np.diag(guess) / (guess.sum(axis=0) + guess.sum(axis=1)),
            "unsure": confusion[:, -1] / confusion.sum(axis=1),
            "precision_sure": precision_sure,
            "recall_sure": np.diag(confusion) / confusion.sum(axis=1),
            "n_assigned": np.asarray(entry["n_assigned"]),
        }
    )
