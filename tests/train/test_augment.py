"""Augmentation: batches of rotated slides, and thinned counts."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from spatialfm.engine import read_tissue
from spatialfm.train._augment import Rotator, count_unit, draw_rotation, drop_counts


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_rotated_batch_is_a_batch_of_the_rotated_slide(slide, mirrored):
    adata = slide.copy()
    adata.obs["half"] = np.where(np.arange(adata.n_obs) % 2, "a", "b")
    del adata.uns["spatial_neighbors"], adata.obsp
    angle = 0.7
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ np.diag(
        [-1.0 if mirrored else 1.0, 1]
    )
    tissue = read_tissue(adata, library_key="half")
    cells = np.arange(0, adata.n_obs, 7)
    coords = Rotator(tissue).coords(tissue, cells, rotation)
    rotated = adata.copy()
    rotated.obsm["spatial"] = adata.obsm["spatial"] @ rotation.T * 3 + 100
    expected = np.empty((adata.n_obs, 2))
    read = read_tissue(rotated, library_key="half")
    expected[read.rows] = read.coords
    np.testing.assert_allclose(coords, expected[tissue.rows[cells]], atol=1e-5)
    np.testing.assert_allclose(Rotator(tissue).coords(tissue, cells, np.eye(2)), tissue.coords[cells], atol=1e-5)


def test_rotations_are_orthogonal_and_can_be_switched_off():
    random = np.random.default_rng(0)
    for rotate in (False, True):
        for reflect in (False, True):
            rotations = np.array([draw_rotation(random, rotate=rotate, reflect=reflect) for _ in range(200)])
            np.testing.assert_allclose(
                rotations @ rotations.transpose(0, 2, 1), np.tile(np.eye(2), (200, 1, 1)), atol=1e-12
            )
            mirrored = np.linalg.det(rotations) < 0
            assert 0.4 < mirrored.mean() < 0.6 if reflect else not mirrored.any()
            if not rotate:
                assert set(np.unique(rotations)) <= {-1.0, 0.0, 1.0}
            else:
                assert len(np.unique(rotations[:, 0, 0].round(6))) > 150


@pytest.mark.parametrize("layout", [np.asarray, sp.csr_matrix])
def test_thinning_gives_fewer_whole_counts_of_the_same_mean(slide, layout):
    random = np.random.default_rng(0)
    adata = slide.copy()
    counts = random.poisson(2.0, adata.shape).astype(np.float32)
    counts[:, 0] = 1  # one count in every cell, so that the unit is known
    adata.X = layout(counts)
    tissue = read_tissue(adata)
    unit = count_unit(tissue)
    x = tissue.expression.toarray() if sp.issparse(tissue.expression) else tissue.expression
    kept_counts = counts[tissue.rows][:, adata.var_names.get_indexer(tissue.genes)]
    np.testing.assert_allclose(np.expm1(x) / unit[:, None], kept_counts, atol=1e-2)

    share = 0.3
    thinned = drop_counts(x, unit, share, random)
    after = np.expm1(thinned) * (1 - share) / unit[:, None]
    np.testing.assert_allclose(after, after.round(), atol=1e-2)
    assert (after.round() <= kept_counts).all()
    assert after.sum() / kept_counts.sum() == pytest.approx(1 - share, abs=0.01)
    assert np.expm1(thinned).mean() == pytest.approx(np.expm1(x).mean(), rel=0.01)
    lost = (thinned == 0)[kept_counts == 1].mean()
    assert lost == pytest.approx(share, abs=0.02)
    np.testing.assert_allclose(drop_counts(x, unit, 0.0, random), x, atol=1e-5)


def test_values_that_are_not_counts_lose_entries(slide):
    random = np.random.default_rng(0)
    adata = slide.copy()
    adata.X = random.gamma(2.0, 300.0, adata.shape).astype(np.float32)
    tissue = read_tissue(adata)
    assert tissue.kind == "intensity"
    assert count_unit(tissue) is None
    x = tissue.expression * (random.random(tissue.expression.shape) < 0.8)
    dropped = drop_counts(x, None, 0.25, random)
    np.testing.assert_array_equal(dropped[dropped != 0], x[dropped != 0])
    assert ((dropped == 0) & (x != 0)).sum() / (x != 0).sum() == pytest.approx(0.25, abs=0.02)
