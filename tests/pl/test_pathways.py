"""pl.pathways: the columns of most spatial structure, each around its mean."""

from __future__ import annotations

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import EllipseCollection

import spatialfm as sfm
from spatialfm.pl._pathways import morans_i
from spatialfm.pp._spatial_neighbors import neighbor_graph


@pytest.fixture
def adata():
    rng = np.random.default_rng(0)
    side = np.stack(np.meshgrid(np.arange(10.0), np.arange(8.0)), -1).reshape(-1, 2)
    x, y = side.T
    noise = rng.normal(size=(4, 80))
    columns = {
        "HALLMARK_NOISE": noise[0],
        "HALLMARK_STRIPES": x % 2 + 0.1 * noise[1],
        "HALLMARK_EAST": x + noise[2],
        "HALLMARK_EAST_AGAIN": x + 1.2 * noise[2],
        "HALLMARK_A_VERY_LONG_NAME" + 8 * "_THAT_HAS_TO_BE_CUT": y + noise[3],
        "HALLMARK_CONSTANT": np.ones(80),
    }
    names = [f"s{i}" for i in range(80)]
    return ad.AnnData(
        obs=pd.DataFrame({"slide": pd.Categorical(np.repeat(["b1", "b2"], 40))}, index=names),
        obsm={"spatial": side * 10, "pathways": pd.DataFrame(columns, index=names).astype(np.float32)},
    )


def values(panel):
    (points,) = [c for c in panel.collections if isinstance(c, EllipseCollection)]
    return points, dict(zip(map(tuple, points.get_offsets().tolist()), points.get_array().tolist(), strict=True))


def test_default_has_most_structure_without_repetition(adata):
    axes = sfm.pl.pathways(adata, n=3)
    titles = [a.get_title(loc="left") for a in axes]
    assert {titles[0].split("\n")[0][:9], titles[1].split("\n")[0][:9]} == {"EAST", "A VERY LO"}
    assert titles[2] in ("NOISE", "STRIPES")
    assert len(sfm.pl.pathways(adata, n=50)) == 5
    order = np.random.default_rng(1).permutation(80)
    assert [a.get_title(loc="left") for a in sfm.pl.pathways(adata[order], n=3)] == titles


def test_morans_i_against_its_formula(adata):
    xy = adata.obsm["spatial"]
    table = adata.obsm["pathways"].to_numpy(np.float64)
    slides = [("b1", np.arange(40)), ("b2", np.arange(40, 80))]
    across, weight, within = np.zeros(6), 0.0, np.zeros(6)
    for _, rows in slides:
        z = table[rows] - table[rows].mean(axis=0)
        w = neighbor_graph(xy[rows])[0].toarray()
        across += np.einsum("ij,ik,jk->k", w, z, z)
        weight, within = weight + w.sum(), within + (z**2).sum(axis=0)
    expected = 80 / weight * across[:5] / within[:5]
    got = morans_i(table, xy, slides)
    np.testing.assert_allclose(got[:5], expected, atol=1e-8)
    assert got[5] == -1


def test_drawn_around_the_mean(adata):
    (panel,) = sfm.pl.pathways(adata, "HALLMARK_EAST")
    points, drawn = values(panel)
    column = adata.obsm["pathways"]["HALLMARK_EAST"].to_numpy(np.float64)
    assert drawn == dict(zip(map(tuple, adata.obsm["spatial"].tolist()), column.tolist(), strict=True))
    low, high = points.get_clim()
    assert (low + high) / 2 == pytest.approx(column.mean())
    assert (high - low) / 2 == pytest.approx(np.percentile(np.abs(column - column.mean()), 99))
    assert panel.yaxis_inverted()
    adata.obsm["hibio_anchors"] = adata.obsm["pathways"] * 0.1 + 3
    (panel,) = sfm.pl.pathways(adata, "HALLMARK_EAST", key="hibio_anchors")
    np.testing.assert_allclose(values(panel)[0].get_clim(), np.array([low, high]) * 0.1 + 3, rtol=1e-5)


def test_slides_and_titles_within_the_figure(adata):
    names = list(adata.obsm["pathways"].columns[[4, 0, 5]])
    adata.obsm["pathways"].loc[adata.obs_names[:3], names[1]] = np.nan
    axes = sfm.pl.pathways(adata, names, library_key="slide", ncols=2)
    assert [a.get_title(loc="left").split("\n")[-1] for a in axes] == ["b1", "b2"] * 3
    assert axes[3].get_title(loc="left") == "NOISE\nb2"
    axes = [*axes, *sfm.pl.pathways(adata, names)]
    for panel in axes:
        panel.figure.canvas.draw()
        box, figure = panel._left_title.get_window_extent(), panel.figure.bbox
        assert figure.x0 <= box.x0 < box.x1 <= figure.x1
        assert figure.y0 <= box.y0 < box.y1 <= figure.y1
    assert axes[6].get_title(loc="left").endswith("…")
    figure, given = plt.subplots(1, 2)
    assert sfm.pl.pathways(adata, names[:2], ax=given) == list(given)


def test_names_of_other_collections(adata):
    adata.obsm["r"] = adata.obsm["pathways"].set_axis(["M Phase R-HSA-68886", *"abcde"], axis=1)
    (panel,) = sfm.pl.pathways(adata, "M Phase R-HSA-68886", key="r")
    assert panel.get_title(loc="left") == "M Phase"


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"names": "east"}, KeyError, "did you mean.*HALLMARK_EAST"),
        ({"key": "nope"}, KeyError, "missing; run sfm.pp.pathways"),
        ({"key": "spatial"}, KeyError, "not a DataFrame"),
        ({"n": 0}, ValueError, "n must be a positive integer"),
        ({"img": True}, KeyError, "img=True"),
    ],
)
def test_refusals_make_no_figure(adata, kwargs, error, message):
    with pytest.raises(error, match=message):
        sfm.pl.pathways(adata, **kwargs)
    assert not plt.get_fignums()
