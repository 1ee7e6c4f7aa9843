"""The bundled tumour is what its docstring says, and its image lies under its spots."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.spatial import cKDTree

import spatialfm as sfm


@pytest.fixture(scope="module")
def tumour():
    return sfm.datasets.her2_breast_tumour()


def test_counts(tumour):
    assert tumour.shape == (187, 12687)
    assert isinstance(tumour.X, csr_matrix)
    assert tumour.X.dtype == np.float32
    assert tumour.X.has_sorted_indices
    assert (tumour.X.data == tumour.X.data.round()).all()
    assert tumour.X.data.min() == 1
    assert {"ERBB2", "EPCAM", "COL1A1"} <= set(tumour.var_names)
    assert "CC BY 4.0" in tumour.uns["source"]["license"]
    assert "cropped" in tumour.uns["source"]["changes"]


def test_scale(tumour):
    stored = tumour.uns["spatial"]["C2"]
    factors = stored["scalefactors"]
    xy = tumour.obsm["spatial"]
    neighbours = np.median(cKDTree(xy).query(xy, k=2)[0][:, 1])
    assert neighbours * factors["microns_per_pixel"] == pytest.approx(200, rel=1e-5)
    assert factors["spot_diameter_fullres"] * factors["microns_per_pixel"] == pytest.approx(100)
    image = stored["images"]["hires"]
    assert image.shape == (2464, 2903, 3)
    assert image.dtype == np.uint8
    margin = 112 / factors["microns_per_pixel"] / 2  # half a patch around each spot is in the image
    assert xy.min() >= margin
    assert (xy.max(axis=0) + margin <= np.array(image.shape[1::-1]) / factors["tissue_hires_scalef"]).all()


def test_patches_need_no_arguments(tumour):
    patches = sfm.pp.patches(tumour)
    assert patches.um_per_px == pytest.approx([0.5])
    assert not patches.blank.any()


def test_spots_lie_on_the_tissue(tumour):
    # Mirrored or turned, spots would reach the pale glass around this slanting section.
    stored = tumour.uns["spatial"]["C2"]
    image = stored["images"]["hires"]

    def glass(xy):
        x, y = (xy * stored["scalefactors"]["tissue_hires_scalef"]).astype(int).T
        dark = [image[max(b - 20, 0) : b + 20, max(a - 20, 0) : a + 20].mean() for a, b in zip(x, y, strict=True)]
        return (np.array(dark) > 215).mean()

    xy = tumour.obsm["spatial"]
    extent = xy.min(axis=0) + xy.max(axis=0)
    assert glass(xy) < 0.05
    for mirrored in ((extent - xy), np.c_[extent[0] - xy[:, 0], xy[:, 1]], np.c_[xy[:, 0], extent[1] - xy[:, 1]]):
        assert glass(mirrored) > 0.1


def test_copies_are_independent(tumour):
    tumour.copy().uns["spatial"]["C2"]["images"]["hires"][:] = 0
    changed = sfm.datasets.her2_breast_tumour()
    changed.uns["spatial"]["C2"]["images"]["hires"][:] = 0
    assert sfm.datasets.her2_breast_tumour().uns["spatial"]["C2"]["images"]["hires"].any()


def test_round_trip(tumour, tmp_path):
    import anndata as ad

    tumour.write_h5ad(tmp_path / "tumour.h5ad")
    back = ad.read_h5ad(tmp_path / "tumour.h5ad")
    assert np.array_equal(back.uns["spatial"]["C2"]["images"]["hires"], tumour.uns["spatial"]["C2"]["images"]["hires"])
    assert sfm.pp.patches(back).um_per_px == pytest.approx([0.5])
