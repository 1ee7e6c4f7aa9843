"""Regions: connected, nested, of bounded size, by brute force; what they find; what they do not depend on."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.sparse.csgraph import connected_components

import spatialfm as sfm
from spatialfm.pp._regions import cut_large, nested_partitions
from spatialfm.pp._spatial_neighbors import neighbor_graph


def tissue(n=600, seed=0, *, n_slides=1, layout=sparse.csr_matrix):
    """Stripes of genes on each slide; a pair of cells far from the others."""
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0, 100, (n, 2))
    xy[-2:] += 1000
    stripe = np.minimum(xy[:, 0] // 25, 3).astype(int)
    rate = np.full((4, 20), 1.0)
    rate[np.arange(20) // 5, np.arange(20)] = 6.0
    slides = rng.integers(n_slides, size=n)
    slides[-2:] = 0
    return ad.AnnData(
        layout(rng.poisson(rate[stripe]).astype(np.float32)),
        obs=pd.DataFrame(
            {"slide": pd.Categorical([f"s{s}" for s in slides]), "stripe": stripe}, index=[f"c{i}" for i in range(n)]
        ),
        obsm={"spatial": xy, "X_flat": np.ones((n, 3), np.float32)},
    )


def assert_good(adata, key, size, branching, slides=None):
    """Connected, nested, of bounded size, within a slide; categories complete."""
    graph = adata.obsp["spatial_connectivities"]
    _, piece = connected_components(graph, directed=False)
    of_piece = np.bincount(piece)[piece]
    entry = adata.uns[key]
    levels = list(entry["levels"])
    assert adata.obs[key].equals(adata.obs[levels[-1]])
    for k, column in enumerate(levels):
        values = adata.obs[column]
        mean = size * branching ** (len(levels) - 1 - k)
        np.testing.assert_array_equal(values.isna(), of_piece < size / 2)
        assert set(values.cat.categories) == set(values.dropna())
        for name in values.cat.categories:
            rows = np.flatnonzero(values == name)
            assert connected_components(graph[rows][:, rows], directed=False)[0] == 1
            assert len(rows) <= 2 * mean
            assert len(rows) >= min(mean / 2, of_piece[rows[0]])
            if slides is not None:
                assert len(set(slides[rows])) == 1
                assert name.startswith(slides[rows[0]] + " ")
            if k:
                (parent,) = set(adata.obs[levels[k - 1]].iloc[rows])
                assert name.rpartition(".")[0] == parent
                assert list(entry["parents"][column])[values.cat.categories.get_loc(name)] == parent


@pytest.mark.parametrize(("n_levels", "size", "branching"), [(1, 30, 4), (2, 20, 3), (3, 5, 4), (2, 2, 2)])
def test_regions_are_good(n_levels, size, branching):
    adata = tissue(n_slides=2)
    sfm.pp.regions(adata, use_rep=None, n_levels=n_levels, size=size, branching=branching, library_key="slide")
    assert_good(adata, "tissue_region", size, branching, adata.obs["slide"].astype(str).to_numpy())
    assert [c for c in adata.obs if c.startswith("tissue_region_")] == [
        f"tissue_region_{k + 1}" for k in range(n_levels)
    ]
    counts = adata.obs["tissue_region"].value_counts()
    assert size * 0.7 < counts.mean() < size * 1.5
    coarse = adata.obs["tissue_region_1"].value_counts()[lambda c: c.index.str.startswith("s0 ")]
    assert coarse["s0 1"] == coarse.max()
    assert adata.obs["tissue_region"].iloc[-2:].isna().all() == (size > 4)


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 120),
    size=st.integers(2, 12),
    method=st.sampled_from(["delaunay", "knn", "radius"]),
)
@settings(deadline=None, max_examples=60)
def test_partitions_of_any_graph(seed, n, size, method):
    rng = np.random.default_rng(seed)
    adata = ad.AnnData(shape=(n, 0), obsm={"spatial": rng.uniform(size=(n, 2))})
    how = {"knn": {"n_neighbors": min(2, n - 1)}, "radius": {"radius": n**-0.5}}.get(method, {})
    sfm.pp.spatial_neighbors(adata, method="delaunay" if n == 1 else method, **({} if n == 1 else how))
    graph = adata.obsp["spatial_connectivities"]
    graph = ((graph + graph.T) != 0).astype(np.float32)
    fine, coarse = nested_partitions(rng.standard_t(2, (n, 2)), graph, [size, 3 * size])
    _, piece = connected_components(graph, directed=False)
    for labels, mean in ((fine, size), (coarse, 3 * size)):
        counts = np.bincount(labels)
        for label, count in enumerate(counts):
            rows = np.flatnonzero(labels == label)
            assert connected_components(graph[rows][:, rows], directed=False)[0] == 1
            assert count >= min(mean / 2, (piece == piece[rows[0]]).sum())
    assert all(len(set(coarse[fine == label])) == 1 for label in fine)


def test_first_unions_are_those_of_ward():
    """Where no bound is met, the partition is scikit-learn's."""
    from sklearn.cluster import AgglomerativeClustering

    from spatialfm.pp._ward import agglomerate

    rng = np.random.default_rng(0)
    xy = rng.uniform(size=(300, 2))
    graph, _ = neighbor_graph(xy, method="delaunay", max_edge=np.inf)
    graph = (graph != 0).astype(np.float32)
    values = (xy * 3).round() + rng.normal(0, 0.01, (300, 2))
    weights, pieces = np.ones(300), np.zeros(300, np.int64)
    labels = agglomerate(values, weights, graph.indptr, graph.indices, pieces, np.array([40]), 0.0, np.inf, np.inf)
    expected = AgglomerativeClustering(40, connectivity=graph).fit_predict(values)
    pairs = set(zip(labels.tolist(), expected.tolist(), strict=True))
    assert len(pairs) == len(set(labels)) == len(set(expected)) == 40


