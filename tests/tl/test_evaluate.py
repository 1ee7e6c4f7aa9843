"""Evaluation: scores against scikit-learn, held-out units, coverage of intervals, random splits."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.preprocessing import StandardScaler

import spatialfm as sfm
from spatialfm._data._splits import group_folds, spatial_blocks
from spatialfm.tl import _evaluate
from spatialfm.tl._baselines import hop_means, principal_components
from spatialfm.tl._evaluate import score_tables

REP = {"use_rep": "X_rep"}
NO_BASELINES = {"baselines": [], "n_bootstrap": 50, **REP}


def tissue(n=700, seed=0, *, n_slides=2, noise=1.5):
    """Three types mixed in space; slides of three patients in turn."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(3, size=n, p=[0.5, 0.3, 0.2])
    slide = np.arange(n) % n_slides
    rep = np.eye(3, 5)[kind] * 2 + noise * rng.normal(size=(n, 5))
    return ad.AnnData(
        rng.poisson(1 + 4 * (kind[:, None] == np.arange(12) % 3)).astype(np.float32),
        obs=pd.DataFrame(
            {
                "type": pd.Categorical(np.array(["a", "b/c", "d"], dtype=object)[kind]),
                "slide": pd.Categorical([f"s{k}" for k in slide]),
                "patient": pd.Categorical([f"p{k % 3}" for k in slide]),
            },
            index=[f"c{i}" for i in range(n)],
        ),
        obsm={"spatial": rng.uniform(0, 100, (n, 2)), "X_rep": rep.astype(np.float32)},
    )


def held_out(adata, fold):
    """Oracle: the probe of scikit-learn in float64, fold by fold."""
    x, y = adata.obsm["X_rep"].astype(np.float64), adata.obs["type"].astype(str).to_numpy()
    found = np.empty_like(y)
    for k in np.unique(fold):
        out = fold == k
        scaler = StandardScaler().fit(x[~out])
        probe = LogisticRegression(C=0.1, max_iter=400).fit(scaler.transform(x[~out]), y[~out])
        found[out] = probe.predict(scaler.transform(x[out]))
    return y, found


@pytest.mark.parametrize(
    ("how", "kwargs"),
    [
        ("blocks", {}),
        ("slides", {"library_key": "slide"}),
        ("patients", {"library_key": "slide", "patient_key": "patient"}),
    ],
)
def test_scores_are_those_of_scikit_learn(how, kwargs):
    adata = tissue(n_slides=6)
    assert sfm.tl.evaluate(adata, "type", **kwargs, **NO_BASELINES) is None
    unit = {
        "blocks": spatial_blocks(adata.obsm["spatial"], np.zeros(adata.n_obs, int)),
        "slides": adata.obs["slide"].cat.codes.to_numpy(),
        "patients": adata.obs["patient"].cat.codes.to_numpy(),
    }[how]
    n_units = len(np.unique(unit))
    y, found = held_out(adata, group_folds(unit.astype(np.int64), min(4, n_units)))
    entry = adata.uns["evaluation"]
    assert (entry["split"], entry["n_units"], entry["n_folds"]) == (how, n_units, min(4, n_units))
    value = sfm.get.evaluation_df(adata).set_index(["metric", "label"])["value"]
    assert value["accuracy", ""] == pytest.approx(accuracy_score(y, found), abs=3e-3)
    assert value["macro_f1", ""] == pytest.approx(f1_score(y, found, average="macro"), abs=3e-3)
    np.testing.assert_allclose(value["f1"].loc[entry["labels"]], f1_score(y, found, average=None), atol=6e-3)


