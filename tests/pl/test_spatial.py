"""pl.spatial: what is drawn is what the data hold."""

from __future__ import annotations

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import EllipseCollection
from matplotlib.colors import to_hex, to_rgba
from scipy import sparse

import spatialfm as sfm
from spatialfm.pl._style import NA_COLOR, PALETTE


@pytest.fixture
def adata():
    rng = np.random.default_rng(0)
    n = 60
    side = np.stack(np.meshgrid(np.arange(6.0), np.arange(5.0)), -1).reshape(-1, 2)
    kind = rng.choice(["a", "b/c", "d"], n)
    return ad.AnnData(
        sparse.csr_matrix(rng.poisson(2, (n, 3)).astype(np.float32)),
        obs=pd.DataFrame(
            {
                "slide": np.repeat(["s1", "s2"], n // 2),
                "kind": pd.Categorical(np.where(np.arange(n) == 7, None, kind), categories=["a", "b/c", "unused", "d"]),
                "value": np.where(np.arange(n) == 9, np.nan, rng.normal(size=n)),
                "flag": rng.random(n) < 0.5,
            },
            index=[f"c{i}" for i in range(n)],
        ),
        var=pd.DataFrame(index=["g0", "g1", "g2"]),
        obsm={"spatial": np.concatenate([side * 10, side * 10 + 500])},
        layers={"double": sparse.csc_matrix(np.arange(n * 3, dtype=float).reshape(n, 3))},
    )


def points(ax):
    (found,) = [c for c in ax.collections if isinstance(c, EllipseCollection)]
    return found


def drawn(ax):
    """Coordinates to colour (as hex) or value of what is drawn."""
    c = points(ax)
    what = c.get_array()
    what = [to_hex(v) for v in c.get_facecolor()] if what is None else what.filled(np.nan).tolist()
    return dict(zip(map(tuple, c.get_offsets().tolist()), what, strict=True))


def assert_unchanged(adata, before):
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    assert set(adata.uns) == set(before.uns)
    assert set(adata.obsm) == set(before.obsm)
    assert (adata.X != before.X).nnz == 0


def test_categories(adata):
    before = adata.copy()
    ax = sfm.pl.spatial(adata, "kind")
    colors = dict(zip(["a", "b/c", "unused", "d"], PALETTE, strict=False))
    expected = [colors.get(k, NA_COLOR).lower() for k in adata.obs["kind"]]
    assert drawn(ax) == dict(zip(map(tuple, adata.obsm["spatial"].tolist()), expected, strict=True))
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "b/c", "d"]
    assert points(ax).get_rasterized()
    assert_unchanged(adata, before)


@pytest.mark.parametrize(("color", "layer"), [("value", None), ("g1", None), ("g2", "double")])
def test_numbers(adata, color, layer):
    ax = sfm.pl.spatial(adata, color, layer=layer)
    x = (
        adata.obs["value"]
        if color == "value"
        else (adata.layers[layer] if layer else adata.X).tocsc()[:, int(color[1])]
    )
    x = np.asarray(x if color == "value" else x.todense()).ravel()
    got = drawn(ax)
    np.testing.assert_array_equal([got[tuple(p)] for p in adata.obsm["spatial"]], x)
    assert points(ax).get_clim() == (np.nanmin(x), np.nanmax(x))
    assert to_hex(points(ax).get_cmap().get_bad()) == NA_COLOR.lower()
    values = points(ax).get_array().compressed()
    assert (np.diff(values) >= 0).all()  # the largest on top


def test_long_name_of_a_colour_bar_has_room(adata):
    adata.obs["probability of the annotation"] = 0.5
    axes = sfm.pl.spatial(adata, ["probability of the annotation", "g0"], library_key="slide")
    (bar,) = [inset for ax in axes[:2] for inset in ax.child_axes]
    axes[0].figure.canvas.draw()
    title = bar._left_title.get_window_extent()
    assert title.width > 100
    assert not any(title.overlaps(ax.get_window_extent()) for ax in axes)


