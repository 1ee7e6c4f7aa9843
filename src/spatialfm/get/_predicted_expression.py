"""Predicted expression as an AnnData of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from spatialfm._checks import checked

if TYPE_CHECKING:
    from anndata import AnnData


@checked
def predicted_expression(
    adata: AnnData,
    *,
    key: str = "predicted_expression",
    basis: str = "spatial",
) -> AnnData:
    """Give the expression predicted from H&E as an AnnData, for scanpy and for every function here that reads ``X``.

    Parameters
    ----------
    adata
        Spots with predicted expression (:func:`spatialfm.tl.predict_expression`); not changed.
    key
        Key of ``obsm`` with the predictions and of ``uns`` with their confidence.
    basis
        Key of ``obsm`` with the coordinates, taken along where it is there.

    Returns
    -------
    An AnnData of the spots by the predicted genes, with nothing shared with ``adata``:

    ``X``
        float32, log-normalised expression as predicted.
    ``var["confidence"]``
        float64, how well the gene was predicted on held-out slides of the training data (Pearson correlation).
    ``uns["tissue"]``
        What that is worth here: ``trained_on``, and where expression was measured ``similarity`` and ``alike``, see
        :func:`spatialfm.tl.predict_expression`.
    ``obs``, ``obsm[basis]``, ``uns["spatial"]``
        As in ``adata``.

    Raises
    ------
    KeyError
        If the predictions or their confidence are missing.
    ValueError
        If there is not one confidence for each gene.
    """
    from copy import deepcopy

    from anndata import AnnData

    table = adata.obsm.get(key)
    entry = adata.uns.get(key)
    if not isinstance(table, pd.DataFrame) or not isinstance(entry, Mapping) or "confidence" not in entry:
        msg = (
            f"key={key!r}: no predicted genes in obsm[{key!r}], or not their confidence in uns[{key!r}]; run "
            "sfm.tl.predict_expression(adata) first, or name others with key="
        )
        raise KeyError(msg)
    confidence = np.asarray(entry["confidence"], np.float64)
    if confidence.shape != (table.shape[1],):
        msg = f"uns[{key!r}]['confidence'] has shape {confidence.shape}, but obsm[{key!r}] has {table.shape[1]} genes; predict again"
        raise ValueError(msg)
    return AnnData(
        table.to_numpy(np.float32, copy=True),
        obs=adata.obs.copy(),
        var=pd.DataFrame({"confidence": confidence}, index=table.columns.astype(str)),
        obsm={basis: deepcopy(adata.obsm[basis])} if basis in adata.obsm else {},
        uns={
            name: deepcopy(where[name]) for name, where in (("tissue", entry), ("spatial", adata.uns)) if name in where
        },
    )
