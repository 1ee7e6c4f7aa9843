"""Transfer of labels: equal to scikit-learn, honest probabilities and thresholds, two files as one, and refusals."""

from __future__ import annotations

import re

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import spatialfm as sfm
from spatialfm._data._splits import group_folds, spatial_blocks
from spatialfm.tl._annotate import Split, predict
from spatialfm.tl._calibration import (
    blended,
    calibration_error,
    find_temperature,
    find_threshold,
    find_weight,
    reliability,
    with_temperature,
)
from spatialfm.tl._joined import join, shared_features

TABLE = "annotation_probabilities"
NAMES = ["tumour/core", "stroma", "fat"]


def tissue(n=600, *, n_slides=1, noise=1.5, seed=0):
    """Three types, mixed over the tissue, that differ in two columns; the left half of the cells is labelled."""
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0, 1, (n, 2)) * [100, 60]
    code = rng.choice(3, n, p=[0.5, 0.3, 0.2])
    centres = np.array([[0, 0], [4, 0], [0, 4]])
    rep = np.column_stack([centres[code] + rng.normal(0, noise, (n, 2)), rng.normal(0, 3, (n, 3)), np.full(n, 7.0)])
    obs = pd.DataFrame(
        {
            "truth": pd.Categorical(np.array(NAMES)[code], categories=NAMES),
            "slide": pd.Categorical([f"s{s}" for s in rng.integers(n_slides, size=n)]),
        },
        index=[f"c{i}" for i in range(n)],
    )
    obs["few"] = obs["truth"].where(xy[:, 0] < 50)
    adata = ad.AnnData(np.zeros((n, 1), np.float32), obs=obs, obsm={"spatial": xy, "X_rep": rep.astype(np.float32)})
    adata.uns["few_colors"] = ["#111111", "#222222", "#333333"]
    return adata


def expressed(n=250, *, seed=0, genes=None):
    """Counts of 40 mouse genes of three types, in patches of tissue, without an embedding."""
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0, 100, (n, 2))
    code = rng.integers(3, size=n)
    profile = np.random.default_rng(7).gamma(0.6, 3, (3, 40))
    names = sfm.datasets.merfish_mouse_brain().var_names[:40]
    return ad.AnnData(
        rng.poisson(profile[code] + 0.2).astype(np.float32),
        obs=pd.DataFrame({"type": pd.Categorical(np.array(NAMES)[code])}, index=[f"{seed}_{i}" for i in range(n)]),
        var=pd.DataFrame(index=names if genes is None else genes),
        obsm={"spatial": xy},
    )


def oracle(adata, labelled, folds):
    """What the documentation says, in plain scikit-learn: held-out predictions, and those of the others."""
    rep = adata.obsm["X_rep"]
    x = rep[:, rep.std(axis=0) > 0].astype(float)
    v = x.var(axis=0)
    x = (x - x.mean(axis=0)) / np.sqrt(v) * np.sqrt((1 + v / v.mean()) / 2)
    y = adata.obs["few"].cat.codes.to_numpy()
    p = LogisticRegression(C=0.1, tol=1e-8, max_iter=9999).fit(x[labelled], y[labelled]).predict_proba(x)
    for fold in np.unique(folds):
        train, out = labelled[folds != fold], labelled[folds == fold]
        p[out] = LogisticRegression(C=0.1, tol=1e-8, max_iter=9999).fit(x[train], y[train]).predict_proba(x[out])
    return p