def test_tables_against_brute_force():
    """Scores, intervals and differences of given predictions, resample by resample with scikit-learn."""
    rng = np.random.default_rng(0)
    n, n_units, labels = 400, 8, ["a", "b", "c"]
    y, unit = rng.integers(3, size=n), rng.integers(n_units, size=n)
    predicted = {
        name: np.where(rng.random(n) < p, y, rng.integers(3, size=n))
        for name, p in (("x", 0.7), ("other", 0.65), ("pca", 0.4), ("majority", 0.0))
    }
    weights = rng.multinomial(n_units, np.full(n_units, 1 / n_units), size=60)
    scores, differences = score_tables(predicted, y, unit, labels, weights, 2)
    rows = [np.concatenate([np.flatnonzero(unit == u) for u in range(n_units) for _ in range(w[u])]) for w in weights]
    macro = {name: [f1_score(y[r], p[r], average="macro") for r in rows] for name, p in predicted.items()}
    accuracy = {name: [accuracy_score(y[r], p[r]) for r in rows] for name, p in predicted.items()}
    table = scores.set_index(["embedding", "metric", "label"])
    for name, p in predicted.items():
        row = table.loc[(name, "macro_f1", "")]
        assert row["value"] == pytest.approx(f1_score(y, p, average="macro"))
        np.testing.assert_allclose([row["low"], row["high"]], np.percentile(macro[name], [2.5, 97.5]))
        each = [f1_score(y[r], p[r], average=None)[1] for r in rows]
        row = table.loc[(name, "f1", "b")]
        np.testing.assert_allclose([row["low"], row["high"]], np.percentile(each, [2.5, 97.5]))
        assert row["n_cells"] == (y == 1).sum()
    # Each embedding against those after it and the baselines, over the same resamples.
    pairs = [("x", "other"), ("x", "pca"), ("x", "majority"), ("other", "pca"), ("other", "majority")]
    assert list(zip(differences["embedding"], differences["reference"], strict=True)) == [
        p for p in pairs for _ in "ab"
    ]
    found = differences.set_index(["embedding", "reference", "metric"])
    for a, b in pairs:
        for metric, samples in (("macro_f1", macro), ("accuracy", accuracy)):
            row = found.loc[(a, b, metric)]
            limits = np.percentile(np.subtract(samples[a], samples[b]), [2.5, 97.5])
            np.testing.assert_allclose(row[["low", "high"]].astype(float), limits)
            value = table["value"]
            assert row["difference"] == pytest.approx(value[a, metric, ""] - value[b, metric, ""])


def test_intervals_cover_where_units_differ():
    """Accuracy that varies between 12 slides: the interval over slides covers its mean, one over cells would not."""
    rng = np.random.default_rng(0)
    covered = by_cell = 0
    for _ in range(200):
        level = rng.beta(8, 4, size=12)
        unit = np.repeat(np.arange(12), 100)
        y = rng.integers(2, size=1200)
        found = np.where(rng.random(1200) < level[unit], y, 1 - y)
        weights = rng.multinomial(12, np.full(12, 1 / 12), size=200)
        scores, _ = score_tables({"x": found}, y, unit, ["a", "b"], weights, 1)
        row = scores.iloc[0]
        covered += row["low"] <= 2 / 3 <= row["high"]
        half = 1.96 * np.sqrt(row["value"] * (1 - row["value"]) / 1200)
        by_cell += abs(row["value"] - 2 / 3) <= half
    assert covered > 0.85 * 200
    assert by_cell < 0.7 * 200


def test_patients_are_never_on_both_sides(monkeypatch):
    seen = []

    def spy(features, y, fold):
        seen.append((features["X_rep"], fold))
        return dict.fromkeys(features, y)

    monkeypatch.setattr(_evaluate, "predict_labels", spy)
    adata = tissue(n_slides=6)
    adata.obsm["X_rep"][:, 0] = adata.obs["patient"].cat.codes
    sfm.tl.evaluate(adata, "type", library_key="slide", patient_key="patient", **NO_BASELINES)
    x, fold = seen[0]
    assert len({(a, b) for a, b in zip(x[:, 0], fold, strict=True)}) == 3


def test_random_splits_score_too_high_where_neighbours_are_read(messages):
    """Labels in patches and an embedding of the location: in random folds, neighbours give the label away."""
    rng = np.random.default_rng(0)
    adata = tissue(900, n_slides=1)
    xy = adata.obsm["spatial"]
    # The label of a patch says nothing about that of another.
    patch = spatial_blocks(xy, np.zeros(900, int), per_side=12)
    adata.obs["niche"] = pd.Categorical(rng.choice(["u", "v"], size=patch.max() + 1)[patch])
    frequencies = rng.normal(scale=0.4, size=(2, 80))
    adata.obsm["X_place"] = np.hstack([np.sin(xy @ frequencies), np.cos(xy @ frequencies)])
    accuracy = {}
    for split in ("random", "auto"):
        sfm.tl.evaluate(adata, "niche", **{**NO_BASELINES, "use_rep": "X_place", "split": split})
        accuracy[split] = sfm.get.evaluation_df(adata)["value"][0]
    assert accuracy["random"] > 0.62
    assert accuracy["auto"] < 0.57
    assert "have a direct neighbour with their label in training" in "\n".join(messages())


