"""get.niche_composition_df: what to run where a table is missing; its contents are tested with tl.niche_composition."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest

import spatialfm as sfm


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("composition", r"niche_composition\(adata, niche_key\) first"),
        ("cell_types", "groupby="),
        ("differences", "condition_key="),
    ],
)
def test_missing_tables(table, message):
    with pytest.raises(KeyError, match=message):
        sfm.get.niche_composition_df(ad.AnnData(np.ones((2, 1))), table=table)
    with pytest.raises(ValueError, match="choose from"):
        sfm.get.niche_composition_df(ad.AnnData(np.ones((2, 1))), table="nope")
