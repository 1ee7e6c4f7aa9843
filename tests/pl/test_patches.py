"""pl.patches: the patches shown are those of the spots marked."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import spatialfm as sfm


@pytest.fixture
def adata():
    rng = np.random.default_rng(0)
    obs = pd.DataFrame({"slide": pd.Categorical(np.tile(["a", "b"], 20))}, index=[f"s{i}" for i in range(40)])
    return ad.AnnData(
        np.ones((40, 1), np.float32), obs=obs, obsm={"spatial": rng.uniform(20, [380, 280], size=(40, 2))}
    )


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)


@pytest.mark.parametrize("n", [1, 5, 12, 100])
def test_patches_shown(adata, image, n, tmp_path):
    patches = sfm.pp.patches(adata, image, size_px=30, out_px=30, out=tmp_path / "p.zarr")
    axes = sfm.pl.patches(adata, patches, n=n)
    n_shown = min(n, 40)
    assert len(axes) == 1 + n_shown
    frames = [p for p in axes[0].patches if p.get_linewidth() < 2]
    centers = np.array([np.add(p.get_xy(), [p.get_width() / 2, p.get_height() / 2]) for p in frames])
    assert np.diff(centers[:, 1]).min(initial=0) >= 0
    for center, panel in zip(centers, axes[1:], strict=True):
        (row,) = np.flatnonzero(np.abs(adata.obsm["spatial"] - center).max(axis=1) < 1e-6)
        np.testing.assert_array_equal(panel.images[0].get_array(), patches[row])
    assert [a.get_title(loc="left") for a in axes[1:]] == [str(k + 1) for k in range(n_shown)]
    axes[0].figure.canvas.draw()


def test_blank_slides_and_subsets(adata, image):
    image[:, :200] = 230
    images = {"a": image, "b": image}
    patches = sfm.pp.patches(adata, images, size_px=30, library_key="slide")
    with pytest.raises(ValueError, match=r"slide=None is not a slide of these spots; choose from \['a', 'b'\]"):
        sfm.pl.patches(adata, patches)
    some = adata[adata.obs["slide"] == "b"]
    axes = sfm.pl.patches(some, patches, n=50)
    assert len(axes) == 21
    assert axes[0].get_title() == "b"
    titles = " ".join(a.get_title(loc="left") for a in axes[1:])
    assert titles.count("blank") == patches.blank[(adata.obs["slide"] == "b").to_numpy()].sum() > 0
    stranger = adata.copy()
    stranger.obs_names = [f"x{i}" for i in range(40)]
    with pytest.raises(KeyError, match="40 spots have no patch, such as"):
        sfm.pl.patches(stranger, patches)
    with pytest.raises(ValueError, match="n must be a positive integer"):
        sfm.pl.patches(some, patches, n=0)
