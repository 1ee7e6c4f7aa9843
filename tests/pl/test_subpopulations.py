"""pl.subpopulations: map and heat map show what tl.subpopulations wrote."""

from __future__ import annotations

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import EllipseCollection, QuadMesh
from matplotlib.colors import to_hex

import spatialfm as sfm
from spatialfm.pl._style import NA_COLOR, PALETTE


@pytest.fixture
def adata():
    """What ``tl.subpopulations`` writes, by hand."""
    n = 40
    names, types = ["A/x 1", "A/x 2"], ["A/x", "B", "never"]
    label = np.array([None, "A/x 1", "A/x 2", "A/x 1"] * 10)
    table = pd.DataFrame(
        {
            "subpopulation": pd.Categorical(np.repeat(names, 3), categories=names),
            "cell_type": pd.Categorical(types * 2, categories=types),
            "fraction": [0.2, 0.8, 0.0, 0.56, 0.04, 0.0],
            "expected": [0.3, 0.7, 0.0, 0.3, 0.7, 0.0],
            "z": [-1.5, 1.5, 0.0, 5.0, -6.0, 0.0],
            "fdr": [0.2, 0.01, 1.0, 0.04, 0.001, 1.0],
        }
    )
    return ad.AnnData(
        np.zeros((n, 1), np.float32),
        obs=pd.DataFrame(
            {"subpopulation": pd.Categorical(label, categories=names), "slide": np.repeat(["s1", "s2"], n // 2)},
            index=[f"c{i}" for i in range(n)],
        ),
        obsm={"spatial": np.random.default_rng(0).uniform(0, 100, (n, 2))},
        uns={"subpopulation": {"names": names, "cell_types": types, "enrichment": table}},
    )


def test_map_and_heat_map(adata):
    before = adata.copy()
    axes = sfm.pl.subpopulations(adata, library_key="slide")
    assert len(axes) == 3
    colors = {"A/x 1": PALETTE[0].lower(), "A/x 2": PALETTE[1].lower()}
    for ax, slide in zip(axes, ["s1", "s2"], strict=False):
        (points,) = [c for c in ax.collections if isinstance(c, EllipseCollection)]
        got = dict(zip(map(tuple, points.get_offsets().tolist()), map(to_hex, points.get_facecolor()), strict=True))
        here = adata[adata.obs["slide"] == slide]
        want = [colors.get(v, NA_COLOR.lower()) for v in here.obs["subpopulation"]]
        assert got == dict(zip(map(tuple, here.obsm["spatial"].tolist()), want, strict=True))

    heat = axes[-1]
    assert [t.get_text() for t in heat.get_xticklabels()] == ["A/x 1", "A/x 2"]
    assert [t.get_text() for t in heat.get_yticklabels()] == [
        "B",
        "A/x",
    ]  # by expected fraction, without the absent one
    assert [t.get_text() for t in heat.texts] == ["80*", "4.0*", "20", "56*"]
    (mesh,) = [c for c in heat.collections if isinstance(c, QuadMesh)]
    shown = mesh.get_array().reshape(2, 2)
    np.testing.assert_allclose(shown.filled(np.nan), [[np.log2(8 / 7), -2], [np.nan, np.log2(0.56 / 0.3)]])
    assert heat.yaxis_inverted()
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    assert set(adata.uns) == set(before.uns)


def test_significance_level(adata):
    heat = sfm.pl.subpopulations(adata, max_fdr=0.005)[-1]
    assert [t.get_text() for t in heat.texts] == ["80", "4.0*", "20", "56"]


def test_everything_lies_inside_the_figure(adata):
    axes = sfm.pl.subpopulations(adata, library_key="slide")
    figure = axes[0].figure
    figure.canvas.draw()
    box = figure.get_tightbbox()
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= figure.get_figwidth()
    assert box.y1 <= figure.get_figheight()


def test_given_axes_are_used(adata):
    _, axes = plt.subplots(1, 2)
    assert sfm.pl.subpopulations(adata, ax=axes) == list(axes)
    assert len(plt.get_fignums()) == 1
    with pytest.raises(ValueError, match="3 panels"):
        sfm.pl.subpopulations(adata, library_key="slide", ax=axes)


def test_refusals_make_no_figure(adata):
    with pytest.raises(KeyError, match=r"sfm\.tl\.subpopulations"):
        sfm.pl.subpopulations(adata, "nope")
    assert not plt.get_fignums()