@pytest.mark.parametrize("n_slides", [1, 3])
def test_equals_scikit_learn(n_slides):
    adata = tissue(n_slides=n_slides)
    assert sfm.tl.annotate(adata, groupby="few", use_rep="X_rep", library_key="slide") is None
    rows = np.flatnonzero(adata.obs["few"].notna())
    slide = adata.obs["slide"].cat.codes.to_numpy().astype(int)
    blocks = spatial_blocks(adata.obsm["spatial"][rows], slide[rows])
    units = blocks if n_slides == 1 else slide[rows]
    entry = adata.uns["annotation"]
    n_folds = 5 if n_slides == 1 else 3
    assert entry["held_out"]["folds"] == ("blocks" if n_slides == 1 else "slides")
    assert (entry["held_out"]["n_folds"], entry["held_out"]["n_units"]) == (n_folds, len(np.unique(units)))

    raw = oracle(adata, rows, group_folds(units, n_folds))
    truth = adata.obs["few"].cat.codes.to_numpy()
    assert entry["temperature"] == pytest.approx(find_temperature(raw[rows], truth[rows]), rel=1e-2)
    expected = raw ** (1 / entry["temperature"])
    expected /= expected.sum(axis=1, keepdims=True)
    table = adata.obsm[TABLE]
    assert list(table.columns) == ["tumour-core", "stroma", "fat"]
    np.testing.assert_allclose(table, expected, atol=2e-3)
    np.testing.assert_allclose(table.sum(axis=1), 1)

    # The rest follows from the table.
    p = table.to_numpy()
    found, best = adata.obs["annotation"], p.argmax(axis=1)
    assert list(found.cat.categories) == [*NAMES, "unsure"]
    given = adata.obs["few"].dropna().astype(str)
    assert (found[given.index].astype(str) == given).all()
    rest = np.setdiff1d(np.arange(adata.n_obs), rows)
    want = np.where(p.max(axis=1) >= entry["threshold"], best, 3)
    np.testing.assert_array_equal(found.cat.codes.to_numpy()[rest], want[rest])
    shown = np.where(truth >= 0, truth, best)
    np.testing.assert_array_equal(adata.obs["annotation_probability"], p[np.arange(adata.n_obs), shown])
    assert entry["n_unsure"] == (found == "unsure").sum() > 0
    assert entry["n_assigned"].tolist() == [int((found.to_numpy()[rest] == name).sum()) for name in NAMES]
    confusion = np.zeros((3, 4), int)
    for row in rows:
        confusion[truth[row], want[row]] += 1
    np.testing.assert_array_equal(entry["confusion"], confusion)
    held = entry["held_out"]
    assert held["accuracy"] == (best == truth)[rows].mean() == np.trace(entry["best_guess"]) / len(rows)
    sure = p[rows].max(axis=1) >= entry["threshold"]
    assert held["coverage"] == sure.mean()
    assert held["accuracy_sure"] == (best == truth)[rows][sure].mean() >= 0.9
    assert list(adata.uns["annotation_colors"]) == ["#111111", "#222222", "#333333", "#D3D3D3"]


def test_the_promise_holds_on_hidden_cells():
    """Also in cells without a label the asked accuracy is reached, and probabilities are right as often as they say."""
    for seed in range(3):
        adata = tissue(n=4000, seed=seed)
        sfm.tl.annotate(adata, groupby="few", use_rep="X_rep")
        hidden = adata.obs["few"].isna().to_numpy()
        found, truth = (adata.obs[c].astype(str).to_numpy()[hidden] for c in ("annotation", "truth"))
        sure = found != "unsure"
        assert 0.5 < sure.mean() < 1
        assert (found == truth)[sure].mean() > 0.89
        p = adata.obsm[TABLE].to_numpy()[hidden]
        correct = np.array(NAMES)[p.argmax(axis=1)] == truth
        assert calibration_error(reliability(p.max(axis=1), correct)) < 0.04


def test_nobody_is_unsure_where_not_asked():
    adata = tissue()
    sfm.tl.annotate(adata, groupby="few", use_rep="X_rep", min_accuracy=None)
    assert list(adata.obs["annotation"].cat.categories) == NAMES
    assert adata.uns["annotation"]["threshold"] == 0
    assert adata.uns["annotation"]["confusion"][:, -1].sum() == 0
    assert list(adata.uns["annotation_colors"]) == ["#111111", "#222222", "#333333"]


def test_all_are_unsure_where_no_probability_will_do(messages):
    """What cannot be known is left out, with the reason, and no line says "nan" or "inf"."""
    adata = tissue()
    adata.obsm["X_rep"] = np.random.default_rng(0).normal(size=(600, 3))
    sfm.tl.annotate(adata, groupby="few", use_rep="X_rep", min_accuracy=0.99)
    assert (adata.obs["annotation"][adata.obs["few"].isna()] == "unsure").all()
    entry = adata.uns["annotation"]
    assert "threshold" not in entry
    assert "no probability reaches an accuracy" in entry["no_threshold"]
    assert "accuracy_sure" not in entry["held_out"]
    assert entry["held_out"]["coverage"] == 0
    assert all(np.isfinite(value).all() for value in entry["held_out"].values() if not isinstance(value, str))
    assert np.isfinite(entry["reliability"].to_numpy()).all()
    assert not {"nan", "inf"} & set(re.findall(r"\w+", "\n".join(messages())))
    assert any("no probability reaches" in w for w in messages())


