"""Niche composition: counts, permutations by brute force, Welch's t, and uniform p-values without a difference."""

from __future__ import annotations

import itertools

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, false_discovery_control, ttest_ind

import spatialfm as sfm
from spatialfm.tl._niche_composition import permutation_p, welch_interval


def cohort(counts, conditions, patients=None):
    """Cells with so many (samples, niches) of each niche."""
    rows = [(s, k) for s, row in enumerate(counts) for k, n in enumerate(row) for _ in range(n)]
    sample, niche = np.array(rows).T
    obs = {
        "sample": pd.Categorical([f"s{s}" for s in sample]),
        "niche": pd.Categorical([f"n{k}" for k in niche]),
        "condition": pd.Categorical(np.asarray(conditions, dtype=object)[sample]),
        "type": pd.Categorical([f"t{i % 3}" for i in range(len(rows))]),
    }
    if patients is not None:
        obs["patient"] = pd.Categorical(np.asarray(patients, dtype=object)[sample])
    return ad.AnnData(obs=pd.DataFrame(obs, index=[f"c{i}" for i in range(len(rows))]))


def drawn(n_a, n_b, seed=0, *, n_cells=300, shift=0.0):
    """Samples whose proportions vary; in condition b the first niche is more frequent by ``shift`` on the log scale."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n_a + n_b, 4)) * 0.5 + np.array([0, 1, 0.5, -1])
    logits[n_a:, 0] += shift
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    counts = np.stack([rng.multinomial(n_cells, row) for row in p])
    return counts, ["a"] * n_a + ["b"] * n_b


def clr(counts):
    logs = np.log(np.asarray(counts) + 0.5)
    return logs - logs.mean(axis=1, keepdims=True)


def test_counts_and_differences():
    counts, conditions = drawn(4, 5, shift=2.0)
    adata = cohort(counts, conditions)
    assert (
        sfm.tl.niche_composition(adata, "niche", sample_key="sample", condition_key="condition", groupby="type") is None
    )
    table = sfm.get.niche_composition_df(adata)
    np.testing.assert_array_equal(table["n_cells"].to_numpy().reshape(9, 4), counts)
    np.testing.assert_allclose(table["proportion"].to_numpy().reshape(9, 4), counts / counts.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(table["clr"].to_numpy().reshape(9, 4), clr(counts))
    assert list(table["condition"][::4]) == conditions
    types = sfm.get.niche_composition_df(adata, table="cell_types")
    oracle = pd.crosstab([adata.obs["sample"], adata.obs["niche"]], adata.obs["type"])
    np.testing.assert_array_equal(types["n_cells"].to_numpy().reshape(36, 3), oracle)
    np.testing.assert_allclose(types["proportion"].to_numpy().reshape(36, 3), oracle.div(oracle.sum(axis=1), axis=0))

    found = sfm.get.niche_composition_df(adata, table="differences")
    values = clr(counts)
    result = ttest_ind(values[4:], values[:4], equal_var=False)
    interval = result.confidence_interval()
    np.testing.assert_allclose(found["difference"], values[4:].mean(axis=0) - values[:4].mean(axis=0))
    np.testing.assert_allclose(found[["low", "high"]].to_numpy().T, [interval.low, interval.high])
    observed = np.abs(found["difference"].to_numpy())
    extreme = [
        np.abs(values[list(c)].mean(axis=0) - np.delete(values, c, axis=0).mean(axis=0)) >= observed - 1e-9
        for c in itertools.combinations(range(9), 5)
    ]
    np.testing.assert_allclose(found["p"], np.mean(extreme, axis=0))
    np.testing.assert_allclose(found["fdr"], false_discovery_control(found["p"]))
    np.testing.assert_allclose(found["smallest_p"], 1 / 126)
    assert found["p"][0] < 0.05
    assert (found["reference"] == "a").all()
    turned = sfm.tl.niche_composition(
        adata, "niche", sample_key="sample", condition_key="condition", reference="b", copy=True
    )
    table = sfm.get.niche_composition_df(turned, table="differences")
    np.testing.assert_allclose(table["difference"], -found["difference"])
    np.testing.assert_allclose(table["p"], found["p"])


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 4), st.integers(2, 4), st.integers(0, 1000), st.booleans())
def test_permutations_against_brute_force(n_a, n_b, seed, ties):
    values = np.random.default_rng(seed).normal(size=(n_a + n_b, 3))
    values = np.round(values) if ties else values
    p, smallest = permutation_p(values[:n_a], values[n_a:], 1000, np.random.default_rng(0))
    ways = list(itertools.combinations(range(n_a + n_b), n_a))
    all_differences = np.array(
        [np.abs(values[list(c)].mean(axis=0) - np.delete(values, c, axis=0).mean(axis=0)) for c in ways]
    )
    np.testing.assert_allclose(p, (all_differences >= all_differences[0] - 1e-9).mean(axis=0))
    # No data can reach less: those in order do reach it.
    ordered = np.arange(n_a + n_b, dtype=float)[:, None] ** 2
    assert permutation_p(ordered[n_a:][::-1], ordered[:n_a], 1000, np.random.default_rng(0))[0] >= smallest - 1e-12
    assert smallest == pytest.approx((2 if n_a == n_b else 1) / len(ways))
    a, b = values[:n_a], values[n_a:]
    varies = np.minimum(a.var(axis=0), b.var(axis=0)) > 1e-9
    low, high = welch_interval(a, b)
    if varies.any():
        interval = ttest_ind(a[:, varies], b[:, varies], equal_var=False).confidence_interval()
        np.testing.assert_allclose([low[varies], high[varies]], [interval.low, interval.high], rtol=1e-6)
    both_flat = np.maximum(a.var(axis=0), b.var(axis=0)) == 0
    np.testing.assert_allclose(low[both_flat], high[both_flat], atol=1e-9)


def test_drawn_permutations_agree_with_all():
    values = np.random.default_rng(3).normal(size=(14, 5))
    values[7:, 0] += 1
    exact, smallest = permutation_p(values[:7], values[7:], 10_000, np.random.default_rng(0))
    assert smallest == 2 / 3432
    some, at_least = permutation_p(values[:7], values[7:], 2000, np.random.default_rng(0))
    np.testing.assert_allclose(some, exact, atol=0.04)
    assert at_least == 1 / 2001
    order = np.r_[np.random.default_rng(1).permutation(7), 7:14]
    again = permutation_p(values[order][:7], values[7:], 2000, np.random.default_rng(0))[0]
    np.testing.assert_array_equal(some, again)


def test_p_values_are_uniform_where_nothing_differs():
    """Of samples; a chi-squared test of cells finds a difference nearly always."""
    p, cells = [], []
    for seed in range(150):
        counts, _ = drawn(5, 5, seed, n_cells=5000)
        p.append(permutation_p(clr(counts)[:5], clr(counts)[5:], 1000, np.random.default_rng(0))[0])
        cells.append(chi2_contingency([counts[:5].sum(axis=0), counts[5:].sum(axis=0)]).pvalue)
    p = np.array(p)
    for level in (0.1, 0.3, 0.5, 0.7):
        assert (p <= level).mean() == pytest.approx(level, abs=0.07)
    assert np.mean(np.array(cells) < 0.05) > 0.95


def test_patients_are_permuted_as_a_whole():
    """Six samples of two patients each condition are two against two."""
    counts, conditions = drawn(6, 6, shift=3.0)
    patients = [f"p{k // 3}" for k in range(12)]
    adata = cohort(counts, conditions, patients)
    how = {"sample_key": "sample", "condition_key": "condition", "patient_key": "patient"}
    with pytest.raises(UserWarning, match=r"with 2 and 2 patients no permutation p-value can be below 0\.33"):
        sfm.tl.niche_composition(adata, "niche", **how)
    assert not adata.uns
    with pytest.warns(UserWarning, match="no permutation p-value"):
        sfm.tl.niche_composition(adata, "niche", **how)
    table = sfm.get.niche_composition_df(adata, table="differences")
    means = clr(counts).reshape(4, 3, 4).mean(axis=1)
    result = ttest_ind(means[2:], means[:2], equal_var=False).confidence_interval()
    np.testing.assert_allclose(table[["low", "high"]].to_numpy().T, [result.low, result.high])
    assert (table["n_condition"] == 2).all()
    np.testing.assert_allclose(table["smallest_p"], 1 / 3)
    assert table["p"].min() >= 1 / 3 - 1e-12
    adata = cohort(counts, conditions, [f"p{k % 6}" for k in range(12)])
    with pytest.raises(ValueError, match="paired designs are not compared here"):
        sfm.tl.niche_composition(adata, "niche", sample_key="sample", condition_key="condition", patient_key="patient")


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
def test_one_sample_is_counted_without_a_test(tmp_path):
    adata = cohort(*drawn(1, 0))
    adata.obs["niche"] = adata.obs["niche"].astype(object).where(np.arange(adata.n_obs) % 9 > 0)
    sfm.tl.niche_composition(adata, "niche", groupby="type")
    entry = adata.uns["niche_composition"]
    assert set(entry) == {"params", "niches", "samples", "composition", "cell_types"}
    assert entry["samples"] == ["all"]
    assert entry["params"]["sample_key"] == ""
    table = sfm.get.niche_composition_df(adata)
    counts = adata.obs["niche"].value_counts().sort_index()
    assert (list(table["niche"]), list(table["n_cells"])) == (list(counts.index), list(counts))
    np.testing.assert_allclose(table["proportion"], counts / counts.sum())
    sfm.tl.niche_composition(adata, "niche", sample_key="sample", groupby="type", key_added="named")
    for which in ("composition", "cell_types"):
        pd.testing.assert_frame_equal(
            sfm.get.niche_composition_df(adata, table=which).drop(columns="sample"),
            sfm.get.niche_composition_df(adata, key="named", table=which).drop(columns="sample"),
        )
    for suffix in ("h5ad", "zarr"):
        getattr(adata, f"write_{suffix}")(tmp_path / f"x.{suffix}")
        back = getattr(ad, f"read_{suffix}")(tmp_path / f"x.{suffix}")
        pd.testing.assert_frame_equal(sfm.get.niche_composition_df(back), table, check_dtype=False)
    with pytest.raises(KeyError, match=r"sample_key=\.\.\., condition_key=\.\.\.\) with at least two samples"):
        sfm.get.niche_composition_df(adata, table="differences")


def test_one_animal_each_is_no_test():
    adata = sfm.datasets.merfish_mouse_brain()
    expected = r"no test is possible for conditions with fewer than two samples, '3' \(1\), '19' \(1\)"
    with pytest.warns(UserWarning, match=expected):
        sfm.tl.niche_composition(adata, "region", sample_key="mouse_id", condition_key="age")
    assert len(sfm.get.niche_composition_df(adata)) == 12
    with pytest.raises(KeyError, match="at least two samples"):
        sfm.get.niche_composition_df(adata, table="differences")


def test_three_conditions_and_missing_niches(messages):
    counts, _ = drawn(4, 4)
    adata = cohort(counts, ["a", "a", "a", "b", "b", "b", "c", "a"])
    niche = adata.obs["niche"].astype(object)
    niche.iloc[::10] = np.nan
    adata.obs["niche"] = niche
    with pytest.warns(UserWarning, match=r"'c' \(1\)"):
        sfm.tl.niche_composition(adata, "niche", sample_key="sample", condition_key="condition")
    table = sfm.get.niche_composition_df(adata, table="differences")
    assert list(dict.fromkeys(table["condition"])) == ["b"]
    assert f"({niche.isna().sum()} cells without a niche left out)" in "\n".join(messages())
    assert sfm.get.niche_composition_df(adata)["n_cells"].sum() == niche.notna().sum()


def test_row_order_changes_nothing():
    counts, conditions = drawn(10, 10)
    adata = cohort(counts, conditions)
    shuffled = adata[np.random.default_rng(0).permutation(adata.n_obs)]
    for one in (adata, shuffled):
        sfm.tl.niche_composition(one, "niche", sample_key="sample", condition_key="condition", n_permutations=500)
    for table in ("composition", "differences"):
        pd.testing.assert_frame_equal(
            sfm.get.niche_composition_df(adata, table=table), sfm.get.niche_composition_df(shuffled, table=table)
        )


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"niche_key": "nope"}, KeyError, "niche_key='nope'"),
        ({"niche_key": "one"}, ValueError, "at least two niches"),
        ({"niche_key": "gap"}, ValueError, r"no cell of the samples \['s0'\] has a niche"),
        ({"sample_key": "nope"}, KeyError, "sample_key='nope'"),
        ({"sample_key": None}, ValueError, "condition_key='condition', patient_key=None: .* with sample_key="),
        ({"sample_key": None, "condition_key": None, "patient_key": "type"}, ValueError, "with sample_key="),
        ({"condition_key": "type"}, ValueError, "each sample needs one"),
        ({"patient_key": "type"}, ValueError, "each sample needs one"),
        ({"reference": "z"}, ValueError, "reference='z' is no condition"),
        ({"groupby": "nope"}, KeyError, "groupby='nope'"),
        ({"n_permutations": 0}, ValueError, "n_permutations"),
    ],
)
def test_refusals_leave_the_data_alone(kwargs, error, message):
    adata = cohort(*drawn(2, 2))
    adata.obs["one"] = "x"
    adata.obs["gap"] = adata.obs["niche"].astype(object).where(adata.obs["sample"] != "s0")
    with pytest.raises(error, match=message):
        sfm.tl.niche_composition(
            adata, **{"niche_key": "niche", "sample_key": "sample", "condition_key": "condition", **kwargs}
        )
    assert not adata.uns


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_round_trip(tmp_path, suffix):
    adata = cohort(*drawn(4, 4))
    sfm.tl.niche_composition(adata, "niche", sample_key="sample", condition_key="condition", groupby="type")
    path = tmp_path / f"x.{suffix}"
    getattr(adata, f"write_{suffix}")(path)
    back = getattr(ad, f"read_{suffix}")(path)
    for table in ("composition", "cell_types", "differences"):
        pd.testing.assert_frame_equal(
            sfm.get.niche_composition_df(adata, table=table),
            sfm.get.niche_composition_df(back, table=table),
            check_dtype=False,
            check_categorical=False,
        )


def test_cells_without_a_type_do_not_count():
    adata = cohort(*drawn(2, 2))
    missing = np.arange(adata.n_obs) % 7 == 0
    adata.obs["type"] = adata.obs["type"].astype(object).where(~missing)
    with pytest.warns(UserWarning, match=f"no value for {missing.sum()} of {adata.n_obs} cells"):
        sfm.tl.niche_composition(adata, "niche", sample_key="sample", groupby="type")
    table = sfm.get.niche_composition_df(adata, table="cell_types")
    assert table["n_cells"].sum() == (~missing).sum()
    np.testing.assert_allclose(table.groupby(["sample", "niche"])["proportion"].sum(), 1)


def test_numbered_samples_come_in_their_order():
    counts = np.full((12, 2), 5)
    adata = cohort(counts, ["a"] * 12)
    adata.obs["sample"] = adata.obs["sample"].astype(str).str[1:].astype(int)
    sfm.tl.niche_composition(adata, "niche", sample_key="sample")
    assert list(sfm.get.niche_composition_df(adata)["sample"].unique()) == [str(k) for k in range(12)]


def test_categories_that_read_alike_are_one():
    adata = ad.AnnData(obs=pd.DataFrame({"niche": pd.Categorical([1, "1", "2", 1])}, index=list("abcd")))
    sfm.tl.niche_composition(adata, "niche")
    table = sfm.get.niche_composition_df(adata)
    assert dict(zip(table["niche"], table["n_cells"], strict=True)) == {"1": 3, "2": 1}