def test_slides_are_panels_of_one_scale(adata):
    axes = sfm.pl.spatial(adata, "g0", library_key="slide")
    assert [ax.get_title() for ax in axes] == ["s1", "s2"]
    spans = []
    for ax, name in zip(axes, ["s1", "s2"], strict=True):
        assert set(drawn(ax)) == set(map(tuple, adata.obsm["spatial"][adata.obs["slide"] == name].tolist()))
        assert ax.get_aspect() == 1
        (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
        assert bottom > top  # y points down
        spans.append((right - left, bottom - top))
    assert spans[0] == pytest.approx(spans[1])
    assert points(axes[0]).get_clim() == points(axes[1]).get_clim()
    assert len([*axes[0].child_axes, *axes[1].child_axes]) == 1  # one colour bar

    axes = sfm.pl.spatial(adata, ["kind", "flag"], library_key="slide")
    assert len(axes) == 4
    assert [ax.get_legend() is not None for ax in axes] == [False, True, False, True]
    assert axes[3].get_legend().get_title().get_text() == "flag"


def test_points_touch(adata):
    ax = sfm.pl.spatial(adata[adata.obs["slide"] == "s1"])
    assert points(ax).get_widths() == pytest.approx([10])
    canvas = ax.figure.canvas
    canvas.draw()
    ink = (np.asarray(canvas.buffer_rgba())[40:, :, 0] < 200).sum()  # below the title
    unit = np.ptp(ax.transData.transform([[0, 0], [1, 0]])[:, 0])
    assert ink == pytest.approx(30 * np.pi * (5 * unit) ** 2, rel=0.03)
    assert points(sfm.pl.spatial(adata, size=3)).get_widths() == [3]


def test_palettes(adata):
    def colors(**kwargs):
        return legend(sfm.pl.spatial(adata, "kind", **kwargs))

    mapping = {"a": "red", "b/c": "#00ff00", "unused": "k", "d": "blue"}
    assert colors(palette=mapping) == {"a": "#ff0000", "b/c": "#00ff00", "d": "#0000ff"}
    assert colors(palette=["red", "lime", "k", "blue"]) == {"a": "#ff0000", "b/c": "#00ff00", "d": "#0000ff"}
    assert colors(palette="tab10")["b/c"] == "#ff7f0e"
    adata.uns["kind_colors"] = ["#111111", "#222222", "#333333", "#444444"]
    assert colors() == {"a": "#111111", "b/c": "#222222", "d": "#444444"}
    adata.uns["kind_colors"] = ["#111111"]
    assert colors()["d"] == PALETTE[3].lower()
    with pytest.raises(ValueError, match="no colour for"):
        colors(palette={"a": "red"})
    # Cells that tl.annotate leaves unsure are grey, unless palette= gives a colour.
    adata.obs["kind"] = adata.obs["kind"].cat.rename_categories({"d": "unsure"})
    del adata.uns["kind_colors"]
    assert colors()["unsure"] == NA_COLOR.lower()
    assert colors()["a"] == PALETTE[0].lower()
    adata.uns["kind_colors"] = ["#111111", "#222222", "#333333", "#444444"]
    assert colors()["unsure"] == "#444444"


def test_default_palette_is_distinct_in_colour_blind_eyes():
    """CIELAB distance of every two colours, seen normally and by protanopes and deuteranopes (Machado et al. 2009)."""
    from skimage.color import rgb2lab

    views = {
        "normal": np.eye(3),
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    }
    rgb = np.array([to_rgba(c)[:3] for c in [*PALETTE, NA_COLOR]])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    for matrix in views.values():
        seen = np.clip(linear @ np.array(matrix).T, 0, 1)
        lab = rgb2lab(np.where(seen <= 0.0031308, seen * 12.92, 1.055 * seen ** (1 / 2.4) - 0.055)[None])[0]
        distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + 1e3 * np.eye(len(lab))
        assert distance[:8, :8].min() > 13
        assert distance.min() > 12


def legend(ax):
    return {
        text.get_text(): to_hex(handle.get_color())
        for text, handle in zip(ax.get_legend().get_texts(), ax.get_legend().legend_handles, strict=True)
    }


def by_cell(adata, ax):
    colors = drawn(ax)
    return [(tuple(place), colors[tuple(place)]) for place in adata.obsm["spatial"].tolist()]


def test_groups_keep_their_colours_and_lie_on_top(adata):
    whole, grey = sfm.pl.spatial(adata, "kind"), NA_COLOR.lower()
    ax = sfm.pl.spatial(adata, "kind", groups=["d", "b/c"])
    shown = adata.obs["kind"].isin(["d", "b/c"]).to_numpy()
    assert drawn(ax) == {place: c if s else grey for (place, c), s in zip(by_cell(adata, whole), shown, strict=True)}
    # From below: others and the missing value, then the groups.
    assert [to_hex(c) == grey for c in points(ax).get_facecolor()] == [True] * (~shown).sum() + [False] * shown.sum()
    assert legend(ax) == {**{k: v for k, v in legend(whole).items() if k != "a"}, "1 other": grey}
    assert drawn(sfm.pl.spatial(adata, "kind", groups="a")) == drawn(sfm.pl.spatial(adata, "kind", groups=["a"]))
    assert list(legend(sfm.pl.spatial(adata, "kind", groups="a"))) == ["a", "2 others"]
    # All that are there: nothing is grey but missing values.
    assert legend(sfm.pl.spatial(adata, "kind", groups=["a", "b/c", "d"])) == legend(whole)


def test_groups_of_several_colours(adata):
    axes = sfm.pl.spatial(adata, ["kind", "flag", "g0"], groups=["a"])
    assert list(legend(axes[0])) == ["a", "2 others"]
    assert list(legend(axes[1])) == ["False", "True"]
    assert drawn(axes[2]) == drawn(sfm.pl.spatial(adata, "g0"))
    axes = sfm.pl.spatial(adata, ["kind", "flag"], groups=["a", True], library_key="slide")
    assert [list(legend(ax)) for ax in axes[1::2]] == [["a", "2 others"], ["True", "1 other"]]
    # A mapping needs the colours of the groups alone.
    assert legend(sfm.pl.spatial(adata, "kind", groups="a", palette={"a": "red"}))["a"] == "#ff0000"
    with pytest.raises(ValueError, match="no colour for \\['a'\\]"):
        sfm.pl.spatial(adata, "kind", groups="a", palette={"d": "red"})


@pytest.mark.parametrize(
    ("color", "groups", "message"),
    [
        (
            "kind",
            ["a", "c"],
            r"\['c'\] is not among the categories of \['kind'\]; choose from \['a', 'b/c', 'unused', 'd'\]",
        ),
        ("kind", [], "nothing is not among"),
        (["value", "g0"], "a", r"color=\['value', 'g0'\] names no column of adata.obs that holds categories"),
        (None, "a", "names no column"),
    ],
)
def test_groups_that_are_not_there(adata, color, groups, message):
    with pytest.raises(ValueError, match=message):
        sfm.pl.spatial(adata, color, groups=groups)
    assert not plt.get_fignums()


def with_image(adata, names=("s1",), scale=0.5):
    adata.uns["spatial"] = {
        name: {
            "images": {"lowres": np.full((40, 50, 3), 0.5), "hires": np.full((400, 500, 3), 0.5)},
            "scalefactors": {
                "tissue_hires_scalef": scale,
                "tissue_lowres_scalef": scale / 10,
                "spot_diameter_fullres": 6.0,
            },
        }
        for name in names
    }
    return adata


def test_image_lies_under_the_spots(adata):
    axes = sfm.pl.spatial(with_image(adata, ["s1", "s2"]), "kind", library_key="slide")
    for ax in axes:
        (image,) = ax.images
        assert image.get_array().shape == (400, 500, 3)
        # Pixel (row, column) has its middle at (column, row) / scale.
        assert image.get_extent() == pytest.approx([-1, 999, 799, -1])
        assert ax.yaxis_inverted()
        assert points(ax).get_widths() == [6]
    assert not sfm.pl.spatial(adata, "kind", library_key="slide", img=False)[0].images
    with pytest.warns(UserWarning, match=r"images of \['s1', 's2'\].*library_key="):
        assert not sfm.pl.spatial(adata, "kind").images  # two images, one panel: none fits
    assert sfm.pl.spatial(with_image(adata), "kind").images
    with pytest.raises(KeyError, match="img=True"):
        sfm.pl.spatial(adata, "kind", library_key="slide", img=True)


def test_image_under_another_name(adata):
    with_image(adata, ["V1_Breast"])
    one = adata[adata.obs["slide"] == "s1"].copy()
    with pytest.warns(UserWarning, match="slide 's1' takes the only image in uns\\['spatial'\\], that of 'V1_Breast'"):
        assert sfm.pl.spatial(one, "kind", library_key="slide").images
    with pytest.warns(UserWarning, match=r"slides \['s1', 's2'\] of obs\['slide'\] have no image.*\['V1_Breast'\]"):
        assert not sfm.pl.spatial(adata, "kind", library_key="slide")[0].images
    with pytest.warns(UserWarning, match="takes the only image"):
        assert len(sfm.pp.patches(one, size_px=10, library_key="slide", scale=0.5)) == 30
    # No warning with img=False, or where one slide has no image.
    sfm.pl.spatial(adata, "kind", library_key="slide", img=False)
    assert not sfm.pl.spatial(with_image(adata, ["s1"]), "kind", library_key="slide")[1].images


@pytest.mark.parametrize("key", ["tissue_hires_scalef", "spot_diameter_fullres"])
def test_scale_factors_of_length_one(adata, key):
    want = sfm.pl.spatial(with_image(adata), "kind")
    factors = adata.uns["spatial"]["s1"]["scalefactors"]
    factors[key] = np.array([factors[key]])
    got = sfm.pl.spatial(adata, "kind")
    assert got.images[0].get_extent() == want.images[0].get_extent()
    assert points(got).get_widths() == points(want).get_widths()
    assert sfm.pp.patches(adata, size_px=10, um_per_px=1).windows == [10]


@pytest.mark.parametrize(
    "stored",
    [
        {"a": "#111111", "d": "#444444", "b/c": "#222222"},
        {b"a": b"#111111", b"b/c": b"#222222", b"d": b"#444444"},
        np.array([b"#111111", b"#222222", b"#333333", b"#444444"]),
        np.array([[17, 17, 17], [34, 34, 34], [51, 51, 51], [68, 68, 68]]) / 255,
    ],
)
def test_stored_colours_of_all_kinds(adata, stored):
    adata.uns["kind_colors"] = stored
    want = {"a": "#111111", "b/c": "#222222", "d": "#444444"}
    assert legend(sfm.pl.spatial(adata, "kind")) == want
    # A palette need not name what no cell has.
    if isinstance(stored, dict):
        assert legend(sfm.pl.spatial(adata, "kind", palette=stored)) == want


def test_stored_colours_follow_their_categories(adata):
    """Categories in the order of the alphabet are drawn in that of numbers, each in its own colour."""
    names = [str(k) for k in range(1, 13)]
    adata.obs["cluster"] = pd.Categorical(np.tile(names, 5))
    adata.uns["cluster_colors"] = [f"#{int(c):02x}0000" for c in adata.obs["cluster"].cat.categories]
    shown = legend(sfm.pl.spatial(adata, "cluster"))
    assert list(shown) == names
    assert shown == {name: f"#{int(name):02x}0000" for name in names}


def test_panels_of_numbered_slides(adata):
    adata.obs["fov"] = np.arange(60) % 12
    assert [ax.get_title() for ax in sfm.pl.spatial(adata, library_key="fov")] == [str(k) for k in range(12)]


def test_genes_by_other_names(adata):
    whole = adata.copy()
    adata.raw = whole
    adata = adata[:, 1:].copy()
    assert drawn(sfm.pl.spatial(adata, "g0")) == drawn(sfm.pl.spatial(whole, "g0"))
    adata.layers["x"] = adata.X
    with pytest.raises(KeyError, match=r"only adata\.raw has that gene"):
        sfm.pl.spatial(adata, "g0", layer="x")
    whole.var["symbol"] = ["TP53", "CD3E", "MS4A1"]
    with pytest.raises(KeyError, match=r"adata\.var\['symbol'\].*color='g1'"):
        sfm.pl.spatial(whole, "CD3E")
    whole.var_names = ["A", "A", "B"]
    with pytest.raises(KeyError, match=r"2 genes in adata\.var_names have that name.*var_names_make_unique") as error:
        sfm.pl.spatial(whole, "A")
    assert "did you mean" not in str(error.value)


def test_regions_leave_the_tissue_visible(adata):
    from matplotlib.collections import LineCollection

    ax = sfm.pl.spatial(with_image(adata), outline="kind", alpha_img=0.4)
    assert ax.images[0].get_alpha() == 0.4
    assert drawn(ax) == {}
    assert [to_hex(c.get_color()[0]) for c in ax.collections if isinstance(c, LineCollection)] == ["#ffffff", "#000000"]
    assert len(drawn(sfm.pl.spatial(adata, outline="kind", img=False))) == 60
    assert len(drawn(sfm.pl.spatial(adata, "g0", outline="kind"))) == 60


def test_images_by_name_and_from_files(adata, tmp_path):
    from PIL import Image

    with_image(adata, ["s1", "s2"])
    axes = sfm.pl.spatial(adata, "kind", library_key="slide", img="lowres")
    assert [ax.images[0].get_array().shape for ax in axes] == [(40, 50, 3)] * 2
    assert axes[0].images[0].get_extent() == pytest.approx([-10, 990, 790, -10])
    # A pixel of the file is drawn at its coordinate, also when the file is larger than what is drawn.
    pixels = np.zeros((1200, 4100, 3), np.uint8)
    pixels[510:530, 520:540] = 255
    Image.fromarray(pixels).save(tmp_path / "x.png")
    axes = sfm.pl.spatial(adata, library_key="slide", img={"s1": "lowres", "s2": tmp_path / "x.png"})
    (image,) = axes[1].images
    assert max(image.get_array().shape) <= 2000
    figure = axes[1].figure
    figure.canvas.draw()
    canvas = np.asarray(figure.canvas.buffer_rgba())
    for x, y, value in [(530, 520, 255), (525, 515, 255), (512, 520, 0), (530, 503, 0), (530, 537, 0)]:
        column, row = axes[1].transData.transform((x, y)).astype(int)
        assert canvas[canvas.shape[0] - 1 - row, column, 0] == value
    with pytest.raises(KeyError, match="img has nothing for slide 's2'"):
        sfm.pl.spatial(adata, library_key="slide", img={"s1": "lowres"})
    with pytest.raises(FileNotFoundError, match="img='nope' is neither a file nor"):
        sfm.pl.spatial(adata, library_key="slide", img="nope")


def test_image_that_cannot_be_drawn_is_left_out(adata):
    with_image(adata).uns["spatial"]["s1"]["images"]["hires"] = np.zeros((400, 500, 7))
    with pytest.warns(UserWarning, match="drawn without it"):
        assert not sfm.pl.spatial(adata, "kind").images
    with pytest.raises(ValueError, match=r"\(400, 500, 7\)"):
        sfm.pl.spatial(adata, "kind", img="hires")


@pytest.mark.parametrize("change", [lambda xy: xy / 1e4, lambda xy: xy + 1e4])
def test_image_in_another_unit_is_left_out(adata, change):
    with_image(adata).obsm["spatial"] = change(adata.obsm["spatial"])
    with pytest.warns(UserWarning, match="do not fit its image 'hires' of 500 x 400 pixels.*drawn without it"):
        ax = sfm.pl.spatial(adata, "kind")
    assert not ax.images
    assert points(ax).get_widths()[0] < 11
    with pytest.raises(ValueError, match="same unit"):
        sfm.pl.spatial(adata, "kind", img=True)


def test_given_axes_are_used(adata):
    figure, axes = plt.subplots(1, 2)
    assert sfm.pl.spatial(adata, "kind", ax=axes[0]) is axes[0]
    assert sfm.pl.spatial(adata, "value", library_key="slide", ax=axes) == list(axes)
    assert plt.get_fignums() == [figure.number]
    with pytest.raises(ValueError, match="holds 1 axes, but this figure has 2 panels"):
        sfm.pl.spatial(adata, "kind", library_key="slide", ax=axes[0])


def test_percentile_limits(adata):
    ax = sfm.pl.spatial(adata, "g0", vmin=1, vmax="p90")
    assert points(ax).get_clim() == (1, np.percentile(adata.X[:, 0].toarray(), 90))
    with pytest.raises(ValueError, match="vmax='90%'"):
        sfm.pl.spatial(adata, "g0", vmax="90%")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"color": "knid"}, "did you mean.*kind"),
        ({"color": "knid", "groups": "a"}, "did you mean.*kind"),
        ({"color": "g1", "layer": "nope"}, "layer='nope'"),
        ({"color": "kind", "library_key": "nope"}, "library_key='nope'"),
        ({"color": "kind", "basis": "nope"}, "nope"),
    ],
)
def test_refusals_make_no_figure(adata, kwargs, message):
    with pytest.raises(KeyError, match=message):
        sfm.pl.spatial(adata, **kwargs)
    assert not plt.get_fignums()