def test_temperature_is_found_again():
    rng = np.random.default_rng(0)
    true = with_temperature(rng.dirichlet([0.5, 0.5, 1], 40_000), 1.0)
    codes = (true.cumsum(axis=1) < rng.uniform(size=(40_000, 1))).sum(axis=1)
    assert find_temperature(true, codes) == pytest.approx(1, abs=0.03)
    overconfident = with_temperature(true, 0.5)
    assert find_temperature(overconfident, codes) == pytest.approx(2, rel=0.03)
    errors = [
        calibration_error(reliability(p.max(axis=1), p.argmax(axis=1) == codes))
        for p in (overconfident, with_temperature(overconfident, 2))
    ]
    assert errors[0] > 0.05
    assert errors[1] < 0.01
    # A label that training lacked says nothing about temperature.
    absent = np.pad(true, ((0, 100), (0, 1)))
    absent[-100:, 0] = 1
    assert find_temperature(absent, np.r_[codes, np.full(100, 3)]) == pytest.approx(1, abs=0.03)


def bound(values, units):
    """Lower 95 % bound of a mean, where cells of a unit are one."""
    mean = values.mean()
    gaps = [(values[units == u] - mean).sum() for u in np.unique(units)]
    return mean - 1.6449 * np.sqrt(np.square(gaps).sum() * len(gaps) / max(len(gaps) - 1, 1)) / len(values)


@pytest.mark.parametrize("n_slides", [1, 4])
@pytest.mark.parametrize("accuracy", [0.6, 0.9, 0.97, 0.9999])
def test_threshold_by_brute_force(accuracy, n_slides):
    rng = np.random.default_rng(1)
    confidence = rng.uniform(0.3, 1, 1500).round(3)
    blocks = rng.integers(20, size=1500)
    slides = blocks % n_slides
    correct = rng.uniform(size=1500) < confidence ** (0.5 + 0.1 * slides)
    units = [blocks] if n_slides == 1 else [blocks, slides]
    want = np.inf
    for t in sorted({np.quantile(confidence, k / 200, method="lower") for k in range(200)}, reverse=True):
        on = confidence >= t
        n, mean = on.sum(), correct[on].mean()
        z = 1.6449
        root = z * np.sqrt(mean * (1 - mean) / n + z**2 / (4 * n**2))
        wilson = (mean + z**2 / (2 * n) - root) / (1 + z**2 / n)
        if min(wilson, *(bound(correct[on], unit[on]) for unit in units)) >= accuracy:
            want = t
    assert find_threshold(confidence, correct, units, accuracy) == want
    assert np.isinf(want) == (accuracy > 0.95)


def test_row_order_and_repetition_change_nothing():
    adata = tissue(n_slides=2)
    shuffled = adata[np.random.default_rng(3).permutation(adata.n_obs)].copy()
    again = sfm.tl.annotate(adata, groupby="few", use_rep="X_rep", copy=True)
    assert "annotation" not in adata.obs
    for each in (adata, shuffled):
        sfm.tl.annotate(each, groupby="few", use_rep="X_rep")
    for other in (again, shuffled):
        pd.testing.assert_series_equal(adata.obs["annotation"], other.obs["annotation"].loc[adata.obs_names])
        pd.testing.assert_frame_equal(adata.obsm[TABLE], other.obsm[TABLE].loc[adata.obs_names], rtol=1e-6)


def test_a_rare_label_that_stands_in_one_place():
    adata = tissue()
    few = adata.obs["few"].astype(object)
    few.iloc[np.flatnonzero(few.notna())[0]] = "rare"
    adata.obs["few"] = pd.Categorical(few)
    sfm.tl.annotate(adata, groupby="few", use_rep="X_rep")
    entry = adata.uns["annotation"]
    rare = entry["names"].index("rare")
    assert entry["best_guess"][rare, rare] == 0
    assert entry["best_guess"].sum() == entry["n_labelled"].sum()
    assert np.isfinite(adata.obsm[TABLE].to_numpy()).all()


