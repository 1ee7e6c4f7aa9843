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