def test_odd_tissues(adata, tmp_path):
    with pytest.raises(ValueError, match="adata holds no cells"):
        sfm.pl.spatial(adata[:0], "kind")
    one = adata[:1]
    assert len(drawn(sfm.pl.spatial(one, "kind"))) == 1
    adata.obs["empty"] = np.full(adata.n_obs, np.nan)
    adata.obs["names"] = np.resize(["", "a$b", "c_d"], adata.n_obs)
    sfm.pl.spatial(adata, "names")
    adata.obsm["line"] = np.column_stack([np.arange(60.0), np.zeros(60), np.zeros(60)])
    ax = sfm.pl.spatial(adata, ["empty", "value"], basis="line")[0]
    ax.figure.savefig(tmp_path / "x.pdf")
    adata.write_h5ad(tmp_path / "x.h5ad")
    backed = ad.read_h5ad(tmp_path / "x.h5ad", backed="r")
    assert drawn(sfm.pl.spatial(backed, "g1")) == drawn(sfm.pl.spatial(adata, "g1"))


def test_legends_stay_inside_the_figure(adata):
    adata.obs["many"] = [f"a rather long name of a cell type {i % 25}" for i in range(adata.n_obs)]
    adata.obs["uneven"] = [f"{'long name ' if i % 25 < 3 else ''}{i % 25}" for i in range(adata.n_obs)]
    axes = sfm.pl.spatial(adata, ["many", "kind", "uneven", "value"], ncols=2)
    figure = axes[0].figure
    figure.canvas.draw()
    # Short columns do not take the room of long ones.
    assert axes[2].get_legend()._ncols > 1
    assert axes[3].get_window_extent().x0 - axes[2].get_legend().get_tightbbox().x1 < 0.8 * figure.dpi
    for ax in axes:
        for part in [ax.get_legend(), *ax.child_axes]:
            if part is not None:
                box = part.get_tightbbox()
                assert box.x0 >= 0
                assert box.x1 <= figure.bbox.width
                assert box.y0 >= 0
                assert box.y1 <= figure.bbox.height