def test_two_files_equal_one():
    """With a reference, both are embedded together: as if they were slides of one AnnData."""
    reference, adata = expressed(seed=0), expressed(seed=1)
    adata.obs["type"] = "not read"
    copies = reference.copy(), adata.copy()
    sfm.tl.annotate(adata, reference, groupby="type")
    both = ad.concat([copies[1], copies[0]], label="slide")
    both.obs["type"] = pd.Categorical(both.obs["type"].astype(object).replace("not read", np.nan))
    sfm.tl.embed(both, library_key="slide")
    sfm.tl.annotate(both, groupby="type", library_key="slide")
    np.testing.assert_allclose(adata.obsm[TABLE], both.obsm[TABLE].loc[adata.obs_names], atol=1e-3)
    assert (adata.obs["annotation"] != "unsure").mean() > 0.5
    # Nothing but the result.
    assert set(adata.obs) - set(copies[1].obs) == {"annotation", "annotation_probability"}
    assert list(adata.uns) == ["annotation", "spatialfm"]
    assert list(adata.obsm) == ["spatial", TABLE]
    assert not list(adata.obsp)
    pd.testing.assert_frame_equal(reference.obs, copies[0].obs)
    assert (list(reference.uns), list(reference.obsm), list(reference.obsp)) == ([], ["spatial"], [])
    np.testing.assert_array_equal(reference.X, copies[0].X)


def test_genes_are_matched_by_id_and_ortholog():
    adata, reference = expressed(n=60), expressed(n=70, seed=1)
    ids, human = reference.copy(), reference.copy()
    sfm.pp.resolve_genes(ids)
    ids.var_names = ids.var["gene_id"].where(ids.var["gene_id"] != "", ids.var_names).astype(str)
    ids = ids[:, ::-1].copy()
    left, right = shared_features(adata, ids)
    assert len(left) == 40
    np.testing.assert_array_equal(left, 39 - right)
    sfm.pp.resolve_genes(human, to="human", key_added="human")
    known = human.var["human_symbol"] != ""
    human = human[:, known].copy()
    human.var_names = human.var["human_symbol"].astype(str)
    left, right = shared_features(adata, human)
    assert len(left) >= 30
    assert (adata.var_names[left].str.upper() == human.var_names[right].str.upper()).mean() > 0.9
    joined = join(adata, human, library_key=None, layer=None, basis="spatial", values="auto")
    assert joined.shape == (130, len(left))
    assert joined.obs["slide"].nunique() == 2
    np.testing.assert_allclose(np.expm1(joined.X).sum(axis=1), 1e4, rtol=1e-4)
    # Proteins, and other features, by their names.
    a, b = (expressed(n=20, genes=[f"marker {k}" for k in order]) for order in (range(40), range(39, -1, -1)))
    left, right = shared_features(a, b)
    np.testing.assert_array_equal(left, 39 - right)


@pytest.mark.parametrize("stored", ["type", "renamed"])
def test_labels_inside_the_networks(stored):
    adata = expressed(n=200)
    adata.obs["renamed"] = adata.obs["type"].cat.rename_categories(lambda name: name + " cells")
    sfm.tl.embed(adata, "heist", groupby=stored)
    adata.obs["type"] = adata.obs["type"].where(adata.obsm["spatial"][:, 0] < 60)
    kwargs = {"groupby": "type", "use_rep": "X_heist"}
    if stored == "type":
        with pytest.raises(ValueError, match=r"has seen these labels.*groupby='auto'"):
            sfm.tl.annotate(adata, **kwargs)
        other = expressed(n=50, seed=1)
        sfm.tl.embed(other, "heist")
        with pytest.raises(ValueError, match="has seen these labels"):
            sfm.tl.annotate(other, adata, **kwargs)
        assert "annotation" not in other.obs
    else:
        with pytest.warns(UserWarning, match="all but seen these labels"):
            sfm.tl.annotate(adata, **kwargs)


