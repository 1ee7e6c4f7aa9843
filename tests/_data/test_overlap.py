"""Overlapping slides are refused with the column that names them, and a single slide never is."""

from __future__ import annotations

from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.spatial import cKDTree

import spatialfm as sfm


def make(xy: np.ndarray, **obs: Any) -> ad.AnnData:
    index = [f"cell{i}" for i in range(len(xy))]
    return ad.AnnData(np.ones((len(xy), 1), np.float32), obs=pd.DataFrame(obs, index=index), obsm={"spatial": xy})


def cells(n: int, seed: int, width: float = 30) -> np.ndarray:
    """Cells that keep a distance of 0.6, about 1 apart."""
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0, width, (6 * n, 2))
    near = cKDTree(xy).query_pairs(0.6, output_type="ndarray")
    keep = np.ones(len(xy), bool)
    for i, j in near[np.lexsort(near.T)]:
        if keep[i]:
            keep[j] = False
    return xy[keep][:n]


square = np.stack(np.meshgrid(np.arange(20.0), np.arange(18.0)), axis=-1).reshape(-1, 2)
hexagonal = square * [1, 3**0.5 / 2] + np.stack([square[:, 1] % 2 / 2, 0 * square[:, 1]], axis=1)
KINDS = {
    "cells": (cells(600, 0), cells(600, 1)),
    "small over large": (cells(600, 0), cells(150, 1, width=12) + 8),
    "hexagonal, shifted": (hexagonal, hexagonal + np.array([0.2, 0.35])),
    "hexagonal, same places": (hexagonal, hexagonal),
    "square, shifted": (square, square + np.array([0.1, 0.4])),
    "square, turned": (square, square @ np.array([[np.cos(0.4), -np.sin(0.4)], [np.sin(0.4), np.cos(0.4)]])),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["category", "object", "int", "float"])
def test_slides_laid_over_each_other(kind, dtype):
    parts = KINDS[kind]
    slide = pd.Series(np.repeat([1, 2], [len(p) for p in parts]))
    slide = slide.astype(dtype) if dtype in ("int", "float") else slide.map({1: "a", 2: "b"}).astype(dtype)
    rng = np.random.default_rng(0)
    adata = make(
        np.vstack(parts), type=rng.choice(list("xyz"), len(slide)), slide=slide.to_numpy(), depth=rng.random(len(slide))
    )
    order = rng.permutation(len(slide))
    for a in (adata, adata[order].copy()):
        with pytest.raises(
            ValueError, match=r"obs\['slide'\] names several overlapping .*library_key='slide'.*allow_overlap=True"
        ):
            sfm.pp.spatial_neighbors(a)
        assert not a.uns
        assert not a.obsp
    sfm.pp.spatial_neighbors(adata, library_key="slide")
    sfm.pp.spatial_neighbors(adata, allow_overlap=True)
    assert adata.uns["spatial_neighbors"]["params"]["allow_overlap"]
    # Each slide alone, and both side by side.
    beside = make(np.vstack([parts[0], parts[1] + np.array([100, 0])]), slide=slide.to_numpy())
    for a in (beside, adata[slide.to_numpy() == slide[0]].copy()):
        sfm.pp.spatial_neighbors(a)


