"""Domains: clusters recovered, refinement against brute force, slides together, what they do not depend on."""

from __future__ import annotations

import itertools

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture

import spatialfm as sfm
from spatialfm.tl._domains import fit_mixture, refine_labels

METHODS = [{"n_domains": 4}, {"n_domains": 4, "method": "kmeans"}, {"resolution": 0.3}]


def tissue(n=600, seed=0, *, n_slides=1, noise=0.5):
    """Four stripes on each slide, of different widths, each with its own mean in the embedding."""
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0, 100, (n, 2))
    stripe = np.digitize(xy[:, 0], [10, 30, 60])
    mean = 2 * rng.normal(size=(4, 6))
    slides = rng.integers(n_slides, size=n)
    return ad.AnnData(
        np.zeros((n, 1), np.float32),
        obs=pd.DataFrame(
            {"slide": pd.Categorical([f"s{s}" for s in slides]), "stripe": stripe}, index=[f"c{i}" for i in range(n)]
        ),
        obsm={"spatial": xy, "X_niche": (mean[stripe] + noise * rng.normal(size=(n, 6))).astype(np.float32)},
    )


def energy(labels, start, graph, strength):
    i, j = sparse.triu(graph, k=1).nonzero()
    return (labels != start).sum() - strength * (labels[i] == labels[j]).sum()


@st.composite
def small(draw, max_n=5, max_k=3):
    n, k = draw(st.integers(2, max_n)), draw(st.integers(2, max_k))
    upper = np.triu(np.array(draw(st.lists(st.booleans(), min_size=n * n, max_size=n * n))).reshape(n, n), 1)
    labels = np.array(draw(st.lists(st.integers(0, k - 1), min_size=n, max_size=n)))
    return labels, sparse.csr_matrix((upper | upper.T).astype(np.float32)), draw(st.sampled_from([0.3, 1.0, 2.5]))


@settings(deadline=None, max_examples=60)
@given(small())
def test_refinement_ends_where_no_single_change_lowers_the_energy(case):
    start, graph, strength = case
    found = refine_labels(start, graph, strength)
    lowest = energy(found, start, graph, strength)
    assert lowest <= energy(start, start, graph, strength) + 1e-6
    for i, k in itertools.product(range(len(start)), range(start.max() + 1)):
        other = found.copy()
        other[i] = k
        assert lowest <= energy(other, start, graph, strength) + 1e-6
    # Not a global minimum, but never below it.
    every = itertools.product(range(start.max() + 1), repeat=len(start))
    assert lowest >= min(energy(np.array(v), start, graph, strength) for v in every) - 1e-6


