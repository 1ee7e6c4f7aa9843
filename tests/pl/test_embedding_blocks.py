"""pl.embedding_blocks: one panel for each key, the colours of the cells, the data unchanged."""

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
    """X_niche separates two halves, X_state is noise."""
    rng = np.random.default_rng(0)
    half = np.repeat([0, 1], 40)
    niche, state = rng.normal(size=(80, 3)) + 30 * half[:, None], rng.normal(size=(80, 3))
    return ad.AnnData(
        np.zeros((80, 1), np.float32),
        obs=pd.DataFrame({"half": pd.Categorical(half.astype(str))}, index=[f"c{i}" for i in range(80)]),
        obsm={"X_niche": niche.astype(np.float32), "X_state": state.astype(np.float32)},
    )


def drawn(ax):
    (c,) = [c for c in ax.collections if isinstance(c, EllipseCollection)]
    return np.asarray(c.get_offsets()), [to_hex(v) for v in c.get_facecolor()]


def test_each_key_has_its_umap(adata):
    before = adata.copy()
    axes = sfm.pl.embedding_blocks(adata, "half")
    assert [ax.get_title() for ax in axes] == ["UMAP of X_niche", "UMAP of X_state"]
    gaps = []
    for ax in axes:
        xy, colors = drawn(ax)
        assert colors == [PALETTE[int(h)].lower() for h in adata.obs["half"]]
        centres = np.array([xy[:40].mean(axis=0), xy[40:].mean(axis=0)])
        gaps.append(np.linalg.norm(np.subtract(*centres)) / xy[:40].std())
    assert gaps[0] > 3 * gaps[1]
    assert list(adata.obsm) == list(before.obsm)
    assert not adata.obsp
    assert not adata.uns
    for key in before.obsm:
        np.testing.assert_array_equal(adata.obsm[key], before.obsm[key])


def test_keys_are_chosen(adata):
    (ax,) = sfm.pl.embedding_blocks(adata, "half", use_rep="X_state")
    assert ax.get_title() == "UMAP of X_state"
    whole = sfm.pl.embedding_blocks(adata, "half")[1]
    np.testing.assert_array_equal(drawn(ax)[0], drawn(whole)[0])
    axes = sfm.pl.embedding_blocks(adata, "half", use_rep=["X_state", "X_niche", "X_state"], ncols=2)
    # Two panels above, the legend at their right, and one below.
    assert [ax.get_legend() is not None for ax in axes] == [False, True, False]
    assert axes[0].get_position().y0 > axes[2].get_position().y1


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
        ({"use_rep": "nope"}, KeyError, "nope.*sfm.tl.embed"),
        ({"use_rep": ["X_niche", "nope"]}, KeyError, "nope.*sfm.tl.embed"),
        ({"use_rep": []}, ValueError, "use_rep is empty"),
        ({"color": "nope"}, KeyError, "color='nope'"),
        ({"n_neighbors": 80}, ValueError, "n_neighbors=80"),
    ],
)
def test_refusals_make_no_figure(adata, kwargs, error, message):
    with pytest.raises(error, match=message):
        sfm.pl.embedding_blocks(adata, **kwargs)
    assert not plt.get_fignums()
