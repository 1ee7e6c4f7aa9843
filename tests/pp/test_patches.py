"""pp.patches: windows by plain slicing, files as arrays, stores, checks."""

from __future__ import annotations

import tracemalloc

import anndata as ad
import numpy as np
import pandas as pd
import PIL.Image
import pytest
import tifffile

import spatialfm as sfm
from spatialfm._data._images import open_image, to_rgb
from spatialfm.pp._patches import cut

H, W = 300, 400


def coded(height=H, width=W):
    """Every pixel says where it is: column and row modulo 256, and which 256 they belong to."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x % 256, y % 256, x // 256 * 16 + y // 256], axis=2).astype(np.uint8)


def smooth(height=H, width=W):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 200 / width, y * 200 / height, 100 + 50 * np.sin(x / 30)], axis=2).astype(np.uint8)


def spots(xy, **kwargs):
    xy = np.asarray(xy, dtype=float)
    index = [f"s{i}" for i in range(len(xy))]
    return ad.AnnData(np.ones((len(xy), 1), np.float32), obs=pd.DataFrame(index=index), obsm={"spatial": xy}, **kwargs)


@pytest.fixture
def adata():
    rng = np.random.default_rng(0)
    return spots(rng.integers(20, [W - 20, H - 20], size=(50, 2)))


def visium(pitch=40.0, scale=0.5, **factors):
    """A hexagonal array in full-resolution pixels, with an image of ``scale`` in uns."""
    rows, columns = np.mgrid[:14, :9]
    xy = np.c_[(columns * pitch + rows % 2 * pitch / 2).ravel(), rows.ravel() * pitch * 3**0.5 / 2] + 40
    image = smooth(int(560 * scale), int(440 * scale))
    factors = {"tissue_hires_scalef": scale, "spot_diameter_fullres": 0.65 * pitch, **factors}
    return spots(xy, uns={"spatial": {"lib": {"images": {"hires": image}, "scalefactors": factors}}})


def sliced(image, xy, size):
    h = size // 2
    return np.stack([image[y - h : y + h, x - h : x + h] for x, y in xy.astype(int)])


def test_windows_are_slices(adata):
    patches = sfm.pp.patches(adata, coded(), size_px=32, out_px=32)
    expected = sliced(coded(), adata.obsm["spatial"], 32)
    np.testing.assert_array_equal(patches[:], expected)
    np.testing.assert_array_equal(np.concatenate(list(patches.batches(7))), expected)
    np.testing.assert_array_equal(np.stack(list(patches)), expected)
    np.testing.assert_array_equal(patches["s3"], expected[3])
    np.testing.assert_array_equal(patches[-1], expected[-1])
    np.testing.assert_array_equal(patches[[4, 2, 2]], expected[[4, 2, 2]])
    np.testing.assert_array_equal(patches[np.arange(50) % 2 == 0], expected[::2])
    assert patches[:0].shape == (0, 32, 32, 3)
    assert len(patches) == 50
    assert patches[0].dtype == np.uint8
    with pytest.raises(KeyError, match="nobody"):
        patches["nobody"]
    with pytest.raises(IndexError):
        patches[50]


def test_nothing_is_written_and_rows_do_not_matter(adata):
    before = adata.copy()
    order = np.random.default_rng(1).permutation(50)
    one = sfm.pp.patches(adata, smooth(), size_px=37.5, out_px=24)[:]
    other = sfm.pp.patches(adata[order], smooth(), size_px=37.5, out_px=24)[:]
    np.testing.assert_array_equal(one[order], other)
    assert list(adata.obs) == list(before.obs)
    assert list(adata.uns) == []
    np.testing.assert_array_equal(adata.obsm["spatial"], before.obsm["spatial"])


def test_resampled_as_the_whole_image():
    """The window read is wide enough: the same as Pillow's resize from the whole image."""
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8))
    for side, out_px in ((90.3, 32), (20.7, 32), (32.5, 32)):
        box = (200.4 - side / 2, 150.2 - side / 2, 200.4 + side / 2, 150.2 + side / 2)
        expected = image.resize((out_px, out_px), PIL.Image.Resampling.BICUBIC, box=box)
        found = cut(open_image(np.asarray(image)), np.array([200.4, 150.2]), side, out_px)
        assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 1


