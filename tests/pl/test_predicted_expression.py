"""pl.predicted_expression: maps and points show what was measured and what was predicted."""

from __future__ import annotations

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import EllipseCollection, PathCollection
from scipy import sparse

import spatialfm as sfm


@pytest.fixture
def adata():
    rng = np.random.default_rng(0)
    side = np.stack(np.meshgrid(np.arange(10.0), np.arange(6.0)), -1).reshape(-1, 2)
    names = [f"s{i}" for i in range(60)]
    counts = rng.poisson(3, (60, 4))
    predicted = np.log1p(counts[:, :3]) + rng.normal(size=(60, 3))
    return ad.AnnData(
        sparse.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame({"slide": pd.Categorical(np.repeat(["b1", "b2"], 30))}, index=names),
        var=pd.DataFrame({"symbol": ["g0", "other", "g2", "x"]}, index=["g0", "g1", "g2", "g3"]),
        obsm={
            "spatial": side * 10,
            "predicted_expression": pd.DataFrame(
                np.column_stack([predicted, rng.normal(size=60)]), index=names, columns=["g0", "g1", "g2", "new"]
            ),
        },
        uns={"predicted_expression": {"confidence": np.array([0.1, 0.5, np.nan, 0.7])}},
    )


def drawn(panel):
    (points,) = [c for c in panel.collections if isinstance(c, EllipseCollection)]
    where = map(tuple, points.get_offsets().tolist())
    return dict(zip(where, points.get_array().filled(np.nan).tolist(), strict=True))


def logged(adata):
    counts = adata.X.toarray().astype(np.float64)
    return np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)


def test_rows_of_maps_and_points(adata):
    before = adata.copy()
    axes = sfm.pl.predicted_expression(adata, n=2)
    assert len(axes) == 6
    assert [a.get_title(loc="left") for a in axes[:2]] == ["g1 measured", "predicted (confidence 0.50)"]
    assert axes[3].get_title(loc="left") == "g0 measured"  # "new" was not measured
    truth, guess = logged(adata), adata.obsm["predicted_expression"].to_numpy()
    places = list(map(tuple, adata.obsm["spatial"].tolist()))
    for row, gene in enumerate([1, 0]):
        left, middle, right = axes[3 * row : 3 * row + 3]
        got = drawn(left)
        np.testing.assert_allclose([got[p] for p in places], truth[:, gene], rtol=1e-5)
        got = drawn(middle)
        np.testing.assert_allclose([got[p] for p in places], guess[:, gene], rtol=1e-5)
        (points,) = [c for c in right.collections if isinstance(c, PathCollection)]
        np.testing.assert_allclose(points.get_offsets(), np.column_stack([truth[:, gene], guess[:, gene]]), rtol=1e-5)
        assert right.get_title() == f"r = {np.corrcoef(truth[:, gene], guess[:, gene])[0, 1]:.2f}"
    assert (adata.X != before.X).nnz == 0
    assert set(adata.uns) == set(before.uns)


def test_layer_is_taken_as_it_is(adata):
    adata.layers["own"] = adata.X.toarray() - 7.0
    axes = sfm.pl.predicted_expression(adata, "g2", layer="own")
    assert axes[1].get_title(loc="left") == "predicted"  # its confidence is not known
    got = drawn(axes[0])
    assert [got[tuple(p)] for p in adata.obsm["spatial"].tolist()] == adata.layers["own"][:, 2].tolist()


def test_slides_are_rows(adata):
    adata.obsm["predicted_expression"].loc[adata.obs_names[:4], "g0"] = np.nan
    axes = sfm.pl.predicted_expression(adata, ["g0", "new"], library_key="slide")
    assert len(axes) == 12
    titles = [a.get_title(loc="left") for a in axes]
    assert titles[:6:3] == ["b1: g0 measured", "b2: g0 measured"]
    assert [len(drawn(axes[k])) for k in (0, 1, 3, 4)] == [30] * 4
    first = slice(4, 30)
    r = np.corrcoef(logged(adata)[first, 0], adata.obsm["predicted_expression"]["g0"].to_numpy()[first])[0, 1]
    assert axes[2].get_title() == f"r = {r:.2f}"
    assert [t.get_text() for t in axes[6].texts] == ["not measured"]
    assert not axes[8].axison
    axes[0].figure.canvas.draw()
    for panel in axes:
        for text in (panel._left_title, panel.title, panel.xaxis.label):
            if text.get_text():
                box, figure = text.get_window_extent(), panel.figure.bbox
                assert figure.x0 <= box.x0 < box.x1 <= figure.x1
                assert figure.y0 <= box.y0 < box.y1 <= figure.y1


@pytest.mark.parametrize("how", ["no genes", "no X", "other names"])
def test_image_only_gives_maps_of_predictions(adata, how):
    if how == "no genes":
        adata = adata[:, :0]
    elif how == "no X":
        adata.X = None
    else:
        adata.var_names = list("ABCD")
    axes = sfm.pl.predicted_expression(adata, n=3)
    expected = ["new (confidence 0.70)", "g1 (confidence 0.50)", "g0 (confidence 0.10)"]
    assert [a.get_title(loc="left") for a in axes] == expected
    assert len(drawn(axes[0])) == 60
    _, ax = plt.subplots()
    assert sfm.pl.predicted_expression(adata, "new", ax=ax) == [ax]


def test_gene_column_and_refusals(adata):
    axes = sfm.pl.predicted_expression(adata, ["g0", "g1"], gene_column="symbol")
    assert [t.get_text() for t in axes[3].texts] == ["not measured"]
    plt.close("all")
    adata.var["twice"] = ["g0", "g0", "g2", "x"]
    with pytest.raises(ValueError, match=r"\['g0'\] were measured by several features"):
        sfm.pl.predicted_expression(adata, "g0", gene_column="twice")
    with pytest.raises(KeyError, match=r"genes='newt' is not among the 4 predicted genes; did you mean.*new"):
        sfm.pl.predicted_expression(adata, "newt")
    with pytest.raises(KeyError, match=r"run sfm\.tl\.predict_expression"):
        sfm.pl.predicted_expression(adata, key="nope")
    with pytest.raises(ValueError, match="n must be a positive integer"):
        sfm.pl.predicted_expression(adata, n=0)
    assert not plt.get_fignums()


def test_a_rare_or_constant_gene(adata):
    x = np.zeros((400, 1), np.float32)
    x[7] = 3
    rare = ad.AnnData(
        x,
        var=pd.DataFrame(index=["g"]),
        obsm={"spatial": np.random.default_rng(0).uniform(size=(400, 2))},
        uns={"predicted_expression": {"confidence": [0.5]}},
    )
    rare.obsm["predicted_expression"] = pd.DataFrame({"g": np.ones(400)}, index=rare.obs_names)
    axes = sfm.pl.predicted_expression(rare, layer=None)
    (points,) = [c for c in axes[0].collections if isinstance(c, EllipseCollection)]
    assert points.get_clim()[1] > 1
    assert axes[2].get_title() == "no correlation (constant)"
    axes[0].figure.canvas.draw()
