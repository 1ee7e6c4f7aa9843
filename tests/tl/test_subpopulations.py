"""Subpopulations: clustering recovered, composition and permutation test against brute force, calibration and power."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.spatial import cKDTree
from scipy.stats import kstest

import spatialfm as sfm
from spatialfm.tl._subpopulations import enrichment, neighbour_fractions

subpopulations = partial(sfm.tl.subpopulations, use_rep="X_rep")


def graph_of(xy, slides=None, k=6):
    """Symmetric kNN graph in the layout of ``sfm.pp.spatial_neighbors``, one component a slide."""
    n = len(xy)
    slides = np.zeros(n, int) if slides is None else slides
    rows, cols = [], []
    for s in np.unique(slides):
        here = np.flatnonzero(slides == s)
        near = cKDTree(xy[here]).query(xy[here], k=k + 1)[1][:, 1:]
        rows.append(np.repeat(here, k))
        cols.append(here[near.ravel()])
    rows, cols = np.concatenate(rows), np.concatenate(cols)
    a = sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, cols)), shape=(n, n))
    a = a.maximum(a.T).tocsr()
    edges = a.tocoo()
    distance = np.linalg.norm(xy[edges.row] - xy[edges.col], axis=1).astype(np.float32)
    return a, sparse.csr_matrix((distance, (edges.row, edges.col)), shape=(n, n))


def add_graph(adata, slides=None):
    a, d = graph_of(np.asarray(adata.obsm["spatial"]), slides)
    adata.obsp["spatial_connectivities"], adata.obsp["spatial_distances"] = a, d
    adata.uns["spatial_neighbors"] = {
        "connectivities_key": "spatial_connectivities",
        "distances_key": "spatial_distances",
        "params": {},
    }
    return adata


def tissue(n=600, seed=0, *, n_slides=1, planted=False):
    """Types A, B/x, C; two blobs of A, at random or by the half of the tissue (``planted``)."""
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0, 100, (n, 2))
    types = rng.choice(["A", "B/x", "C"], n, p=[0.4, 0.3, 0.3])
    half = xy[:, 0] > 50
    if planted:
        types = np.where((types != "A") & half, "B/x", np.where(types != "A", "C", types))
    blob = half if planted else rng.random(n) < 0.4
    rep = rng.normal(0, 0.3, (n, 4)) + 6 * blob[:, None]
    slides = rng.integers(n_slides, size=n)
    adata = ad.AnnData(
        np.zeros((n, 1), np.float32),
        obs=pd.DataFrame(
            {"type": pd.Categorical(types), "slide": pd.Categorical([f"s{s}" for s in slides]), "blob": blob},
            index=[f"c{i}" for i in range(n)],
        ),
        obsm={"spatial": xy, "X_rep": rep.astype(np.float32)},
    )
    return add_graph(adata, slides)


def partition(values):
    return {frozenset(np.flatnonzero(values == v)) for v in pd.unique(values.dropna())}


@pytest.mark.parametrize("how", [{"n_clusters": 2}, {"resolution": 0.1}])
def test_clusters_are_found_and_named_by_size(how):
    adata = tissue()
    assert subpopulations(adata, "type", "A", **how) is None
    found = adata.obs["subpopulation"]
    is_a = adata.obs["type"] == "A"
    assert (found.notna() == is_a).all()
    counts = found.value_counts()[list(found.cat.categories)].to_numpy()
    assert list(found.cat.categories) == [f"A {i + 1}" for i in range(len(counts))]
    assert (np.diff(counts) <= 0).all()
    assert len(counts) == 2
    assert partition(found[is_a].reset_index(drop=True)) == partition(adata.obs["blob"][is_a].reset_index(drop=True))


def test_many_separate_clusters_are_all_found():
    """Components of the graph have the same eigenvalue: a solver that finds one vector at a time misses some."""
    adata = tissue(n=900)
    kind = np.random.default_rng(7).integers(5, size=900)
    adata.obsm["X_rep"] = (30 * np.eye(5)[kind] + np.random.default_rng(8).normal(size=(900, 5))).astype(np.float32)
    subpopulations(adata, "type", "A", n_clusters=5)
    is_a = (adata.obs["type"] == "A").to_numpy()
    assert partition(adata.obs["subpopulation"][is_a].reset_index(drop=True)) == partition(pd.Series(kind[is_a]))


@pytest.mark.parametrize("k", [2, 4])
def test_outliers_are_no_subpopulations(k):
    """Pockets of cells without neighbours among the others were parts of their own, and all the rest one part."""
    adata = tissue(n=2400)
    rng = np.random.default_rng(0)
    rep = rng.normal(size=(2400, 8)) + 2 * np.eye(8)[rng.integers(3, size=2400)]
    pockets = np.repeat([0, 1, 2], (20, 8, 6))
    adata.obs["type"] = "A"
    rep[: len(pockets)] = 20 * np.eye(8)[pockets + 4] + rng.normal(0, 0.1, (len(pockets), 8))
    adata.obsm["X_rep"] = rep.astype(np.float32)
    subpopulations(adata, "type", "A", n_clusters=k, n_permutations=1)
    sizes = adata.obs["subpopulation"].value_counts()
    assert len(sizes) == k
    assert sizes.min() > 0.25 * 2400 / k
    assert adata.uns["subpopulation"]["params"]["n_outliers"] >= 6


def test_tiny_parts_are_named():
    adata = tissue(n=2400)
    adata.obsm["X_rep"][:16] += 100
    adata.obs["type"] = "A"
    with pytest.warns(UserWarning, match=r"few of its 2400 cells: 'A 3' \(16\).*resolution="):
        subpopulations(adata, "type", "A", resolution=0.01, n_permutations=1)


def test_cells_without_a_type_do_not_count():
    adata = tissue()
    missing = np.random.default_rng(0).random(600) < 0.1
    adata.obs["type"] = adata.obs["type"].astype(object).where(~missing)
    want = subpopulations(adata[~missing].copy(), "type", "A", n_clusters=2, copy=True)
    with pytest.warns(UserWarning, match=f"no value for {missing.sum()} of 600 cells"):
        subpopulations(adata, "type", "A", n_clusters=2)
    pd.testing.assert_series_equal(adata.obs["subpopulation"][~missing], want.obs["subpopulation"])
    pd.testing.assert_frame_equal(adata.uns["subpopulation"]["enrichment"], want.uns["subpopulation"]["enrichment"])


def test_parts_of_a_numbered_type_have_one_name():
    adata = tissue()
    adata.obs["cluster"] = (adata.obs["type"] == "A").astype(int)
    subpopulations(adata, "cluster", 1, n_clusters=2)
    assert list(adata.obs["subpopulation"].cat.categories) == ["1-1", "1-2"]
    assert set(sfm.get.subpopulations_df(adata)["subpopulation"]) == {"1-1", "1-2"}


def test_the_process_is_left_as_it_was():
    """The first parallel kernel of numba sets the threads of torch, too, so this runs in a new process."""
    script = """