def test_axes_of_two_files(messages):
    reference, adata = expressed(seed=0), expressed(seed=1)
    for a in (reference, adata):
        sfm.tl.embed(a)
    with pytest.raises(ValueError, match=r"different axes in each.*Leave use_rep out"):
        sfm.tl.annotate(adata, reference, groupby="type", use_rep=("X_niche", "X_state"))
    for a in (reference, adata):
        a.obsm["X_mine"] = np.asarray(np.log1p(a.X))
    with pytest.warns(UserWarning, match="the origin of"):
        sfm.tl.annotate(adata, reference, groupby="type", use_rep="X_mine")
    assert any("slides without labels" in w for w in messages())
    found = adata.obs["annotation"].astype(str)
    assert (found == adata.obs["type"].astype(str)).mean() > 0.8
    adata.obsm["X_mine"] = adata.obsm["X_mine"][:, :5]
    with pytest.raises(ValueError, match=r"different numbers of columns, \[5, 40\]"):
        sfm.tl.annotate(adata, reference, groupby="type", use_rep="X_mine")


@pytest.mark.filterwarnings("ignore:the origin of")
def test_a_reference_of_dissociated_cells():
    """Cells without coordinates are held out at random; without use_rep= the error names the fix."""
    reference, adata = expressed(seed=0), expressed(seed=1)
    del reference.obsm["spatial"]
    with pytest.raises(KeyError, match=r"reference has no coordinates in obsm\['spatial'\].*use_rep="):
        sfm.tl.annotate(adata, reference, groupby="type")
    with pytest.raises(KeyError, match=r"reference has no coordinates"):
        sfm.tl.annotate(adata, reference, groupby="type", method="fine_tune")
    assert "annotation" not in adata.obs
    for a in (reference, adata):
        a.obsm["X_mine"] = np.asarray(np.log1p(a.X))
    sfm.tl.annotate(adata, reference, groupby="type", use_rep="X_mine")
    held_out = adata.uns["annotation"]["held_out"]
    assert held_out["folds"] == "cells"
    found = adata.obs["annotation"].astype(str)
    sure = (found != "unsure").to_numpy()
    assert sure.mean() > 0.5
    assert (found == adata.obs["type"].astype(str))[sure].mean() > 0.85
    # The order of the cells of the reference does not matter.
    again = adata.copy()
    shuffled = reference[np.random.default_rng(2).permutation(reference.n_obs)].copy()
    sfm.tl.annotate(again, shuffled, groupby="type", use_rep="X_mine")
    np.testing.assert_allclose(
        again.obs["annotation_probability"], adata.obs["annotation_probability"], rtol=0, atol=1e-4
    )
    # Without coordinates in adata, the error is the usual one.
    with pytest.raises(KeyError, match=r"obsm\['spatial'\] is missing"):
        sfm.tl.annotate(reference, adata, groupby="type")


def test_says_what_the_held_out_tissue_cannot_tell(messages):
    """Cells on slides without labels, and slides that nobody named."""
    adata = tissue(n=900, n_slides=3)
    last = (adata.obs["slide"] == "s2").to_numpy()
    few = adata.obs["few"].astype(object)
    first = (adata.obs["slide"] == "s0").to_numpy()
    for shown, why in (
        (few.where(first), "all labels are on one slide"),
        (few.where(~last).replace("fat", np.nan).where(first | (few != "stroma")), "labels are only on one slide"),
        (few.where(~last), None),
    ):
        adata.obs["some"] = shown
        before = len(messages())
        sfm.tl.annotate(adata, groupby="some", use_rep="X_rep", library_key="slide")
        found = [m for m in messages()[before:] if "slides without labels" in m]
        assert len(found) == (why is not None)
        assert all(why in m for m in found)
    adata.uns["embeddings"] = {"X_rep": {"model": "mine", "params": {"library_key": "slide"}}}
    sfm.tl.annotate(adata, groupby="some", use_rep="X_rep", library_key="slide")
    with pytest.warns(UserWarning, match="library_key='slide'"):
        sfm.tl.annotate(adata, groupby="some", use_rep="X_rep")


def nothing(adata):
    pass


