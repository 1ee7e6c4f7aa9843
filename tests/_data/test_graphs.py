"""All functions read coordinates and tissue graphs alike, and refuse bad ones."""

from __future__ import annotations

from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import spatialfm as sfm
from spatialfm._data._adata import get_coordinates, get_graph


@pytest.fixture
def adata() -> ad.AnnData:
    rng = np.random.default_rng(0)
    names = [f"cell{i}" for i in range(200)]
    a = ad.AnnData(
        rng.poisson(2, (200, 30)).astype(np.float32),
        obs=pd.DataFrame(
            {"slide": pd.Categorical(["a", "b"] * 100), "type": pd.Categorical(["p", "q"] * 100)}, index=names
        ),
        obsm={"spatial": rng.random((200, 2)) * 100, "X_rep": rng.normal(size=(200, 4))},
    )
    a.obsm["spatial"][a.obs["slide"] == "b"] += np.array([120, 0])
    return a


def domains(a: ad.AnnData, **how: Any) -> list[str]:
    return sfm.tl.domains(a, 3, use_rep="X_rep", copy=True, **how).obs["domain"].astype(str).tolist()


def test_coordinates_from_tables(adata):
    xy = adata.obsm["spatial"]
    table = pd.DataFrame(xy, index=adata.obs_names, columns=["x", "y"])
    for same in (
        table,
        table.convert_dtypes(),
        table.astype(str),
        table.astype(object),
        xy.astype(object),
        sparse.csr_matrix(xy),
    ):
        adata.obsm["same"] = same
        np.testing.assert_allclose(get_coordinates(adata, "same"), xy, rtol=1e-12)
    gone = table.copy()
    gone.iloc[3, 0] = np.nan
    for missing in (gone, gone.convert_dtypes(), gone.astype(str).replace("nan", ""), gone.to_numpy(dtype=object)):
        adata.obsm["missing"] = missing
        with pytest.raises(ValueError, match=r"coordinates for 1 of 200 cells \(first: \['cell3'\]\)"):
            get_coordinates(adata, "missing")
    adata.obsm["fov"] = table.assign(fov="f1")
    with pytest.raises(
        ValueError,
        match=r"\['fov'\]; keep the columns of numbers: adata.obsm\['fov'\] = adata.obsm\['fov'\]\[\['x', 'y'\]\]",
    ):
        get_coordinates(adata, "fov")
    for wrong in (xy.astype(complex), np.full((200, 2), "left")):
        adata.obsm["wrong"] = wrong
        with pytest.raises(ValueError, match="holds values that are no real numbers"):
            get_coordinates(adata, "wrong")


@pytest.mark.parametrize("scale", [1e40, 1e200, 1e-40])
def test_coordinates_that_have_no_lengths(adata, scale):
    adata.obsm["spatial"] *= scale
    with pytest.raises(ValueError, match="convert them to pixels or micrometres"):
        sfm.pp.spatial_neighbors(adata)


@pytest.mark.parametrize(
    "names",
    [
        ("x", "y"),
        ("x_centroid", "y_centroid"),
        ("CenterX_global_px", "CenterY_global_px"),
        ("array_col", "array_row"),
        ("X", "Y"),
    ],
)
def test_missing_coordinates_are_looked_for(adata, names):
    xy = adata.obsm.pop("spatial")
    adata.obsm["spatial_um"] = xy
    adata.obs[names[0]], adata.obs[names[1]] = xy.T
    adata.obs["max_area"] = 1.0
    with pytest.raises(KeyError) as error:
        sfm.tl.embed(adata)
    assert f"adata.obs[['{names[0]}', '{names[1]}']].to_numpy()" in str(error.value)
    assert "basis=" in str(error.value)
    assert "spatial_um" in str(error.value)


def test_formats_of_graphs(adata):
    sfm.pp.spatial_neighbors(adata)
    expected, lengths = get_graph(adata)
    found = domains(adata)
    for form in (
        sparse.csr_array,
        sparse.csc_matrix,
        lambda m: m.toarray(),
        lambda m: pd.DataFrame(m.toarray(), adata.obs_names, adata.obs_names),
    ):
        other = adata.copy()
        for key in list(other.obsp):
            other.obsp[key] = form(adata.obsp[key])
        graph, distances = get_graph(other)
        assert abs(graph - expected).nnz == 0
        assert abs(distances - lengths).nnz == 0
        assert domains(other) == found
    whole = adata.copy()
    whole.obsp["spatial_connectivities"] = adata.obsp["spatial_connectivities"].astype(bool)
    del whole.uns["spatial_neighbors"]["distances_key"]
    graph, distances = get_graph(whole)
    assert abs(distances - lengths).max() < 1e-4
    assert domains(whole) == found


