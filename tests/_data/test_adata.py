"""Labels of cells: their order, and what counts as one label."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from spatialfm._data._adata import (
    as_label,
    get_coordinates,
    get_known_labels,
    get_libraries,
    get_obs_labels,
    slide_codes,
    stored_colors,
)
from spatialfm._data._embeddings import get_embedding

NUMBERS = [1, 10, 2, 11, 1]


@pytest.mark.parametrize(
    ("column", "names"),
    [
        (NUMBERS, ["1", "2", "10", "11"]),
        (np.array(NUMBERS, np.uint64), ["1", "2", "10", "11"]),
        (pd.Categorical(NUMBERS), ["1", "2", "10", "11"]),
        ([str(k) for k in NUMBERS], ["1", "2", "10", "11"]),
        (pd.Categorical([str(k) for k in NUMBERS]), ["1", "2", "10", "11"]),
        ([f"fov{k}" for k in NUMBERS], ["fov1", "fov2", "fov10", "fov11"]),
        ([-1, 10, 9, -1, 9], ["-1", "9", "10"]),
        (pd.Categorical(["b", "a", "c", "a", "b"], categories=["c", "a", "b"]), ["c", "a", "b"]),
        (pd.Categorical(["1", "10", "2", "1", "1"], categories=["1", "10", "2"], ordered=True), ["1", "10", "2"]),
        ([1, "1", 2, None, 2.5], ["1", "2", "2.5"]),
        ([1.0, 1.5, 3.0, 1.5, 3.0], ["1.0", "1.5", "3.0"]),
        ([True, False, True, True, False], ["False", "True"]),
    ],
)
def test_labels_come_in_their_natural_or_given_order(column, names):
    adata = ad.AnnData(np.zeros((5, 1), np.float32))
    adata.obs["x"] = pd.Series(column, index=adata.obs_names)
    labels = get_obs_labels(adata, "x", name="x")
    assert list(labels.categories) == names
    values = [None if v is None else str(v) for v in adata.obs["x"].astype(object)]
    assert [None if isinstance(v, float) else v for v in labels.astype(object)] == values
    again = get_obs_labels(adata[::-1].copy(), "x", name="x")
    assert list(again.categories) == names
    if None not in values:
        assert [name for name, _ in get_libraries(adata, "x")] == names


@pytest.mark.parametrize(
    "column",
    [
        [10.0, np.nan, 2.0, 1.0, 2.0],
        np.array([10, np.nan, 2, 1, 2], np.float32),
        pd.array([10, None, 2, 1, 2], "Int64"),
        pd.Categorical([10.0, np.nan, 2.0, 1.0, 2.0]),
        pd.Series([10, None, 2.0, 1, 2.0], dtype=object),
    ],
    ids=["float64", "float32", "Int64", "categories", "objects"],
)
def test_whole_numbers_beside_missing_values_are_whole(column):
    """A missing value turns a column of integers into floats, and labels 1 and 2 must not become 1.0 and 2.0 by it."""
    adata = ad.AnnData(np.zeros((5, 1), np.float32))
    adata.obs["x"] = column if not isinstance(column, pd.Series) else column.to_numpy()
    labels = get_obs_labels(adata, "x", name="x")
    assert sorted(labels.categories) == ["1", "10", "2"]
    assert [v if isinstance(v, str) else None for v in labels] == ["10", None, "2", "1", "2"]
    adata.uns["x_colors"] = dict(zip([1.0, 2.0, 10.0], ["red", "green", "blue"], strict=True))
    assert stored_colors(adata, "x") == {"1": "red", "2": "green", "10": "blue"}
    adata.uns["x_colors"] = ["red", "green", "blue"]
    assert set(stored_colors(adata, "x")) == {"1", "2", "10"}


def test_a_value_is_found_among_labels():
    assert as_label(1.0, ["1", "2"]) == as_label(1, ["1"]) == as_label("1", ["1"]) == "1"
    assert as_label(1.0, ["1.0", "1.5"]) == "1.0"


def test_unused_categories_are_no_labels():
    adata = ad.AnnData(np.zeros((3, 1), np.float32))
    adata.obs["x"] = pd.Categorical(["b", "a", "a"], categories=["b", "z", "a"])
    assert list(get_obs_labels(adata, "x", name="x").categories) == ["b", "a"]
    adata.uns["x_colors"] = ["red", "green", "blue"]
    assert stored_colors(adata, "x") == {"b": "red", "z": "green", "a": "blue"}


def test_no_label_at_all():
    adata = ad.AnnData(np.zeros((3, 1), np.float32))
    adata.obs["x"] = np.nan
    with pytest.raises(ValueError, match="has no value for any of the 3 cells"):
        get_known_labels(adata, "x", name="groupby", effect="")


@pytest.mark.parametrize("read", [get_coordinates, lambda adata: get_embedding(adata, "X_pca")])
def test_no_cells(read):
    adata = ad.AnnData(np.zeros((3, 2), np.float32), obsm={"spatial": np.ones((3, 2)), "X_pca": np.eye(3)})
    read(adata)
    with pytest.raises(ValueError, match="adata holds no cells, only 2 genes"):
        read(adata[:0].copy())


def test_numbers_of_slides_follow_their_names():
    """Not the order of the categories, which is that of the files that were concatenated."""
    slides = ["b", "a", "c", "a"]
    for categories in (["a", "b", "c"], ["c", "a", "b"]):
        adata = ad.AnnData(np.zeros((4, 1), np.float32))
        adata.obs["slide"] = pd.Categorical(slides, categories=categories)
        assert [name for name, _ in get_libraries(adata, "slide")] == categories
        assert list(slide_codes(get_libraries(adata, "slide"))) == [1, 0, 2, 0]
