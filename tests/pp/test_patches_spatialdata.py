"""pp.patches of SpatialData objects: against patches of the plain array at places mapped by hand."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import shapely
import spatialdata as sd
import xarray as xr
from geopandas import GeoDataFrame
from spatialdata.models import Image2DModel, Labels2DModel, PointsModel, ShapesModel, TableModel
from spatialdata.transformations import Affine, Identity, Scale, Sequence, Translation, set_transformation

import spatialfm as sfm
from spatialfm._data._images import open_image

H, W, N = 300, 400, 40
AXES = ("x", "y")
# Image to global, and spots to global: a pixel of the image is 2 units of the spots.
TO_GLOBAL = Sequence([Scale([0.5, 0.5], AXES), Translation([100, -30], AXES)])
SPOTS_TO_GLOBAL = Sequence([Scale([0.25, 0.25], AXES), Translation([90, 0], AXES)])


def pixels_of(xy):
    """By hand: out of the coordinates of the spots into the pixels of the image."""
    return (xy * 0.25 + [90, 0] - [100, -30]) / 0.5


def coded(height=H, width=W):
    """Every pixel says where it is: column and row modulo 256, and which 256 they belong to."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x % 256, y % 256, x // 256 * 16 + y // 256], axis=2).astype(np.uint8)


def smooth():
    y, x = np.mgrid[:H, :W]
    return np.stack([x * 200 / W, y * 200 / H, 100 + 50 * np.sin(x / 30)], axis=2).astype(np.uint8)


def image_of(pixels, to=None, scales=None, chunk=64):
    return Image2DModel.parse(
        pixels.transpose(2, 0, 1), dims=("c", "y", "x"), scale_factors=scales, chunks=(3, chunk, chunk),
        transformations=to or {"global": TO_GLOBAL},
    )  # fmt: skip


def circles(xy, index, radius=4.0, to=None):
    return ShapesModel.parse(
        np.asarray(xy, float),
        geometry=0,
        radius=radius,
        index=index,
        transformations=to or {"global": SPOTS_TO_GLOBAL},
    )


def table_of(regions, instances):
    obs = pd.DataFrame({"region": pd.Categorical(regions), "instance": instances})
    obs.index = [f"s{i}" for i in range(len(obs))]
    return TableModel.parse(
        ad.AnnData(np.ones((len(obs), 1), np.float32), obs=obs),
        region=list(dict.fromkeys(regions)),
        region_key="region",
        instance_key="instance",
    )


def spots_at():
    """Coordinates of spots, at integer pixels of the image 20 and more from its border."""
    pixels = np.random.default_rng(0).integers(20, [W - 20, H - 20], size=(N, 2))
    return (pixels * 0.5 + [100, -30] - [90, 0]) / 0.25


