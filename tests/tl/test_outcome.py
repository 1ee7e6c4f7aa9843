"""Outcome of held-out patients: equal to a loop in scikit-learn, calibrated p-values, attention, and errors."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from natsort import natsorted
from scipy.stats import kstest
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score

import spatialfm as sfm
from spatialfm.tl._outcome import auc_interval

COLUMNS = {"sample_key": "sample", "condition_key": "response", "patient_key": "patient", "use_rep": "X_rep"}


def cohort(n=12, *, classes=("no", "yes"), effect=0.0, cells=20, per_patient=2, columns=5, seed=0):
    """Patients with samples of unequal size; a fifth of the cells, more in later classes, are of a niche."""
    rng = np.random.default_rng(seed)
    reps, obs = [], []
    for i in range(n):
        c = i % len(classes)
        own = rng.normal(0, 0.3, columns)
        for s in range(per_patient):
            size = cells + 3 * s
            niche = rng.random(size) < 0.2 + effect * c
            reps.append(rng.normal(size=(size, columns)) + own + 3 * niche[:, None] * np.eye(columns)[0])
            obs.append(
                pd.DataFrame({"sample": f"p{i}/{s}", "patient": f"p{i}", "response": classes[c]}, index=range(size))
            )
    table = pd.concat(obs, ignore_index=True)
    table.index = [f"c{i}" for i in range(len(table))]
    rep = np.concatenate(reps).astype(np.float32)
    return ad.AnnData(np.zeros((len(rep), 1), np.float32), obs=table, obsm={"X_rep": rep})


def pooled(adata, *, spread=False):
    """Mean of each sample, beside it the spread, and the standard deviation over cells."""
    rep = pd.DataFrame(adata.obsm["X_rep"].astype(float), index=adata.obs_names)
    sample = adata.obs["sample"].astype(str)
    mean = rep.groupby(sample).mean().loc[natsorted(sample.unique())]
    scale = np.sqrt((rep**2).groupby(sample).mean().mean() - mean.mean() ** 2)
    if spread:
        return pd.concat([mean, rep.groupby(sample).std(ddof=0).loc[mean.index]], axis=1), np.tile(scale, 2)
    return mean, scale.to_numpy()


def oracle(adata, x, folds, classes):
    """AUC of patients held out together, by fitting each fold and each leave-one-out error, from samples ``x``."""
    patient = adata.obs.groupby("sample", observed=True)["patient"].first().astype(str).loc[x.index]
    x = x.groupby(patient.to_numpy()).mean()
    label = adata.obs.groupby("patient", observed=True)["response"].first().astype(str).loc[x.index].to_numpy()
    x = x.to_numpy()
    y = np.column_stack([label == c for c in (classes if len(classes) > 2 else classes[1:])]).astype(float)
    alphas = ((x - x.mean(axis=0)) ** 2).sum() / len(x) * 10.0 ** np.arange(-2, 3)
    won, pairs = np.zeros(y.shape[1]), np.zeros(y.shape[1])
    for fold in folds.T:
        for k in np.unique(fold):
            train, test = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
            errors = []
            for alpha in alphas:
                left = [
                    y[i] - Ridge(alpha).fit(x[train[train != i]], y[train[train != i]]).predict(x[[i]])[0]
                    for i in train
                ]
                errors.append((np.array(left) ** 2).sum())
            score = Ridge(alphas[np.argmin(errors)]).fit(x[train], y[train]).predict(x[test]).reshape(len(test), -1)
            for c in range(y.shape[1]):
                member = y[test, c] == 1
                n = member.sum() * (~member).sum()
                won[c] += n * roc_auc_score(member, score[:, c])
                pairs[c] += n
    return (won / pairs).mean()


@pytest.mark.parametrize(
    ("classes", "n", "pooling"), [(("no", "yes"), 13, "mean_std"), (("bad", "good", "none"), 14, "mean")]
)
def test_equals_a_loop_in_scikit_learn(classes, n, pooling):
    adata = cohort(n, classes=classes, effect=0.1)
    adata.obs["type"] = pd.cut(adata.obsm["X_rep"][:, 0], [-np.inf, 0, 1, np.inf], labels=["low", "mid", "high"])
    before = adata.copy()
    samples = sfm.tl.outcome(
        adata, **COLUMNS, n_folds=3, n_repeats=2, n_permutations=3, pooling=pooling, groupby="type"
    )
    assert samples.uns["outcome"]["classes"] == sorted(classes)
    fold = samples.obsm["fold"]
    by_patient = pd.DataFrame(fold, index=samples.obs["patient"].astype(str)).groupby(level=0)
    assert (by_patient.nunique() == 1).all(axis=None)
    folds = by_patient.first().to_numpy()
    expected, scale = pooled(adata, spread=pooling == "mean_std")
    entry = samples.uns["outcome"]
    assert entry["auc"] == pytest.approx(oracle(adata, expected / scale, folds, sorted(classes)))
    logs = np.log(pd.crosstab(adata.obs["sample"], adata.obs["type"]).astype(float) + 0.5)
    clr = logs.sub(logs.mean(axis=1), axis=0)
    baseline = entry["baselines"]["composition"]
    assert baseline["auc"] == pytest.approx(oracle(adata, clr, folds, sorted(classes)))
    low, high = baseline["interval"]
    assert low < baseline["auc"] < high
    assert (
        sfm.get.outcome_df(samples)["composition_agreement"] == samples.obs["composition_agreement"].to_numpy()
    ).all()
    for repeat in fold.T:
        # Every class in every fold, and the folds of about one size.
        assert (pd.crosstab(repeat, samples.obs["label"].to_numpy()) > 0).all(axis=None)
    assert list(samples.obs_names) == list(expected.index)
    np.testing.assert_allclose(samples.X, expected, atol=1e-6)
    np.testing.assert_allclose(samples.obsm["probability"].sum(axis=1), 1)
    assert samples.obs["n_cells"].sum() == adata.n_obs
    assert list(adata.obs) == list(before.obs)
    assert not adata.uns


def test_agreement_is_the_auc_of_each_patient():
    samples = sfm.tl.outcome(cohort(20, effect=0.1), **COLUMNS, n_permutations=1)
    patients = samples.obs.groupby("patient", observed=True).first()
    for _, own in patients.groupby("label", observed=True):
        assert own["agreement"].mean() == pytest.approx(samples.uns["outcome"]["auc"])


def test_finds_a_niche_that_differs():
    samples = sfm.tl.outcome(cohort(24, effect=0.3, cells=60), **COLUMNS, n_permutations=199)
    entry = samples.uns["outcome"]
    assert entry["auc"] > 0.9
    assert entry["p"] == 1 / 200
    assert abs(entry["null"].mean() - 0.5) < 0.05
    assert (samples.obs["predicted"] == samples.obs["label"]).mean() > 0.85


def test_mean_std_finds_what_shows_in_the_spread_alone():
    adata = cohort(20, cells=60, seed=1)
    case = (adata.obs["response"] == "yes").to_numpy()
    adata.obsm["X_rep"][case, 1] *= 2
    aucs = [
        sfm.tl.outcome(adata, **COLUMNS, pooling=pooling, n_permutations=1).uns["outcome"]["auc"]
        for pooling in ("mean", "mean_std")
    ]
    assert aucs[0] < 0.75
    assert aucs[1] > 0.95


def test_p_is_uniform_and_the_interval_holds_where_there_is_nothing():
    found = [
        sfm.tl.outcome(cohort(10, seed=s), **COLUMNS, n_repeats=2, n_permutations=49, rng=s).uns["outcome"]
        for s in range(60)
    ]
    p = np.array([e["p"] for e in found]) - np.random.default_rng(0).uniform(0, 0.02, len(found))
    assert kstest(p, "uniform").pvalue > 0.01
    assert abs(np.mean([e["auc"] for e in found]) - 0.5) < 0.06
    low, high = np.array([e["interval"] for e in found]).T
    assert ((low <= 0.5) & (high >= 0.5)).mean() > 0.9


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_order_of_cells_does_not_matter(pooling):
    adata = cohort(6, effect=0.2, per_patient=1 if pooling == "attention" else 2)
    adata.obs["response"] = pd.Categorical(adata.obs["response"], categories=["yes", "unused", "no"])
    how = {**COLUMNS, "n_folds": 2, "n_permutations": 1, "pooling": pooling}
    order = np.random.default_rng(0).permutation(adata.n_obs)
    one, other = sfm.tl.outcome(adata, **how), sfm.tl.outcome(adata[order], **how)
    np.testing.assert_allclose(one.obsm["probability"], other.obsm["probability"], atol=1e-5)
    assert one.uns["outcome"]["p"] == other.uns["outcome"]["p"]
    if pooling == "attention":
        weights = one.uns["outcome"]["attention"]
        np.testing.assert_allclose(weights[order], other.uns["outcome"]["attention"], atol=1e-3)
        np.testing.assert_allclose(pd.Series(weights).groupby(adata.obs["sample"].to_numpy()).mean(), 1, atol=1e-5)


def test_as_many_cells_twice_are_not_more_patients():
    adata = cohort(effect=0.1)
    twice = ad.concat([adata, adata], index_unique="-")
    one, other = (sfm.tl.outcome(a, **COLUMNS, n_permutations=20) for a in (adata, twice))
    np.testing.assert_allclose(one.obsm["probability"], other.obsm["probability"], atol=1e-8)
    np.testing.assert_array_equal(one.uns["outcome"]["interval"], other.uns["outcome"]["interval"])


def test_attention_finds_the_cells_that_matter():
    """Only 5 % of the cells differ between classes; the mean over a sample hides them."""
    adata = cohort(20, cells=100, per_patient=1)
    rng = np.random.default_rng(0)
    niche = rng.random(adata.n_obs) < 0.05
    state = np.where(adata.obs["response"] == "yes", 2, -2)
    adata.obsm["X_rep"][:, 0] = rng.normal(size=adata.n_obs) + 6 * niche
    adata.obsm["X_rep"][niche, 1] += state[niche]
    how = {**COLUMNS, "n_folds": 2, "n_permutations": 1}
    attended = sfm.tl.outcome(adata, **how, pooling="attention").uns["outcome"]
    assert attended["auc"] > sfm.tl.outcome(adata, **how).uns["outcome"]["auc"] + 0.1
    assert attended["auc"] > 0.9
    assert roc_auc_score(niche, attended["attention"]) > 0.9


@pytest.mark.parametrize(("auc", "n", "m"), [(0.5, 10, 10), (0.8, 7, 30), (1.0, 5, 5), (0.0, 5, 8)])
def test_interval(auc, n, m):
    low, high = auc_interval(auc, n, m, 5)
    assert 0 <= low <= auc <= high <= 1
    assert high - low > 0.1
    np.testing.assert_allclose(auc_interval(1 - auc, n, m, 5), (1 - high, 1 - low), atol=1e-6)


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_samples_survive_a_file(tmp_path, suffix):
    adata = cohort()
    adata.obs["type"] = np.arange(adata.n_obs) % 3
    samples = sfm.tl.outcome(adata, **COLUMNS, n_permutations=5, groupby="type")
    path = tmp_path / f"samples.{suffix}"
    getattr(samples, f"write_{suffix}")(path)
    back = (ad.read_h5ad if suffix == "h5ad" else ad.read_zarr)(path)
    pd.testing.assert_frame_equal(
        sfm.get.outcome_df(samples).astype({"sample": str}),
        sfm.get.outcome_df(back).astype({"sample": str}),
        check_dtype=False,
        check_categorical=False,
    )
    assert back.uns["outcome"]["params"] == samples.uns["outcome"]["params"]


def test_several_anndata():
    adata = cohort()
    whole = sfm.tl.outcome(adata, **COLUMNS, n_permutations=5)
    heist = {"model": "heist", "sha256": "a", "params": {"context_size": 256}, "axes": "model"}
    parts = {str(s): adata[adata.obs["sample"] == s].copy() for s in adata.obs["sample"].unique()}
    for part in parts.values():
        part.uns["embeddings"] = {"X_rep": heist}
        del part.obs["sample"]
    named = sfm.tl.outcome(parts, "response", patient_key="patient", use_rep="X_rep", n_permutations=5)
    np.testing.assert_allclose(named.obsm["probability"], whole.obsm["probability"])
    niche = {"model": "heist-niche", "sha256": "a", "params": {"library_key": ""}}
    next(iter(parts.values())).uns["embeddings"] = {"X_rep": niche}
    with pytest.raises(ValueError, match=r"different axes in each .*anndata.concat.*library_key"):
        sfm.tl.outcome(parts, "response", patient_key="patient", use_rep="X_rep")
    for part in parts.values():
        hibio = {"model": "hibio", "sha256": "a", "params": {}}
        part.uns["embeddings"] = {"X_hibio": hibio, "X_hibio_gene": {**hibio, "axes": "model"}}
        part.obsm["X_hibio_gene"] = part.obsm["X_hibio"] = part.obsm["X_rep"]
    with pytest.raises(ValueError, match="different axes in each"):
        sfm.tl.outcome(parts, condition_key="response", patient_key="patient", use_rep="X_hibio")
    sfm.tl.outcome(parts, condition_key="response", patient_key="patient", use_rep="X_hibio_gene", n_permutations=1)
    one = adata[adata.obs["sample"] == "p0/0"]
    with (
        pytest.warns(UserWarning, match="the origin of"),
        pytest.raises(ValueError, match="'p0/0' is in several AnnData, '0' and '1'"),
    ):
        sfm.tl.outcome([one, one], **COLUMNS)


def test_samples_as_patients_are_warned_of():
    with pytest.warns(UserWarning, match="patient_key= is not given, so each of the 24 samples counts as a patient"):
        sfm.tl.outcome(cohort(), "response", sample_key="sample", use_rep="X_rep", n_permutations=1)


def test_two_keys_are_side_by_side():
    adata = cohort()
    adata.obsm["X_niche"], adata.obsm["X_state"] = adata.obsm["X_rep"][:, :2], adata.obsm["X_rep"][:, 2:]
    how = {k: v for k, v in COLUMNS.items() if k != "use_rep"} | {"n_permutations": 3}
    both = sfm.tl.outcome(adata, **how, pooling="mean_std")
    one = sfm.tl.outcome(adata, **how, use_rep="X_rep", pooling="mean_std")
    np.testing.assert_allclose(both.obsm["probability"], one.obsm["probability"])
    assert list(both.var_names[:5]) == ["X_niche_1", "X_niche_2", "X_state_1", "X_state_2", "X_state_3"]
    assert both.var_names[5] == "X_niche_1_std"
    assert both.uns["outcome"]["params"]["use_rep"] == "X_niche + X_state"


def changed(**columns):
    adata = cohort()
    for name, value in columns.items():
        adata.obs[name] = value(adata.obs) if callable(value) else value
    return adata


@pytest.mark.parametrize(
    ("adata", "arguments", "message"),
    [
        (cohort(6), {}, "the class 'no' has 3 patients, fewer than n_folds=5; pass n_folds=3 or less"),
        (cohort(3), {"n_folds": 2}, "the class 'yes' has 1 patient, .*do not help"),
        (changed(response="yes"), {}, "all patients are of the class 'yes'"),
        (changed(response=lambda o: np.where(o.index == "c0", "yes", "no")), {}, "'p0/0' has cells of 'no' and 'yes'"),
        (changed(patient=lambda o: np.where(o.index == "c0", "q", "p")), {}, "cells of the patients 'p' and 'q'"),
        (changed(response=lambda o: o["sample"].str[-1]), {}, "patient 'p0' has samples of '0' and '1'"),
        (changed(response=lambda o: np.arange(len(o)) / 7), {}, "is a continuous number"),
        (cohort(), {"n_folds": 1}, "n_folds must be a whole number from 2"),
        (cohort(), {"pooling": "max"}, r"pooling='max' is not known"),
        (changed(type="a"), {"groupby": "type"}, "groupby='type' holds 'a' alone"),
        (cohort(), {"sample_key": None}, "sample_key= is missing"),
        (cohort(), {"n_permutations": 0}, "n_permutations must be a positive integer"),
        ([], {}, "at least one"),
        (cohort()[:0], {}, "adata holds no cells"),
    ],
)  # fmt: skip
def test_refusals(adata, arguments, message):
    with pytest.raises(ValueError, match=message):
        sfm.tl.outcome(adata, **{**COLUMNS, **arguments})


@pytest.mark.parametrize(
    "missing",
    [{"condition_key": "age"}, {"sample_key": "age"}, {"patient_key": "age"}, {"use_rep": "X_no"}, {"groupby": "age"}],
)
def test_missing_fields(missing):
    with pytest.raises(KeyError):
        sfm.tl.outcome(cohort(), **{**COLUMNS, **missing})


def test_numbered_samples_and_patients_come_in_their_order():
    adata = cohort(24, per_patient=1)
    number = adata.obs["patient"].str[1:].astype(float)
    adata.obs["patient"], adata.obs["sample"] = number, number + 1
    samples = sfm.tl.outcome(adata, **COLUMNS, n_permutations=1)
    assert list(samples.obs_names) == [str(k + 1) for k in range(24)]
    assert list(samples.obs["patient"].cat.categories) == [str(k) for k in range(24)]
    np.testing.assert_allclose(
        samples.X, pd.DataFrame(adata.obsm["X_rep"], index=number.index).groupby(number).mean(), atol=1e-5
    )
