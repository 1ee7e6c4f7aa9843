"""Few-shot annotation: equal to scikit-learn, any order of rows, estimated quality, and errors."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.spatial import cKDTree
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

import spatialfm as sfm

TABLE = "region_label_probabilities"


def tissue(n=400, *, n_slides=1, per_region=10, noise=1.5, seed=0):
    """Three stripes of different width that differ in two columns; three more are noise, and one is constant."""
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0, 1, (n, 2)) * [100, 60]
    code = np.digitize(xy[:, 0], [50, 80])
    centres = np.array([[0, 0], [4, 0], [0, 4]])
    rep = np.column_stack([centres[code] + rng.normal(0, noise, (n, 2)), rng.normal(0, 3, (n, 3)), np.full(n, 7.0)])
    names = np.array(["tumour/core", "stroma", "fat"])
    obs = pd.DataFrame(
        {
            "truth": pd.Categorical(names[code], categories=[*names, "unused"]),
            "slide": pd.Categorical([f"s{s}" for s in rng.integers(n_slides, size=n)]),
        },
        index=[f"c{i}" for i in range(n)],
    )
    chosen = obs.groupby("truth", observed=True).sample(per_region, random_state=seed).index
    obs["few"] = obs["truth"].where(obs.index.isin(chosen))
    adata = ad.AnnData(np.zeros((n, 1), np.float32), obs=obs, obsm={"spatial": xy, "X_rep": rep.astype(np.float32)})
    adata.uns["few_colors"] = ["#111111", "#222222", "#333333", "#444444"]
    return adata


def unlabelled_f1(adata):
    rest = adata.obs["few"].isna()
    return f1_score(adata.obs["truth"][rest].astype(str), adata.obs["region_label"][rest].astype(str), average="macro")


def oracle(rep, labels, rows):
    """What the documentation says, in plain scikit-learn."""
    x = rep[:, rep.std(axis=0) > 0].astype(float)
    v = x.var(axis=0)
    x = (x - x.mean(axis=0)) / np.sqrt(v) * np.sqrt((1 + v / v.mean()) / 2)
    model = LogisticRegression(C=0.1, class_weight="balanced", tol=1e-10, max_iter=10_000).fit(x[rows], labels[rows])
    return pd.DataFrame(model.predict_proba(x), columns=model.classes_)


@pytest.mark.parametrize("uneven", [False, True])
def test_equals_scikit_learn(uneven):
    adata = tissue()
    if uneven:
        stroma = adata.obs.index[adata.obs["few"] == "stroma"]
        adata.obs.loc[stroma[3:], "few"] = np.nan
    assert sfm.tl.annotate_regions(adata, "few", use_rep="X_rep") is None
    rows = np.flatnonzero(adata.obs["few"].notna())
    labels = adata.obs["few"].astype(object).to_numpy()
    expected = oracle(adata.obsm["X_rep"], labels, rows)
    expected.columns = expected.columns.str.replace("/", "-")
    table = adata.obsm[TABLE]
    assert list(table.columns) == ["tumour-core", "stroma", "fat"]
    np.testing.assert_allclose(table, expected[table.columns], atol=1e-6)
    np.testing.assert_allclose(table.sum(axis=1), 1)

    found = adata.obs["region_label"]
    assert list(found.cat.categories) == adata.uns["region_label"]["names"] == ["tumour/core", "stroma", "fat"]
    given = adata.obs["few"].dropna().astype(str)
    assert (found[given.index].astype(str) == given).all()
    best = np.array(found.cat.categories)[table.to_numpy().argmax(axis=1)]
    rest = adata.obs["few"].isna().to_numpy()
    assert (found.to_numpy()[rest] == best[rest]).all()
    codes = found.cat.codes.to_numpy()
    np.testing.assert_array_equal(
        adata.obs["region_label_probability"], table.to_numpy()[np.arange(adata.n_obs), codes]
    )
    assert list(adata.uns["region_label_colors"]) == ["#111111", "#222222", "#333333"]
    assert list(adata.uns["region_label"]["n_labelled"]) == [10, 3 if uneven else 10, 10]
    assert ("cross_validation" in adata.uns["region_label"]) != uneven
    assert unlabelled_f1(adata) > 0.6


def test_a_labelled_spot_keeps_its_label_where_the_probe_disagrees():
    adata = tissue(noise=0.1)
    wrong = adata.obs.index[adata.obs["few"] == "stroma"][0]
    adata.obs.loc[wrong, "few"] = "fat"
    sfm.tl.annotate_regions(adata, "few", use_rep="X_rep")
    assert adata.obs.loc[wrong, "region_label"] == "fat"
    assert adata.obsm[TABLE].loc[wrong].idxmax() == "stroma"
    labelled = adata.obs["few"].notna()
    assert adata.obs.loc[labelled, "region_label_probability"].idxmin() == wrong


def test_smoothing_equals_averages_over_neighbours():
    adata = tissue(noise=3)
    sfm.pp.spatial_neighbors(adata)
    sfm.tl.annotate_regions(adata, "few", use_rep="X_rep")
    plain, p = unlabelled_f1(adata), adata.obsm[TABLE].to_numpy().copy()
    a = adata.obsp["spatial_connectivities"].toarray() > 0
    given = adata.obs["few"].cat.codes.to_numpy()
    for _ in range(2):
        for i in np.flatnonzero(given >= 0):
            p[i] = np.arange(3) == given[i]
        p = np.stack([(p[i] + p[a[i]].mean(axis=0)) / 2 for i in range(adata.n_obs)])
    sfm.tl.annotate_regions(adata, "few", use_rep="X_rep", refine=2)
    np.testing.assert_allclose(adata.obsm[TABLE], p, atol=1e-6)
    assert unlabelled_f1(adata) > plain + 0.05


def test_smoothing_leaves_a_spot_without_neighbours():
    adata = tissue()
    sfm.pp.spatial_neighbors(adata)
    sfm.tl.annotate_regions(adata, "few", use_rep="X_rep", key_added="plain")
    alone = np.flatnonzero(adata.obs["few"].isna())[0]
    for key in ("spatial_connectivities", "spatial_distances"):
        graph = adata.obsp[key].tolil()
        graph[alone], graph[:, alone] = 0, 0
        adata.obsp[key] = graph.tocsr()
    sfm.tl.annotate_regions(adata, "few", use_rep="X_rep", refine=3)
    np.testing.assert_allclose(adata.obsm[TABLE].iloc[alone], adata.obsm["plain_probabilities"].iloc[alone], rtol=1e-6)
    np.testing.assert_allclose(adata.obsm[TABLE].sum(axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("n_slides", [1, 2])
def test_row_order_and_repetition_change_nothing(n_slides):
    adata = tissue(n_slides=n_slides)
    kwargs = {"use_rep": "X_rep", "refine": 1, "library_key": "slide"}
    sfm.pp.spatial_neighbors(adata, library_key="slide")
    shuffled = adata[np.random.default_rng(3).permutation(adata.n_obs)].copy()
    again = sfm.tl.annotate_regions(adata, "few", **kwargs, copy=True)
    assert "region_label" not in adata.obs
    sfm.tl.annotate_regions(adata, "few", **kwargs)
    sfm.tl.annotate_regions(shuffled, "few", **kwargs)
    pd.testing.assert_frame_equal(adata.obsm[TABLE], again.obsm[TABLE], check_exact=True)
    for other in (again, shuffled):
        pd.testing.assert_series_equal(adata.obs["region_label"], other.obs.loc[adata.obs_names, "region_label"])
        pd.testing.assert_frame_equal(adata.obsm[TABLE], other.obsm[TABLE].loc[adata.obs_names], atol=1e-6)
        np.testing.assert_allclose(
            adata.uns["region_label"]["cross_validation"]["f1"], other.uns["region_label"]["cross_validation"]["f1"]
        )


def test_a_labelled_slide_annotates_another():
    """In the units of the whole file, so that also a slide of one region alone is annotated."""
    adata = tissue(n=800, n_slides=2, per_region=20)
    adata.obs.loc[adata.obs["slide"] == "s1", "few"] = np.nan
    adata = adata[(adata.obs["slide"] == "s0") | (adata.obs["truth"] == "fat")].copy()
    sfm.tl.annotate_regions(adata, "few", use_rep="X_rep", library_key="slide")
    other = adata.obs["slide"] == "s1"
    assert (adata.obs["region_label"][other] == "fat").mean() > 0.8
    assert adata.uns["region_label"]["cross_validation"]["folds"] == "strips"


def test_folds_are_slides_where_each_label_stands_on_two():
    adata = tissue(n_slides=3, per_region=12)
    sfm.tl.annotate_regions(adata, "few", use_rep="X_rep", library_key="slide")
    found = adata.uns["region_label"]["cross_validation"]
    assert (found["folds"], found["n_folds"]) == ("slides", 3)

    # By hand.
    few = adata.obs["few"].astype(object).to_numpy()
    labelled = adata.obs["few"].notna().to_numpy()
    predicted = np.empty(adata.n_obs, object)
    for slide in ("s0", "s1", "s2"):
        out = (adata.obs["slide"] == slide).to_numpy()
        table = oracle(adata.obsm["X_rep"], few, np.flatnonzero(labelled & ~out))
        predicted[out] = table.idxmax(axis=1)[out]
    names = adata.uns["region_label"]["names"]
    weight = adata.obs["region_label"].value_counts() / adata.obs["few"].value_counts()
    f1 = f1_score(
        few[labelled], predicted[labelled], labels=names, average=None, sample_weight=weight.loc[few[labelled]]
    )
    np.testing.assert_allclose(found["f1"], f1)
    assert found["macro_f1"] == pytest.approx(f1.mean())


def test_neighbours_do_not_raise_the_estimate():
    """An embedding by location alone: only neighbours of labelled spots are easy to annotate."""
    adata = tissue(n=900, per_region=25)
    rng = np.random.default_rng(1)
    patch = cKDTree(rng.uniform(0, 1, (40, 2)) * [100, 60]).query(adata.obsm["spatial"])[1]
    adata.obsm["X_rep"] = (np.eye(40)[patch] + rng.normal(0, 0.01, (900, 40))).astype(np.float32)
    region_of_patch = rng.integers(2, size=40)
    adata.obs["few"] = pd.Series(np.array(["a", "b"])[region_of_patch[patch]], index=adata.obs_names).where(
        adata.obs["few"].notna()
    )
    del adata.uns["few_colors"]
    sfm.tl.annotate_regions(adata, "few", use_rep="X_rep")
    rows = np.flatnonzero(adata.obs["few"].notna())
    few = adata.obs["few"].to_numpy()
    naive = np.empty(adata.n_obs, object)
    for k in range(5):
        out = rows[k::5]
        naive[out] = oracle(adata.obsm["X_rep"], few, np.setdiff1d(rows, out)).idxmax(axis=1)[out]
    too_high = f1_score(few[rows].astype(str), naive[rows].astype(str), average="macro")
    assert adata.uns["region_label"]["cross_validation"]["macro_f1"] < too_high - 0.05


@pytest.mark.parametrize("kind", ["str", "float", "bool", "ordered"])
def test_labels_need_not_be_categorical(kind):
    adata = tissue(n=100, per_region=5)
    few, names = adata.obs["few"], ["fat", "stroma", "tumour/core"]
    if kind == "str":
        adata.obs["few"] = few.astype(object)
    elif kind == "float":
        adata.obs["few"] = few.cat.codes.replace(-1, np.nan).astype(float)
        names = ["0", "1", "2"]
    elif kind == "bool":
        adata.obs["few"] = pd.array(np.where(few.isna(), None, few == "fat"), dtype="boolean")
        names = ["False", "True"]
    else:
        adata.obs["few"] = few.cat.as_ordered()
        names = ["tumour/core", "stroma", "fat"]
    del adata.uns["few_colors"]
    adata.uns["region_label_colors"] = ["#000000"]
    sfm.tl.annotate_regions(adata, "few", use_rep="X_rep")
    assert list(adata.obs["region_label"].cat.categories) == names
    assert adata.obs["region_label"].notna().all()
    assert adata.uns["region_label_colors"] == ["#000000"]  # the user's


def test_view_and_table_are_accepted():
    adata = tissue()
    adata.obsm["X_rep"] = pd.DataFrame(adata.obsm["X_rep"], index=adata.obs_names, columns=[f"d{i}" for i in range(6)])
    view = adata[adata.obs["truth"] != "fat"]
    sfm.tl.annotate_regions(view, "few", use_rep="X_rep")
    assert view.uns["region_label"]["names"] == ["tumour/core", "stroma"]
    assert list(view.uns["region_label_colors"]) == ["#111111", "#222222"]
    assert "region_label" not in adata.obs


def everywhere(adata):
    adata.obs["few"] = adata.obs["truth"]


def nowhere(adata):
    adata.obs["few"] = np.nan


def one_label(adata):
    adata.obs["few"] = adata.obs["few"].where(adata.obs["few"] == "fat")


def constant(adata):
    adata.obsm["X_rep"] = np.ones((adata.n_obs, 3), np.float32)


def not_finite(adata):
    adata.obsm["X_rep"][3] = np.nan


def across(adata):
    sfm.pp.spatial_neighbors(adata)


def nothing(adata):
    pass


@pytest.mark.parametrize(
    ("change", "kwargs", "error", "message"),
    [
        (nothing, {"groupby": "nope"}, KeyError, "groupby='nope'"),
        (nothing, {"use_rep": "X_nope"}, KeyError, "X_nope"),
        (nothing, {"use_rep": "X_hibio"}, KeyError, "model='hibio'"),
        (nothing, {"basis": "nope"}, KeyError, "nope"),
        (nothing, {"library_key": "nope"}, KeyError, "library_key='nope'"),
        (nothing, {"refine": 1}, KeyError, "sfm.pp.spatial_neighbors"),
        (nothing, {"refine": -1}, ValueError, "refine"),
        (nothing, {"refine": 0.5}, ValueError, "refine"),
        (nothing, {"key_added": "few"}, ValueError, "did not write it"),
        (across, {"refine": 1, "library_key": "slide"}, ValueError, "between slides"),
        (everywhere, {}, ValueError, "Only NaN counts"),
        (nowhere, {}, ValueError, "holds no label"),
        (one_label, {}, ValueError, "'fat' alone"),
        (constant, {}, ValueError, "the same for all"),
        (not_finite, {}, ValueError, "NaN"),
    ],
)
def test_refusals_leave_the_data_alone(change, kwargs, error, message):
    adata = tissue(n=100, n_slides=2, per_region=5)
    change(adata)
    before = [list(field) for field in (adata.obs, adata.obsm, adata.uns)]
    with pytest.raises(error, match=message):
        sfm.tl.annotate_regions(adata, **{"groupby": "few", "use_rep": "X_rep", **kwargs})
    assert [list(field) for field in (adata.obs, adata.obsm, adata.uns)] == before


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_round_trip(tmp_path, suffix):
    adata = tissue(n_slides=2)
    sfm.tl.annotate_regions(adata, "few", use_rep="X_rep", library_key="slide")
    adata.obs["truth"] = adata.obs["truth"].cat.remove_unused_categories()
    path = tmp_path / f"x.{suffix}"
    getattr(adata, f"write_{suffix}")(path)
    back = getattr(ad, f"read_{suffix}")(path)
    pd.testing.assert_series_equal(adata.obs["region_label"], back.obs["region_label"])
    pd.testing.assert_frame_equal(adata.obsm[TABLE], back.obsm[TABLE])
    entry, kept = adata.uns["region_label"], back.uns["region_label"]
    assert list(kept["names"]) == entry["names"]
    assert list(kept["n_labelled"]) == list(entry["n_labelled"])
    assert dict(kept["params"]) == entry["params"]
    np.testing.assert_array_equal(kept["cross_validation"]["f1"], entry["cross_validation"]["f1"])


def test_regions_right_after_embedding():
    """The default embedding of :func:`tl.embed` is the default here too."""
    adata = sfm.datasets.merfish_mouse_brain()[:400].copy()
    adata.obs["few"] = adata.obs["region"].where(np.arange(400) % 4 == 0)
    sfm.tl.embed(adata)
    sfm.tl.annotate_regions(adata, "few")
    assert adata.uns["region_label"]["params"]["use_rep"] == "X_niche"
