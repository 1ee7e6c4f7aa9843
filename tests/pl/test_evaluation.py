"""pl.evaluation: points and intervals are those of the table."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

import spatialfm as sfm


@pytest.fixture
def adata():
    rng = np.random.default_rng(0)
    kind, slide = rng.integers(4, size=500), rng.integers(6, size=500)
    adata = ad.AnnData(
        np.ones((500, 1), np.float32),
        obs=pd.DataFrame(
            {"type": pd.Categorical([f"t{k}" for k in kind]), "slide": pd.Categorical([f"s{k}" for k in slide])},
            index=[f"c{i}" for i in range(500)],
        ),
        obsm={
            "spatial": rng.uniform(size=(500, 2)),
            "X_a": np.eye(4)[kind] + 0.4 * rng.normal(size=(500, 4)),
            "X_b": np.eye(4)[kind] + rng.normal(size=(500, 4)),
        },
    )
    sfm.tl.evaluate(
        adata,
        "type",
        use_rep=["X_a", "X_b"],
        library_key="slide",
        baselines=["location", "majority"],
        n_bootstrap=50,
    )
    return adata


def test_names_that_start_with_an_underscore(adata):
    adata.obsm["_rep"] = adata.obsm["X_a"]
    sfm.tl.evaluate(adata, "type", use_rep="_rep", baselines=["majority"], n_bootstrap=9)
    legend = sfm.pl.evaluation(adata)[2].get_legend()
    assert [t.get_text() for t in legend.get_texts()] == ["_rep", "majority"]


def points(panel):
    """Places of single markers, in the order they were drawn."""
    return [(line.get_xdata()[0], line.get_ydata()[0]) for line in panel.lines if len(line.get_xdata()) == 1]


def test_points_intervals_and_labels(adata):
    axes = sfm.pl.evaluation(adata)
    table = sfm.get.evaluation_df(adata)
    names = ["X_a", "X_b", "location", "majority"]
    for panel, metric in zip(axes, ("macro_f1", "accuracy"), strict=False):
        own = table[table["metric"] == metric]
        assert [x for x, _ in points(panel)] == list(own["value"])
        lines = [line for line in panel.lines if len(line.get_xdata()) == 2]
        np.testing.assert_array_equal([line.get_xdata() for line in lines], own[["low", "high"]])
        assert [t.get_text() for t in panel.texts] == [f"{v:.3f}" for v in own["value"]]
        # Baselines are grey, embeddings are not.
        assert [len(set(to_rgb(line.get_color()))) == 1 for line in lines] == [False, False, True, True]
    assert [t.get_text() for t in axes[0].get_yticklabels()] == names
    assert "500 cells, 4 folds of 6 slides" in axes[0].get_xlabel()
    f1 = table[(table["metric"] == "f1") & (table["embedding"] == "X_a")].sort_values("value", ascending=False)
    assert [t.get_text() for t in axes[2].get_yticklabels()] == [
        f"{label} ({n:,})" for label, n in zip(f1["label"], f1["n_cells"], strict=True)
    ]
    assert set(f1["value"]) <= {x for x, _ in points(axes[2])}
    axes[0].figure.canvas.draw()
    assert len(sfm.pl.evaluation(adata, per_label=False)) == 2


def test_errors(adata):
    with pytest.raises(KeyError, match=r"sfm\.tl\.evaluate"):
        sfm.pl.evaluation(adata, "nope")
    with pytest.raises(ValueError, match="3 panels"):
        sfm.pl.evaluation(adata, ax=sfm.pl.evaluation(adata)[:2])
