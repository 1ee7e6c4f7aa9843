"""Labels inside gene networks are refused, groups found without labels are not."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import spatialfm as sfm
from spatialfm.tl._provenance import check_networks


def embedded(groupby, n=300):
    rng = np.random.default_rng(0)
    types = rng.integers(3, size=n)
    adata = ad.AnnData(
        rng.poisson(1 + 3 * (types[:, None] == np.arange(12) % 3)).astype(np.float32),
        obs=pd.DataFrame(
            {
                "type": pd.Categorical([f"t{t}" for t in types]),
                "renamed": pd.Categorical([f"r{t}" for t in types]),
                "region": pd.Categorical([f"g{t}" for t in rng.integers(2, size=n)]),
            },
            index=[f"c{i}" for i in range(n)],
        ),
        obsm={"spatial": rng.uniform(0, 100, (n, 2))},
    )
    sfm.tl.embed(adata, "heist", groupby=groupby)
    return adata


@pytest.mark.parametrize("rep", ["X_heist", ("X_pca", "X_heist")])
def test_networks_of_the_labels(rep):
    adata = embedded("type")
    adata.obsm["X_pca"] = np.zeros((adata.n_obs, 2))
    with pytest.raises(
        ValueError, match=r"networks of the groups of obs\['type'\].*sfm\.pp\.grn\(adata, groupby='auto'\)"
    ):
        check_networks(adata, rep, "type")
    check_networks(adata, rep, "region")
    with pytest.warns(UserWarning, match=r"adjusted mutual information 1\.00"):
        check_networks(adata, rep, "renamed")
    # Without the record of the embedding, the stored networks are taken for its own.
    del adata.uns["embeddings"]
    with pytest.raises(ValueError, match="has seen these labels"):
        check_networks(adata, rep, "type")
    check_networks(adata, "X_pca", "type")
    # The fix that the message names works.
    sfm.pp.grn(adata, groupby="auto")
    sfm.tl.embed(adata, "heist")
    check_networks(adata, rep, "type")


def test_groups_without_labels():
    adata = embedded("auto")
    adata.obs["same"] = adata.obs["grn_group"]
    check_networks(adata, "X_heist", "same")
    check_networks(adata, "X_heist", "type")
    sfm.tl.embed(adata)  # the default model reads no networks
    adata.uns["grn"]["groupby"] = "type"
    check_networks(adata, ("X_niche", "X_state"), "type")