def test_refinement_follows_the_neighbours():
    """A cell among four others changes, unless their weight is too small; cells without neighbours stay."""
    graph = np.zeros((6, 6), np.float32)
    graph[0, 1:5] = graph[1:5, 0] = 1
    start = np.array([0, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(refine_labels(start, sparse.csr_matrix(graph), 1.0), [1, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(refine_labels(start, sparse.csr_matrix(graph), 0.2), start)


def test_fit_equals_scikit_learn():
    """From the same responsibilities to the same likelihood and labels."""
    adata = tissue(noise=1.2)
    points = np.asarray(adata.obsm["X_niche"], np.float64)
    start = adata.obs["stripe"].to_numpy()
    likelihood, labels = fit_mixture(points, start, 4)
    weights = np.bincount(start) / len(start)
    means = np.stack([points[start == k].mean(axis=0) for k in range(4)])
    within = np.cov((points - means[start]).T, bias=True)
    oracle = GaussianMixture(
        4,
        covariance_type="tied",
        weights_init=weights,
        means_init=means,
        precisions_init=np.linalg.inv(within),
        tol=1e-5,
    ).fit(points)
    assert likelihood == pytest.approx(oracle.score(points), abs=1e-3)
    assert (labels == oracle.predict(points)).mean() > 0.99


@pytest.mark.parametrize("how", METHODS)
def test_stripes_are_found_and_refined(how):
    adata = tissue(noise=1.2)
    assert sfm.tl.domains(adata, **how, refine=0, key_added="plain") is None
    assert "spatial_neighbors" not in adata.uns
    sfm.tl.domains(adata, **how)
    found = adata.obs["domain"]
    assert list(found.cat.categories) == [str(k) for k in range(found.nunique())]
    assert (np.diff(found.value_counts()[list(found.cat.categories)]) <= 0).all()
    plain, refined = (adjusted_rand_score(adata.obs["stripe"], adata.obs[k]) for k in ("plain", "domain"))
    assert refined > plain
    assert refined > 0.75
    assert adata.uns["domain"]["n_refined"] > 0 == adata.uns["plain"]["n_refined"]
    assert sfm.tl.domains(adata, **how, copy=True).obs["domain"].equals(found)


def test_small_domains_of_outliers_lose_to_tissue():
    adata = tissue()
    adata.obsm["X_niche"][:2] += 60 * np.random.default_rng(1).normal(size=(2, 6)).astype(np.float32)
    sfm.tl.domains(adata, 3)
    assert adata.obs["domain"].value_counts().min() >= 6


def test_slides_are_clustered_together_and_refined_apart():
    """One slide in two halves: the same clusters; a slide laid upon another changes nothing."""
    adata = tissue(n_slides=3, noise=1.2)
    joint = sfm.tl.domains(adata, 4, refine=0, copy=True).obs["domain"]
    slides = sfm.tl.domains(adata, 4, library_key="slide", refine=0, copy=True).obs["domain"]
    pd.testing.assert_series_equal(joint, slides)
    moved = adata.copy()
    moved.obsm["spatial"] = moved.obsm["spatial"] + 1000.0 * adata.obs["slide"].cat.codes.to_numpy()[:, None]
    for one in (adata, moved):
        sfm.tl.domains(one, 4, library_key="slide")
        i, j = one.obsp["spatial_connectivities"].nonzero()
        assert (adata.obs["slide"].to_numpy()[i] == adata.obs["slide"].to_numpy()[j]).all()
    assert adjusted_rand_score(adata.obs["domain"], moved.obs["domain"]) == 1
    assert adata.uns["domain"]["params"]["library_key"] == "slide"


@pytest.mark.parametrize("how", METHODS)
def test_row_order_changes_nothing(how):
    adata = tissue(n_slides=2, noise=1.2)
    adata.obsm["X_niche"] = np.round(adata.obsm["X_niche"])  # many cells alike
    shuffled = adata[np.random.default_rng(3).permutation(adata.n_obs)].copy()
    for one in (adata, shuffled):
        sfm.tl.domains(one, **how, library_key="slide")
    pd.testing.assert_series_equal(adata.obs["domain"], shuffled.obs["domain"].loc[adata.obs_names])


def test_views_and_tables_and_wide_embeddings():
    adata = tissue()
    wide = np.hstack([adata.obsm["X_niche"], np.zeros((600, 30), np.float32)])
    adata.obsm["wide"] = pd.DataFrame(wide, index=adata.obs_names, columns=[f"k{i}" for i in range(36)])
    sfm.tl.domains(adata, 4)
    sfm.tl.domains(adata, 4, use_rep="wide", key_added="other")
    assert adjusted_rand_score(adata.obs["domain"], adata.obs["other"]) == 1
    view = adata[adata.obs["stripe"] > 0]
    sfm.tl.domains(view, 3, key_added="part")
    assert "part" in view.obs
    assert "part" not in adata.obs


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"use_rep": "X_hibio_other"}, KeyError, r"sfm\.tl\.embed\(adata, model='hibio'\)"),
        ({"use_rep": "X_nan"}, ValueError, "NaN"),
        ({"use_rep": "X_flat"}, ValueError, "1 different rows"),
        ({"neighbors_key": "nope"}, KeyError, "sfm.pp.spatial_neighbors"),
        ({"library_key": "nope"}, KeyError, "library_key='nope'"),
        ({"library_key": "slide"}, ValueError, "edges between slides"),
        ({"basis": "nope"}, KeyError, "obsm\\['nope'\\]"),
        ({"method": "nope"}, ValueError, "choose from"),
        ({"method": "leiden"}, ValueError, "method='leiden'"),
        ({"n_domains": None, "method": "kmeans"}, ValueError, "needs n_domains"),
        ({"resolution": 1.0}, ValueError, "belongs to"),
        ({"n_domains": None, "resolution": 0.0}, ValueError, "must be positive"),
        ({"n_domains": 1}, ValueError, "n_domains=1"),
        ({"n_domains": 2.5}, ValueError, "n_domains must be a whole number or None, got 2.5"),
        ({"n_domains": 600}, ValueError, "n_domains=600"),
        ({"refine": -1.0}, ValueError, "refine=-1.0"),
    ],
)
def test_refusals_leave_the_data_alone(kwargs, error, message):
    adata = tissue(n_slides=2)
    sfm.pp.spatial_neighbors(adata)
    adata.obsm["X_nan"] = np.full((adata.n_obs, 2), np.nan)
    adata.obsm["X_flat"] = np.ones((adata.n_obs, 2))
    before = list(adata.obs), list(adata.uns)
    with pytest.raises(error, match=message):
        sfm.tl.domains(adata, **{"n_domains": 4, **kwargs})
    assert (list(adata.obs), list(adata.uns)) == before


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_round_trip(tmp_path, suffix):
    adata = tissue(n_slides=2)
    sfm.tl.domains(adata, 4, library_key="slide")
    path = tmp_path / f"x.{suffix}"
    getattr(adata, f"write_{suffix}")(path)
    back = getattr(ad, f"read_{suffix}")(path)
    pd.testing.assert_series_equal(adata.obs["domain"], back.obs["domain"])
    assert back.uns["domain"]["params"] == adata.uns["domain"]["params"]


def test_takes_the_niche_unless_told():
    adata = tissue()
    adata.obsm["X_hibio"] = adata.obsm["X_niche"]
    sfm.tl.domains(adata, 4)
    assert adata.uns["domain"]["params"]["use_rep"] == "X_niche"
    adata.obsm["X_left"], adata.obsm["X_right"] = np.hsplit(adata.obsm["X_niche"], 2)
    sfm.tl.domains(adata, 4, use_rep=["X_left", "X_right"], key_added="of_two")
    assert adata.uns["of_two"]["params"]["use_rep"] == "X_left + X_right"
    assert (adata.obs["of_two"].to_numpy() == adata.obs["domain"].to_numpy()).all()
    del adata.obsm["X_niche"]
    with pytest.raises(KeyError, match=r"sfm\.tl\.embed\(adata\)"):
        sfm.tl.domains(adata, 4)
