"""pl.imputation: maps show what was measured and imputed, points the scores."""

from __future__ import annotations

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import EllipseCollection, PathCollection

import spatialfm as sfm


@pytest.fixture
def adata():
    rng = np.random.default_rng(0)
    side = np.stack(np.meshgrid(np.arange(20.0), np.arange(12.0)), -1).reshape(-1, 2)
    rates = np.exp(1 + np.sin(side @ rng.normal(0, 0.3, (2, 8))))
    adata = ad.AnnData(
        rng.poisson(rates).astype(np.float32),
        obs=pd.DataFrame({"slide": np.repeat(["b1", "b2"], 120)}, index=[f"s{i}" for i in range(240)]),
        var=pd.DataFrame(index=[f"g{j}" for j in range(8)]),
        obsm={"spatial": side * 10},
    )
    adata.obs["unseen"] = adata.obsm["spatial"][:, 0] > 150
    return adata


def drawn(panel):
    (points,) = [c for c in panel.collections if isinstance(c, EllipseCollection)]
    where = map(tuple, points.get_offsets().tolist())
    return dict(zip(where, points.get_array().filled(np.nan).tolist(), strict=True))


def test_maps_and_points(adata):
    sfm.tl.impute(adata, ["g1", "g2", "g3"])
    before = adata.copy()
    axes = sfm.pl.imputation(adata, ["g3", "g1"])
    assert len(axes) == 5
    assert axes[0].get_title(loc="left") == "g3 measured"
    logged = np.log1p(adata.X / adata.X.sum(axis=1, keepdims=True) * 1e4)
    for panel, values in ((axes[0], logged[:, 3]), (axes[3], adata.layers["imputed"][:, 1])):
        got = drawn(panel)
        np.testing.assert_allclose([got[p] for p in map(tuple, adata.obsm["spatial"].tolist())], values, rtol=1e-5)
    points = np.concatenate([c.get_offsets() for c in axes[-1].collections if isinstance(c, PathCollection)])
    entry = adata.uns["imputed"]
    expected = np.column_stack([entry["correlation_smoothing"], entry["correlation"]])
    np.testing.assert_allclose(np.sort(points, axis=0), np.sort(expected, axis=0))
    assert sorted(t.get_text() for t in axes[-1].texts) == ["g1", "g3"]
    np.testing.assert_array_equal(adata.X, before.X)


def test_cells_that_lack_a_gene_are_grey(adata):
    sfm.tl.impute(adata, ["g2"], mask="unseen", library_key="slide")
    axes = sfm.pl.imputation(adata, "g2", library_key="slide")
    assert len(axes) == 5
    assert axes[0].get_title(loc="left") == "g2 measured\nb1"
    got = drawn(axes[0])
    lacks = adata.obs["unseen"].to_numpy()
    assert [np.isnan(got[tuple(p)]) for p in adata.obsm["spatial"][:120].tolist()] == lacks[:120].tolist()
    assert np.isfinite(list(drawn(axes[1]).values())).all()
    _, given = plt.subplots(1, 5)
    assert sfm.pl.imputation(adata, "g2", library_key="slide", ax=given)[4] is given[4]


@pytest.mark.parametrize(
    ("slide", "per_row"),
    [
        ("patient {}", 4),
        ("patient {}, section of the colon", 2),
        ("patient {}, second section of the descending colon", 1),
    ],
)
def test_many_narrow_slides_do_not_overlap(adata, slide, per_row):
    adata.obs["slide"] = pd.Categorical([slide.format(k % 4) for k in range(240)])
    adata.obsm["spatial"][:, 0] /= 8
    adata.var_names = ["ENSMUSG00000032259", *adata.var_names[1:]]
    sfm.tl.impute(adata, ["ENSMUSG00000032259", "g3"], n_folds=2, library_key="slide")
    axes = sfm.pl.imputation(adata, library_key="slide")
    assert len(axes) == 17
    assert len({round(panel.get_position().y0, 3) for panel in axes[:-1]}) == 8 / per_row
    assert axes[0].get_title(loc="left").startswith("ENSMUSG00000032259 measured\npatient 0")
    figure = axes[0].figure
    figure.canvas.draw()
    titles = [panel._left_title for panel in axes[:-1]]
    boxes = [title.get_window_extent() for title in titles]
    # The title of a row is above the names of its slides and may be wider than the first of them.
    lines = [title.get_text().count("\n") for title in titles]
    frames = [panel.get_window_extent() for panel in axes]
    for k, box in enumerate(boxes):
        later = zip(boxes[k + 1 :], lines[k + 1 :], strict=True)
        assert not any(box.overlaps(other) for other, n in later if n == lines[k])
        assert not any(box.overlaps(frame) for frame in frames)
        assert figure.bbox.containsx(box.x1)
        assert figure.bbox.containsy(box.y1)


def test_genes_that_are_gone_or_named_twice(adata):
    sfm.tl.impute(adata, ["g2", "g3", "g5"])
    part = adata[:, [0, 2, 6]]
    axes = sfm.pl.imputation(part)
    assert [panel._left_title.get_text() for panel in axes[:-1:2]] == ["g2 measured"]
    with pytest.raises(KeyError, match="genes='g3' occurs 0 times"):
        sfm.pl.imputation(part, "g3")
    with pytest.raises(KeyError, match="none of the 3 imputed genes"):
        sfm.pl.imputation(adata[:, [0, 6]])
    adata.var_names = [*adata.var_names[:3], "g2", *adata.var_names[4:]]
    with pytest.raises(KeyError, match="genes='g2' occurs 2 times"):
        sfm.pl.imputation(adata, "g2")
    assert len(sfm.pl.imputation(adata)) == 3


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"genes": "g22"}, KeyError, "did you mean"),
        ({"key": "nope"}, KeyError, "sfm.tl.impute"),
        ({"n": 0}, ValueError, "n must be a positive integer"),
        ({"layer": "nope"}, KeyError, "layer='nope'"),
        ({"ax": []}, ValueError, "0 axes"),
    ],
)
def test_errors(adata, kwargs, error, message):
    sfm.tl.impute(adata, ["g2"])
    with pytest.raises(error, match=message):
        sfm.pl.imputation(adata, **kwargs)
