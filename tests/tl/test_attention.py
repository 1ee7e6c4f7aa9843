"""tl.attention: weights against equal weights, tests against brute force, invariance, and errors."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from scipy.stats import ttest_ind

import spatialfm as sfm
from spatialfm.models import HEIST, HEISTConfig
from spatialfm.tl._type_tests import TypeTests


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return HEIST(HEISTConfig(width=16, heads=2, layers=2, pe_dim=16)).eval()


def make(n=240, g=10, seed=0):
    rng = np.random.default_rng(seed)
    kind = rng.integers(3, size=n)
    x = rng.poisson(np.exp(rng.normal(size=(3, g)))[kind] * 2).astype(np.float32)
    quarter = np.arange(n) * 4 // n
    obs = pd.DataFrame(
        {
            "slide": pd.Categorical([f"s{k}" for k in quarter]),
            "stage": pd.Categorical(np.where(quarter < 2, "late/2", "early"), categories=["early", "late/2"]),
            "type": pd.Categorical(np.array(["A/x", "B", "C"])[kind]),
        },
        index=[f"cell{i}" for i in range(n)],
    )
    adata = ad.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"gene{i}" for i in range(g)]))
    adata.obsm["spatial"] = rng.random((n, 2)) * 1000
    return adata


ARGS = {
    "groupby": "type",
    "condition_key": "stage",
    "library_key": "slide",
    "context_size": 20,
    "n_permutations": 50,
}


@pytest.fixture(scope="module")
def done(model):
    return sfm.tl.attention(make(), model, **ARGS, copy=True)


def test_weights_lie_on_graph_and_networks(done):
    weights = done.obsp["attention"]
    assert weights.dtype == np.float32
    graph = done.obsp["spatial_connectivities"]
    assert ((weights != 0) != (graph != 0)).nnz == 0
    entry = done.uns["attention"]
    assert entry["cells"]["on_neighbors"] == pytest.approx(weights.sum() / done.n_obs, rel=1e-5)
    genes, grn = entry["genes"], done.uns["grn"]
    assert genes["genes"] == grn["genes"]
    assert genes["names"] == grn["names"]
    for k, network in grn["groups"].items():
        assert ((genes["groups"][k] != 0) != (network != 0)).nnz == 0
        connected = np.diff(network.indptr) > 0
        np.testing.assert_allclose(np.asarray(genes["groups"][k].sum(axis=1)).ravel(), connected, atol=1e-5)


def test_zero_queries_attend_to_all_alike(model):
    """Then type-to-type attention is the plain composition of the neighbourhood, and genes attend by their degree."""
    import copy

    equal = copy.deepcopy(model)
    with torch.no_grad():
        for layer in equal.layers:
            for linear in (layer.cell_qkv, layer.gene_qkvs):
                linear.weight[:16] = 0
                linear.bias[:16] = 0
    adata = make()
    sfm.tl.attention(adata, equal, **ARGS)
    cells = adata.uns["attention"]["cells"]
    assert cells["on_neighbors"] == pytest.approx(cells["on_neighbors_uniform"], rel=1e-5)
    assert cells["on_itself"] == pytest.approx(cells["on_itself_uniform"], rel=1e-5)
    table = sfm.get.attention_df(adata)
    np.testing.assert_allclose(table["attention"], table["neighbors"], rtol=1e-5)
    np.testing.assert_allclose(table["log2_over_neighbors"][table["neighbors"] > 0], 0, atol=1e-4)
    graph = (adata.obsp["spatial_connectivities"] != 0).astype(float)
    near = sp.diags(1 / np.maximum(np.asarray(graph.sum(axis=1)).ravel(), 1)) @ graph
    types, stage = adata.obs["type"].to_numpy(), adata.obs["stage"].to_numpy()
    for _, row in table.iterrows():
        rows = (types == row["cell_type"]) & (stage == row["condition"]) & (graph.getnnz(axis=1) > 0)
        assert row["attention"] == pytest.approx((near[rows] @ (types == row["neighbor_type"])).mean(), rel=1e-5)
        assert row["n_cells"] == rows.sum()
    for k, network in adata.uns["grn"]["groups"].items():
        expected = (network != 0).toarray() / np.maximum(network.getnnz(axis=1), 1)[:, None]
        np.testing.assert_allclose(adata.uns["attention"]["genes"]["groups"][k].toarray(), expected, rtol=1e-4)


NAMES = {"types": ["a", "b", "c"], "conditions": ["x", "y"]}


def random_tests(n=80, seed=0):
    rng = np.random.default_rng(seed)
    slide = np.sort(rng.integers(4, size=n))
    dense = rng.random((n, n)) * (rng.random((n, n)) < 0.2) * (slide[:, None] == slide)
    dense[dense.T > 0] = np.maximum(dense, rng.random((n, n)))[dense.T > 0]
    dense[5] = dense[:, 5] = 0  # a cell without neighbours
    np.fill_diagonal(dense, 0)
    return dense, rng.integers(3, size=n), slide, slide // 2


def test_expected_and_p_against_brute_force():
    dense, codes, slide, condition = random_tests()
    tests = TypeTests(sp.csr_matrix(dense), codes, slide, condition, **NAMES)
    table = tests.types(n_permutations=3000, generator=np.random.default_rng(0))
    known = dense.sum(1) > 0
    share = dense / np.where(known, dense.sum(1), 1)[:, None]

    def mean(codes, c, a, b):
        return share[np.ix_(known & (codes == a) & (condition == c), known & (codes == b))].sum(1).mean()

    rng = np.random.default_rng(1)
    null = []
    for _ in range(3000):
        permuted = codes.copy()
        for s in range(4):
            here = np.flatnonzero(known & (slide == s))
            permuted[here] = rng.permutation(codes[here])
        null.append([mean(permuted, c, a, b) for c, a, b in np.ndindex(2, 3, 3)])
    null = np.array(null)
    observed = np.array([mean(codes, c, a, b) for c, a, b in np.ndindex(2, 3, 3)])
    assert len(table) == 18
    np.testing.assert_allclose(table["attention"], observed)
    np.testing.assert_allclose(table["expected"], null.mean(0), atol=4 * null.std(0).max() / 3000**0.5)
    np.testing.assert_allclose(table["z"], (observed - table["expected"]) / null.std(0), rtol=0.1, atol=0.1)
    extreme = np.abs(null - table["expected"].to_numpy()) >= np.abs(observed - table["expected"].to_numpy()) - 1e-9
    np.testing.assert_allclose(table["p"], (1 + extreme.sum(0)) / 3001, atol=0.05)
    # Conditions, slide by slide.
    different = tests.differences()
    row = different[(different["cell_type"] == "a") & (different["neighbor_type"] == "b")].iloc[0]
    excess = []
    for s in range(4):
        own = known & (slide == s)
        n_a, n_b = (own & (codes == 0)).sum(), (own & (codes == 1)).sum()
        got = share[np.ix_(own & (codes == 0), own & (codes == 1))].sum() / n_a
        excess.append(got - n_b / (own.sum() - 1))
    assert row["difference"] == pytest.approx(np.mean(excess[2:]) - np.mean(excess[:2]))
    assert row["p"] == pytest.approx(ttest_ind(excess[2:], excess[:2], equal_var=False).pvalue)
    assert (row["condition"], row["reference"], row["n_slides"]) == ("y", "x", 2)


def test_permuted_types_give_uniform_p():
    p = []
    for seed in range(60):
        dense, codes, slide, condition = random_tests(n=60, seed=seed)
        tests = TypeTests(sp.csr_matrix(dense), codes, slide, condition, **NAMES)
        table = tests.types(n_permutations=39, generator=np.random.default_rng(seed))
        p.append(table["p"].to_numpy())
    p = np.concatenate(p)
    assert 0.03 < (p <= 0.05).mean() < 0.08
    assert 0.42 < (p <= 0.5).mean() < 0.58


def test_the_order_of_the_rows_does_not_matter(done, model):
    adata = make()
    adata.uns["grn"], adata.obs["grn_group"] = done.uns["grn"], done.obs["grn_group"]
    order = np.random.default_rng(0).permutation(adata.n_obs)
    other = sfm.tl.attention(adata[order].copy(), model, **ARGS, copy=True)[adata.obs_names]
    np.testing.assert_allclose(
        other.obsp["attention"].toarray(), done.obsp["attention"].toarray(), rtol=1e-3, atol=1e-6
    )
    for k, weights in done.uns["attention"]["genes"]["groups"].items():
        np.testing.assert_allclose(
            other.uns["attention"]["genes"]["groups"][k].toarray(), weights.toarray(), rtol=1e-3, atol=1e-5
        )
    for table in ("types", "differences"):
        a, b = (sfm.get.attention_df(x, level=table) for x in (done, other))
        pd.testing.assert_frame_equal(a, b, rtol=1e-3, atol=1e-4)


def test_one_slide_a_condition_has_no_p(model):
    adata = make(120)
    adata.obs["slide"] = adata.obs["stage"]
    with pytest.warns(UserWarning, match="no p-values"):
        sfm.tl.attention(adata, model, **ARGS)
    table = sfm.get.attention_df(adata, level="differences")
    assert len(table) == 9
    assert table["p"].isna().all()
    assert table["fdr"].isna().all()
    assert (table["n_slides"] == 1).all()
    sfm.pp.grn(adata, groupby="type")
    before = list(adata.uns), list(adata.obsp)
    # pytest makes errors of warnings: nothing is written then.
    with pytest.raises(UserWarning, match="seen these types"):
        sfm.tl.attention(adata, model, groupby="type", n_permutations=1, key_added="other")
    assert (list(adata.uns), list(adata.obsp)) == before


def test_cells_without_a_type_are_left_out():
    """As if they and their edges were not there."""
    rng = np.random.default_rng(0)
    dense = np.where(rng.random((60, 60)) < 0.2, rng.random((60, 60)), 0)
    dense = np.where(dense.T > 0, dense, 0)
    codes, slide = rng.integers(-1, 3, 60), np.repeat([0, 1, 2, 3], 15)
    condition = slide // 2

    def tables(dense, codes, slide, condition):
        tests = TypeTests(sp.csr_matrix(dense), codes, slide, condition, **NAMES)
        one = tests.types(n_permutations=19, generator=np.random.default_rng(0))
        return one, tests.differences()

    known = codes >= 0
    rest = tables(dense[np.ix_(known, known)], codes[known], slide[known], condition[known])
    for a, b in zip(tables(dense, codes, slide, condition), rest, strict=True):
        pd.testing.assert_frame_equal(a, b)


def test_one_missing_type_is_left_out_with_a_warning(model):
    adata = make(80)
    adata.obs.loc[adata.obs_names[3], "type"] = np.nan
    with pytest.warns(UserWarning, match="no value for 1 of 80 cells; these cells neither attend"):
        sfm.tl.attention(adata, model, groupby="type", n_permutations=2)
    assert adata.obsp["attention"][3].nnz
    assert sfm.get.attention_df(adata).groupby("cell_type", observed=True)["n_cells"].first().sum() == 79


def test_slides_that_are_alike_have_no_p(model):
    """Rounding is no spread: with one type the excess is 0 on each slide, but for its last digits."""
    adata = make(120)
    adata.obs["type"] = "A"
    sfm.tl.attention(adata, model, **ARGS)
    assert sfm.get.attention_df(adata, level="differences")["p"].isna().all()


def test_nothing_is_infinite():
    """Where nothing falls on a type, there is no ratio to take a logarithm of."""
    dense = np.array([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]], float)
    same = np.zeros(4, int)
    tests = TypeTests(sp.csr_matrix(dense), np.array([0, 0, 1, 1]), same, same, types=["a", "b"], conditions=["all"])
    table = tests.types(n_permutations=9, generator=np.random.default_rng(0))
    apart = table["cell_type"].astype(str) != table["neighbor_type"].astype(str)
    assert table["log2_enrichment"].isna().tolist() == apart.tolist()
    assert np.isfinite(table.loc[~apart].select_dtypes("number")).all(axis=None)


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_round_trip(done, tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    getattr(done, f"write_{suffix}")(path)
    back = getattr(ad, f"read_{suffix}")(path)
    for level in ("types", "differences", "genes", "cells"):
        a, b = (sfm.get.attention_df(x, level=level) for x in (done, back))
        pd.testing.assert_frame_equal(a, b, check_categorical=False, check_dtype=False)


def test_refusals_leave_adata_as_it_was(model):
    adata = make(40)
    with pytest.raises(ValueError, match="model='heist-niche' has no attention"):
        sfm.tl.attention(adata, "heist-niche")
    with pytest.raises(ValueError, match="library_key="):
        sfm.tl.attention(adata, model, groupby="type", condition_key="stage")
    with pytest.raises(ValueError, match="several conditions"):
        sfm.tl.attention(adata, model, groupby="stage", condition_key="type", library_key="slide")
    with pytest.raises(ValueError, match="n_permutations must be a positive integer"):
        sfm.tl.attention(adata, model, n_permutations=0)
    assert not adata.uns
    assert not adata.obsp
