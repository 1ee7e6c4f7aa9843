"""get.retrieval_recall_df: planted ranks, groups, and chance where there is nothing to find."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import spatialfm as sfm


def ranked(ranks, size):
    adata = ad.AnnData(obs=pd.DataFrame({"retrieved_rank": ranks}, index=[f"s{i}" for i in range(len(ranks))]))
    adata.uns["retrieved"] = {"n_reference": size}
    return adata


def test_planted_ranks():
    adata = ranked([1.0, 5.0, 10.5, np.nan, 20.0], 200)
    table = sfm.get.retrieval_recall_df(adata, at=(1, 10, 0.1, 500))
    expected = pd.DataFrame(
        {
            "at": [1, 10, 0.1, 500],
            "rank": [1, 10, 20, 200],
            "recall": [0.25, 0.5, 1, 1],
            "chance": [0.005, 0.05, 0.1, 1],
            "n": 4,
            "median_rank": 7.75,
        }
    )
    pd.testing.assert_frame_equal(table, expected)
    adata.obs["slide"] = pd.Categorical(["b", "a", "b", "c", "a"])
    table = sfm.get.retrieval_recall_df(adata, "slide", at=(0.05,))
    assert list(table["group"]) == ["a", "b", "c"]
    np.testing.assert_array_equal(table["recall"], [0.5, 0.5, np.nan])
    np.testing.assert_array_equal(table["n"], [2, 2, 0])
    np.testing.assert_array_equal(table["median_rank"], [12.5, 5.75, np.nan])
    adata.obs["slide"] = adata.obs["slide"].where(np.arange(5) > 0)
    with pytest.warns(UserWarning, match="no value for 1 of 5 cells; these spots are in no group"):
        table = sfm.get.retrieval_recall_df(adata, "slide", at=(0.05,))
    np.testing.assert_array_equal(table["n"], [2, 1, 0])


@pytest.mark.parametrize(("fraction", "last"), [(0.07, 7), (0.29, 29), (0.999, 99), (0.001, 0)])
def test_fraction_is_rounded_down(fraction, last):
    assert sfm.get.retrieval_recall_df(ranked([1.0], 100), at=[fraction])["rank"].item() == last


def test_nothing_to_find_is_chance():
    rng = np.random.default_rng(0)
    adata = ad.AnnData(obsm={f"X_hibio_{m}": rng.normal(size=(2000, 8)) for m in ("image", "gene")})
    sfm.tl.retrieve(adata, adata)
    table = sfm.get.retrieval_recall_df(adata, at=(0.1, 0.5))
    np.testing.assert_allclose(table["recall"], table["chance"], atol=0.04)
    adata.obsm["X_hibio_gene"][:] = 1.0
    sfm.tl.retrieve(adata, adata)
    table = sfm.get.retrieval_recall_df(adata)
    assert (table["median_rank"] == 1000.5).all()
    assert (table["recall"] == 0).all()


def test_errors():
    adata = ranked([1.0], 10)
    for value in (0, 1.0, -0.5, True, "10"):
        with pytest.raises(ValueError, match=r"at\[0\] must be|must be a positive integer"):
            sfm.get.retrieval_recall_df(adata, at=[value])
    with pytest.raises(KeyError, match="groupby='slide'"):
        sfm.get.retrieval_recall_df(adata, "slide")
    with pytest.raises(KeyError, match=r"retrieve\(adata, reference, paired=True\)"):
        sfm.get.retrieval_recall_df(ad.AnnData(np.ones((2, 1))))
