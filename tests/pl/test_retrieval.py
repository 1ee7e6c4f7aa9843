"""pl.retrieval: what is marked is what was retrieved."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import spatialfm as sfm


@pytest.fixture
def adata():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(60, 5))
    obs = pd.DataFrame({"slide": pd.Categorical(np.tile(["a", "b"], 30))}, index=[f"s{i}" for i in range(60)])
    return ad.AnnData(
        np.ones((60, 1), np.float32),
        obs=obs,
        obsm={
            "spatial": rng.uniform(20, [380, 280], size=(60, 2)),
            "X_hibio_image": shared + rng.normal(size=(60, 5)),
            "X_hibio_gene": shared,
        },
    )


def marked(panel, marker):
    """Places of the marks, each drawn white and then in colour."""
    lines = [line for line in panel.lines if line.get_marker() == marker]
    return np.concatenate([np.column_stack(line.get_data()) for line in lines[1::2]]) if lines else np.empty((0, 2))


def test_maps_marks_and_patches(adata):
    image = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    patches = sfm.pp.patches(adata, image, size_px=30, out_px=30)
    sfm.tl.retrieve(adata, adata, n=4)
    names = ["s7", "s3"]
    axes = sfm.pl.retrieval(adata, adata, spots=names, patches=patches)
    per_row = 2 + 1 + 4
    assert len(axes) == 2 * per_row
    xy = pd.DataFrame(adata.obsm["spatial"], index=adata.obs_names)
    table = adata.obsm["retrieved"]
    for k, name in enumerate(names):
        place, patch, tissue, *found = axes[k * per_row : (k + 1) * per_row]
        assert place.get_title() == name
        np.testing.assert_array_equal(marked(place, "o"), xy.loc[[name]])
        np.testing.assert_array_equal(patch.images[0].get_array(), patches[name])
        rings = marked(tissue, "o")
        assert {tuple(p) for p in rings} == {tuple(xy.loc[other]) for other in table.loc[name]}
        np.testing.assert_array_equal(marked(tissue, "x"), xy.loc[[name]])
        assert f"own rank {adata.obs.loc[name, 'retrieved_rank']:.6g} of 60" in tissue.get_title()
        for panel, other in zip(found, table.loc[name], strict=True):
            np.testing.assert_array_equal(panel.images[0].get_array(), patches[other])
        a, b = adata.obsm["X_hibio_image"], adata.obsm["X_hibio_gene"]
        row = adata.obs_names.get_loc(name)
        cosine = b @ a[row] / np.linalg.norm(b, axis=1) / np.linalg.norm(a[row])
        np.testing.assert_allclose(np.sort(tissue.collections[0].get_array()), np.sort(cosine))
    axes[0].figure.canvas.draw()


def test_slides_without_images(adata):
    query = adata[::3].copy()
    del query.obs["slide"]
    sfm.tl.retrieve(query, adata, "gene->image", n=5)
    axes = sfm.pl.retrieval(query, adata, n_spots=2, library_key="slide")
    assert len(axes) == 2 * 3
    assert [a.get_title() for a in axes[1:3]] == ["a", "b"]
    assert len(marked(axes[1], "o")) + len(marked(axes[2], "o")) == 5
    assert len(marked(axes[1], "x")) == 0
    with pytest.raises(KeyError, match="library_key='batch'"):
        sfm.pl.retrieval(query, adata, library_key="batch")


def test_image_of_uns(adata):
    image = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    adata.uns["spatial"] = {
        "x": {"images": {"hires": image}, "scalefactors": {"tissue_hires_scalef": 1.0, "microns_per_pixel": 4.0}}
    }
    sfm.tl.retrieve(adata, adata, n=2)
    assert len(sfm.pl.retrieval(adata, adata, n_spots=1)) == 5
    adata.uns["spatial"]["x"]["images"] = {}
    with pytest.warns(UserWarning, match="drawn without the image"):
        assert len(sfm.pl.retrieval(adata, adata, n_spots=1)) == 2


def test_errors(adata):
    with pytest.raises(KeyError, match=r"sfm\.tl\.retrieve\(adata, reference\) first"):
        sfm.pl.retrieval(adata, adata)
    sfm.tl.retrieve(adata, adata)
    with pytest.raises(KeyError, match=r"spots=\['nobody'\] are not in adata.obs_names"):
        sfm.pl.retrieval(adata, adata, spots=["s1", "nobody"])
    with pytest.raises(ValueError, match="of the spots retrieved are not in reference"):
        sfm.pl.retrieval(adata, adata[:5].copy())
    with pytest.raises(ValueError, match="n_spots must be a positive integer"):
        sfm.pl.retrieval(adata, adata, n_spots=0)
    patches = sfm.pp.patches(adata[:3], np.zeros((300, 400, 3), np.uint8), size_px=30, scale=1.0)
    with pytest.raises(KeyError, match="patches= holds no patch of"):
        sfm.pl.retrieval(adata, adata, patches=patches, n_spots=4)