def test_wide_slides_are_below_each_other(adata):
    square = sfm.pl.spatial(adata, ["kind", "value"])
    assert square[0].get_position().y0 == pytest.approx(square[1].get_position().y0)
    adata.obsm["spatial"] = adata.obsm["spatial"] * [10, 1]
    wide = sfm.pl.spatial(adata, ["kind", "value"])
    assert wide[0].get_position().y0 > wide[1].get_position().y1
    assert wide[0].figure.get_figwidth() < 13


def test_outlines_part_categories(adata, tmp_path):
    from matplotlib.collections import LineCollection
    from scipy.spatial import cKDTree

    adata.obs["part"] = np.where(adata.obsm["spatial"][:, 0] % 500 < 25, "left", "right")
    axes = sfm.pl.spatial(adata, "kind", library_key="slide", outline="part")
    for ax, corner in zip(axes, [0, 500], strict=True):
        (lines,) = [c for c in ax.collections if isinstance(c, LineCollection)]
        ends = np.array(lines.get_segments())
        ends = ends[np.ptp(ends, axis=1).max(axis=1) > 1e-6]
        # A square lattice of 10: the border is between the third and fourth column, along all inner rows.
        np.testing.assert_allclose(ends[..., 0], corner + 25)
        inner = np.sort(ends[..., 1], axis=1)
        assert {(corner + y - 5, corner + y + 5) for y in (10, 20, 30)} <= set(map(tuple, inner.round(6)))
        middles = ends.mean(axis=1)
        _, near = cKDTree(adata.obsm["spatial"]).query(middles, k=2)
        part = adata.obs["part"].to_numpy()[near]
        assert (part[:, 0] != part[:, 1]).all()
    plain = sfm.pl.spatial(adata[:1], outline="part")
    assert not [c for c in plain.collections if isinstance(c, LineCollection)]
    with pytest.raises(KeyError, match="outline='nope'"):
        sfm.pl.spatial(adata, outline="nope")


def test_a_number_is_no_gene():
    adata = ad.AnnData(np.ones((3, 2), np.float32), obsm={"spatial": np.eye(3)[:, :2]})
    with pytest.raises(KeyError, match="color=1: neither a column"):
        sfm.pl.spatial(adata, [1])
