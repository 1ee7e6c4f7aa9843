"""Retrieved spots, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from spatialfm._checks import checked

if TYPE_CHECKING:
    from anndata import AnnData


@checked
def retrieved_df(adata: AnnData, *, key: str = "retrieved") -> pd.DataFrame:
    """Table of the spots that were retrieved for each spot.

    Parameters
    ----------
    adata
        Spots after :func:`spatialfm.tl.retrieve`, or a subset of them; not changed.
    %(result_key)s

    Returns
    -------
    A row for each spot and rank, in the order of ``adata``: ``query``, the spot of ``adata``; ``rank`` from 1;
    ``reference``, the spot found; ``similarity``, the cosine of the two.

    Raises
    ------
    KeyError
        If there is no such result.

    Examples
    --------
    >>> import anndata as ad, numpy as np, spatialfm as sfm
    >>> adata = ad.AnnData(obsm={"X_hibio_image": np.eye(3), "X_hibio_gene": np.eye(3)[[1, 0, 2]]})
    >>> sfm.tl.retrieve(adata, adata, n=1)
    >>> sfm.get.retrieved_df(adata)["reference"].tolist()
    ['1', '0', '2']
    """
    if key not in adata.obsm or f"{key}_similarity" not in adata.obsm:
        msg = (
            f"key={key!r}: obsm[{key!r}] and obsm['{key}_similarity'] are missing; run sfm.tl.retrieve(adata, reference"
            f"{'' if key == 'retrieved' else f', key_added={key!r}'}) first"
        )
        raise KeyError(msg)
    names = adata.obsm[key].to_numpy(dtype=object)
    n_queries, n = names.shape
    similarity = np.asarray(adata.obsm[f"{key}_similarity"])
    if similarity.shape != names.shape:
        msg = (
            f"obsm['{key}_similarity'] has shape {similarity.shape}, but obsm[{key!r}] has {names.shape}: they are not "
            "from the same call of sfm.tl.retrieve"
        )
        raise ValueError(msg)
    return pd.DataFrame(
        {
            "query": np.repeat(adata.obs_names.to_numpy(dtype=object), n),
            "rank": np.tile(np.arange(1, n + 1), n_queries),
            "reference": names.ravel(),
            "similarity": similarity.ravel(),
        }
    )
