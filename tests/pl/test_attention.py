"""pl.attention: lines of the strongest edges, heat maps of the tests."""

from __future__ import annotations

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from matplotlib.collections import LineCollection, QuadMesh

import spatialfm as sfm


@pytest.fixture
def adata():
    """What ``tl.attention`` writes, by hand: two slides of three cells."""
    block = np.array([[0, 0.1, 0.3], [0.2, 0, 0.2], [0.5, 0, 0]], np.float32)
    genes = {"genes": ["g"], "names": ["all"], "groupby": "", "groups": {"0": sp.csr_matrix((1, 1), dtype=np.float32)}}
    table = pd.DataFrame(
        {
            "condition": pd.Categorical(np.repeat(["x", "y"], 4)),
            "cell_type": pd.Categorical(["A", "A", "B", "B"] * 2, categories=["A", "B", "never"]),
            "neighbor_type": pd.Categorical(["A", "B", "A", "B"] * 2, categories=["A", "B", "never"]),
            "attention": [0.8, 0.2, 0.6, 0.4, 0.5, 0.5, 0.5, 0.5],
            "expected": [0.4, 0.6, 0.6, 0.4, 0.5, 0.5, 0.5, 0.5],
            "fdr": [0.01, 0.02, 0.5, 1.0, 1, 1, 1, 1],
        }
    )
    params = {"groupby": "type", "library_key": "slide"}
    return ad.AnnData(
        np.zeros((6, 1), np.float32),
        obs=pd.DataFrame(
            {"type": pd.Categorical(["A", "B", "A"] * 2), "slide": ["s1"] * 3 + ["s2"] * 3},
            index=[f"c{i}" for i in range(6)],
        ),
        obsm={"spatial": np.array([[0, 0], [10, 0], [0, 10]] * 2, float)},
        obsp={"attention": sp.csr_matrix(np.kron(np.eye(2), block))},
        uns={"attention": {"params": params, "genes": genes, "types": table}},
    )


def test_lines_and_heat_maps(adata):
    before = adata.copy()
    axes = sfm.pl.attention(adata, n_edges=2)
    assert len(axes) == 4
    for ax in axes[:2]:
        (lines,) = [c for c in ax.collections if isinstance(c, LineCollection)]
        assert lines.get_rasterized()
        # 0 -> 2 gets 1.5 times the mean of 0's; the others get the mean, and the first of them is drawn.
        np.testing.assert_array_equal(lines.get_segments(), [[[10, 0], [0, 0]], [[0, 0], [0, 10]]])
        assert lines.get_linewidths()[1] > lines.get_linewidths()[0]
        assert [t.get_text() for t in ax.texts] == ["2 of 5 edges\nattention ≥ 1.00 × the mean of the cell"]
    heat = axes[2]
    assert heat.get_title() == "x"
    assert [t.get_text() for t in heat.get_yticklabels()] == ["A", "B"]
    (mesh,) = [c for c in heat.collections if isinstance(c, QuadMesh)]
    shown = mesh.get_array().reshape(2, 2).filled(np.nan)
    np.testing.assert_allclose(shown, [[1, np.nan], [np.log2(0.2 / 0.6), np.nan]])
    assert [t.get_text() for t in heat.texts] == ["*", "*"]
    assert [t.get_text() for t in axes[3].texts] == ["no difference at FDR ≤ 0.05"]
    assert set(adata.uns) == set(before.uns)
    pd.testing.assert_frame_equal(adata.obs, before.obs)


def test_everything_lies_inside_the_figure(adata):
    figure = sfm.pl.attention(adata)[0].figure
    figure.canvas.draw()
    box = figure.get_tightbbox()
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= figure.get_figwidth()
    assert box.y1 <= figure.get_figheight()


def test_without_types(adata):
    del adata.uns["attention"]["types"]
    adata.uns["attention"]["params"] = {"groupby": "", "library_key": ""}
    adata.obsp["attention"] = sp.csr_matrix((6, 6), dtype=np.float32)
    (ax,) = sfm.pl.attention(adata)
    assert [t.get_text() for t in ax.texts] == ["no edges"]
    _, given = plt.subplots()
    assert sfm.pl.attention(adata, color="type", ax=[given]) == [given]
    assert given.get_legend() is not None


def test_no_pair_of_types_was_tested(adata):
    adata.uns["attention"]["types"] = adata.uns["attention"]["types"][:0]
    assert len(sfm.pl.attention(adata)) == 2  # the slides


def test_refusals(adata):
    with pytest.raises(KeyError, match=r"sfm\.tl\.attention"):
        sfm.pl.attention(adata, "nope")
    with pytest.raises(ValueError, match="n_edges"):
        sfm.pl.attention(adata, n_edges=0)
    with pytest.raises(ValueError, match="ax must be a list"):
        sfm.pl.attention(adata, ax=plt.subplots()[1])
