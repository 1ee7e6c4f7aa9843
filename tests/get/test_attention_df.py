"""get.attention_df: rows of each level."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import spatialfm as sfm


@pytest.fixture
def adata():
    genes = sp.csr_matrix(np.array([[0, 0.2, 0.8], [1, 0, 0], [1, 0, 0]], np.float32))
    networks = {"genes": ["x", "y", "z"], "names": ["a/b", "none"], "groupby": "g"}
    networks["groups"] = {"0": genes, "1": sp.csr_matrix((3, 3), dtype=np.float32)}
    return ad.AnnData(
        obs=pd.DataFrame(index=["c0", "c1", "c2"]),
        obsp={"attention": sp.csr_matrix(np.array([[0, 0.1, 0], [0.2, 0, 0.3], [0, 0.4, 0]], np.float32))},
        uns={"attention": {"genes": networks, "types": pd.DataFrame({"p": [0.5]}, index=["7"])}},
    )


def test_levels(adata):
    cells = sfm.get.attention_df(adata, level="cells")
    pairs = list(zip(cells["cell"], cells["neighbor"], strict=True))
    assert pairs == [("c0", "c1"), ("c1", "c0"), ("c1", "c2"), ("c2", "c1")]
    np.testing.assert_allclose(cells["attention"], [0.1, 0.2, 0.3, 0.4])
    part = sfm.get.attention_df(adata[["c2", "c1"]], level="cells")
    assert list(zip(part["cell"], part["neighbor"], strict=True)) == [("c2", "c1"), ("c1", "c2")]
    genes = sfm.get.attention_df(adata, level="genes")
    assert list(genes["gene"]) == ["y", "z", "x", "x"]
    assert list(genes["neighbor"]) == ["x", "x", "z", "y"]
    assert list(genes["group"].cat.categories) == ["a/b", "none"]
    assert list(sfm.get.attention_df(adata).index) == [0]


def test_errors(adata):
    with pytest.raises(KeyError, match="condition_key="):
        sfm.get.attention_df(adata, level="differences")
    with pytest.raises(KeyError, match=r"sfm\.tl\.attention\(adata, \.\.\., key_added='other'\)"):
        sfm.get.attention_df(adata, key="other")
    with pytest.raises(ValueError, match="level='edges'"):
        sfm.get.attention_df(adata, level="edges")
