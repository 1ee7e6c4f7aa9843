"""get.annotation_df: each number by hand."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest

import spatialfm as sfm


def annotated():
    entry = {
        "names": ["a", "b", "never"],
        "n_labelled": np.array([10, 4, 1]),
        "n_assigned": np.array([7, 2, 0]),
        "best_guess": np.array([[8, 2, 0], [1, 3, 0], [1, 0, 0]]),
        "confusion": np.array([[7, 1, 0, 2], [0, 2, 0, 2], [0, 0, 0, 1]]),
    }
    return ad.AnnData(np.zeros((2, 1), np.float32), uns={"mine": entry})


def test_by_hand():
    table = sfm.get.annotation_df(annotated(), key="mine").set_index("label")
    assert table.loc["a"].to_dict() == pytest.approx(
        {
            "n_labelled": 10,
            "precision": 0.8,
            "recall": 0.8,
            "f1": 0.8,
            "unsure": 0.2,
            "precision_sure": 1.0,
            "recall_sure": 0.7,
            "n_assigned": 7,
        }
    )  # fmt: skip
    b = table.loc["b"]
    assert (b["precision"], b["recall"], b["precision_sure"], b["recall_sure"]) == pytest.approx(
        (0.6, 0.75, 2 / 3, 0.5)
    )
    never = table.loc["never"]
    assert np.isnan([never["precision"], never["precision_sure"]]).all()
    assert (never["recall"], never["f1"], never["unsure"]) == (0, 0, 1)


def test_nothing_annotated():
    with pytest.raises(KeyError, match=r"sfm.tl.annotate\(adata, groupby=\.\.\.\) first"):
        sfm.get.annotation_df(annotated())
