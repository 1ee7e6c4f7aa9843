"""A pass of HiBio over spots."""

from __future__ import annotations

from dataclasses import replace

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch

from spatialfm.engine import encode_spots, find_regions, walk_tensor
from spatialfm.engine._spots import sparse_tensor
from spatialfm.models import HiBio, HiBioConfig
from spatialfm.pp._regions import nested_partitions
from spatialfm.pp._spots import read_spots

CPU = torch.device("cpu")
SHAPE = {"n_features": 40, "width": 6, "n_components": 8, "radii": (0.0, 2.0), "columns": 5}


@pytest.fixture(scope="module")
def adata(make_spots):
    return ad.concat([make_spots(0, 130, "a"), make_spots(1, 90, "b")])


@pytest.fixture(scope="module")
def spots(adata):
    return read_spots(adata, image=adata.obsm["image_features"], library_key="slide")


def make(adata, **changes):
    model = HiBio(HiBioConfig(**{**SHAPE, "genes": tuple(adata.var_names[:40]), **changes}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(torch.randn(value.shape, generator=generator))
    return model


def test_sparse_tensor():
    x = sp.random(7, 5, 0.4, format="csr", random_state=0, dtype=np.float64)
    for form in (x, x.tocsc(), x[:, :0].tocsr(), sp.csr_matrix((7, 5))):
        found = sparse_tensor(form, CPU)
        assert found.dtype == torch.float32
        np.testing.assert_array_equal(found.to_dense().numpy(), form.toarray().astype(np.float32))


def test_regions_are_of_each_slide(spots):
    """Each slide is divided as nested_partitions divides it, of what is heard within the niche."""
    config = HiBioConfig(**SHAPE)
    components = torch.randn(220, 4, generator=torch.Generator().manual_seed(0))
    walk = walk_tensor(spots.graph, CPU)
    fine, coarse = find_regions(components, walk, spots, config)
    heard = (
        components.numpy() + walk.to_dense().numpy() @ components.numpy()
    ) / 2  # 0.07 root(110) steps, at least one
    root = 110**0.5
    for k in range(2):
        rows = np.flatnonzero(spots.slide == k)
        sizes = [0.22 * root, 0.92 * root]
        expected = nested_partitions(heard[rows].astype(np.float64), spots.graph[rows][:, rows].astype(float), sizes)
        for level, (found, part) in enumerate(zip((fine, coarse), expected, strict=True)):
            assert len({*zip(found[rows], part, strict=True)}) == part.max() + 1 == len(set(found[rows]))
            assert abs(len(rows) / (part.max() + 1) - sizes[level]) < sizes[level] / 2
    for level in (fine, coarse):
        assert level.dtype == np.int64
        assert set(level) == set(range(level.max() + 1))
        assert not set(level[spots.slide == 0]) & set(level[spots.slide == 1])


def test_all_modalities(adata, spots):
    model = make(adata)
    anchors = sp.csr_matrix(np.eye(40, dtype=np.float32)[:3])
    both = encode_spots(model, spots, anchors=anchors, device=CPU)
    assert both.fused.shape == (220, 5)
    assert list(both.space) == list(both.anchors) == list(both.region_similarity) == ["gene", "image"]
    for name, z in both.space.items():
        assert z.shape == (220, 6)
        assert z.dtype == both.anchors[name].dtype == both.region_similarity[name][0].dtype == np.float32
        directions = model.anchors(torch.eye(40)[:3]).detach().numpy()
        np.testing.assert_allclose(both.anchors[name], z @ directions.T, atol=1e-5)
        assert len(both.region_similarity[name]) == 2
    assert len(set(both.regions[0])) < len(set(both.regions[1]))  # coarse first
    none = encode_spots(model, spots, anchors=None, device=CPU)
    assert none.anchors == {}
    np.testing.assert_array_equal(none.fused, both.fused)

    genes = encode_spots(model, replace(spots, image=None), anchors=anchors, device=CPU)
    assert list(genes.space) == ["gene"]
    np.testing.assert_array_equal(genes.space["gene"], both.space["gene"])
    for mine, theirs in zip(genes.regions, both.regions, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    image = encode_spots(model, replace(spots, genes=[], symbols=[]), anchors=anchors, device=CPU)
    assert list(image.space) == ["image"]
    np.testing.assert_array_equal(image.space["image"], both.space["image"])
    for found in (genes, image):
        (z,) = found.space.values()
        (similarities,) = found.region_similarity.values()
        (name,) = found.space
        for region, similarity in zip(found.regions, similarities, strict=True):
            pooled = model.pool(torch.from_numpy(z), torch.from_numpy(region), image=name == "image").detach().numpy()
            pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
            np.testing.assert_allclose(similarity, (z * pooled[region]).sum(1), atol=1e-5)


def test_the_patches_count_as_much_as_the_model_says(adata, spots):
    alone = encode_spots(make(adata), replace(spots, image=None), anchors=None, device=CPU)
    model = make(adata, image_weight=0.0)
    np.testing.assert_allclose(encode_spots(model, spots, anchors=None, device=CPU).fused, alone.fused, atol=1e-3)


@pytest.mark.parametrize("scales", [(0.5,), (0.2, 0.6, 1.5)])
def test_any_number_of_levels(adata, spots, scales):
    found = encode_spots(make(adata, region_scales=scales), spots, anchors=None, device=CPU)
    sizes = [len(set(region)) for region in found.regions]
    assert len(sizes) == len(scales)
    assert sizes == sorted(sizes)


def test_the_model_is_left_as_it_was(adata, spots):
    model = make(adata).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    # MPS has no sparse matrices: nothing is asked of it.
    encode_spots(model, spots, anchors=None, device=torch.device("mps"))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
