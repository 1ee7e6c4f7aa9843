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
    """Table of the predictions for each sample, made while its patient was held out.

    Parameters
    ----------
    adata
        Samples that :func:`spatialfm.tl.outcome` returned, or a subset of them; not changed.
    key
        Key of ``uns`` with the result.

    Returns
    -------
    A row for each sample: ``sample``, ``patient``, ``label``, ``n_cells``; ``predicted``, the most probable class;
    ``agreement``, how often the patient was ranked correctly, and ``composition_agreement``, the same by composition
    alone, if ``groupby`` was given; ``probability_<class>`` of each class.

    Raises
    ------
    KeyError
        If there are no predictions.

    Examples
    --------
    >>> import anndata as ad, numpy as np, pandas as pd, spatialfm as sfm
    >>> rng = np.random.default_rng(0)
    >>> patient = np.repeat([f"p{i}" for i in range(12)], 30)
    >>> response = np.repeat(["yes", "no"], 180)
    >>> obs = pd.DataFrame({"patient": patient, "response": response}, index=[f"c{i}" for i in range(360)])
    >>> rep = rng.normal(size=(360, 4)) + (response == "yes")[:, None]
    >>> adata = ad.AnnData(obs=obs, obsm={"X_rep": rep})
    >>> how = {"sample_key": "patient", "patient_key": "patient", "use_rep": "X_rep", "n_permutations": 9}
    >>> samples = sfm.tl.outcome(adata, "response", **how)
    >>> sfm.get.outcome_df(samples).shape[0]
    12
    """
    entry = adata.uns.get(key)
    if not isinstance(entry, Mapping) or "classes" not in entry or "probability" not in adata.obsm:
        msg = (
            f"key={key!r}: uns[{key!r}] or obsm['probability'] is missing; pass the samples that "
            "sfm.tl.outcome(adata, ...) returns"
        )
        raise KeyError(msg)
    probability = np.asarray(adata.obsm["probability"])
    if probability.shape != (adata.n_obs, len(entry["classes"])):
        msg = (
            f"obsm['probability'] has shape {probability.shape}, which does not fit the {len(entry['classes'])} "
            f"classes of uns[{key!r}]"
        )
        raise ValueError(msg)
    table = pd.DataFrame({"sample": adata.obs_names.to_numpy(dtype=object)})
    given = [name for name in ("composition_agreement",) if name in adata.obs]
    for column in ("patient", "label", "n_cells", "predicted", "agreement", *given):
        table[column] = adata.obs[column].array
    for name, values in zip(entry["classes"], probability.T, strict=True):
        table[f"probability_{name}"] = values
    return table
