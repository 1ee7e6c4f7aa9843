"""get.imputation_df: a row a gene, best first."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest

import spatialfm as sfm


def test_rows_and_order():
    adata = ad.AnnData(np.zeros((3, 3), np.float32))
    arrays = ("correlation_low", "correlation_high", "skill", "skill_smoothing", "n_held_out", "n_units", "n_imputed")
    adata.uns["imputed"] = {
        "genes": ["a", "b", "c"],
        "correlation": np.array([0.1, 0.6, np.nan]),
        "correlation_smoothing": np.array([0.3, np.nan, 0.2]),
        **{name: np.arange(3) for name in arrays},
    }
    table = sfm.get.imputation_df(adata)
    assert table["gene"].tolist() == ["b", "a", "c"]
    assert table["better"].tolist() == [True, False, False]
    assert table["n_units"].tolist() == [1, 0, 2]


def test_nothing_imputed():
    with pytest.raises(KeyError, match=r"sfm\.tl\.impute\(adata, key_added='other'\)"):
        sfm.get.imputation_df(ad.AnnData(np.zeros((3, 3), np.float32)), key="other")