def everywhere(adata):
    adata.obs["few"] = adata.obs["truth"]


def one_place(adata):
    adata.obsm["spatial"] = np.zeros((adata.n_obs, 2))


def unsure(adata):
    adata.obs["few"] = adata.obs["few"].cat.rename_categories({"fat": "unsure"})


def unnamed(adata):
    adata.obs["few"] = adata.obs["few"].cat.rename_categories({"fat": ""})


@pytest.mark.parametrize(
    ("change", "kwargs", "error", "message"),
    [
        (nothing, {"groupby": "nope"}, KeyError, "groupby='nope'"),
        (nothing, {"use_rep": None}, KeyError, "X_niche.*sfm.tl.embed"),
        (nothing, {"basis": "nope"}, KeyError, "nope"),
        (nothing, {"library_key": "nope"}, KeyError, "library_key='nope'"),
        (nothing, {"min_accuracy": 1.0}, ValueError, "min_accuracy=1.0"),
        (nothing, {"n_folds": 1}, ValueError, "n_folds"),
        (nothing, {"key_added": "few"}, ValueError, "did not write it"),
        (everywhere, {}, ValueError, "Only NaN counts"),
        (one_place, {}, ValueError, "the same location"),
        (unsure, {}, ValueError, "holds the label 'unsure'"),
        (unnamed, {}, ValueError, "an empty text as a label"),
    ],
)
def test_refusals_leave_the_data_alone(change, kwargs, error, message):
    adata = tissue(n=100)
    change(adata)
    before = [list(field) for field in (adata.obs, adata.obsm, adata.uns)]
    with pytest.raises(error, match=message):
        sfm.tl.annotate(adata, **{"groupby": "few", "use_rep": "X_rep", **kwargs})
    assert [list(field) for field in (adata.obs, adata.obsm, adata.uns)] == before


def test_values_and_genes_that_do_not_fit():
    adata, reference = expressed(n=60), expressed(n=60, seed=1)
    with pytest.raises(ValueError, match="share 0 features, at least 10"):
        sfm.tl.annotate(adata, expressed(n=60, genes=[f"protein {k}" for k in range(40)]), groupby="type")
    reference.X = reference.X - reference.X.mean(axis=0)
    with pytest.raises(ValueError, match="counts values and reference scaled values"):
        sfm.tl.annotate(adata, reference, groupby="type")
    reference.obsm["spatial"] = np.zeros((60, 3))
    with pytest.raises(ValueError, match="2 columns in adata and 3 in reference"):
        sfm.tl.annotate(adata, reference, groupby="type")
    with pytest.raises(ValueError, match="no cells"):
        sfm.tl.annotate(adata[:0].copy(), expressed(n=60), groupby="type")


def test_view():
    adata = tissue()
    view = adata[adata.obs["truth"] != "fat"]
    sfm.tl.annotate(view, groupby="few", use_rep="X_rep")
    assert view.uns["annotation"]["names"] == NAMES[:2]
    assert "annotation" not in adata.obs


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_round_trip(tmp_path, suffix):
    adata = tissue()
    sfm.tl.annotate(adata, groupby="few", use_rep="X_rep")
    path = tmp_path / f"x.{suffix}"
    getattr(adata, f"write_{suffix}")(path)
    back = getattr(ad, f"read_{suffix}")(path)
    pd.testing.assert_series_equal(adata.obs["annotation"], back.obs["annotation"])
    pd.testing.assert_frame_equal(adata.obsm[TABLE], back.obsm[TABLE])
    pd.testing.assert_frame_equal(sfm.get.annotation_df(adata), sfm.get.annotation_df(back))
    entry, kept = adata.uns["annotation"], back.uns["annotation"]
    assert list(kept["names"]) == entry["names"]
    assert dict(kept["held_out"]) == entry["held_out"]
    pd.testing.assert_frame_equal(
        kept["reliability"].reset_index(drop=True), entry["reliability"], check_index_type=False
    )


