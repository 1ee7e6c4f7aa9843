"""get.retrieved_df beside the fields it reads."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import spatialfm as sfm


def test_table():
    rng = np.random.default_rng(0)
    adata = ad.AnnData(obsm={"X_hibio_image": rng.normal(size=(6, 4))})
    reference = ad.AnnData(obsm={"X_hibio_gene": rng.normal(size=(9, 4))})
    reference.obs_names = list("abcdefghi")
    sfm.tl.retrieve(adata, reference, n=3)
    rows = [
        (query, rank + 1, adata.obsm["retrieved"].loc[query].iloc[rank], adata.obsm["retrieved_similarity"][i, rank])
        for i, query in enumerate(adata.obs_names)
        for rank in range(3)
    ]
    expected = pd.DataFrame(rows, columns=["query", "rank", "reference", "similarity"])
    pd.testing.assert_frame_equal(sfm.get.retrieved_df(adata), expected, check_dtype=False)
    part = sfm.get.retrieved_df(adata[[4, 1]])
    assert list(part["query"]) == ["4"] * 3 + ["1"] * 3
    with pytest.raises(KeyError, match=r"sfm\.tl\.retrieve\(adata, reference, key_added='found'\)"):
        sfm.get.retrieved_df(adata, key="found")
