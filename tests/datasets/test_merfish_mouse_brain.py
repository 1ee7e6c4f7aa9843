"""The bundled tissue is what its docstring says."""

from __future__ import annotations

import numpy as np

import spatialfm as sfm


def test_merfish_mouse_brain():
    adata = sfm.datasets.merfish_mouse_brain()
    assert adata.shape == (4788, 200)
    assert adata.obs["mouse_id"].nunique() == 2
    assert adata.obs["celltype"].nunique() == 15
    assert adata.obs["region"].nunique() == 6
    assert np.isfinite(adata.obsm["spatial"]).all()
    assert "MIT" in adata.uns["source"]["license"]
    adata.obs["celltype"] = "changed"
    assert sfm.datasets.merfish_mouse_brain().obs["celltype"].nunique() == 15


def test_sections_are_not_joined():
    adata = sfm.datasets.merfish_mouse_brain()
    x = adata.obsm["spatial"][:, 0]
    young = (adata.obs["mouse_id"] == "YC1").to_numpy()
    assert 195 < x[young].min() - x[~young].max() < 205
    together, apart = (sfm.pp.spatial_neighbors(adata, library_key=key, copy=True) for key in (None, "mouse_id"))
    i, j = together.obsp["spatial_connectivities"].nonzero()
    assert (young[i] == young[j]).all()
    assert (together.obsp["spatial_connectivities"] != apart.obsp["spatial_connectivities"]).nnz < 100