def test_within_what_library_key_names():
    """A column of patients, each with two slides at one place."""
    parts = [cells(500, s) + np.array([100 * (s // 2), 0]) for s in range(4)]
    adata = make(np.vstack(parts), patient=np.repeat(["p", "q"], 1000), slide=np.repeat(list("abcd"), 500))
    with pytest.raises(ValueError, match=r"obs\['slide'\] names"):
        sfm.pp.spatial_neighbors(adata, library_key="patient")


def test_names_of_cells_tell_slides_apart():
    a, b = (make(cells(500, s)) for s in (0, 1))
    adata = ad.concat([a, b], index_unique="-")
    with pytest.raises(ValueError, match=r"the end of obs_names names .*rsplit"):
        sfm.pp.spatial_neighbors(adata)
    adata.obs["slide"] = adata.obs_names.str.rsplit("-", n=1).str[-1]
    sfm.pp.spatial_neighbors(adata, library_key="slide")


def test_images_tell_slides_apart():
    adata = make(
        np.vstack([hexagonal, hexagonal + np.array([500, 0])]), section=np.repeat(["s1", "s2"], len(hexagonal))
    )
    adata.uns["spatial"] = {"s1": {"images": {}}, "s2": {"images": {}}}
    with pytest.raises(ValueError, match=r"obs\['section'\] names.*images"):
        sfm.pp.spatial_neighbors(adata)
    sfm.pp.spatial_neighbors(adata, library_key="section")
    # A section cut out keeps the images of all.
    sfm.pp.spatial_neighbors(adata[adata.obs["section"] == "s1"].copy())


@pytest.mark.parametrize("seed", range(3))
def test_one_slide_is_never_refused(seed):
    """Labels that are random, in patches, rare or avoid themselves; fields of view that overlap; cells at one place."""
    rng = np.random.default_rng(seed)
    slides = {
        "cells": cells(900, seed),
        "square": square,
        "hexagonal": hexagonal,
        "measured": hexagonal + rng.normal(0, 0.05, hexagonal.shape),
        "points": rng.random((900, 2)) * 30,
    }
    for kind, xy in slides.items():
        n = len(xy)
        patches = cKDTree(rng.choice(xy, 12, replace=False)).query(xy)[1] % 4
        labels = {
            "random": rng.integers(0, 4, n),
            "rare": rng.random(n) < 0.1,
            "patches": patches,
            "fold": np.arange(n) % 5,
        }
        if kind != "points":
            # No two of one type within a distance of 2, as in the mosaics of a retina.
            mosaic = np.full(n, 30)
            for i, near in enumerate(cKDTree(xy).query_ball_point(xy, 2)):
                mosaic[i] = min(set(range(30)) - set(mosaic[near]))
            labels["mosaic"] = mosaic
        fov = np.char.add((xy[:, 0] // 10).astype(int).astype(str), (xy[:, 1] // 10).astype(int).astype(str))
        sfm.pp.spatial_neighbors(make(xy, **labels, fov=fov))
        strip = (xy[:, 0] % 10 < 1) & (xy[:, 0] > 10)
        twice = np.vstack([xy, xy[strip] + rng.normal(0, 0.03, (strip.sum(), 2))])
        left = np.char.add(
            (xy[strip, 0] // 10 - 1).astype(int).astype(str), (xy[strip, 1] // 10).astype(int).astype(str)
        )
        sfm.pp.spatial_neighbors(make(twice, fov=np.r_[fov, left]))
        spots = np.repeat(xy[::3], 3, axis=0)
        sfm.pp.spatial_neighbors(make(spots, type=rng.integers(0, 4, len(spots))))


@pytest.mark.parametrize("name", ["codex_mouse_spleen", "her2_breast_tumour", "visium_human_dlpfc"])
def test_real_slides(name):
    try:
        adata = getattr(sfm.datasets, name)()
    except OSError:
        pytest.skip("not downloaded")
    sfm.pp.spatial_neighbors(adata)


def test_real_slides_laid_over_each_other():
    adata = sfm.datasets.merfish_mouse_brain()
    young = (adata.obs["mouse_id"] == "YC1").to_numpy()
    adata.obsm["spatial"][young, 0] -= 700  # the coordinates of the study
    with pytest.raises(ValueError, match=r"obs\['mouse_id'\] names"):
        sfm.pp.spatial_neighbors(adata)
    with pytest.raises(ValueError, match=r"obs\['mouse_id'\] names"):
        sfm.tl.embed(adata)
    for mouse in adata.obs["mouse_id"].unique():
        sfm.pp.spatial_neighbors(adata[adata.obs["mouse_id"] == mouse].copy())


def test_a_graph_of_another_tool_over_both():
    adata = make(np.vstack(KINDS["cells"]), slide=np.repeat(["a", "b"], 600))
    adata.obsm["X"] = np.random.default_rng(0).random((1200, 3))
    joined = sfm.pp.spatial_neighbors(adata, allow_overlap=True, copy=True)
    apart = sfm.pp.spatial_neighbors(adata, library_key="slide", copy=True)
    for a in (joined, apart):
        a.uns["spatial_neighbors"]["params"] = {"coord_type": "generic"}
    with pytest.raises(
        ValueError, match=r"obs\['slide'\] names .* edges of the graph of uns\['spatial_neighbors'\] join them"
    ):
        sfm.tl.domains(joined, 3, use_rep="X")
    sfm.tl.domains(apart, 3, use_rep="X")
