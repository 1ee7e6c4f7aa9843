"""tl.image_features: the tower's own features, stain by a naive reference, patches given or cut, errors."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from torch import nn

import spatialfm as sfm
from spatialfm.engine import compute_image_features
from spatialfm.engine._images import stain

H, W = 300, 400
N = 20
D = 6  # features of the small tower
rng = np.random.default_rng(0)
IMAGE = np.asarray(PIL.Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((W, H)))


@pytest.fixture
def adata():
    xy = np.random.default_rng(1).integers(20, [W - 20, H - 20], size=(N, 2)).astype(float)
    return ad.AnnData(
        np.ones((N, 1), np.float32), obs=pd.DataFrame(index=[f"s{i}" for i in range(N)]), obsm={"spatial": xy}
    )


@pytest.fixture
def visium(adata):
    """The same with the image in uns; 112 µm are 44.8 pixels."""
    factors = {"tissue_hires_scalef": 1.0, "microns_per_pixel": 2.5}
    adata.uns["spatial"] = {"lib": {"images": {"hires": IMAGE}, "scalefactors": factors}}
    return adata


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, D, 8, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return sfm.models.ImageTower(network, name="small", size=32, mean=[0.5] * 3, std=[0.25] * 3)


def naive(patch):
    """The ten statistics of one patch in float64, as documented."""
    density = -np.log((patch.astype(float) + 1) / 256)
    grey = density.mean(axis=2)
    height, width = grey.shape
    steps = [abs(grey[y + 1, x] - grey[y, x]) for y in range(height - 1) for x in range(width)]
    return [
        *(density[..., c].mean() for c in range(3)),
        *(density[..., c].std() for c in range(3)),
        sum(steps) / len(steps),
        *(np.quantile(grey, q) for q in (0.1, 0.5, 0.9)),
    ]


def test_stain():
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (3, 13, 17, 3), dtype=np.uint8)
    stripes = np.zeros((1, 13, 17, 3), np.uint8)
    stripes[:, ::2] = 255
    flat = np.full((1, 13, 17, 3), 255, np.uint8)
    batch = np.concatenate([noise, stripes, stripes.copy() // 2 + noise[:1] // 3, flat])
    found = stain(batch)
    assert (found.shape, found.dtype) == ((6, 10), np.float32)
    np.testing.assert_allclose(found, [naive(p) for p in batch], rtol=2e-6, atol=1e-6)
    assert found[3, 6] == pytest.approx(np.log(256))  # rows alternate between black and white
    assert not found[-1].any()  # white has no density
    sideways = stain(stripes.transpose(0, 2, 1, 3))
    assert sideways[0, 6] == 0
    np.testing.assert_array_equal(stain(batch[:, ::-1, ::-1])[:, 7:], found[:, 7:])


def test_what_is_written(visium, tower):
    before = visium.copy()
    assert sfm.tl.image_features(visium, tower=tower, batch_size=3) is None
    patches = sfm.pp.patches(visium)[:]
    found = visium.obsm["image_features"]
    assert (found.shape, found.dtype) == ((N, D + 10), np.float32)
    np.testing.assert_allclose(found[:, :D], tower.encode(patches), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[:, D:], stain(patches))
    facts = visium.uns["image_features"]
    assert facts["tower"] == "small"
    assert facts["tower_sha256"] == sfm.models.fingerprint(tower.network)
    assert facts["columns"] == {"tower": [0, D], "stain": [D, D + 10]}
    assert facts["n_blank"] == 0
    assert facts["params"]["size_um"] == [pytest.approx(112)]
    assert facts["params"]["size_px"] == [pytest.approx(44.8)]
    assert facts["params"]["out_px"] == 224
    np.testing.assert_array_equal(visium.X, before.X)
    assert list(visium.obsm) == ["spatial", "image_features"]
    assert list(visium.uns) == ["spatial", "image_features", "spatialfm"]
    features, again = compute_image_features(before, tower=tower, batch_size=3)
    np.testing.assert_array_equal(features, found)
    assert again == facts
    assert list(before.obsm) == ["spatial"]


def test_built_in_tower(visium):
    few = visium[:3].copy()
    sfm.tl.image_features(few, device="cpu")
    tower = sfm.models.load_tower()
    expected = tower.encode(sfm.pp.patches(few)[:])
    np.testing.assert_allclose(few.obsm["image_features"][:, :1280], expected, rtol=1e-3, atol=1e-4)
    assert few.uns["image_features"]["columns"] == {"tower": [0, 1280], "stain": [1280, 1290]}
    assert few.uns["image_features"]["tower_sha256"] == sfm.models.fingerprint(tower.network)


@pytest.mark.parametrize("batch_size", [1, 7, 100, None])
def test_batches_and_rows_do_not_matter(adata, tower, batch_size):
    patches = sfm.pp.patches(adata, IMAGE, size_px=30, out_px=32)
    sfm.tl.image_features(adata, patches, tower=tower, batch_size=4)
    order = np.random.default_rng(2).permutation(N)
    other = adata[order].copy()
    shuffled = sfm.pp.patches(other, IMAGE, size_px=30, out_px=32)
    sfm.tl.image_features(other, shuffled, tower=tower, batch_size=batch_size, key_added="again")
    one, two = adata.obsm["image_features"][order], other.obsm["again"]
    np.testing.assert_allclose(one[:, :D], two[:, :D], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(one[:, D:], two[:, D:])


def test_patches_or_image(visium, tower, tmp_path):
    stored = sfm.pp.patches(visium, out=tmp_path / "p.zarr", size_um=80)
    path = tmp_path / "image.png"
    PIL.Image.fromarray(IMAGE).save(path)
    results = [
        compute_image_features(visium, image, tower=tower, size_um=size)[0]
        for image, size in ((None, 80), ("hires", 80), (IMAGE, 80), (path, 80), (stored, None))
    ]
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


def test_each_batch_is_decoded_once(adata, tower, monkeypatch):
    from spatialfm.pp import _patches

    centers = []
    cut = _patches.cut
    monkeypatch.setattr(
        _patches, "cut", lambda image, center, *args: centers.append(center) or cut(image, center, *args)
    )
    patches = sfm.pp.patches(adata, IMAGE, size_px=30, out_px=32)
    sfm.tl.image_features(adata, patches, tower=tower, batch_size=6)
    assert patches.blank.sum() == 0
    assert len(centers) == N


def test_blank_patches_are_named(adata, tower, messages):
    image = IMAGE.copy()
    image[:, : W // 2] = 240
    adata.obsm["spatial"][:, 0] = np.where(np.arange(N) % 4 == 0, 50, 350)
    sfm.tl.image_features(adata, sfm.pp.patches(adata, image, size_px=30), tower=tower)
    assert any("5 of 20 patches are blank (glass or background), such as ['s0', 's4'," in line for line in messages())
    assert adata.uns["image_features"]["n_blank"] == 5
    assert (adata.obsm["image_features"][::4, D + 3 : D + 7] < 1e-6).all()


@pytest.fixture
def slides(adata):
    adata.obs["slide"] = pd.Categorical(np.where(np.arange(N) % 3 == 0, "a", "b"))
    images = {"a": IMAGE, "b": IMAGE[::-1].copy()}
    return adata, sfm.pp.patches(adata, images, size_px=30, out_px=32, library_key="slide")


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_round_trip(slides, tower, tmp_path, suffix):
    adata, patches = slides
    sfm.tl.image_features(adata, patches, tower=tower, library_key="slide")
    path = tmp_path / f"a.{suffix}"
    getattr(adata, f"write_{suffix}")(path)
    back = getattr(ad, f"read_{suffix}")(path)
    np.testing.assert_array_equal(back.obsm["image_features"], adata.obsm["image_features"])
    one, two = adata.uns["image_features"], back.uns["image_features"]
    assert list(two["columns"]["stain"]) == one["columns"]["stain"]
    assert two["tower_sha256"] == one["tower_sha256"]
    assert list(two["params"]["slides"]) == ["a", "b"]
    assert list(two["params"]["size_px"]) == [30, 30]
    assert "size_um" not in two["params"]


def test_copies_and_views(visium, tower):
    copied = sfm.tl.image_features(visium, tower=tower, copy=True)
    assert list(visium.obsm) == ["spatial"]
    view = visium[5:9]
    sfm.tl.image_features(view, tower=tower)
    np.testing.assert_allclose(view.obsm["image_features"], copied.obsm["image_features"][5:9], rtol=1e-5, atol=1e-6)
    assert list(visium.obsm) == ["spatial"]


def test_patches_of_other_spots(slides, tower):
    adata, patches = slides

    def run(adata, **kwargs):
        sfm.tl.image_features(adata, patches, tower=tower, **kwargs)

    with pytest.raises(
        ValueError, match=r"size_um=112, but the patches already have a size \(TissuePatches of 20 spots"
    ):
        run(adata, size_um=112)
    with pytest.raises(
        ValueError, match=r"image holds 20 patches and adata 10 spots; cut them again with sfm.pp.patch"
    ):
        run(adata[:10].copy())
    with pytest.raises(ValueError, match="in another order: row 0 is 's0' in the patches and 's19' in adata"):
        run(adata[::-1].copy())
    adata.obs["other"] = pd.Categorical(np.where(np.arange(N) % 3 == 1, "a", "b"))
    with pytest.raises(ValueError, match=r"slides of the patches, \['a', 'b'\], differ from library_key='other'"):
        run(adata, library_key="other")
    with pytest.raises(ValueError, match="a patch of one pixel has no texture"):
        sfm.tl.image_features(adata, sfm.pp.patches(adata, IMAGE, size_px=30, out_px=1), tower=tower)
    assert list(adata.obsm) == ["spatial"]
    adata.obsm["spatial"] = adata.obsm["spatial"] + 3
    with pytest.warns(
        UserWarning, match="the patches were not cut at basis='spatial'. That is expected for patches of a Spatial"
    ):
        run(adata)


def test_errors_name_the_fix(adata, tower, tmp_path):
    with pytest.raises(KeyError, match=r"there is no image with its scale factor: .* Pass image="):
        sfm.tl.image_features(adata, tower=tower)
    with pytest.raises(
        ValueError, match=r"spot_distance_um= .* These are arguments of sfm\.pp\.patches: .* image=sfm\.pp\.patches\("
    ):
        sfm.tl.image_features(adata, IMAGE, tower=tower)
    with pytest.raises(ValueError, match=r"size_um must be a positive number, got 0$"):
        sfm.tl.image_features(adata, IMAGE, tower=tower, size_um=0)
    with pytest.raises(FileNotFoundError, match="there is no image file"):
        sfm.tl.image_features(adata, tmp_path / "none.png", tower=tower)
    patches = sfm.pp.patches(adata, IMAGE, size_px=30, out_px=32)
    with pytest.raises(FileNotFoundError, match="no image tower 'nonsense'"):
        sfm.tl.image_features(adata, patches, tower="nonsense")
    with pytest.raises(ValueError, match="batch_size must be a positive integer, got 0"):
        sfm.tl.image_features(adata, patches, tower=tower, batch_size=0)
    with pytest.raises(ValueError, match="dtype='float16'"):
        sfm.tl.image_features(adata, patches, tower=tower, dtype="float16")
    endless = sfm.models.ImageTower(
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2)), name="endless", size=32, mean=[0.5] * 3, std=[0.25] * 3
    )
    nn.init.constant_(endless.network[1].bias, float("nan"))
    with pytest.raises(ValueError, match="the features by 'endless' are not finite for 20 of 20 patches"):
        sfm.tl.image_features(adata, patches, tower=endless)
    assert list(adata.obsm) == ["spatial"]
    assert list(adata.uns) == []
