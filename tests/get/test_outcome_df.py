"""Outcomes as a table."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import spatialfm as sfm


def test_a_row_for_each_sample():
    obs = pd.DataFrame(
        {
            "label": ["a/b", "c"],
            "patient": ["p", "q"],
            "n_cells": [3, 4],
            "predicted": ["c", "c"],
            "agreement": [0.0, 1.0],
        },
        index=["s1", "s2"],
    )
    samples = ad.AnnData(
        obs=obs, obsm={"probability": np.array([[0.4, 0.6], [0.1, 0.9]])}, uns={"outcome": {"classes": ["a/b", "c"]}}
    )
    table = sfm.get.outcome_df(samples[::-1])
    assert list(table["sample"]) == ["s2", "s1"]
    assert list(table["patient"]) == ["q", "p"]
    assert list(table["probability_a/b"]) == [0.1, 0.4]
    assert list(table["probability_c"]) == [0.9, 0.6]
    assert list(table["agreement"]) == [1.0, 0.0]


def test_cells_are_refused():
    with pytest.raises(KeyError, match=r"pass the samples that sfm\.tl\.outcome"):
        sfm.get.outcome_df(ad.AnnData(np.zeros((2, 1))))
