"""Embedding of spots by the encoder of HiBio."""

from __future__ import annotations

from dataclasses import replace

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch

from spatialfm.engine import HiBioEncoder
from spatialfm.engine._hibio import find_regions, read_spots, sparse_tensor
from spatialfm.models import HiBio, HiBioConfig
from spatialfm.models._propagate import transition_tensor
from spatialfm.pp._regions import nested_partitions

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


def test_regions_are_found_in_each_slide(spots):
    """Each slide is divided by nested_partitions, using the mean of the niche."""
    config = HiBioConfig(**SHAPE)
    components = torch.randn(220, 4, generator=torch.Generator().manual_seed(0))
    transition = transition_tensor(spots.graph, CPU)
    fine, coarse = find_regions(components, transition, spots, config)
    # 0.07 sqrt(110) steps, at least one.
    niche = (components.numpy() + transition.to_dense().numpy() @ components.numpy()) / 2
    root = 110**0.5
    for k in range(2):
        rows = np.flatnonzero(spots.slide == k)
        sizes = [0.22 * root, 0.92 * root]
        expected = nested_partitions(niche[rows].astype(np.float64), spots.graph[rows][:, rows].astype(float), sizes)
        for level, (found, part) in enumerate(zip((fine, coarse), expected, strict=True)):
            assert len({*zip(found[rows], part, strict=True)}) == part.max() + 1 == len(set(found[rows]))
            assert abs(len(rows) / (part.max() + 1) - sizes[level]) < sizes[level] / 2
    for level in (fine, coarse):
        assert level.dtype == np.int64
        assert set(level) == set(range(level.max() + 1))
        assert not set(level[spots.slide == 0]) & set(level[spots.slide == 1])


def encode(model, spots, gene_sets=None, device=CPU):
    return HiBioEncoder(model, gene_sets=gene_sets).fit_encode(spots, device=device)[1]


def similarities(found, name):
    return [found.tables["regions"][f"{name}_{k + 1}"] for k in range(len(found.regions))]


def test_all_modalities(adata, spots):
    model = make(adata)
    sets = {f"set {k}": list(adata.var_names[k : k + 5]) for k in (0, 5, 10)}
    both = encode(model, spots, sets)
    assert both.blocks["fused"].shape == (220, 5)
    assert list(both.blocks) == ["fused", "gene", "image"]
    assert both.facts["modalities"] == ["gene", "image"]
    membership = torch.zeros(3, 40)
    for k in range(3):
        membership[k, 5 * k : 5 * k + 5] = 1
    directions = model.anchors(membership).detach().numpy()
    for name, table in (("gene", "anchors"), ("image", "anchors_image")):
        z, anchors = both.blocks[name], both.tables[table]
        assert z.shape == (220, 6)
        assert z.dtype == anchors["set 0"].dtype == both.tables["regions"][f"{name}_1"].dtype == np.float32
        assert list(anchors) == list(sets)
        np.testing.assert_allclose(np.stack(list(anchors.values()), 1), z @ directions.T, atol=1e-5)
    assert len(both.tables["regions"]) == 4
    assert len(set(both.regions[0])) < len(set(both.regions[1]))  # coarse first
    none = encode(model, spots)
    assert list(none.tables) == ["regions"]
    np.testing.assert_array_equal(none.blocks["fused"], both.blocks["fused"])

    genes = encode(model, replace(spots, image=None), sets)
    assert list(genes.blocks) == ["fused", "gene"]
    np.testing.assert_array_equal(genes.blocks["gene"], both.blocks["gene"])
    for mine, theirs in zip(genes.regions, both.regions, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    image = encode(model, replace(spots, genes=[], symbols=[]), sets)
    assert list(image.blocks) == ["fused", "image"]
    assert list(image.tables) == ["anchors", "regions"]
    np.testing.assert_array_equal(image.blocks["image"], both.blocks["image"])
    for found in (genes, image):
        (name,) = found.facts["modalities"]
        z = found.blocks[name]
        for region, similarity in zip(found.regions, similarities(found, name), strict=True):
            pooled = model.pool(torch.from_numpy(z), torch.from_numpy(region), image=name == "image").detach().numpy()
            pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
            np.testing.assert_allclose(similarity, (z * pooled[region]).sum(1), atol=1e-5)


@pytest.mark.parametrize("what", ["both", "genes", "image"])
def test_encode_on_the_axes_of_a_fit_is_fit_encode(adata, spots, what):
    spots = {
        "both": spots, "genes": replace(spots, image=None), "image": replace(spots, genes=[], symbols=[])
    }[what]  # fmt: skip
    encoder = HiBioEncoder(make(adata), gene_sets=None)
    state, expected = encoder.fit_encode(spots, device=CPU)
    found = encoder.encode(spots, state, device=CPU)
    for name, block in expected.blocks.items():
        np.testing.assert_allclose(found.blocks[name], block, atol=1e-4)


def test_a_state_of_other_features_or_modalities_is_refused(adata, spots):
    encoder = HiBioEncoder(make(adata), gene_sets=None)
    state = encoder.fit(spots, device=CPU)
    with pytest.raises(ValueError, match="no expression"):
        encoder.encode(replace(spots, genes=[], symbols=[]), state, device=CPU)
    lost = state.features[0]
    genes = ["another" if name == lost else name for name in spots.genes]
    with pytest.raises(ValueError, match=f"not measured.*{lost}"):
        encoder.encode(replace(spots, genes=genes), state, device=CPU)


def test_patches_are_weighted_by_the_config(adata, spots):
    alone = encode(make(adata), replace(spots, image=None)).blocks["fused"]
    np.testing.assert_allclose(encode(make(adata, image_weight=0.0), spots).blocks["fused"], alone, atol=1e-3)


@pytest.mark.parametrize("scales", [(0.5,), (0.2, 0.6, 1.5)])
def test_any_number_of_levels(adata, spots, scales):
    found = encode(make(adata, region_scales=scales), spots)
    sizes = [len(set(region)) for region in found.regions]
    assert len(sizes) == len(scales)
    assert sizes == sorted(sizes)


def test_the_model_is_not_changed(adata, spots):
    model = make(adata).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    # MPS has no sparse matrices, so the CPU is used instead.
    encode(model, spots, device=torch.device("mps"))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