def crossed(n=2500, *, seed=0, random=False):
    """Two programs of genes, on or off; the label says whether both are alike, which no linear probe can find."""
    rng = np.random.default_rng(seed)
    on = rng.integers(2, size=(n, 2))
    up = np.repeat(np.where(on, 25.0, 1.0), 3, axis=1)
    counts = rng.poisson(np.hstack([up, np.full((n, 5), 3.0)]))
    truth = rng.integers(2, size=n) if random else on[:, 0] ^ on[:, 1]
    xy = rng.uniform(0, 100, (n, 2))
    obs = pd.DataFrame(
        {"truth": pd.Categorical(np.array(["alike", "apart"])[truth])}, index=[f"c{i}" for i in range(n)]
    )
    obs["few"] = obs["truth"].where(xy[:, 0] < 60)
    return ad.AnnData(counts.astype(np.float32), obs=obs, obsm={"spatial": xy})


def test_fine_tuning_finds_what_a_probe_cannot():
    from spatialfm.models import fingerprint, load

    adata, model = crossed(), load("heist-niche")
    before, weights = adata.copy(), fingerprint(model)
    shuffled = adata[np.random.default_rng(3).permutation(adata.n_obs)].copy()
    hidden = adata.obs["few"].isna().to_numpy()
    state = torch.get_rng_state()
    sfm.tl.annotate(adata, groupby="few", method="fine_tune", model=model, n_folds=2)
    assert torch.equal(state, torch.get_rng_state())
    entry = adata.uns["annotation"]
    assert entry["fine_tune"]["weight"] > 0
    assert entry["fine_tune"]["accuracy_probe"] < 0.65
    assert entry["held_out"]["accuracy"] > 0.8
    best = np.array(entry["names"])[adata.obsm[TABLE].to_numpy().argmax(axis=1)]
    assert (best == adata.obs["truth"])[hidden].mean() > 0.8
    # Nothing else is written, and any order of the cells gives the same.
    assert fingerprint(model) == weights
    assert not model.training
    assert list(adata.obsm) == ["spatial", TABLE]
    assert (list(adata.uns), list(adata.obsp)) == (["annotation", "spatialfm"], [])
    np.testing.assert_array_equal(adata.X, before.X)
    again = sfm.tl.annotate(before, groupby="few", method="fine_tune", model=model, n_folds=2, copy=True)
    pd.testing.assert_frame_equal(adata.obsm[TABLE], again.obsm[TABLE])
    assert not before.uns
    sfm.tl.annotate(shuffled, groupby="few", method="fine_tune", n_folds=2)
    pd.testing.assert_frame_equal(adata.obsm[TABLE], shuffled.obsm[TABLE].loc[adata.obs_names], atol=1e-4)


def test_fine_tuning_is_the_probe_where_there_is_nothing_to_learn():
    adata = crossed(n=400, random=True)
    sfm.tl.annotate(adata, groupby="few", method="fine_tune", n_folds=2)
    assert adata.uns["annotation"]["fine_tune"]["weight"] == 0
    tuned = adata.obsm[TABLE].copy()
    sfm.tl.embed(adata)
    sfm.tl.annotate(adata, groupby="few", n_folds=2)
    np.testing.assert_allclose(tuned, adata.obsm[TABLE], atol=1e-4)
    assert "fine_tune" not in adata.uns["annotation"]


def test_fine_tuning_with_a_reference():
    reference, adata = crossed(n=1500), crossed(n=500, seed=1)
    copies = reference.copy(), adata.copy()
    sfm.tl.annotate(adata, reference, groupby="truth", method="fine_tune", n_folds=2)
    best = np.array(["alike", "apart"])[adata.obsm[TABLE].to_numpy().argmax(axis=1)]
    assert (best == adata.obs["truth"]).mean() > 0.65
    for now, then in zip((reference, adata), copies, strict=True):
        np.testing.assert_array_equal(now.X, then.X)
    assert (list(reference.uns), list(reference.obsm), list(reference.obsp)) == ([], ["spatial"], [])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"method": "fine_tune", "use_rep": "X_rep"}, "leave it out, or take method='probe'"),
        ({"method": "fine_tune", "model": "heist"}, "use model='heist-niche'"),
        ({"method": "fine_tune", "model": "hibio"}, "use model='heist-niche'"),
        ({"method": "svm"}, "method='svm' is not known"),
    ],
)
def test_fine_tuning_refuses(kwargs, message):
    adata = crossed(n=100)
    with pytest.raises(ValueError, match=message):
        sfm.tl.annotate(adata, groupby="few", **kwargs)
    assert not adata.uns