def test_baselines(messages):
    adata = tissue(noise=3.0)
    sfm.tl.evaluate(adata, "type", library_key="slide", split="blocks", n_bootstrap=100, **REP)
    assert "spatial_neighbors" in adata.uns
    table = sfm.get.evaluation_df(adata)
    assert list(dict.fromkeys(table["embedding"])) == ["X_rep", "pca", "neighbors", "hops", "location", "majority"]
    f1 = table[table["metric"] == "macro_f1"].set_index("embedding")["value"]
    # Types are mixed in space: components predict them; means of neighbours and locations do not.
    assert f1["pca"] > 0.9
    assert f1["majority"] == pytest.approx(2 * 0.5 / 1.5 / 3, abs=0.02)
    assert max(f1["hops"], f1["location"]) < 0.5
    differences = sfm.get.evaluation_df(adata, differences=True).set_index(["reference", "metric"])
    assert differences.loc[("pca", "macro_f1"), "difference"] == pytest.approx(f1["X_rep"] - f1["pca"])
    assert differences.loc[("pca", "macro_f1"), "high"] < 0
    assert differences.loc[("majority", "macro_f1"), "low"] > 0
    assert "macro F1 of 3 labels of 700 cells by 4 folds of 72 blocks" in "\n".join(messages())


def test_components_and_means():
    adata = tissue()
    found = principal_components(adata, None, "auto").scores
    import scanpy as sc

    cells = ad.AnnData(adata.X.copy())
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    sc.pp.scale(cells, max_value=10)
    oracle = sc.pp.pca(cells.X, n_comps=found.shape[1])
    corr = np.abs(np.corrcoef(found.T, oracle.T)[: found.shape[1], found.shape[1] :])
    np.testing.assert_allclose(np.diag(corr), 1, atol=1e-3)
    sfm.pp.spatial_neighbors(adata)
    graph = adata.obsp["spatial_connectivities"]
    means = hop_means(found, graph, (0, 1, 2))
    dense = graph.toarray() / graph.sum(axis=1).reshape(-1, 1)
    np.testing.assert_allclose(means, np.hstack([found, dense @ found, dense @ dense @ found]), atol=1e-4)


def test_labels_that_cannot_be_tested(messages):
    adata = tissue(n_slides=5)
    label = adata.obs["type"].astype(object)
    label.iloc[:10] = "rare"
    label.iloc[10:40] = np.nan
    here = (adata.obs["slide"] == "s0").to_numpy() & (np.arange(adata.n_obs) > 200)
    label.loc[here] = "one slide"
    adata.obs["label"] = label
    sfm.tl.evaluate(adata, "label", library_key="slide", **NO_BASELINES)
    entry = adata.uns["evaluation"]
    assert entry["labels"] == ["a", "b/c", "d"]
    assert entry["n_cells"] == adata.n_obs - 40 - here.sum()
    assert "rare (10)" in "\n".join(messages())
    assert "one slide, or few) cannot be tested and are left out: one slide" in "\n".join(messages())
    adata.obs["slide_name"] = adata.obs["slide"]
    with pytest.raises(ValueError, match="use split='blocks'"):
        sfm.tl.evaluate(adata, "slide_name", library_key="slide", **NO_BASELINES)


def test_few_units_have_no_interval(messages):
    adata = tissue(n_slides=4)
    sfm.tl.evaluate(adata, "type", library_key="slide", n_bootstrap=20, **REP)
    table = sfm.get.evaluation_df(adata)
    assert table[["low", "high"]].isna().all(axis=None)
    assert table["value"].notna().all()
    assert sfm.get.evaluation_df(adata, differences=True)["low"].isna().all()
    assert "4 slides are too few for intervals" in "\n".join(messages())


