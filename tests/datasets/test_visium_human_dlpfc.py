"""The bundled cortex is what its docstring says, and its image lies under its spots."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix
from scipy.spatial import cKDTree

import spatialfm as sfm


@pytest.fixture(scope="module")
def cortex():
    return sfm.datasets.visium_human_dlpfc()


def test_counts(cortex):
    assert cortex.shape == (2929, 8916)
    assert isinstance(cortex.X, csr_matrix)
    assert cortex.X.dtype == np.float32
    assert cortex.X.has_sorted_indices
    assert (cortex.X.data == cortex.X.data.round()).all()
    assert cortex.X.data.min() == 1
    assert {"MBP", "SNAP25", "PCP4", "ENC1"} <= set(cortex.var_names)
    assert (cortex.X.getnnz(axis=0) > 0.05 * cortex.n_obs).all()
    share = np.asarray(cortex.X.sum(axis=1)).ravel() / cortex.obs["n_counts"].to_numpy()
    assert share.min() > 0.95
    assert share.max() <= 1


def test_labels_and_source(cortex):
    layers = cortex.obs["layer"].value_counts()
    assert set(layers.index) == {"WM", *(f"Layer{i}" for i in range(1, 7))}
    assert layers.min() == 98
    assert cortex.uns["eval"]["niche"] == ["layer"]
    assert "BSD-3-Clause" in cortex.uns["source"]["license"]
    assert "Artistic-2.0" in cortex.uns["source"]["license"]
    assert "8,916 of 11,381" in cortex.uns["source"]["changes"]


def test_scale(cortex):
    xy = cortex.obsm["spatial"]
    factors = cortex.uns["spatial"]["151673"]["scalefactors"]
    um = 100 / np.median(cKDTree(xy).query(xy, k=2)[0][:, 1])
    assert um == pytest.approx(0.73, abs=0.01)
    assert um / factors["tissue_lowres_scalef"] == pytest.approx(16, abs=0.5)
    row, column = cortex.obs["array_row"].to_numpy(), cortex.obs["array_col"].to_numpy()
    assert ((row + column) % 2 == 0).all()  # a hexagonal array


def test_image_lies_under_the_spots(cortex):
    # White matter is the darkest layer, unless the image is mirrored or turned.
    stored = cortex.uns["spatial"]["151673"]
    image = stored["images"]["lowres"]
    assert image.shape == (600, 600, 3)
    assert image.dtype == np.uint8

    def darkest(xy):
        x, y = (xy * stored["scalefactors"]["tissue_lowres_scalef"]).astype(int).T
        light = pd.Series(image[y, x].mean(axis=1), index=cortex.obs_names)
        return light.groupby(cortex.obs["layer"], observed=True).mean().idxmin()

    xy = cortex.obsm["spatial"]
    extent = xy.min(axis=0) + xy.max(axis=0)
    assert darkest(xy) == "WM"
    for mirrored in ((extent - xy), np.c_[extent[0] - xy[:, 0], xy[:, 1]], np.c_[xy[:, 0], extent[1] - xy[:, 1]]):
        assert darkest(mirrored) != "WM"


def test_copies_are_independent(cortex):
    cortex.copy().uns["spatial"]["151673"]["images"]["lowres"][:] = 0
    assert sfm.datasets.visium_human_dlpfc().uns["spatial"]["151673"]["images"]["lowres"].any()
