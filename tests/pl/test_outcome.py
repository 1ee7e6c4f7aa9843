"""pl.outcome: curve, permutations and patients show what tl.outcome returned."""

from __future__ import annotations

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import spatialfm as sfm


def samples(classes=("no", "yes")):
    """What ``tl.outcome`` returns, by hand: six patients a class, the first with two samples."""
    rng = np.random.default_rng(0)
    label = np.repeat(classes, 6)
    patient = np.array([f"p{i}" for i in range(len(label))])
    label, patient = np.append(label, label[0]), np.append(patient, "p0")
    agreement = rng.uniform(0.3, 1, len(label))
    agreement[-1] = agreement[0]
    probability = rng.dirichlet(np.ones(len(classes)), len(label))
    return ad.AnnData(
        obs=pd.DataFrame(
            {
                "label": pd.Categorical(label),
                "patient": pd.Categorical(patient),
                "n_cells": 5,
                "predicted": label,
                "agreement": agreement,
            },
            index=[f"s{i}" for i in range(len(label))],
        ),
        obsm={"probability": probability},
        uns={
            "outcome": {
                "classes": list(classes),
                "n_patients": np.full(len(classes), 6),
                "auc": 0.71,
                "interval": np.array([0.4, 0.9]),
                "p": 0.03,
                "null": rng.uniform(size=99),
            }
        },
    )


def test_curve_holds_the_auc():
    adata = samples()
    before = adata.copy()
    roc, null, strip = sfm.pl.outcome(adata)
    curve = roc.lines[-1]
    x, y = curve.get_data()
    area = float(np.sum(np.diff(x) * np.asarray(y)[:-1]))
    assert area == pytest.approx(
        adata.obs.groupby("patient", observed=True).first().query("label == 'yes'")["agreement"].mean()
    )
    assert roc.get_title() == "AUC 0.71 (95 %: 0.40 to 0.90)"
    assert sum(bar.get_height() for bar in null.patches) == 99
    assert null.lines[0].get_xdata()[0] == 0.71
    assert "p = 0.03, 99 permutations" in null.get_title()

    rows = [t.get_text() for t in strip.get_yticklabels()]
    assert sorted(rows) == sorted(adata.obs["patient"].unique())
    assert [r in {f"p{i}" for i in range(6)} for r in rows] == [True] * 6 + [False] * 6
    points = {
        line.get_ydata()[0]: line.get_xdata()
        for line in strip.lines
        if line.get_marker() == "o" and len(line.get_xdata())
    }
    for row, name in enumerate(rows):
        np.testing.assert_allclose(points[row], adata.obsm["probability"][(adata.obs["patient"] == name).to_numpy(), 1])
    assert list(adata.obs) == list(before.obs)
    assert list(adata.uns) == list(before.uns)


def test_more_classes_have_a_curve_each():
    roc, _, strip = sfm.pl.outcome(samples(("a", "b", "c")), palette={"a": "red", "b": "green", "c": "blue"})
    assert [line.get_color() for line in roc.lines[1:]] == ["red", "green", "blue"]
    assert [t.get_text() for t in strip.get_legend().get_texts()] == [f"{c} (n = 6)" for c in "abc"]


def test_classes_that_start_with_an_underscore():
    strip = sfm.pl.outcome(samples(("_no", "yes")))[2]
    assert [t.get_text() for t in strip.get_legend().get_texts()] == ["_no (n = 6)", "yes (n = 6)"]


def test_a_part_of_the_patients_is_refused():
    adata = samples()
    sfm.pl.outcome(adata[:-1])  # the second sample of the first patient
    with pytest.raises(ValueError, match="holds 6 of the 12 patients"):
        sfm.pl.outcome(adata[adata.obs["label"] == "yes"])


def test_composition_is_dashed():
    adata = samples()
    adata.obs["composition_agreement"] = adata.obs["agreement"] / 2
    adata.uns["outcome"]["baselines"] = {"composition": {"auc": 0.35, "interval": np.array([0.1, 0.7])}}
    roc, null, _ = sfm.pl.outcome(adata)
    x, y = next(line for line in roc.lines[1:] if line.get_linestyle() == "--").get_data()
    rank = adata.obs.groupby("patient", observed=True).first().query("label == 'yes'")["agreement"].mean()
    assert float(np.sum(np.diff(x) * np.asarray(y)[:-1])) == pytest.approx(rank / 2)
    assert [t.get_text() for t in roc.get_legend().get_texts()] == ["composition: 0.35"]
    assert null.lines[1].get_xdata()[0] == 0.35


def test_axes_of_ones_own():
    _, axes = plt.subplots(1, 3)
    assert sfm.pl.outcome(samples(), ax=axes) == list(axes)
    with pytest.raises(ValueError, match="has 3 panels"):
        sfm.pl.outcome(samples(), ax=axes[:2])
    with pytest.raises(KeyError, match=r"tl\.outcome"):
        sfm.pl.outcome(samples(), key="other")


def test_an_interval_that_ends_at_one():
    adata = samples()
    adata.uns["outcome"]["interval"] = np.array([0.6, 1.0])
    roc = sfm.pl.outcome(adata)[0]
    band = roc.collections[0].get_paths()[0].vertices
    assert np.isfinite(band).all()
    assert band[:, 1].max() == pytest.approx(1)
