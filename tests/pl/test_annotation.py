"""pl.annotation: the heat map and the curve show what tl.annotate wrote."""

from __future__ import annotations

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import QuadMesh

import spatialfm as sfm


@pytest.fixture
def adata():
    """What ``tl.annotate`` writes, by hand."""
    bins = pd.DataFrame({"n": [0, 4, 12], "confidence": [np.nan, 0.6, 0.9], "accuracy": [np.nan, 0.5, 1.0]})
    entry = {
        "names": ["rare/x", "common", "never given"],
        "n_labelled": np.array([4, 1200, 1]),
        "n_assigned": np.array([2, 7, 0]),
        "threshold": 0.7,
        "best_guess": np.array([[3, 1, 0], [2, 8, 0], [0, 1, 0]]),
        "confusion": np.array([[2, 0, 0, 2], [1, 7, 0, 2], [0, 0, 0, 1]]),
        "reliability": bins,
        "reliability_before": bins.assign(accuracy=[np.nan, 0.2, 0.7]),
        "held_out": {
            "folds": "slides", "n_folds": 3, "coverage": 0.6, "accuracy_sure": 0.9, "calibration_error": 0.02,
            "calibration_error_before": 0.2,
        },
    }  # fmt: skip
    return ad.AnnData(np.zeros((2, 1), np.float32), uns={"annotation": entry})


def test_heat_map_and_curve(adata):
    heat, curve = sfm.pl.annotation(adata)
    assert [t.get_text() for t in heat.get_yticklabels()] == ["common", "rare/x", "never given"]
    assert [t.get_text() for t in heat.get_xticklabels()] == ["common", "rare/x", "never given", "unsure"]
    (mesh,) = [c for c in heat.collections if isinstance(c, QuadMesh)]
    want = np.array([[0.7, 0.1, 0, 0.2], [0, 0.5, 0, 0.5], [0, 0, 0, 1]])
    np.testing.assert_allclose(np.asarray(mesh.get_array()).reshape(3, 4), want)
    texts = [t.get_text() for t in heat.texts]
    assert {"70", "10", "1,200", "100", "67", "–", "precision, %"} <= set(texts)
    _, before, after, line = curve.lines
    np.testing.assert_array_equal(after.get_xydata(), [[0.6, 0.5], [0.9, 1.0]])
    np.testing.assert_array_equal(before.get_xydata(), [[0.6, 0.2], [0.9, 0.7]])
    assert set(line.get_xdata()) == {0.7}
    assert "60 % sure, 90 % of them correct" in curve.get_legend().get_texts()[-1].get_text()
    assert curve.get_title(loc="left") == "3 folds of slides"


@pytest.mark.parametrize("threshold", [0.0, None])
def test_without_threshold(adata, threshold):
    adata.uns["annotation"]["threshold"] = threshold
    if threshold is None:
        del adata.uns["annotation"]["threshold"]
    _, curve = sfm.pl.annotation(adata)
    assert len(curve.lines) == 3


def test_given_axes(adata):
    _, axes = plt.subplots(1, 2)
    assert sfm.pl.annotation(adata, ax=axes) == list(axes)
    with pytest.raises(ValueError, match="ax must be a list"):
        sfm.pl.annotation(adata, ax=axes[0])
    with pytest.raises(KeyError, match="key_added='other'"):
        sfm.pl.annotation(adata, "other")
