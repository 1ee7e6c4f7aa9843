"""pl.keywords: the bars are those of get.keywords_df."""

from __future__ import annotations

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from matplotlib.colors import to_rgba

import spatialfm as sfm
from spatialfm.pl._style import PALETTE


@pytest.fixture
def adata():
    rng = np.random.default_rng(0)
    kind = pd.Categorical(rng.choice(["a", "b/c", "d"], 60), categories=["d", "unused", "a", "b/c"])
    adata = ad.AnnData(
        sp.csr_matrix(rng.poisson(1.0, (60, 9)).astype(np.float32)),
        obs=pd.DataFrame({"kind": kind, "number": rng.integers(2, size=60)}, index=[f"s{i}" for i in range(60)]),
        var=pd.DataFrame(index=[f"gene_{i}" for i in range(9)]),
    )
    sfm.pp.tfidf(adata)
    return adata


def drawn(ax):
    """Gene to (length of the bar, place of the line)."""
    lines = [c for c in ax.collections if c.get_segments()]
    rest = [segment[0, 0] for segment in lines[-1].get_segments()] if lines else []
    genes = [t.get_text() for t in ax.get_yticklabels()]
    return {g: (bar.get_width(), r) for g, bar, r in zip(genes, ax.patches, rest, strict=True)}


@pytest.mark.parametrize("groupby", ["kind", "number"])
def test_bars(adata, groupby):
    uns = set(adata.uns)
    axes = sfm.pl.keywords(adata, groupby, n_genes=3)
    table = sfm.get.keywords_df(adata, groupby, n_genes=3)
    assert [ax.get_title(loc="left") for ax in axes] == list(table["group"].cat.categories)
    for ax, group in zip(axes, table["group"].cat.categories, strict=True):
        rows = table[table["group"] == group]
        expected = dict(zip(rows["gene"], zip(rows["mean"], rows["mean_rest"], strict=True), strict=True))
        assert drawn(ax) == {g: pytest.approx(v) for g, v in expected.items()}
        assert list(drawn(ax)) == list(rows["gene"])
        assert ax.yaxis_inverted()
        assert max(bar.get_width() for bar in ax.patches) < ax.get_xlim()[1]
    assert len({ax.get_xlim() for ax in axes}) == 1
    assert set(adata.uns) == uns


def test_colors_are_those_of_the_map(adata):
    def colors(**options):
        axes = sfm.pl.keywords(adata, "kind", **options)
        return [ax.patches[0].get_facecolor() for ax in axes]

    assert colors() == [to_rgba(PALETTE[k]) for k in (0, 2, 3)]
    adata.uns["kind_colors"] = ["#111111", "#222222", "#333333", "#444444"]
    assert colors() == [to_rgba(c) for c in ("#111111", "#333333", "#444444")]
    named = {"d": "red", "a": "green", "b/c": "blue", "unused": "black"}
    assert colors(palette=named) == [to_rgba(c) for c in ("red", "green", "blue")]


@pytest.mark.parametrize("ncols", [1, 2, 4])
def test_nothing_overlaps_or_is_cut(adata, ncols):
    adata.obs["kind"] = adata.obs["kind"].cat.rename_categories({"a": "a group of a rather long and telling name"})
    axes = sfm.pl.keywords(adata, "kind", ncols=ncols)
    figure = axes[0].figure
    figure.canvas.draw()
    boxes = [ax.get_tightbbox() for ax in axes]
    for k, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.width
        assert box.y1 <= figure.bbox.height
        assert not any(box.overlaps(other) for other in boxes[k + 1 :])


def test_own_axes(adata):
    _, mine = plt.subplots(3)
    assert sfm.pl.keywords(adata, "kind", ax=mine) == list(mine)
    with pytest.raises(ValueError, match="this figure has 3 panels"):
        sfm.pl.keywords(adata, "kind", ax=mine[:2])


def test_group_without_keywords(adata):
    adata.X = adata.X.toarray()
    adata.X[adata.obs["kind"] == "a"] = 0
    sfm.pp.tfidf(adata)
    panel = sfm.pl.keywords(adata, "kind")[1]
    assert panel.get_title(loc="left") == "a"
    assert not panel.patches


def test_errors(adata):
    with pytest.raises(KeyError, match=r"sfm\.pp\.tfidf"):
        sfm.pl.keywords(adata, "kind", key="missing")
    for name in ("n_genes", "ncols"):
        with pytest.raises(ValueError, match=f"{name} must be a positive integer, got 0"):
            sfm.pl.keywords(adata, "kind", **{name: 0})
