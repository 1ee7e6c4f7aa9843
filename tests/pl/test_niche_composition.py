"""pl.niche_composition: bars, grouping and differences are those of the tables."""

from __future__ import annotations

from fractions import Fraction

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

import spatialfm as sfm


@pytest.fixture
def adata():
    rng = np.random.default_rng(0)
    sample = np.repeat(np.arange(8), 100)
    obs = {
        "sample": pd.Categorical([f"s{k}" for k in sample]),
        "niche": pd.Categorical([f"n{k}" for k in rng.choice(3, size=800, p=[0.6, 0.3, 0.1])]),
        "condition": pd.Categorical(np.array(["x", "y"], dtype=object)[sample % 2]),
    }
    return ad.AnnData(obs=pd.DataFrame(obs, index=[f"c{i}" for i in range(800)]))


def test_bars_and_differences(adata):
    adata.uns["niche_colors"] = ["#ff0000", "#00ff00", "#0000ff"]
    sfm.tl.niche_composition(adata, "niche", sample_key="sample", condition_key="condition")
    bars, differences = sfm.pl.niche_composition(adata)
    assert [t.get_text() for t in bars.get_xticklabels()] == ["s0", "s2", "s4", "s6", "s1", "s3", "s5", "s7"]
    assert [t.get_text() for t in bars.texts] == ["x", "y"]
    shares = sfm.get.niche_composition_df(adata).pivot(index="sample", columns="niche", values="proportion")
    heights = {c.get_label(): [b.get_height() for b in c] for c in bars.containers}
    for niche in ("n0", "n1", "n2"):
        np.testing.assert_allclose(heights[niche], shares.loc[["s0", "s2", "s4", "s6", "s1", "s3", "s5", "s7"], niche])
    tops = [max(b.get_y() + b.get_height() for c in bars.containers for b in [c[k]]) for k in range(8)]
    np.testing.assert_allclose(tops, 1)
    table = sfm.get.niche_composition_df(adata, table="differences")
    drawn = [line.get_xdata()[0] for line in differences.lines if line.get_marker() == "o" and len(line.get_xdata())]
    np.testing.assert_allclose(drawn, table["difference"] / np.log(2))
    assert differences.get_legend().get_texts()[0].get_text() == "y (4) against x (4)"
    bars.figure.canvas.draw()


def test_times_the_reference(adata):
    adata.obs.loc[(adata.obs["condition"] == "x").to_numpy() & (adata.obs["niche"] == "n0").to_numpy(), "niche"] = "n1"
    sfm.tl.niche_composition(adata, "niche", sample_key="sample", condition_key="condition", reference="y")
    axis = sfm.pl.niche_composition(adata)[1].xaxis
    drawn = {label.get_text(): tick for label, tick in zip(axis.get_ticklabels(), axis.get_ticklocs(), strict=True)}
    assert min(drawn.values()) < 0
    assert all(float(Fraction(text)) == 2**tick for text, tick in drawn.items())


def test_small_differences_have_a_scale(adata):
    adata.obs["niche"] = np.resize(["n0", "n1", "n2"], adata.n_obs)
    sfm.tl.niche_composition(adata, "niche", sample_key="sample", condition_key="condition")
    axis = sfm.pl.niche_composition(adata)[1].xaxis
    assert [label.get_text() for label in axis.get_ticklabels()] == ["1/2", "1", "2"]


def test_without_conditions(adata):
    sfm.tl.niche_composition(adata, "niche", sample_key="sample")
    assert len(sfm.pl.niche_composition(adata, palette={"n0": "r", "n1": "g", "n2": "b"})) == 1


def test_one_sample(adata):
    sfm.tl.niche_composition(adata, "niche")
    (bars,) = sfm.pl.niche_composition(adata)
    assert [t.get_text() for t in bars.get_xticklabels()] == ["all"]
    heights = [container[0].get_height() for container in bars.containers[::-1]]
    np.testing.assert_allclose(heights, sfm.get.niche_composition_df(adata)["proportion"])


@pytest.mark.parametrize(
    "palette", [None, "tab10", ["r", "g", "b", "k"], {"n0": "r", "n1": "g", "n2": "b", "gone": "k"}]
)
def test_colours_are_those_of_maps(adata, palette):
    adata.obs["niche"] = adata.obs["niche"].cat.set_categories(["gone", "n0", "n1", "n2"])
    adata.obsm["spatial"] = np.random.default_rng(0).random((800, 2))
    (bars,) = sfm.pl.niche_composition(sfm.tl.niche_composition(adata, "niche", copy=True), palette=palette)
    legend = sfm.pl.spatial(adata, "niche", palette=palette).get_legend()
    shown = {
        text.get_text(): to_hex(h.get_color()) for text, h in zip(legend.texts, legend.legend_handles, strict=True)
    }
    assert {c.get_label(): to_hex(c[0].get_facecolor()) for c in bars.containers} == shown
    # The column may be another by now, or gone.
    sfm.tl.niche_composition(adata, "niche")
    adata.obs["niche"] = "other"
    assert len(sfm.pl.niche_composition(adata, palette=palette)[0].containers) == 3
    del adata.obs["niche"]
    assert len(sfm.pl.niche_composition(adata, palette=palette)[0].containers) == 3


def test_legend_names_what_starts_with_an_underscore(adata):
    adata.obs["niche"] = adata.obs["niche"].cat.rename_categories({"n1": "_rest"})
    sfm.tl.niche_composition(adata, "niche")
    (bars,) = sfm.pl.niche_composition(adata)
    assert [t.get_text() for t in bars.get_legend().get_texts()] == ["n0", "_rest", "n2"]


def test_errors(adata):
    with pytest.raises(KeyError, match=r"sfm\.tl\.niche_composition"):
        sfm.pl.niche_composition(adata)
    sfm.tl.niche_composition(adata, "niche", sample_key="sample")
    with pytest.raises(ValueError, match="1 panels"):
        sfm.pl.niche_composition(adata, ax=[None, None])
