"""get.evaluation_df: the tables of tl.evaluate, and what to run where there are none."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import spatialfm as sfm


def test_tables_are_given_as_copies():
    scores, differences = pd.DataFrame({"value": [0.5]}, index=["7"]), pd.DataFrame({"difference": [0.1]}, index=["7"])
    adata = ad.AnnData(np.ones((2, 1)), uns={"evaluation": {"scores": scores, "differences": differences}})
    found = sfm.get.evaluation_df(adata)
    pd.testing.assert_frame_equal(found, pd.DataFrame({"value": [0.5]}))
    found.loc[0, "value"] = 0
    assert sfm.get.evaluation_df(adata)["value"][0] == 0.5
    assert list(sfm.get.evaluation_df(adata, differences=True)) == ["difference"]


def test_errors():
    with pytest.raises(KeyError, match=r"run sfm\.tl\.evaluate\(adata, groupby\) first"):
        sfm.get.evaluation_df(ad.AnnData(np.ones((2, 1))))
    with pytest.raises(KeyError, match="key_added='other'"):
        sfm.get.evaluation_df(ad.AnnData(np.ones((2, 1))), key="other")
