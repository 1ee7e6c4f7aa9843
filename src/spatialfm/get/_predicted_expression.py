"""Predicted expression as an AnnData."""

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
    """AnnData of the expression predicted from H&E, for scanpy and for functions that read ``X``.

    Parameters
    ----------
    adata
        Spots after :func:`spatialfm.tl.predict_expression`; not changed.
    key
        Key of ``obsm`` with the predictions and of ``uns`` with their confidence.
    %(basis)s

    Returns
    -------
    A new AnnData of the spots by the predicted genes:

    ``X``
        float32, predicted log-normalised expression.
    ``var["confidence"]``
        float64, Pearson correlation of the gene on held-out slides of the training data.
    ``uns["tissue"]``
        ``trained_on`` and, where expression was measured, ``similarity`` and ``alike``: see
        :func:`spatialfm.tl.predict_expression`.
    ``obs``, ``obsm[basis]``, ``uns["spatial"]``
        As in ``adata``.

    Raises
    ------
    KeyError
        If the predictions or their confidence are missing.
    ValueError
        If there is not one confidence for each gene.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.her2_breast_tumour()[:60].copy()
    >>> sfm.tl.predict_expression(adata, ["ERBB2", "CD3D"])
    >>> sfm.get.predicted_expression(adata).var_names.tolist()
    ['ERBB2', 'CD3D']
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
        msg = (
            f"uns[{key!r}]['confidence'] has shape {confidence.shape}, but obsm[{key!r}] has {table.shape[1]} genes; "
            "predict again"
        )
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