@pytest.mark.parametrize("value", [np.nan, -1.0, np.inf])
@pytest.mark.parametrize("key", ["spatial_connectivities", "spatial_distances"])
def test_graphs_with_values_that_are_none(adata, key, value):
    sfm.pp.spatial_neighbors(adata)
    adata.obsp[key].data[3] = value
    with pytest.raises(ValueError, match=f"'{key}'.*NaN, infinite, negative"):
        domains(adata)


def test_self_loops_count_nowhere(adata):
    sfm.pp.spatial_neighbors(adata)
    looped = adata.copy()
    looped.obsp["spatial_connectivities"] = (adata.obsp["spatial_connectivities"] + sparse.eye(200)).tocsr()
    before = looped.obsp["spatial_connectivities"].copy()
    for a in (adata, looped):
        sfm.tl.embed(a)
    for key in ("X_niche", "X_state"):
        np.testing.assert_array_equal(looped.obsm[key], adata.obsm[key])
    assert domains(looped) == domains(adata)
    assert (looped.obsp["spatial_connectivities"] != before).nnz == 0


def test_a_graph_without_its_record_is_used(adata):
    parts = [adata[adata.obs["slide"] == s].copy() for s in "ab"]
    for part in parts:
        sfm.pp.spatial_neighbors(part, method="knn", n_neighbors=20)
    joined = ad.concat(parts, pairwise=True)
    joined.uns = {}
    n_edges = joined.obsp["spatial_connectivities"].nnz
    with pytest.warns(UserWarning, match=r"its record uns\['spatial_neighbors'\] is missing"):
        sfm.tl.embed(joined, library_key="slide")
    assert joined.obsp["spatial_connectivities"].nnz == n_edges
    assert joined.uns["spatial_neighbors"]["params"]["guessed"] == "the record"
    expected = adata[joined.obs_names].copy()
    sfm.pp.spatial_neighbors(expected, method="knn", n_neighbors=20, library_key="slide")
    sfm.tl.embed(expected, library_key="slide")
    for key in ("X_niche", "X_state"):
        np.testing.assert_allclose(joined.obsm[key], expected.obsm[key], atol=1e-5)
    # Now there is one.
    domains(joined, library_key="slide")


def test_library_key_on_the_second_call(adata):
    adata.obsm["spatial"][:] = np.random.default_rng(1).random((200, 2)) * 100
    adata.obs["slide"] = np.where(adata.obsm["spatial"][:, 0] < 50, "a", "b")
    stored = sfm.tl.domains(adata, 3, use_rep="X_rep", copy=True)
    with pytest.raises(
        ValueError,
        match=r"built with no library_key, .*again with sfm.pp.spatial_neighbors\(adata, library_key='slide'\)",
    ):
        domains(stored, library_key="slide")
    with pytest.raises(ValueError, match="built with no library_key"):
        sfm.tl.subpopulations(stored, "type", "p", use_rep="X_rep", n_clusters=2, library_key="slide")
    sfm.pp.spatial_neighbors(stored, library_key="slide")
    domains(stored, library_key="slide")


@pytest.mark.parametrize("tool", ["ours", "other"])
def test_coordinates_replaced_after_the_graph_was_stored(adata, tool):
    sfm.pp.spatial_neighbors(adata, library_key="slide")
    if tool == "other":
        adata.uns["spatial_neighbors"]["params"] = {"coord_type": "generic", "library_key": "slide"}
    xy, slide = adata.obsm["spatial"].copy(), (adata.obs["slide"] == "b").to_numpy()[:, None]
    angle = np.array([[0.8, -0.6], [0.6, 0.8]])
    for same in (
        xy * 0.1,
        xy @ angle + 50,
        xy[:, ::-1],
        np.where(slide, xy * 3, xy + 1e4),
        np.round(xy, 1),
        xy.astype(np.float32),
    ):
        adata.obsm["spatial"] = same
        domains(adata, library_key="slide")
    order = np.random.default_rng(0).permutation(200)
    for other in (xy[order], np.where(slide, xy[np.r_[1:200, 0]], xy), xy * np.array([1, 3]), np.zeros_like(xy)):
        adata.obsm["spatial"] = other
        with pytest.raises(ValueError, match="the coordinates were replaced after it was built"):
            domains(adata, library_key="slide")
        with pytest.raises(ValueError, match="the coordinates were replaced after it was built"):
            sfm.tl.subpopulations(adata, "type", "p", use_rep="X_rep", n_clusters=2)
    # Lengths that are none, and those of other coordinates.
    adata.obsm["before"] = xy
    adata.uns["spatial_neighbors"]["params"] = {"basis": "before"}
    domains(adata, library_key="slide")