import random, igraph, matplotlib.pyplot, numpy as np, scanpy, sklearn.cluster, torch, spatialfm as sfm
sfm.settings.progress = False
adata = sfm.datasets.merfish_mouse_brain()[:400].copy()
adata.obs["type"], adata.obsm["X_rep"] = "A", np.random.default_rng(0).normal(size=(400, 4))
torch.set_num_threads(3)
def state():
    return torch.get_num_threads(), random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
before = state()
sfm.pp.spatial_neighbors(adata)
sfm.pp.grn(adata, n_genes=20)
sfm.tl.subpopulations(adata, "type", "A", use_rep="X_rep", n_permutations=1)
sfm.tl.subpopulations(adata, "type", "A", use_rep="X_rep", n_clusters=3, n_permutations=1, copy=True)
sfm.tl.domains(adata, use_rep="X_rep")
sfm.pl.grn(adata, "0")
assert state() == before
"""
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "MPLBACKEND": "Agg"})


def test_few_cells_and_many_clusters():
    adata = tissue()
    types = np.where(np.arange(600) < 16, "small", "rest")
    adata.obs["type"] = pd.Categorical(types)
    for k in (2, 7, 15):
        subpopulations(adata, "type", "small", n_clusters=k)
        assert adata.obs["subpopulation"].nunique() <= k
    subpopulations(adata, "type", "small", resolution=0.5)
    assert adata.obs["subpopulation"].notna().sum() == 16


def test_composition_and_moments_equal_brute_force():
    adata = tissue(n_slides=3)
    subpopulations(adata, "type", "A", n_clusters=2, library_key="slide", n_permutations=4000)
    entry = adata.uns["subpopulation"]
    types, found = adata.obs["type"].to_numpy(), adata.obs["subpopulation"]
    a = adata.obsp["spatial_connectivities"].toarray()
    fractions = {
        i: np.array([(types[a[i] > 0] == t).mean() for t in entry["cell_types"]]) for i in np.flatnonzero(types == "A")
    }
    for k, name in enumerate(entry["names"]):
        expected = np.mean([fractions[i] for i in np.flatnonzero(found == name)], axis=0)
        np.testing.assert_allclose(entry["composition"][k], expected)
        # The table says the same.
        rows = entry["enrichment"].query("subpopulation == @name").set_index("cell_type")
        np.testing.assert_allclose(rows.loc[entry["cell_types"], "fraction"], expected)

    # Permute within slides by hand.
    rng = np.random.default_rng(1)
    cells = np.array(list(fractions))
    values = np.stack(list(fractions.values()))
    first = (found.iloc[cells] == entry["names"][0]).to_numpy()
    slide = adata.obs["slide"].to_numpy()[cells]
    means = []
    for _ in range(4000):
        label = first.copy()
        for s in np.unique(slide):
            label[slide == s] = rng.permutation(label[slide == s])
        means.append(values[label].mean(axis=0))
    means = np.array(means)
    table = entry["enrichment"].iloc[: len(entry["cell_types"])]
    sd = means.std(axis=0)
    np.testing.assert_allclose(table["expected"], means.mean(axis=0), atol=5 * sd.max() / np.sqrt(4000))
    observed = values[first].mean(axis=0)
    np.testing.assert_allclose(table["z"], (observed - means.mean(axis=0)) / sd, atol=0.15)
    p = (
        1 + (np.abs(means - table["expected"].to_numpy()) >= np.abs(observed - table["expected"].to_numpy())).sum(0)
    ) / 4001
    np.testing.assert_allclose(table["p"], p, atol=0.04)


def test_fdr_is_benjamini_hochberg():
    adata = tissue(planted=True)
    subpopulations(adata, "type", "A", n_clusters=2)
    table = adata.uns["subpopulation"]["enrichment"].sort_values("p", kind="stable")
    m = len(table)
    raw = table["p"].to_numpy() * m / np.arange(1, m + 1)
    np.testing.assert_allclose(table["fdr"], np.minimum(np.minimum.accumulate(raw[::-1])[::-1], 1))


def test_null_is_calibrated():
    """Random labels on one tissue: uniform p-values, FDR hits no more often than promised."""
    adata = tissue(n=300, n_slides=2)
    rows = np.flatnonzero(adata.obs["type"] == "A")
    graph = adata.obsp["spatial_connectivities"]
    composition = neighbour_fractions(graph[rows], rows, adata.obs["type"].cat.codes.to_numpy(), 3)
    slides = adata.obs["slide"].cat.codes.to_numpy()[rows]
    rng = np.random.default_rng(0)
    p, hits = [], 0
    for _ in range(400):
        labels = rng.choice(3, len(rows), p=[0.5, 0.3, 0.2])
        table = enrichment(labels, composition, slides, n_permutations=199, generator=rng)
        p.append(table["p"].ravel())
        hits += (table["fdr"] < 0.05).any()
    for column in np.array(p).T:
        assert kstest(column, "uniform").pvalue > 1e-3
    assert hits / 400 < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)


def test_planted_structure_is_found():
    adata = tissue(planted=True)
    subpopulations(adata, "type", "A", n_clusters=2)
    table = adata.uns["subpopulation"]["enrichment"].set_index(["subpopulation", "cell_type"])
    right = adata.obs["subpopulation"][(adata.obs["type"] == "A") & adata.obs["blob"]].iloc[0]
    assert table.loc[(right, "B/x"), "z"] > 5
    assert table.loc[(right, "C"), "z"] < -5
    assert (table.loc[[(right, "B/x"), (right, "C")], "fdr"] < 0.01).all()


def test_slides_that_differ_do_not_make_an_enrichment():
    """Slides differ in blob and in composition: only permutations across slides find a difference."""
    adata = tissue(n=800, n_slides=2)
    slide = (adata.obs["slide"] == "s1").to_numpy()
    rng = np.random.default_rng(100)
    types = adata.obs["type"].astype(str).to_numpy()
    swap = (types != "A") & (rng.random(len(types)) < 0.8)
    types[swap] = np.where(slide[swap], "B/x", "C")
    adata.obs["type"] = pd.Categorical(types)
    blob = np.where(rng.random(len(types)) < 0.8, slide, ~slide)
    adata.obsm["X_rep"] = (rng.normal(0, 0.3, (len(types), 4)) + 6 * blob[:, None]).astype(np.float32)
    subpopulations(adata, "type", "A", n_clusters=2, key_added="across")
    subpopulations(adata, "type", "A", n_clusters=2, library_key="slide", key_added="within")
    assert adata.uns["across"]["enrichment"]["fdr"].min() < 0.01
    assert adata.uns["within"]["enrichment"]["fdr"].min() > 0.05


@pytest.mark.parametrize("how", [{"n_clusters": 3}, {"resolution": 1.0}])
def test_row_order_and_repetition_change_nothing(how):
    adata = tissue(n_slides=2)
    shuffled = adata[np.random.default_rng(3).permutation(adata.n_obs)].copy()
    again = subpopulations(adata, "type", "A", library_key="slide", **how, copy=True)
    assert "subpopulation" not in adata.obs
    subpopulations(adata, "type", "A", library_key="slide", **how)
    subpopulations(shuffled, "type", "A", library_key="slide", **how)
    for other in (again, shuffled):
        pd.testing.assert_series_equal(adata.obs["subpopulation"], other.obs["subpopulation"].loc[adata.obs_names])
        pd.testing.assert_frame_equal(
            adata.uns["subpopulation"]["enrichment"], other.uns["subpopulation"]["enrichment"]
        )


def test_view_is_accepted():
    adata = tissue()
    view = adata[adata.obs["type"] != "C"]
    subpopulations(view, "type", "A", n_clusters=2)
    assert view.uns["subpopulation"]["cell_types"] == ["A", "B/x"]
    assert "subpopulation" not in adata.obs


def test_isolated_cells_and_self_loops_do_not_count():
    adata = tissue()
    a = adata.obsp["spatial_connectivities"].tolil()
    lonely = np.flatnonzero(adata.obs["type"] == "A")[:5]
    a[lonely], a[:, lonely] = 0, 0
    adata.obsp["spatial_connectivities"] = a.tocsr()
    subpopulations(adata, "type", "A", n_clusters=2)
    a.setdiag(1)
    adata.obsp["spatial_connectivities"] = a.tocsr()
    subpopulations(adata, "type", "A", n_clusters=2, key_added="loops")
    table = adata.uns["subpopulation"]["enrichment"]
    pd.testing.assert_frame_equal(table, adata.uns["loops"]["enrichment"])
    assert adata.obs["subpopulation"].notna().sum() == (adata.obs["type"] == "A").sum()
    np.testing.assert_allclose(adata.uns["subpopulation"]["composition"].sum(axis=1), 1)


def test_subpopulation_of_isolated_cells_has_no_composition():
    adata = tissue()
    a = adata.obsp["spatial_connectivities"].tolil()
    lonely = np.flatnonzero((adata.obs["type"] == "A") & adata.obs["blob"])
    a[lonely], a[:, lonely] = 0, 0
    adata.obsp["spatial_connectivities"] = a.tocsr()
    subpopulations(adata, "type", "A", n_clusters=2)
    table = adata.uns["subpopulation"]["enrichment"]
    assert table["fraction"].isna().sum() == len(adata.uns["subpopulation"]["cell_types"])
    assert (table["p"] == 1).all()  # the other one is then all cells


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"groupby": "nope"}, KeyError, "groupby='nope'"),
        ({"group": "Z"}, ValueError, "choose from"),
        ({"group": "rare"}, ValueError, "has 3 cells"),
        ({"use_rep": "X_nope"}, KeyError, "sfm.tl.embed"),
        ({"neighbors_key": "nope"}, KeyError, "sfm.pp.spatial_neighbors"),
        ({"library_key": "nope"}, KeyError, "library_key='nope'"),
        ({"n_clusters": 2, "resolution": 1.0}, ValueError, "exclude each other"),
        ({"n_clusters": 1}, ValueError, "n_clusters=1"),
        ({"n_clusters": 10_000}, ValueError, "n_clusters=10000"),
        ({"resolution": 0.0}, ValueError, "resolution=0.0"),
        ({"n_permutations": 0}, ValueError, "n_permutations must be a positive integer"),
        ({"use_rep": "X_nan"}, ValueError, "NaN"),
    ],
)
def test_refusals_leave_the_data_alone(kwargs, error, message):
    adata = tissue()
    types = adata.obs["type"].astype(str)
    types.iloc[np.flatnonzero(types == "C")[:3]] = "rare"
    adata.obs["type"] = pd.Categorical(types)
    adata.obsm["X_nan"] = np.full((adata.n_obs, 2), np.nan)
    obs, uns = list(adata.obs), list(adata.uns)
    with pytest.raises(error, match=message):
        subpopulations(adata, **{"groupby": "type", "group": "A", **kwargs})
    assert (list(adata.obs), list(adata.uns)) == (obs, uns)


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_round_trip(tmp_path, suffix):
    adata = tissue(n_slides=2)
    subpopulations(adata, "type", "B/x", n_clusters=2, library_key="slide")
    path = tmp_path / f"x.{suffix}"
    getattr(adata, f"write_{suffix}")(path)
    back = getattr(ad, f"read_{suffix}")(path)
    pd.testing.assert_series_equal(adata.obs["subpopulation"], back.obs["subpopulation"])
    pd.testing.assert_frame_equal(
        adata.uns["subpopulation"]["enrichment"], back.uns["subpopulation"]["enrichment"], check_index_type=False
    )
    assert list(back.uns["subpopulation"]["names"]) == ["B/x 1", "B/x 2"]
    assert back.uns["subpopulation"]["params"]["n_clusters"] == 2
