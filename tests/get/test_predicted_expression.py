"""get.predicted_expression: an AnnData of its own."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import spatialfm as sfm


@pytest.fixture
def adata():
    rng = np.random.default_rng(0)
    names = [f"s{i}" for i in range(30)]
    return ad.AnnData(
        rng.poisson(2, (30, 2)).astype(np.float32),
        obs=pd.DataFrame({"kind": pd.Categorical(np.tile(["a", "b"], 15))}, index=names),
        obsm={
            "spatial": rng.uniform(size=(30, 2)),
            "predicted_expression": pd.DataFrame(rng.normal(size=(30, 3)), index=names, columns=["G1", "G2", "G3"]),
        },
        uns={
            "spatial": {"s": {"images": {"hires": np.zeros((4, 4, 3), np.uint8)}}},
            "predicted_expression": {"confidence": np.array([0.1, 0.3, np.nan])},
        },
    )


@pytest.mark.parametrize("rows", [slice(None), slice(3, 9)])
def test_content(adata, rows, tmp_path):
    some = adata[rows]
    got = sfm.get.predicted_expression(some)
    assert got.X.dtype == np.float32
    np.testing.assert_array_equal(got.X, some.obsm["predicted_expression"].to_numpy(np.float32))
    assert list(got.var_names) == ["G1", "G2", "G3"]
    np.testing.assert_array_equal(got.var["confidence"], [0.1, 0.3, np.nan])
    pd.testing.assert_frame_equal(got.obs, pd.DataFrame(some.obs))
    np.testing.assert_array_equal(got.obsm["spatial"], some.obsm["spatial"])
    got.write_h5ad(tmp_path / "x.h5ad")
    assert ad.read_h5ad(tmp_path / "x.h5ad").var["confidence"].dtype == np.float64


def test_nothing_is_shared(adata):
    before = adata.copy()
    got = sfm.get.predicted_expression(adata)
    got.X[:] = 9
    got.obs["kind"] = "c"
    got.obsm["spatial"][:] = 9
    got.uns["spatial"]["s"]["images"]["hires"][:] = 9
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    np.testing.assert_array_equal(adata.obsm["predicted_expression"], before.obsm["predicted_expression"])
    np.testing.assert_array_equal(adata.obsm["spatial"], before.obsm["spatial"])
    assert not adata.uns["spatial"]["s"]["images"]["hires"].any()


def test_refusals(adata):
    with pytest.raises(KeyError, match=r"key='nope'.*sfm.tl.predict_expression"):
        sfm.get.predicted_expression(adata, key="nope")
    adata.uns["predicted_expression"]["confidence"] = np.zeros(2)
    with pytest.raises(ValueError, match=r"shape \(2,\), but obsm\['predicted_expression'\] has 3 genes"):
        sfm.get.predicted_expression(adata)
    del adata.uns["predicted_expression"]
    with pytest.raises(KeyError, match="confidence"):
        sfm.get.predicted_expression(adata)