def test_planted_stripes_are_found():
    from sklearn.metrics import homogeneity_score

    adata = tissue(2000)
    sfm.pp.regions(adata, use_rep=None, size=25, branching=4)
    known = adata.obs["tissue_region"].notna()
    assert homogeneity_score(adata.obs["stripe"][known], adata.obs["tissue_region_1"][known].astype(str)) > 0.8
    rng = np.random.default_rng(0)
    shuffled = adata.obs["tissue_region_1"][known].sample(frac=1, random_state=0).astype(str)
    assert homogeneity_score(adata.obs["stripe"][known], shuffled) < 0.1
    # By default, X_niche decides.
    adata.obsm["X_niche"] = (adata.obsm["spatial"] + rng.normal(size=(2000, 2))).astype(np.float32)
    got = sfm.pp.regions(adata, copy=True).obs["tissue_region"]
    assert got.equals(sfm.pp.regions(adata, use_rep="X_niche", copy=True).obs["tissue_region"])
    assert not got.equals(sfm.pp.regions(adata, use_rep="X_flat", copy=True).obs["tissue_region"])


@pytest.mark.parametrize("use_rep", [None, "X_flat"])
def test_nothing_depends_on_rows_layout_or_other_slides(use_rep):
    adata = tissue(n_slides=2)
    how = {"size": 20, "library_key": "slide", "use_rep": use_rep}
    sfm.pp.regions(adata, **how)
    order = np.random.default_rng(1).permutation(adata.n_obs)
    columns = ["tissue_region", "tissue_region_1", "tissue_region_2"]
    for layout in (sparse.csr_matrix, sparse.csc_matrix, lambda x: x):
        other = tissue(n_slides=2, layout=layout)[order].copy()
        sfm.pp.regions(other, **how)
        pd.testing.assert_frame_equal(other.obs[columns].loc[adata.obs_names], adata.obs[columns])
    one = tissue(n_slides=2)
    one = one[one.obs["slide"] == "s1"]
    sfm.pp.regions(one, **how)
    for column in columns:
        assert list(one.obs[column]) == list(adata.obs.loc[one.obs_names, column])