def test_row_order_threads_and_copies_change_nothing():
    adata = tissue(n_slides=6)
    kwargs = {"use_rep": ["X_rep"], "library_key": "slide", "n_bootstrap": 50}
    first = sfm.tl.evaluate(adata, "type", copy=True, **kwargs)
    assert "evaluation" not in adata.uns
    shuffled = adata[np.random.default_rng(1).permutation(adata.n_obs)].copy()
    with sfm.settings.override(n_jobs=1):
        sfm.tl.evaluate(shuffled, "type", **kwargs)
    for differences in (False, True):
        pd.testing.assert_frame_equal(
            sfm.get.evaluation_df(first, differences=differences),
            sfm.get.evaluation_df(shuffled, differences=differences),
            atol=0.02,
        )
    # Cells at one location that differ only in later columns.
    first = tissue(n_slides=6)
    first.obsm["spatial"][:] = np.round(first.obsm["spatial"] / 20) * 20
    first.obsm["X_rep"][:, :2] = 0
    found = []
    for order in (np.arange(first.n_obs), np.random.default_rng(2).permutation(first.n_obs)):
        again = first[order].copy()
        sfm.tl.evaluate(again, "type", split="random", baselines=["majority"], key_added="of", **REP)
        found.append(again.uns["of"]["scores"])
    pd.testing.assert_frame_equal(*found, atol=1e-3)
    view = adata[adata.obs["type"] != "d"]
    sfm.tl.evaluate(view, "type", **NO_BASELINES)
    assert view.uns["evaluation"]["labels"] == ["a", "b/c"]
    assert "evaluation" not in adata.uns


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"groupby": "nope"}, KeyError, "groupby='nope'"),
        ({"use_rep": "X_nope"}, KeyError, r"sfm\.tl\.embed\(adata\)"),
        ({"use_rep": []}, ValueError, "at least one embedding"),
        ({"use_rep": ["X_rep", "X_rep"]}, ValueError, "'X_rep' twice"),
        ({"use_rep": ["X_rep", ()]}, ValueError, r"\(\) names no embedding; give a key of obsm, a tuple of keys"),
        ({"use_rep": ["X_rep", 3]}, ValueError, "3 names no embedding"),
        ({"use_rep": ["pca"], "baselines": ["pca"]}, ValueError, "'pca' is an embedding too"),
        ({"baselines": ["pls"]}, ValueError, "choose from"),
        ({"split": "cells"}, ValueError, "choose from"),
        ({"split": "slides"}, ValueError, "needs at least two slides"),
        ({"split": "patients"}, ValueError, "needs patient_key="),
        ({"split": "blocks", "patient_key": "patient"}, ValueError, "on the same patient"),
        ({"patient_key": "one"}, ValueError, "all cells are of one patient"),
        ({"n_folds": 1}, ValueError, "n_folds must be"),
        ({"n_bootstrap": 0}, ValueError, "n_bootstrap"),
        ({"groupby": "rare"}, ValueError, "no label has at least 20 cells, so there is nothing to evaluate"),
        ({"groupby": "one"}, ValueError, "fewer than two labels"),
        ({"groupby": "leaked"}, ValueError, "has seen these labels"),
        ({"basis": "nope"}, KeyError, "obsm\\['nope'\\]"),
    ],
)
def test_refusals_leave_the_data_alone(kwargs, error, message):
    adata = tissue()
    adata.obs["one"] = "x"
    adata.obs["rare"] = np.where(np.arange(adata.n_obs) < 10, "x", None)
    if kwargs.get("groupby") == "leaked":
        adata.obs["leaked"] = adata.obs["type"]
        adata.uns["embeddings"] = {"X_rep": {"model": "heist", "params": {"groupby": "leaked"}}}
    before = list(adata.uns)
    with pytest.raises(error, match=message):
        sfm.tl.evaluate(adata, **{"groupby": "type", **NO_BASELINES, **kwargs})
    assert list(adata.uns) == before


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_round_trip(tmp_path, suffix):
    adata = tissue(n_slides=6)
    sfm.tl.evaluate(adata, "type", library_key="slide", baselines=["location"], n_bootstrap=20, **REP)
    path = tmp_path / f"x.{suffix}"
    getattr(adata, f"write_{suffix}")(path)
    back = getattr(ad, f"read_{suffix}")(path)
    for differences in (False, True):
        pd.testing.assert_frame_equal(
            sfm.get.evaluation_df(adata, differences=differences),
            sfm.get.evaluation_df(back, differences=differences),
            check_dtype=False,
            check_categorical=False,
        )


def test_a_tuple_is_one_embedding_and_a_list_several():
    adata = tissue()
    adata.obsm["X_niche"], adata.obsm["X_state"] = adata.obsm["X_rep"][:, :2], adata.obsm["X_rep"][:, 2:]
    how = {"baselines": [], "n_bootstrap": 20}
    sfm.tl.evaluate(adata, "type", **how, key_added="default")
    both = ("X_niche", "X_state")
    sfm.tl.evaluate(adata, "type", use_rep=[both, "X_rep", "X_state"], **how)
    names = ["X_niche + X_state", "X_rep", "X_state"]
    assert list(dict.fromkeys(sfm.get.evaluation_df(adata)["embedding"])) == names
    value = sfm.get.evaluation_df(adata).set_index(["embedding", "metric", "label"])["value"]
    pd.testing.assert_series_equal(value[names[0]], value["X_rep"])
    one = sfm.get.evaluation_df(adata, key="default")
    assert set(one["embedding"]) == {names[0]}
    np.testing.assert_array_equal(one["value"], value[names[0]])
    assert adata.uns["evaluation"]["params"]["use_rep"] == names


def test_expression_that_does_not_vary():
    adata = tissue()
    adata.X[:] = 1
    with pytest.raises(
        ValueError, match="no principal components; leave 'pca', 'neighbors' and 'hops' out of baselines="
    ):
        sfm.tl.evaluate(adata, "type", **REP)
    sfm.tl.evaluate(adata, "type", baselines=["location"], **REP)