def build(pixels=None, scales=None, images=None, **shapes):
    """SpatialData with spots of names in no order, of which the table takes half, in another order."""
    names = [f"AAC{i * 7 % N}" for i in range(N)]
    images = images or {"he": image_of(coded() if pixels is None else pixels, scales=scales)}
    shapes = {"spots": circles(spots_at(), names), **shapes}
    rows = np.random.default_rng(1).permutation(N)[: N // 2]
    table = table_of(["spots"] * len(rows), [names[i] for i in rows])
    return sd.SpatialData(images=images, shapes=shapes, tables={"table": table}), pixels_of(spots_at())[rows]


def plain(pixels, xy, **options):
    adata = ad.AnnData(np.ones((len(xy), 1), np.float32), obsm={"spatial": xy})
    return sfm.pp.patches(adata, pixels, **options)


def sliced(image, xy, size):
    h = size // 2
    return np.stack([image[y - h : y + h, x - h : x + h] for x, y in np.rint(xy).astype(int)])


@pytest.mark.parametrize("scales", [None, [2, 2]])
def test_as_the_plain_array(scales):
    sdata, xy = build(scales=scales)
    adata = sdata["table"]
    patches = sfm.pp.patches(adata, sdata, size_px=32, out_px=32)
    np.testing.assert_array_equal(patches[:], sliced(coded(), xy, 32))
    np.testing.assert_allclose(patches.coordinates, xy, atol=1e-9)
    assert list(patches.obs_names) == list(adata.obs_names)
    assert list(adata.obsm) == []
    for view in (adata[::-1], adata[[7, 3]]):
        part = sfm.pp.patches(view, (sdata, "he"), size_px=32, out_px=32)
        np.testing.assert_array_equal(part[:], patches[adata.obs_names.get_indexer(view.obs_names)])


@pytest.mark.parametrize("size", [20, 37.5, 150])
def test_resampled_as_the_plain_array(size):
    """Enlarged, reduced, and beyond the border."""
    sdata, xy = build(smooth())
    found = sfm.pp.patches(sdata["table"], sdata, size_px=size, out_px=30)
    # Centroids are equal up to rounding, and so are levels.
    difference = np.abs(found[:].astype(int) - plain(smooth(), xy, size_px=size, out_px=30)[:])
    assert difference.max() <= 1


def test_coarser_scales_serve_large_patches():
    sdata, xy = build(smooth(), scales=[2, 2])
    levels = sd.get_pyramid_levels(sdata["he"])
    assert [level.shape[1:] for level in levels] == [(300, 400), (150, 200), (75, 100)]
    level = levels[2].transpose("y", "x", "c").to_numpy()
    found = sfm.pp.patches(sdata["table"], sdata, size_px=64, out_px=16)
    expected = plain(level, xy / 4, size_px=16, out_px=16)[:]
    np.testing.assert_array_equal(found[:], expected)
    single, _ = build(smooth())
    full = sfm.pp.patches(single["table"], single, size_px=64, out_px=16)[:]
    assert np.abs(full.astype(int) - expected).mean() < 3


def recorded(pixels, chunk, scales=None):
    """Element of which a list tells the chunks that were computed."""
    import dask.array as da

    seen = []

    def look(block, block_info):
        seen.append(tuple(block_info[0]["chunk-location"]))
        return block

    array = da.from_array(pixels.transpose(2, 0, 1), chunks=(3, chunk, chunk)).map_blocks(look, dtype=np.uint8)
    return xr.DataArray(array, dims=("c", "y", "x")), seen


def test_only_chunks_under_a_patch_are_computed():
    element, seen = recorded(coded(), 64)
    image = open_image(element)
    assert seen == []
    np.testing.assert_array_equal(image.read(0, 70, 120, 100, 140), coded()[70:120, 100:140])
    assert sorted(seen) == [(0, 1, 1), (0, 1, 2)]
    image.read(0, 64, 128, 128, 192)  # exactly the second
    assert len(seen) == 2
    np.testing.assert_array_equal(image.read(0, -5, 310, 390, 410)[5:-10, :10], coded()[:, 390:])
    assert sorted(seen[2:]) == [(0, i, 6) for i in range(5)]


def test_each_chunk_is_computed_once():
    element, seen = recorded(coded(), 64)
    xy = pixels_of(spots_at())
    patches = plain(element, xy, size_px=32, out_px=32)
    np.testing.assert_array_equal(np.concatenate(list(patches.batches(7))), sliced(coded(), xy, 32))
    assert len(seen) == len(set(seen))


def test_channels_may_lie_in_chunks_of_their_own():
    element, _ = recorded(coded(), 64)
    patches = plain(element.chunk({"c": 1}), pixels_of(spots_at()), size_px=32, out_px=32)
    np.testing.assert_array_equal(patches[:], sliced(coded(), pixels_of(spots_at()), 32))


@pytest.mark.filterwarnings("ignore:zarr v3 autosharding:UserWarning")
@pytest.mark.parametrize("scales", [None, [2]])
def test_on_disk(tmp_path, scales):
    sdata, xy = build(scales=scales)
    sdata.write(tmp_path / "s.zarr")
    sdata = sd.read_zarr(tmp_path / "s.zarr")
    adata = sdata["table"]
    patches = sfm.pp.patches(adata, sdata, size_px=32, out_px=32)
    np.testing.assert_array_equal(patches[:], sliced(coded(), xy, 32))
    stored = sfm.pp.patches(adata, sdata, size_px=32, out_px=32, out=tmp_path / "p.zarr")
    np.testing.assert_array_equal(stored[:], patches[:])
    for one, other in zip(stored.overview(), patches.overview(), strict=True):
        np.testing.assert_array_equal(one, other)
    # All chunks are spoilt but those under the first patch.
    x, y = np.rint(xy[0]).astype(int)
    needed = {f"{i}/{j}" for i in {(y - 16) // 64, (y + 15) // 64} for j in {(x - 16) // 64, (x + 15) // 64}}
    chunks = [p for p in (tmp_path / "s.zarr" / "images").rglob("*") if p.is_file() and p.parts[-4] == "c"]
    assert len(chunks) >= 35
    finest = [p for p in chunks if p.parts[-5] == min(q.parts[-5] for q in chunks)]
    for path in chunks:
        if path not in finest or "/".join(path.parts[-2:]) not in needed:
            path.write_bytes(b"spoilt")
    fresh = sfm.pp.patches(adata, sdata, size_px=32, out_px=32)
    np.testing.assert_array_equal(fresh[0], patches[0])
    with pytest.raises(RuntimeError, match="decompression error"):
        fresh[:]


@pytest.mark.parametrize("kind", ["polygons", "labels", "points"])
def test_what_a_table_annotates(kind):
    xy = spots_at()
    ids = np.arange(1, N + 1)
    if kind == "polygons":
        boxes = GeoDataFrame({"geometry": [shapely.box(x - 3, y - 2, x + 3, y + 2) for x, y in xy]}, index=ids)
        element = ShapesModel.parse(boxes, transformations={"global": SPOTS_TO_GLOBAL})
    elif kind == "points":
        frame = pd.DataFrame(xy, columns=["x", "y"], index=ids)
        element = PointsModel.parse(frame, transformations={"global": SPOTS_TO_GLOBAL})
    else:  # 2 x 2 pixels around integer places
        xy = spots_at()[: N // 2]
        ids = ids[: N // 2]
        low = np.rint(pixels_of(xy)).astype(int)
        labels = np.zeros((H, W), np.int32)
        for i, (x, y) in zip(ids, low, strict=True):
            labels[y - 1 : y + 1, x - 1 : x + 1] = i
        element = Labels2DModel.parse(labels, dims=("y", "x"), transformations={"global": TO_GLOBAL})
    order = np.random.default_rng(2).permutation(len(ids))
    sdata = sd.SpatialData.init_from_elements({"he": image_of(coded()), "cells": element})
    sdata["table"] = table_of(["cells"] * len(ids), ids[order])
    found = sfm.pp.patches(sdata["table"], sdata, size_px=32, out_px=32)
    np.testing.assert_array_equal(found[:], sliced(coded(), pixels_of(xy)[order], 32))
    with pytest.raises(
        ValueError, match=r"'cells' does not hold the equal circles of a Visium array\. Pass um_per_px="
    ):
        sfm.pp.patches(sdata["table"], sdata)


def hexagonal(pitch):
    rows, columns = np.mgrid[:10, :8]
    return np.c_[(columns * pitch + rows % 2 * pitch / 2).ravel(), rows.ravel() * pitch * 3**0.5 / 2] + 120


def test_micrometres():
    """A Visium array is known by its circles, even where the table is one spot; whatever else needs the µm a pixel."""
    xy, ids = hexagonal(40), [str(i) for i in range(80)]
    sdata = sd.SpatialData(
        images={"he": image_of(smooth())},
        shapes={
            "visium": circles(xy, ids, radius=0.65 * 40 / 2),
            "wide": circles(xy, ids, radius=0.25 * 40),
            "uneven": circles(xy, ids, radius=np.linspace(12, 14, 80)),
        },
    )

    def um(region, rows=80, **options):
        patches = sfm.pp.patches(table_of([region] * rows, ids[:rows]), sdata, out_px=24, **options)
        return patches.um_per_px[0] * 24 / patches.windows[0]

    for rows in (80, 1):  # 40 units of the spots are 20 pixels
        assert um("visium", rows) == pytest.approx(100 / 20)
    assert um("wide", um_per_px=2) == 2
    assert um("wide", 1, spot_distance_um=200) == pytest.approx(200 / 20)
    with pytest.raises(ValueError, match=r"spots 20 px apart of 10 px are no Visium array\. Pass um_per_px="):
        um("wide")
    with pytest.raises(ValueError, match="'uneven' does not hold the equal circles"):
        um("uneven")


def test_several_slides():
    names = [f"b{i}" for i in range(N)]
    sdata = sd.SpatialData(
        images={
            "he_a": image_of(coded(), to={"a": TO_GLOBAL}),
            "he_b": image_of(255 - coded(), to={"b": TO_GLOBAL}),
        },
        shapes={
            "a": circles(spots_at(), names, to={"a": SPOTS_TO_GLOBAL}),
            "b": circles(spots_at(), names, to={"b": SPOTS_TO_GLOBAL}),
        },
    )
    regions = ["b" if i % 3 else "a" for i in range(N)]
    sdata["table"] = table_of(regions, names)
    adata = sdata["table"]
    options = {"size_px": 32, "out_px": 32, "library_key": "region"}
    xy = pixels_of(spots_at())
    is_a = np.array(regions)[:, None, None, None] == "a"
    expected = np.where(is_a, sliced(coded(), xy, 32), sliced(255 - coded(), xy, 32))
    np.testing.assert_array_equal(sfm.pp.patches(adata, sdata, **options)[:], expected)
    adata.obsm["spatial"] = xy
    for one in (sdata["he_a"], sdata["he_a"].to_numpy().transpose(1, 2, 0), (sdata, "he_a")):
        found = sfm.pp.patches(adata, {"a": one, "b": sdata}, **options)
        np.testing.assert_array_equal(found[:], expected)
    with pytest.raises(ValueError, match=r"rows annotate several elements: \['a', 'b'\]\. Pass library_key='region'"):
        sfm.pp.patches(adata, sdata, size_px=32)
    adata.obs["patient"] = "p"
    with pytest.raises(ValueError, match=r"obs\['patient'\] must distinguish them"):
        sfm.pp.patches(adata, sdata, size_px=32, library_key="patient")


@pytest.mark.parametrize("scales", [None, [2]])
def test_an_element_alone(scales):
    """Its transformation does not matter: coordinates are its pixels."""
    xy = pixels_of(spots_at())
    element = image_of(coded(), scales=scales)
    np.testing.assert_array_equal(plain(element, xy, size_px=32, out_px=32)[:], sliced(coded(), xy, 32))
    half = plain(element, xy * 2, size_px=64, out_px=32, scale=0.5)
    np.testing.assert_array_equal(half[:], sliced(coded(), xy, 32))


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_dtypes(dtype):
    pixels = coded().astype(dtype) * 257 if dtype == np.uint16 else coded().astype(dtype) / 255
    sdata, xy = build(pixels)
    found = sfm.pp.patches(sdata["table"], sdata, size_px=32, out_px=32)
    np.testing.assert_array_equal(found[:], sliced(coded(), xy, 32))


def test_which_image():
    he = image_of(coded())
    dapi = Image2DModel.parse(np.zeros((1, H, W), np.uint8), transformations={"global": TO_GLOBAL})
    far = image_of(coded(), to={"elsewhere": Identity()})
    sdata, xy = build(images={"dapi": dapi, "he": he, "far": far})
    adata = sdata["table"]
    expected = sliced(coded(), xy, 32)
    np.testing.assert_array_equal(sfm.pp.patches(adata, sdata, size_px=32, out_px=32)[:], expected)
    assert sfm.pp.patches(adata, (sdata, "dapi"), size_px=32)[:].max() == 0
    with pytest.raises(ValueError, match="'spots' and 'far' share no coordinate system"):
        sfm.pp.patches(adata, (sdata, "far"), size_px=32)
    with pytest.raises(KeyError, match=r"has no image 'h&e'; it holds \['dapi', 'he', 'far'\]"):
        sfm.pp.patches(adata, (sdata, "h&e"), size_px=32)
    none, _ = build(images={"dapi": dapi, "far": far})
    with pytest.raises(ValueError, match=r"no image .* \['dapi \(1 channels\)', 'far \(3 channels, other coordinate"):
        sfm.pp.patches(none["table"], none, size_px=32)
    sdata["second"] = image_of(coded())
    with pytest.raises(ValueError, match=r"several images .*: \['he', 'second'\]\. Name one: image=\(sdata, 'name'\)"):
        sfm.pp.patches(adata, sdata, size_px=32)


def test_which_coordinate_system():
    sdata, xy = build()
    adata = sdata["table"]
    for name in ("moved", "turned"):
        for element in ("he", "spots"):
            set_transformation(sdata[element], Identity(), name)
    set_transformation(sdata["spots"], Sequence([Scale([0.2, 0.2], AXES), Translation([30, 50], AXES)]), "moved")
    by_global = sfm.pp.patches(adata, sdata, size_px=32)
    moved = sfm.pp.patches(adata, sdata, size_px=32, coordinate_system="moved")
    np.testing.assert_allclose(by_global.coordinates, xy, atol=1e-9)
    np.testing.assert_allclose(moved.coordinates, (xy * 0.5 + [10, -30]) / 0.25 * 0.2 + [30, 50], atol=1e-9)
    with pytest.raises(ValueError, match=r"'lost' is no coordinate system of 'spots'.* has \['global', "):
        sfm.pp.patches(adata, sdata, size_px=32, coordinate_system="lost")
    sd.transformations.remove_transformation(sdata["he"], "global")
    with pytest.raises(ValueError, match=r"choose one with coordinate_system=: \['moved', 'turned'\]"):
        sfm.pp.patches(adata, sdata, size_px=32)


def turn(degrees):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return Affine([[c, -s, 0], [s, c, 0], [0, 0, 1]], AXES, AXES)


@pytest.mark.parametrize(
    "extra",
    [turn(30), turn(90), Affine([[1, 0.2, 0], [0, 1, 0], [0, 0, 1]], AXES, AXES), Scale([1, 1.1], AXES)],
    ids=["turned", "quarter turn", "sheared", "stretched"],
)
def test_only_scale_and_translation(extra):
    sdata, xy = build()
    set_transformation(sdata["he"], Sequence([TO_GLOBAL, extra]))
    with pytest.raises(
        ValueError, match=r"'global' rotates, shears or stretches .* spatialdata\.transform\(sdata\['he'"
    ):
        sfm.pp.patches(sdata["table"], sdata, size_px=32)
    # The spots with the image: nothing is turned between the two.
    set_transformation(sdata["spots"], Sequence([SPOTS_TO_GLOBAL, extra]))
    found = sfm.pp.patches(sdata["table"], sdata, size_px=32, out_px=32)
    np.testing.assert_array_equal(found[:], sliced(coded(), xy, 32))


def test_the_named_remedy_works():
    sdata, _ = build(smooth())
    set_transformation(sdata["he"], turn(90))
    set_transformation(sdata["spots"], Sequence([Scale([0.25, 0.25], AXES), Translation([-250, 50], AXES)]))
    sdata["upright"] = sd.transform(sdata["he"], to_coordinate_system="global")
    found = sfm.pp.patches(sdata["table"], (sdata, "upright"), size_px=20, out_px=20)
    turned = np.rot90(smooth(), -1)  # x, y become -y, x: the image lies left of 0
    expected = plain(turned, found.coordinates, size_px=20, out_px=20)
    assert np.abs(found[:].astype(int) - expected[:]).mean() < 2


def test_mirrored():
    sdata, xy = build()
    set_transformation(sdata["he"], Sequence([TO_GLOBAL, Scale([-1, 1], AXES)]))
    set_transformation(sdata["spots"], Sequence([SPOTS_TO_GLOBAL, Scale([-1, 1], AXES)]))
    np.testing.assert_array_equal(
        sfm.pp.patches(sdata["table"], sdata, size_px=32, out_px=32)[:], sliced(coded(), xy, 32)
    )


def test_object_with_one_table():
    """It stands for its table and its image."""
    sdata, xy = build()
    np.testing.assert_array_equal(sfm.pp.patches(sdata, size_px=32, out_px=32)[:], sliced(coded(), xy, 32))


def test_mistakes(tmp_path):
    sdata, _ = build()
    adata = sdata["table"]
    with pytest.raises(ValueError, match="scale=2 and a SpatialData object"):
        sfm.pp.patches(adata, sdata, size_px=32, scale=2)
    with pytest.raises(
        ValueError, match="coordinate_system='global' is for a SpatialData object as image, got ndarray"
    ):
        sfm.pp.patches(adata, coded(), size_px=32, coordinate_system="global")
    with pytest.raises(FileNotFoundError, match=r"is a folder: .* pass image=spatialdata\.read_zarr"):
        plain(tmp_path, np.full((1, 2), 50.0), size_px=32)
    other = adata.copy()
    other.obs["instance"] = np.arange(len(other))
    with pytest.raises(ValueError, match=r"'spots' has no instance for 20 of 20 spots, such as \[0, 1, 2\]; it names"):
        sfm.pp.patches(other, sdata, size_px=32)
    other.obs["region"] = pd.Categorical(["gone"] * len(other))
    with pytest.raises(KeyError, match="annotate element 'gone', which the SpatialData object does not hold"):
        sfm.pp.patches(other, sdata, size_px=32)
    del other.uns["spatialdata_attrs"]
    with pytest.raises(KeyError, match=r"uns\['spatialdata_attrs'\].* \(\['table'\]\).* uns_merge='same'"):
        sfm.pp.patches(other, sdata, size_px=32)
    set_transformation(sdata["spots"], Identity())
    with pytest.raises(ValueError, match=r"lie outside SpatialData image 'he' .* Check the transformations of 'spots'"):
        sfm.pp.patches(adata, sdata, size_px=32)
    five = xr.DataArray(np.zeros((5, H, W), np.uint8), dims=("c", "y", "x"))
    with pytest.raises(ValueError, match="an image of 5 channels is not supported"):
        plain(five, np.full((1, 2), 50.0), size_px=32)
    with pytest.raises(ValueError, match=r"an image of dimensions \{'z': 5, 'y': 300, 'x': 400\} is not supported"):
        plain(five.rename(c="z"), np.full((1, 2), 50.0), size_px=32)