def test_large_regions_are_cut():
    path = sparse.diags([1.0, 1.0], [-1, 1], shape=(9, 9)).tocsr()
    values = np.array([0, 0, 0, 5, 5, 5, 5, 5, 5.0])[:, None]
    zeros = np.zeros(9, np.int64)
    assert cut_large(zeros, values, np.ones(9), path, 2, 8).tolist() in ([0] * 3 + [1] * 6, [1] * 3 + [0] * 6)
    assert cut_large(zeros, values, np.ones(9), path, 4, 8)[[3, 5]].tolist() in ([0, 1], [1, 0])
    star = sparse.lil_matrix((9, 9))
    star[0, 1:] = star[1:, 0] = 1
    assert cut_large(zeros, values, np.ones(9), star.tocsr(), 2, 8).tolist() == [0] * 9


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning")
def test_writing(tmp_path):
    adata = tissue(200)
    x = adata.X.copy()
    copied = sfm.pp.regions(adata, use_rep=None, size=20, copy=True)
    assert "tissue_region" not in adata.obs
    assert "spatial_neighbors" not in adata.uns
    assert sfm.pp.regions(adata, use_rep=None, size=20, n_levels=3) is None
    assert (x != adata.X).nnz == 0
    # Fewer levels leave no column of an earlier call behind.
    sfm.pp.regions(adata, use_rep=None, size=20)
    pd.testing.assert_frame_equal(adata.obs, copied.obs)
    assert adata.uns["tissue_region"] == copied.uns["tissue_region"]
    view = tissue(200)[:150]
    sfm.pp.regions(view, use_rep=None, size=20)
    assert not view.is_view

    adata.write_h5ad(tmp_path / "x.h5ad")
    adata.write_zarr(tmp_path / "x.zarr")
    for back in (ad.read_h5ad(tmp_path / "x.h5ad"), ad.read_zarr(tmp_path / "x.zarr")):
        pd.testing.assert_frame_equal(back.obs, adata.obs)
        assert list(back.uns["tissue_region"]["levels"]) == ["tissue_region_1", "tissue_region_2"]
        assert (
            list(back.uns["tissue_region"]["parents"]["tissue_region_2"])
            == adata.uns["tissue_region"]["parents"]["tissue_region_2"]
        )
        sfm.pp.regions(back, use_rep=None, size=20)
        pd.testing.assert_frame_equal(back.obs, adata.obs)
    tissue(200).write_h5ad(tmp_path / "plain.h5ad")
    backed = ad.read_h5ad(tmp_path / "plain.h5ad", backed="r")
    assert (
        sfm.pp.regions(backed, use_rep=None, size=20, copy=True).obs["tissue_region"].equals(adata.obs["tissue_region"])
    )


def test_every_piece_is_numbered_by_itself():
    """Two pieces of tissue and single cells; a piece smaller than a coarse region is one."""
    xy = np.concatenate([np.stack(np.meshgrid(np.arange(10.0), np.arange(n)), -1).reshape(-1, 2) for n in (12, 4)])
    xy[120:] += 50
    xy = np.concatenate([xy, [[500, 500], [900, 0]]])
    adata = ad.AnnData(np.random.default_rng(0).random((162, 5)), obsm={"spatial": xy})
    sfm.pp.spatial_neighbors(adata, method="radius", radius=1.2)
    sfm.pp.regions(adata, use_rep=None, size=15)
    assert_good(adata, "tissue_region", 15, 4)
    assert (adata.obs["tissue_region_1"][120:160].nunique(), adata.obs["tissue_region"].isna().sum()) == (1, 2)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"size": 1}, ValueError, "size must be at least 2"),
        ({"branching": 1.5}, ValueError, "branching must be a whole number"),
        ({"n_levels": 0}, ValueError, "n_levels"),
        ({"size": 10_000}, ValueError, "lower size="),
        ({"key_added": "stripe"}, ValueError, r"obs\['stripe'\].*did not write it.*key_added="),
        ({"key_added": "mine"}, ValueError, r"uns\['mine'\]"),
        ({"use_rep": "X_nope"}, KeyError, "X_nope"),
        (
            {"use_rep": "X_niche"},
            KeyError,
            r"obsm\['X_niche'\] is missing; run sfm.tl.embed\(adata\) first, pass use_rep=None for components of the "
            "expression",
        ),
        ({"layer": "nope"}, KeyError, "nope"),
        ({"neighbors_key": "nope"}, KeyError, "spatial_neighbors"),
        ({"library_key": "half"}, ValueError, "edges between slides"),
    ],
)
def test_refusals_change_nothing(kwargs, error, message):
    adata = tissue(200)
    adata.obs["half"] = np.arange(200) % 2
    adata.uns["mine"] = {"a": 1}
    if "library_key" in kwargs:
        sfm.pp.spatial_neighbors(adata)
    before = adata.copy()
    with pytest.raises(error, match=message):
        sfm.pp.regions(adata, **{"use_rep": None, **kwargs})
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    assert set(adata.uns) == set(before.uns)
    assert set(adata.obsp) == set(before.obsp)
