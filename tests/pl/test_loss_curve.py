"""pl.loss_curve: the numbers of uns, and the model that was kept."""

from __future__ import annotations

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pytest

import spatialfm as sfm


@pytest.fixture
def adata():
    adata = ad.AnnData(np.zeros((2, 1)))
    adata.uns["fine_tune"] = {
        "model": "heist-fine-tuned",
        "best_step": 40,
        "curve": {
            "step": np.array([0, 20, 40, 60]),
            "held_out_loss": np.array([1.1, 1.0, 0.9, 0.95]),
            "loss": np.array([1.3, 1.2, 1.15]),
        },
    }
    return adata


def test_lines_are_the_curve(adata):
    ax = sfm.pl.loss_curve(adata)
    lines = {line.get_label(): line.get_xydata() for line in ax.lines}
    np.testing.assert_allclose(lines["training"], [[20, 1.3], [40, 1.2], [60, 1.15]])
    np.testing.assert_allclose(lines["validation"], [[0, 1.1], [20, 1.0], [40, 0.9], [60, 0.95]])
    np.testing.assert_allclose(lines["model kept (step 40)"], [[40, 0.9]])
    assert ax.get_xlabel() == "training step"
    # The legend lies within the figure.
    figure = ax.figure
    figure.canvas.draw()
    assert ax.get_legend().get_window_extent().x1 <= figure.bbox.x1


def test_draws_into_given_axes(adata):
    _, axes = plt.subplots(1, 2)
    adata.uns["mine"] = adata.uns.pop("fine_tune")
    assert sfm.pl.loss_curve(adata, "mine", ax=axes[1]) is axes[1]
    assert not axes[0].lines


@pytest.mark.parametrize("entry", [None, {"params": {}}])
def test_no_curve(adata, entry):
    del adata.uns["fine_tune"]
    if entry is not None:
        adata.uns["fine_tune"] = entry
    with pytest.raises(KeyError, match=r"no loss curve; sfm[.]tl[.]fine_tune"):
        sfm.pl.loss_curve(adata)
