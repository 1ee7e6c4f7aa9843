"""The bundled spleen is what its docstring says."""

from __future__ import annotations

import numpy as np

import spatialfm as sfm
from spatialfm._data._expression import value_kind


def test_codex_mouse_spleen():
    adata = sfm.datasets.codex_mouse_spleen()
    assert adata.shape == (15829, 29)
    assert adata.X.dtype == np.float32
    assert value_kind(adata.X) == "intensity"
    assert adata.obs["cell_type"].nunique() == 26
    assert adata.obs["cell_type"].value_counts().min() >= 15
    counts = adata.obs["compartment"].value_counts()
    assert set(counts.index) == {"B-zone", "PALS", "marginal zone", "red pulp", "NoAnnotation"}
    assert counts.drop("NoAnnotation").min() > 2000
    assert counts["NoAnnotation"] == 39
    assert "BSD-3-Clause" in adata.uns["source"]["license"]
    assert "MIT" in adata.uns["source"]["license"]
    assert "15,829 of 82,382" in adata.uns["source"]["changes"]
    assert adata.uns["eval"]["cell"] == ["cell_type"]
    assert adata.uns["eval"]["niche"] == ["compartment"]


def test_place():
    # Nuclei of lymphocytes lie about 6 µm apart; tiles are rectangles side by side, four columns of three.
    adata = sfm.datasets.codex_mouse_spleen()
    xy = adata.obsm["spatial"]
    assert np.ptp(xy, axis=0).round().tolist() == [1010, 568]
    assert adata.obs["tile"].nunique() == 12
    boxes = [xy[rows] for rows in adata.obs.groupby("tile", observed=True).indices.values()]
    lows, highs = np.array([b.min(axis=0) for b in boxes]), np.array([b.max(axis=0) for b in boxes])
    overlap = (np.minimum(highs[:, None], highs) - np.maximum(lows[:, None], lows)).min(axis=2)
    assert (overlap[~np.eye(12, dtype=bool)] <= 0).all()
    sfm.pp.spatial_neighbors(adata)
    assert 5 < np.median(adata.obsp["spatial_distances"].data) < 8
