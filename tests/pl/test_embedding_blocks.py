"""pl.embedding_blocks: one panel a block, the cells' own colours, the data untouched."""

from __future__ import annotations

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import EllipseCollection
from matplotlib.colors import to_hex

import spatialfm as sfm
from spatialfm.pl._style import PALETTE


@pytest.fixture
def adata():
    """The first block separates two halves, the second is noise."""
    rng = np.random.default_rng(0)
    half = np.repeat([0, 1], 40)
    rep = np.hstack([rng.normal(size=(80, 3)) + 30 * half[:, None], rng.normal(size=(80, 3))])
    return ad.AnnData(
        np.zeros((80, 1), np.float32),
        obs=pd.DataFrame({"half": pd.Categorical(half.astype(str))}, index=[f"c{i}" for i in range(80)]),
        obsm={"X_heist": rep.astype(np.float32)},
        uns={"heist": {"blocks": {"cell": [0, 3], "gene": np.array([3, 6])}}},
    )


def drawn(ax):
    (c,) = [c for c in ax.collections if isinstance(c, EllipseCollection)]
    return np.asarray(c.get_offsets()), [to_hex(v) for v in c.get_facecolor()]


def test_each_block_has_its_umap(adata):
    before = adata.copy()
    axes = sfm.pl.embedding_blocks(adata, "half")
    assert [ax.get_title() for ax in axes] == ["cell block (UMAP)", "gene block (UMAP)"]
    gaps = []
    for ax in axes:
        xy, colors = drawn(ax)
        assert colors == [PALETTE[int(h)].lower() for h in adata.obs["half"]]
        centres = np.array([xy[:40].mean(axis=0), xy[40:].mean(axis=0)])
        gaps.append(np.linalg.norm(np.subtract(*centres)) / xy[:40].std())
    assert gaps[0] > 3 * gaps[1]
    assert list(adata.obsm) == list(before.obsm)
    assert not adata.obsp
    assert set(adata.uns) == {"heist"}
    np.testing.assert_array_equal(adata.obsm["X_heist"], before.obsm["X_heist"])


def test_row_order_and_seed(adata):
    order = np.random.default_rng(1).permutation(80)
    a, b = (drawn(sfm.pl.embedding_blocks(x, "half")[1])[0] for x in (adata, adata[order]))
    np.testing.assert_array_equal(a[order], b)
    assert not np.array_equal(a, drawn(sfm.pl.embedding_blocks(adata, rng=1)[1])[0])


def test_given_axes_are_used(adata):
    _, axes = plt.subplots(1, 2)
    assert sfm.pl.embedding_blocks(adata, ax=axes) == list(axes)
    assert len(plt.get_fignums()) == 1


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"key": "nope"}, KeyError, "sfm.tl.embed"),
        ({"color": "nope"}, KeyError, "color='nope'"),
        ({"n_neighbors": 80}, ValueError, "n_neighbors=80"),
    ],
)
def test_refusals_make_no_figure(adata, kwargs, error, message):
    with pytest.raises(error, match=message):
        sfm.pl.embedding_blocks(adata, **kwargs)
    adata.uns["heist"].pop("blocks")
    with pytest.raises(KeyError, match="blocks"):
        sfm.pl.embedding_blocks(adata)
    assert not plt.get_fignums()
