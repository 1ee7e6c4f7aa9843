"""How good each transferred label is, as a table."""

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
    """Give the held-out quality of each label and how many cells were given it.

    Parameters
    ----------
    adata
        Cells after :func:`spatialfm.tl.annotate`; not changed.
    key
        Its ``key_added``.

    Returns
    -------
    A row for each label: ``label``; ``n_labelled`` cells that carried it; ``precision``, ``recall`` and ``f1`` of the best guesses for held-out cells,
    no cell unsure (NaN precision where nobody was given the label); ``unsure``, the share of its held-out cells that were unsure; ``precision_sure`` and ``recall_sure``
    where unsure cells are given no label, so that ``recall_sure`` counts them as missed; ``n_assigned``, cells without a label that were given it.

    Raises
    ------
    KeyError
        If nothing was annotated under ``key``.
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
