"""get.keywords_df beside a loop over groups and genes."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import spatialfm as sfm


@pytest.fixture
def adata():
    rng = np.random.default_rng(0)
    kind = pd.Categorical(rng.choice(["b/c", "a", "d"], 90), categories=["d", "unused", "a", "b/c"])
    x = rng.poisson(0.4, (90, 12)) + np.r_[30, np.zeros(11)]
    for k, name in enumerate(["a", "b/c", "d"]):
        x[kind == name, 3 * k + 1] += 4
    adata = ad.AnnData(
        sp.csr_matrix(x.astype(np.float32)),
        obs=pd.DataFrame({"kind": kind}, index=[f"s{i}" for i in range(90)]),
        var=pd.DataFrame(index=[f"g{i}" for i in range(12)]),
    )
    sfm.pp.tfidf(adata)
    return adata


def test_equals_a_loop(adata):
    table = sfm.get.keywords_df(adata, "kind", n_genes=None)
    w, kind = adata.layers["tfidf"].toarray().astype(float), adata.obs["kind"]
    expected = []
    for name in ("d", "a", "b/c"):
        inside = (kind == name).to_numpy()
        rows = []
        for g, gene in enumerate(adata.var_names):
            mean, rest = w[inside, g].mean(), w[~inside, g].mean()
            if mean > rest:
                rows.append([name, gene, mean - rest, mean, rest, (w[inside, g] > 0).mean()])
        rows.sort(key=lambda row: -row[2])
        expected += [[row[0], k + 1, *row[1:]] for k, row in enumerate(rows)]
    columns = ["group", "rank", "gene", "score", "mean", "mean_rest", "fraction"]
    assert list(table.columns) == columns
    assert list(table["group"].cat.categories) == ["d", "a", "b/c"]
    found = table.assign(group=table["group"].astype(object), gene=table["gene"].astype(object))
    pd.testing.assert_frame_equal(
        found, pd.DataFrame(expected, columns=columns), check_dtype=False, atol=1e-9, check_column_type=False
    )


def test_planted_genes_lead_and_the_ubiquitous_one_does_not(adata):
    first = sfm.get.keywords_df(adata, "kind", n_genes=1).set_index("group")["gene"]
    assert first.to_dict() == {"a": "g1", "b/c": "g4", "d": "g7"}
    assert "g0" not in set(sfm.get.keywords_df(adata, "kind", n_genes=2)["gene"])


def test_row_order_and_view(adata):
    expected = sfm.get.keywords_df(adata, "kind")
    order = np.random.default_rng(1).permutation(adata.n_obs)
    pd.testing.assert_frame_equal(sfm.get.keywords_df(adata[order], "kind"), expected, atol=1e-12)


def test_number_of_genes(adata):
    whole = sfm.get.keywords_df(adata, "kind", n_genes=None)
    pd.testing.assert_frame_equal(
        sfm.get.keywords_df(adata, "kind", n_genes=2), whole[whole["rank"] <= 2].reset_index(drop=True)
    )


def test_one_group_and_empty_group(adata):
    adata.obs["one"] = "all"
    table = sfm.get.keywords_df(adata, "one", n_genes=None)
    assert (table["mean_rest"] == 0).all()
    np.testing.assert_allclose(
        table.set_index("gene")["mean"][adata.var_names], adata.layers["tfidf"].toarray().mean(axis=0), rtol=1e-5
    )
    adata.X = adata.X.toarray()
    adata.X[:10] = 0
    adata.obs["empty"] = np.where(np.arange(90) < 10, "empty", "full")
    sfm.pp.tfidf(adata)
    table = sfm.get.keywords_df(adata, "empty")
    assert set(table["group"]) == {"full"}
    assert list(table["group"].cat.categories) == ["empty", "full"]


def test_errors(adata):
    with pytest.raises(KeyError, match=r"sfm\.pp\.tfidf\(adata, key_added='w'\)"):
        sfm.get.keywords_df(adata, "kind", key="w")
    with pytest.raises(KeyError, match="groupby='type'"):
        sfm.get.keywords_df(adata, "type")
    with pytest.raises(ValueError, match="n_genes must be a positive integer or None, got 0"):
        sfm.get.keywords_df(adata, "kind", n_genes=0)


def test_spots_without_a_group_do_not_count(adata):
    known = np.arange(90) > 4
    part = adata[known].copy()
    adata.obs["kind"] = adata.obs["kind"].where(known)
    with pytest.warns(UserWarning, match="no value for 5 of 90 cells; these spots do not count"):
        table = sfm.get.keywords_df(adata, "kind", n_genes=None)
    pd.testing.assert_frame_equal(table, sfm.get.keywords_df(part, "kind", n_genes=None))
