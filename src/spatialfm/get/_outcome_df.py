"""Predicted outcomes, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from spatialfm._checks import checked

if TYPE_CHECKING:
    from anndata import AnnData


@checked
def outcome_df(adata: AnnData, *, key: str = "outcome") -> pd.DataFrame:
    """Give what was predicted for each sample while its patient was left out.

    Parameters
    ----------
    adata
        Samples that :func:`spatialfm.tl.outcome` returned, or a part of them; not changed.
    key
        Entry of ``uns``.

    Returns
    -------
    A row for each sample: ``sample``, ``patient``, ``label``, ``n_cells``; ``predicted``, the class of highest probability;
    ``agreement``, how often its patient was ranked rightly; ``composition_agreement``, the same by the composition alone, where ``groupby`` was given;
    and ``probability_<class>`` for each class.

    Raises
    ------
    KeyError
        If these are no samples with predictions.
    """
    entry = adata.uns.get(key)
    if not isinstance(entry, Mapping) or "classes" not in entry or "probability" not in adata.obsm:
        msg = f"key={key!r}: uns[{key!r}] and obsm['probability'] are not there; pass the samples that sfm.tl.outcome(adata, ...) returns"
        raise KeyError(msg)
    probability = np.asarray(adata.obsm["probability"])
    if probability.shape != (adata.n_obs, len(entry["classes"])):
        msg = f"obsm['probability'] has shape {probability.shape}, which does not fit the {len(entry['classes'])} classes of uns[{key!r}]"
        raise ValueError(msg)
    table = pd.DataFrame({"sample": adata.obs_names.to_numpy(dtype=object)})
    given = [name for name in ("composition_agreement",) if name in adata.obs]
    for column in ("patient", "label", "n_cells", "predicted", "agreement", *given):
        table[column] = adata.obs[column].array
    for name, values in zip(entry["classes"], probability.T, strict=True):
        table[f"probability_{name}"] = values
    return table