def test_scale_does_not_matter(adata):
    """Half the image with coordinates of the whole shows the same tissue."""
    half = np.asarray(PIL.Image.fromarray(smooth()).resize((W // 2, H // 2), PIL.Image.Resampling.BOX))
    one = sfm.pp.patches(adata, smooth(), size_px=32, out_px=16)[:]
    other = sfm.pp.patches(adata, half, size_px=32, out_px=16, scale=0.5)[:]
    assert np.abs(one.astype(int) - other).max() <= 3


def test_mirrored_at_the_border():
    image = coded(40, 60)
    patches = sfm.pp.patches(spots([[0, 0], [60, 40], [30, 20]]), image, size_px=100, out_px=100)[:]
    padded = np.pad(image, ((200, 200), (200, 200), (0, 0)), mode="symmetric")
    for patch, (x, y) in zip(patches, [(0, 0), (60, 40), (30, 20)], strict=True):
        np.testing.assert_array_equal(patch, padded[150 + y : 250 + y, 150 + x : 250 + x])


def write(path, image, **options):
    if path.suffix == ".tif":
        tifffile.imwrite(path, image, photometric="rgb", **options)
    else:
        PIL.Image.fromarray(image).save(path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {}),
        ("a.tif", {"tile": (64, 48)}),
        ("a.tif", {"tile": (64, 64), "compression": "zlib"}),
        ("a.tif", {"rowsperstrip": 17, "compression": "zlib"}),
        ("a.tif", {"bigtiff": True, "byteorder": ">"}),
        ("a.tif", {"planar": True, "tile": (64, 64)}),
    ],
)
def test_files_equal_arrays(adata, tmp_path, name, options):
    planar = options.pop("planar", False)
    image = coded().transpose(2, 0, 1) if planar else coded()
    path = write(tmp_path / name, image, **(options | ({"planarconfig": "separate"} if planar else {})))
    for source in (path, str(path)):
        found = sfm.pp.patches(adata, source, size_px=32, out_px=32)[:]
        np.testing.assert_array_equal(found, sliced(coded(), adata.obsm["spatial"], 32))
    np.testing.assert_array_equal(
        open_image(path).read(0, -10, H + 10, -7, W), open_image(coded()).read(0, -10, H + 10, -7, W)
    )


def test_ome_tiff_of_one_page_a_channel(adata, tmp_path):
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(
        path, coded().transpose(2, 0, 1), photometric="minisblack", metadata={"axes": "CYX"}, tile=(64, 64)
    )
    found = sfm.pp.patches(adata, path, size_px=32, out_px=32)[:]
    np.testing.assert_array_equal(found, sliced(coded(), adata.obsm["spatial"], 32))


def test_jpeg(adata, tmp_path):
    found = sfm.pp.patches(adata, write(tmp_path / "a.jpg", smooth(), quality=98), size_px=32, out_px=32)[:]
    assert np.abs(found.astype(int) - sliced(smooth(), adata.obsm["spatial"], 32)).mean() < 2


def test_jpeg_in_tiff(adata, tmp_path):
    """As slide scanners write it: tiles that share their JPEG tables, edges of the image within a tile."""
    pytest.importorskip("imagecodecs")
    path = write(tmp_path / "a.tif", smooth(), tile=(64, 64), compression="jpeg", compressionargs={"level": 98})
    found = sfm.pp.patches(adata, path, size_px=32, out_px=32)[:]
    assert np.abs(found.astype(int) - sliced(smooth(), adata.obsm["spatial"], 32)).mean() < 2


@pytest.fixture
def pyramid(tmp_path):
    """Levels of one, a half and a quarter, each with a colour of its own in the blue channel."""
    path = tmp_path / "pyramid.ome.tif"
    with tifffile.TiffWriter(path) as file:
        for k in range(3):
            image = smooth(H * 4 // 2**k, W * 4 // 2**k)
            image[..., 2] = 60 * k
            options = {"photometric": "rgb", "tile": (64, 64), "compression": "zlib"}
            file.write(
                image, **options, **({"subifds": 2, "metadata": {"axes": "YXS"}} if k == 0 else {"subfiletype": 1})
            )
    return path


def test_pyramid_takes_the_coarsest_level_that_is_fine_enough(adata, pyramid):
    adata.obsm["spatial"] *= 4.0
    for size, level in ((32, 0), (60, 0), (64, 1), (100, 1), (128, 2), (400, 2)):
        found = sfm.pp.patches(adata, pyramid, size_px=size, out_px=32)[:]
        assert np.unique(found[..., 2]).tolist() == [60 * level]
        reference = sfm.pp.patches(adata, smooth(4 * H, 4 * W), size_px=size, out_px=32)[:]
        assert np.abs(found.astype(int) - reference)[..., :2].max() <= 3


def test_tiles_are_read_by_window(pyramid):
    """Only the tiles under the window are decoded, each once while it is kept, and few are kept."""
    image = open_image(pyramid)
    image.read(0, 70, 130, 65, 127)
    assert sorted(image._cache.tiles) == [(0, 0, 1 * 25 + 1), (0, 0, 2 * 25 + 1)]
    image._cache.limit = 5 * 64 * 64 * 3
    image.read(0, 0, 4 * H, 0, 4 * W)
    assert len(image._cache.tiles) == 5
    assert image._cache.bytes == sum(part.nbytes for part in image._cache.tiles.values())
    assert image.overview(100).shape == (75, 100, 3)


def test_modes_of_pixels(tmp_path):
    rgb = coded(20, 30)
    grey = rgb[..., 0]
    alpha = np.full((20, 30), 255, np.uint8)
    alpha[:10] = 0
    laid = rgb.copy()
    laid[:10] = 255
    np.testing.assert_array_equal(to_rgb(np.dstack([rgb, alpha])), laid)
    np.testing.assert_array_equal(to_rgb(grey), np.dstack([grey] * 3))
    np.testing.assert_array_equal(to_rgb(rgb.astype(np.uint16) * 257), rgb)
    np.testing.assert_array_equal(to_rgb((rgb.astype(np.uint16) * 257).astype(">u2")), rgb)
    np.testing.assert_array_equal(to_rgb(rgb / np.float32(255)), rgb)
    np.testing.assert_array_equal(to_rgb(grey > 9)[..., 1], (grey > 9) * 255)
    for bad in (rgb.astype(float), rgb.astype(int), rgb / 255 * np.nan):
        with pytest.raises(ValueError, match="it must be uint8, uint16, bool or float from 0 to 1"):
            to_rgb(bad)
    for mode, expected in (("RGBA", rgb), ("L", None), ("P", None), ("1", None), ("LA", None), ("CMYK", None)):
        path = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        image = PIL.Image.fromarray(rgb).convert(mode)
        if mode == "CMYK":
            path = path.with_suffix(".jpg")
        image.save(path)
        read = open_image(path).read(0, 0, 20, 0, 30)
        assert (read.shape, read.dtype) == ((20, 30, 3), np.uint8)
        if mode != "CMYK":
            np.testing.assert_array_equal(read, rgb if expected is not None else np.asarray(image.convert("RGB")))
    PIL.Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    np.testing.assert_array_equal(open_image(tmp_path / "16.png").read(0, 0, 20, 0, 30)[..., 0], grey)


def test_image_in_uns(messages):
    adata = visium()
    patches = sfm.pp.patches(adata, size_um=100, out_px=20)
    assert "2.5 µm/px from Visium's 100 µm between spots" in messages()[-1]
    assert patches.windows == [pytest.approx(40)]
    assert patches.um_per_px == [pytest.approx(5)]
    centers = adata.obsm["spatial"] / 2
    left_top = np.floor(centers - 10 + 0.5).astype(int)
    image = adata.uns["spatial"]["lib"]["images"]["hires"]
    padded = np.pad(image, ((20, 20), (20, 20), (0, 0)), mode="symmetric")
    for patch, (x, y) in zip(patches, left_top, strict=True):
        np.testing.assert_array_equal(patch, padded[y + 20 : y + 40, x + 20 : x + 40])
    np.testing.assert_array_equal(sfm.pp.patches(adata, "hires", size_um=100, out_px=20)[:], patches[:])


def test_micrometres():
    def um(adata, **kwargs):
        (value,) = sfm.pp.patches(adata, size_um=50, out_px=10, **kwargs).windows
        return 50 / value

    assert um(visium()) == pytest.approx(2.5)
    assert um(visium(microns_per_pixel=2.2)) == pytest.approx(2.2)
    assert um(visium(), spot_distance_um=200) == pytest.approx(5)
    assert um(visium(), um_per_px=3) == 3
    assert um(visium()[[0, 60, 110]]) == pytest.approx(65 / 26)  # no neighbours: by the spot diameter
    with pytest.raises(ValueError, match=r"size_um=50 needs the µm a pixel, .* no Visium array\. Pass um_per_px="):
        um(visium(spot_diameter_fullres=40.0))
    with pytest.raises(ValueError, match="spot_distance_um needs spots at two locations"):
        um(visium()[[70]], spot_distance_um=100)
    with pytest.raises(ValueError, match="states neither microns_per_pixel nor spot_diameter_fullres"):
        sfm.pp.patches(spots([[200, 200]]), smooth())
    unknown = sfm.pp.patches(spots([[200, 200]]), smooth(), size_px=20)
    assert np.isnan(unknown.um_per_px).all()
    assert "unknown size" in repr(unknown)


@pytest.fixture
def two_slides(adata, tmp_path):
    adata.obs["slide"] = pd.Categorical(np.where(np.arange(50) % 3 == 0, "a", "b"))
    other = 255 - coded()
    return adata, {"a": coded(), "b": write(tmp_path / "b.png", other)}, other


def test_several_slides(two_slides):
    adata, images, other = two_slides
    expected = np.where(
        (adata.obs["slide"] == "a").to_numpy()[:, None, None, None],
        sliced(coded(), adata.obsm["spatial"], 32),
        sliced(other, adata.obsm["spatial"], 32),
    )
    patches = sfm.pp.patches(adata, images, size_px=32, out_px=32, library_key="slide")
    np.testing.assert_array_equal(patches[:], expected)
    np.testing.assert_array_equal(np.concatenate(list(patches.batches(5))), expected)
    half = sfm.pp.patches(adata, images, size_um=16, um_per_px={"a": 0.5, "b": 1}, out_px=16, library_key="slide")
    assert half.windows == [32, 16]
    with pytest.raises(KeyError, match="image has nothing for slide 'b'"):
        sfm.pp.patches(adata, {"a": coded()}, size_px=32, library_key="slide")
    with pytest.raises(KeyError, match="Pass library_key="):
        sfm.pp.patches(adata, images, size_px=32)


def test_store(two_slides, tmp_path):
    adata, images, _ = two_slides
    options = {"size_um": 10, "um_per_px": 0.5, "out_px": 24, "library_key": "slide"}
    lazy = sfm.pp.patches(adata, images, **options)
    stored = sfm.pp.patches(adata, images, **options, out=tmp_path / "p.zarr")
    again = sfm.pp.TissuePatches.read(str(tmp_path / "p.zarr"))
    for found in (stored, again):
        np.testing.assert_array_equal(found[:], lazy[:])
        np.testing.assert_array_equal(found[[7, 3, 3]], lazy[[7, 3, 3]])
        np.testing.assert_array_equal(found["s9"], lazy["s9"])
        np.testing.assert_array_equal(found.blank, lazy.blank)
        np.testing.assert_array_equal(found.coordinates, lazy.coordinates)
        assert found[[]].shape == (0, 24, 24, 3)
        assert list(found.obs_names) == list(adata.obs_names)
        assert list(found.slides) == list(lazy.slides)
        assert (found.windows, found.um_per_px, found.out_px) == (lazy.windows, lazy.um_per_px, 24)
        assert repr(found) == "TissuePatches of 50 spots: 24 x 24 pixels, 10 µm"
        for slide in ("a", "b"):
            for one, other in zip(found.overview(slide), lazy.overview(slide), strict=True):
                np.testing.assert_array_equal(one, other)
    with pytest.raises(FileExistsError, match=r"read it with sfm\.pp\.TissuePatches\.read"):
        sfm.pp.patches(adata, images, **options, out=tmp_path / "p.zarr")


def test_store_is_whole_or_missing(adata, tmp_path, monkeypatch):
    def fail(self, rows):
        raise OSError("disk")

    monkeypatch.setattr("spatialfm.pp._patches._Images.fetch", fail)
    with pytest.raises(OSError, match="disk"):
        sfm.pp.patches(adata, smooth(), size_px=32, out=tmp_path / "p.zarr")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="there is no store"):
        sfm.pp.TissuePatches.read(tmp_path / "p.zarr")
    with pytest.raises(ValueError, match="is no store of patches"):
        sfm.pp.TissuePatches.read(tmp_path)


def test_memory_does_not_grow_with_spots(tmp_path):
    """1,500 patches of 96 pixels are 41 MB; a few chunks of them are ever in memory."""
    rng = np.random.default_rng(0)
    adata = spots(rng.uniform(0, [W, H], size=(1500, 2)))
    sfm.pp.patches(adata[:1], smooth(), size_px=60, out=tmp_path / "warm.zarr")  # imports
    tracemalloc.start()
    patches = sfm.pp.patches(adata, smooth(), size_px=60, out_px=96, out=tmp_path / "p.zarr")
    n = sum(len(batch) for batch in patches.batches(64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 1500
    assert peak < 15e6


def test_blank(adata):
    image = np.full((H, W, 3), (240, 235, 245), np.uint8)
    image += np.random.default_rng(0).integers(0, 6, image.shape, dtype=np.uint8)
    image[:, : W // 2] = np.random.default_rng(0).integers(0, 256, (H, W // 2, 3), dtype=np.uint8)
    image = np.asarray(PIL.Image.fromarray(image))
    adata = spots([[50, 50], [350, 50], [50, 250], [350, 250]])
    assert sfm.pp.patches(adata, image, size_px=40).blank.tolist() == [False, True, False, True]


def test_spots_outside(adata):
    adata.obsm["spatial"][[4, 7]] = [[W + 5, 20], [-3, 20]]
    with pytest.raises(
        ValueError, match=r"2 of 50 spots lie outside image \(400 x 300 pixels\) at scale 1, such as \['s4', 's7'\]"
    ):
        sfm.pp.patches(adata, smooth(), size_px=32)
    assert len(sfm.pp.patches(adata[~adata.obs_names.isin(["s4", "s7"])], smooth(), size_px=32)) == 48
    adata.obsm["spatial"] = np.abs(adata.obsm["spatial"]) * 10
    with pytest.raises(ValueError, match=r"All would fit at scales up to 0\.0988"):
        sfm.pp.patches(adata, smooth(), size_px=32)
    adata.obsm["spatial"] = adata.obsm["spatial"] / 4000 - 0.5
    with pytest.raises(ValueError, match="are no pixels: convert obsm to pixels"):
        sfm.pp.patches(adata, smooth(), size_px=32)


def test_wrong_scale():
    adata = visium()
    factors = adata.uns["spatial"]["lib"]["scalefactors"]
    factors["tissue_lowres_scalef"], factors["tissue_hires_scalef"] = 0.5, 0.15
    with pytest.raises(
        ValueError, match=r"all 126 spots lie in the upper left 26% .* fit at tissue_lowres_scalef = 0.5"
    ):
        sfm.pp.patches(adata)
    assert len(sfm.pp.patches(adata, scale=0.15)) == 126
    factors["tissue_hires_scalef"] = 1.0
    with pytest.raises(
        ValueError, match=r"spots lie outside uns image 'hires' .* All would fit at tissue_lowres_scalef = 0.5"
    ):
        sfm.pp.patches(adata)


def test_missing_images(adata, tmp_path):
    with pytest.raises(
        KeyError, match=r"there is no image with its scale factor: uns\['spatial'\] holds \[\]\. Pass image="
    ):
        sfm.pp.patches(adata, size_px=32)
    unscaled = visium()
    del unscaled.uns["spatial"]["lib"]["scalefactors"]["tissue_hires_scalef"]
    with pytest.raises(
        KeyError, match=r"holds the images \['hires'\] and the scalefactors \['spot_diameter_fullres'\]"
    ):
        sfm.pp.patches(unscaled)
    with pytest.raises(FileNotFoundError, match=r"is neither a file nor an image of .* holds \['hires'\]"):
        sfm.pp.patches(visium(), "lowres")
    with pytest.raises(FileNotFoundError, match="there is no image file"):
        sfm.pp.patches(adata, tmp_path / "none.png", size_px=32)
    (tmp_path / "text.png").write_text("nothing")
    with pytest.raises(ValueError, match="is no image that can be read"):
        sfm.pp.patches(adata, tmp_path / "text.png", size_px=32)
    tifffile.imwrite(tmp_path / "many.tif", np.zeros((7, 64, 64), np.uint8), photometric="minisblack")
    with pytest.raises(ValueError, match="not an RGB or grey image"):
        sfm.pp.patches(adata, tmp_path / "many.tif", size_px=32)
    with pytest.raises(ValueError, match=r"an image of shape \(3, 300, 400\) is not supported"):
        sfm.pp.patches(adata, smooth().transpose(2, 0, 1), size_px=32)


def test_decompression_bomb(adata, tmp_path, monkeypatch):
    path = write(tmp_path / "a.png", coded())
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", H * W - 1)  # Pillow warns
    assert len(sfm.pp.patches(adata, path, size_px=32)[:3]) == 3
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", H * W // 3)  # Pillow refuses
    with pytest.raises(
        ValueError, match=r"tiled TIFF, which is read by windows.*set PIL.Image.MAX_IMAGE_PIXELS = None"
    ):
        sfm.pp.patches(adata, path, size_px=32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size_px": 0}, "size_px must be a positive number, got 0"),
        ({"size_um": float("nan")}, "size_um must be a number"),
        ({"size_px": 32, "scale": -1}, "scale must be a positive number"),
        ({"size_um": 32, "um_per_px": "1"}, "um_per_px must be a number, a mapping or None, got '1'"),
        ({"size_px": 32, "size_um": 3}, "are two sizes of a patch; give one"),
        ({"size_px": 32, "out_px": 0}, "out_px must be a positive integer"),
        ({"size_px": 1.5}, r"a patch covers 1.5 units of the coordinates, 1.5 pixels of image \(400 x 300\)"),
        ({"size_px": 1e5}, "no more than 16 times the image"),
    ],
)
def test_bad_numbers(adata, options, message):
    with pytest.raises(ValueError, match=message):
        sfm.pp.patches(adata, smooth(), **options)


def test_no_spots(adata):
    with pytest.raises(ValueError, match="holds no spots"):
        sfm.pp.patches(adata[:0], smooth(), size_px=32)