def test_weight_from_held_out_predictions():
    rng = np.random.default_rng(0)
    blocks = rng.integers(36, size=3000)
    units = [blocks]
    good = rng.dirichlet([0.3, 0.3, 0.3], 3000)
    codes = (good.cumsum(axis=1) < rng.uniform(size=(3000, 1))).sum(axis=1)
    flat = np.full((3000, 3), 1 / 3)
    noisy = [with_temperature(good * np.exp(rng.normal(0, 1, good.shape)), 1.0) for _ in range(2)]
    assert find_weight(flat, good, codes, units) > 0
    assert find_weight(noisy[0], good, codes, units) == 1
    assert find_weight(good, flat, codes, units) == 0
    assert find_weight(good, good, codes, units) == 0
    assert 0 < find_weight(*noisy, codes, units) < 1
    # A gain in one block only does not count, nor one on one of several slides.
    chance = np.where((blocks == 0)[:, None], good, flat)
    assert find_weight(flat, chance, codes, units) == 0
    chance = np.where((blocks < 12)[:, None], good, flat)
    assert find_weight(flat, chance, codes, units) > 0
    assert find_weight(flat, chance, codes, [blocks, blocks // 12]) == 0
    # Nothing is known where training lacked every label.
    assert find_weight(np.pad(flat, ((0, 0), (0, 1))), flat, np.full(3000, 3), units) == 0
    np.testing.assert_array_equal(blended(good, flat, 0), good)
    np.testing.assert_allclose(blended(good, flat, 1), flat)
    absent = np.pad(good, ((0, 0), (0, 1)))
    assert (blended(absent, absent, 0.5)[:, 3] == 0).all()
    np.testing.assert_allclose(blended(absent, absent, 0.5), absent, atol=1e-9)


def test_the_surest_weight_is_not_the_largest_gain():
    """A network that is better in most blocks and worse in some: less of it gains less, but in more places."""
    rng = np.random.default_rng(0)
    n, blocks = 4000, rng.integers(20, size=4000)
    truth = rng.dirichlet([0.4, 0.4, 0.4], n)
    codes = (truth.cumsum(axis=1) < rng.uniform(size=(n, 1))).sum(axis=1)
    probe, noise = (with_temperature(truth * np.exp(rng.normal(0, by, truth.shape)), 1.0) for by in (1.5, 2.5))
    network = np.where((blocks < 3)[:, None], noise, truth)
    gains = {}
    for weight in (0.25, 0.5, 0.75, 1.0):
        p = blended(probe, network, weight)
        pair = [with_temperature(q, find_temperature(q, codes))[np.arange(n), codes] for q in (probe, p)]
        gain = np.log(pair[1]) - np.log(pair[0])
        gains[weight] = gain.mean(), bound(gain, blocks)
    mean, lower = (max(gains, key=lambda w, k=k: gains[w][k]) for k in range(2))
    assert lower < mean
    assert find_weight(probe, network, codes, [blocks]) == lower


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_gain_must_stand_on_slides_left_out(everywhere):
    """A network that is right only on the slides it was trained on is no gain for cells of other slides."""
    rng = np.random.default_rng(0)
    slide, truth = np.arange(900) % 3, rng.integers(2, size=900)
    codes = np.where(slide < 2, truth, -1)
    rows = np.flatnonzero(codes >= 0)

    class Network:
        def fit(self, codes, rows, probe, *, seed):
            seen = np.isin(slide, slide[rows]) | everywhere
            return np.where((seen[:, None]) & (rng.uniform(size=(900, 1)) < 0.9), np.eye(2)[truth] * 0.8 + 0.1, probe)

    blocks = rng.integers(15, size=len(rows)) * 2 + slide[rows]
    weights = []
    for confirm in (None, slide[rows]):
        x = rng.normal(size=(900, 2)).astype(np.float32)
        split = Split(rows, blocks % 5, "blocks", [blocks], confirm)
        weights.append(predict(x, codes, split, 2, Network(), 0).tuned["weight"])
    assert weights[0] > 0
    assert (weights[1] > 0) == everywhere
