"""tl.predict_expression: values by plain matrices, what does not matter, names of genes, errors."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import spatialfm as sfm
from spatialfm.models import HEISTNiche, HEISTNicheConfig, HiBio, HiBioConfig

N, D = 40, 5  # spots, columns of the patches' features
GENES = ("EPCAM", "CD3D", "TP53", "CXCL5", "CXCL6", "ERBB2", "SNORA74", "SNORA74D")
CONFIDENCE = np.array([0.6, 0.5, 0.4, 0.3, 0.25, 0.1, 0.15, 0.0], np.float32)
KEY = "predicted_expression"
OF_MOUSE = ["Trp53", "Epcam", "Cxcl5", "Actb", "Cd3d", "Gapdh"]  # Cxcl5 is the ortholog of CXCL6


def make_model(n_features=D, genes=GENES):
    """Random weights, and a mean that keeps most predictions above zero."""
    model = HiBio(HiBioConfig(genes=genes, n_features=n_features, width=3, radii=(0.0, 2.0)))
    generator = torch.Generator().manual_seed(0)
    for weights in (model.image_weights, model.decoder):
        weights.copy_(torch.randn(weights.shape, generator=generator) * 0.3)
    model.mean_expression.copy_(torch.linspace(0.2, 2, len(genes)))
    model.confidence.copy_(torch.from_numpy(CONFIDENCE[: len(genes)]))
    return model


MODEL = make_model()


def spots(names=(), n=N, seed=0):
    """Two slides, over each other; genes of the given names."""
    rng = np.random.default_rng(seed)
    return ad.AnnData(
        sp.csr_matrix(rng.poisson(1.0, (n, len(names))).astype(np.float32)),
        obs=pd.DataFrame({"slide": np.repeat(["a", "b"], [n // 2, n - n // 2])}, index=[f"s{i}" for i in range(n)]),
        var=pd.DataFrame(index=list(names)),
        obsm={"spatial": rng.uniform(0, 100, (n, 2)), "image_features": rng.normal(size=(n, D)).astype(np.float32)},
    )


def naive(adata, model, slides):
    """All genes in float64, from the graph that was written."""

    def standardized(x):
        out = np.empty_like(x)
        for rows in slides:
            out[rows] = (x[rows] - x[rows].mean(axis=0)) / (x[rows].std(axis=0) + 1e-6)
        return out

    graph = adata.obsp["spatial_connectivities"].toarray().astype(float)
    step = (np.eye(len(graph)) + graph / graph.sum(axis=1, keepdims=True)) / 2
    x = standardized(np.asarray(adata.obsm["image_features"], float))
    own, around = (w.double().numpy() for w in model.image_weights)
    e = standardized(x) @ own + standardized(step @ step @ x) @ around
    return np.maximum(model.mean_expression.double().numpy() + e @ model.decoder.double().numpy(), 0)


@pytest.mark.parametrize("library_key", [None, "slide"])
def test_values(library_key, monkeypatch):
    monkeypatch.setattr("spatialfm.engine._hibio._ROWS", 7)
    adata = spots()
    assert sfm.tl.predict_expression(adata, "all", model=MODEL, library_key=library_key) is None
    table = adata.obsm[KEY]
    slides = [np.arange(N)] if library_key is None else [np.arange(N // 2), np.arange(N // 2, N)]
    expected = naive(adata, MODEL, slides)
    np.testing.assert_allclose(table, expected, rtol=1e-4, atol=1e-5)
    assert (expected == 0).any()
    assert (table.to_numpy().dtype, list(table)) == (np.float32, list(GENES))
    entry = adata.uns[KEY]
    np.testing.assert_array_equal(entry.pop("confidence"), CONFIDENCE.astype(np.float64))
    assert entry == {
        "model": "hibio",
        "sha256": sfm.models.fingerprint(MODEL),
        "organism": "",
        "tissue": {"trained_on": ""},
        "params": {
            "genes": "all",
            "min_confidence": 0.2,
            "library_key": library_key or "",
            "basis": "spatial",
            "device": "cpu",
        },
    }
    assert set(adata.obsm) == {"spatial", "image_features", KEY}
    assert set(adata.uns) == {"spatial_neighbors", KEY, "spatialfm"}


def test_slides_are_on_their_own():
    adata = spots()
    together = sfm.tl.predict_expression(adata, "all", model=MODEL, library_key="slide", copy=True)
    alone = sfm.tl.predict_expression(adata[: N // 2].copy(), "all", model=MODEL, copy=True)
    np.testing.assert_allclose(together.obsm[KEY][: N // 2], alone.obsm[KEY], atol=1e-5)
    assert KEY not in adata.obsm
    assert "spatial_neighbors" not in adata.uns


def test_what_plays_no_part():
    """Not the expression, whatever it holds, nor the order of rows, nor a view, nor genes predicted beside."""
    adata = spots(OF_MOUSE)
    expected = sfm.tl.predict_expression(adata, ["EPCAM", "ERBB2"], model=MODEL, copy=True).obsm[KEY]

    other = adata.copy()
    other.X = np.full(adata.shape, np.nan, np.float32)
    sfm.tl.predict_expression(other, ["EPCAM", "ERBB2"], model=MODEL)
    pd.testing.assert_frame_equal(other.obsm[KEY], expected)
    assert np.isnan(other.X).all()
    without = adata[:, []].copy()
    sfm.tl.predict_expression(without, ["EPCAM", "ERBB2"], model=MODEL)
    pd.testing.assert_frame_equal(without.obsm[KEY], expected)

    view = adata[np.random.default_rng(3).permutation(N)]
    sfm.tl.predict_expression(view, ["ERBB2", "EPCAM"], model=MODEL)
    pd.testing.assert_frame_equal(view.obsm[KEY].loc[adata.obs_names, ["EPCAM", "ERBB2"]], expected)

    graph = adata.copy()
    sfm.pp.spatial_neighbors(graph, method="knn", n_neighbors=3)
    stored = graph.obsp["spatial_connectivities"].copy()
    sfm.tl.predict_expression(graph, ["EPCAM", "ERBB2"], model=MODEL)
    assert (graph.obsp["spatial_connectivities"] != stored).nnz == 0
    assert not np.allclose(graph.obsm[KEY], expected)  # a stored graph is used


@pytest.mark.parametrize(
    ("names", "organism", "columns"),
    [
        ([], "", ["EPCAM", "CD3D", "TP53", "CXCL5", "CXCL6"]),
        (["x", "y"], "", ["EPCAM", "CD3D", "TP53", "CXCL5", "CXCL6"]),
        (["CD3D", "TP53", "ACTB"], "human", ["EPCAM", "CD3D", "TP53", "CXCL5", "CXCL6"]),
        (
            ["ENSG00000141510.18", "ENSG00000119888", "EPCAM"],
            "human",
            ["ENSG00000119888", "CD3D", "ENSG00000141510.18", "CXCL5", "CXCL6"],
        ),
        (OF_MOUSE, "mouse", ["Epcam", "Cd3d", "Trp53", "CXCL5", "Cxcl5"]),
    ],
)
def test_default_genes(names, organism, columns):
    """Those of confidence, under the names that the file has for them."""
    adata = spots(names)
    sfm.tl.predict_expression(adata, model=MODEL)
    assert list(adata.obsm[KEY]) == columns
    assert adata.uns[KEY]["organism"] == organism
    np.testing.assert_array_equal(adata.uns[KEY]["confidence"], CONFIDENCE[:5].astype(np.float64))
    sfm.tl.predict_expression(adata, list(GENES[:5]), model=MODEL, key_added="by_symbol")
    np.testing.assert_array_equal(adata.obsm[KEY], adata.obsm["by_symbol"])
    assert list(adata.obsm["by_symbol"]) == list(GENES[:5])


def test_a_feature_keeps_its_name():
    """SNORA74 of mouse is SNORA74D of human, and there is another SNORA74 of human."""
    adata = spots([*OF_MOUSE, "SNORA74"])
    sfm.tl.predict_expression(adata, "all", model=MODEL)
    sfm.tl.predict_expression(adata, ["SNORA74D", "SNORA74"], model=MODEL, key_added="named")
    assert adata.obsm[KEY].columns.is_unique
    np.testing.assert_array_equal(adata.obsm[KEY]["SNORA74"], adata.obsm["named"]["SNORA74D"])
    np.testing.assert_array_equal(adata.obsm["named"]["SNORA74"], adata.obsm["named"]["SNORA74D"])


def test_named_genes(messages):
    names = ["ENSMUSG00000059552", "CXCL5", "Cxcl5", "erbb2", "ENSG00000119888.4", "EPCAM"]
    truth = ["TP53", "CXCL5", "CXCL6", "ERBB2", "EPCAM", "EPCAM"]
    adata = spots()
    sfm.tl.predict_expression(adata, "all", model=MODEL, key_added="all")
    sfm.tl.predict_expression(adata, names, model=MODEL)
    assert list(adata.obsm[KEY]) == names
    np.testing.assert_array_equal(adata.obsm[KEY], adata.obsm["all"][truth])
    assert adata.uns[KEY]["params"]["genes"] == "given"
    assert (
        "40 spots x 6 genes by hibio, median confidence 0.35, 1 of them with a confidence below 0.2" in messages()[-1]
    )
    sfm.tl.predict_expression(adata, "CD3D", model=MODEL)
    assert list(adata.obsm[KEY]) == ["CD3D"]
    assert "below" not in messages()[-1]
    sfm.tl.predict_expression(adata, model=MODEL, min_confidence=0.45)
    assert list(adata.obsm[KEY]) == ["EPCAM", "CD3D"]


def test_image(tmp_path):
    """Read where no features are stored, and kept for the next call."""
    model = make_model(1290)
    sfm.models.save(model, tmp_path)
    adata = spots(n=9)
    del adata.obsm["image_features"]
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (200, 200, 3), dtype=np.uint8)
    adata.obsm["spatial"] = rng.integers(40, 160, (9, 2)).astype(float)
    patches = sfm.pp.patches(adata, image, size_px=32)
    other = sfm.tl.predict_expression(adata, "all", model=tmp_path, image=patches, copy=True)
    sfm.tl.predict_expression(adata, "all", model=model, image=patches)
    np.testing.assert_allclose(adata.obsm[KEY], other.obsm[KEY], rtol=1e-3, atol=1e-3)
    assert adata.uns["image_features"]["tower"] == "efficientnet-lite0"
    first = adata.obsm.pop(KEY)
    sfm.tl.predict_expression(adata, "all", model=model)
    pd.testing.assert_frame_equal(adata.obsm[KEY], first)
    np.testing.assert_allclose(first, naive(adata, model, [np.arange(9)]), rtol=1e-3, atol=1e-3)


def test_read_by_get_and_pl():
    adata = spots(OF_MOUSE)
    sfm.tl.predict_expression(adata, model=MODEL)
    predicted = sfm.get.predicted_expression(adata)
    assert predicted.var["confidence"].to_dict() == dict(
        zip(predicted.var_names, adata.uns[KEY]["confidence"], strict=True)
    )
    axes = sfm.pl.predicted_expression(adata, n=2)
    assert [ax.get_title(loc="left") for ax in axes[::3]] == ["Epcam measured", "Cd3d measured"]


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_round_trip(tmp_path, suffix):
    adata = spots(OF_MOUSE)
    sfm.tl.predict_expression(adata, model=MODEL, library_key="slide")
    getattr(adata, f"write_{suffix}")(tmp_path / f"a.{suffix}")
    back = getattr(ad, f"read_{suffix}")(tmp_path / f"a.{suffix}")
    pd.testing.assert_frame_equal(back.obsm[KEY], adata.obsm[KEY])
    np.testing.assert_array_equal(back.uns[KEY].pop("confidence"), adata.uns[KEY].pop("confidence"))
    assert back.uns[KEY] == adata.uns[KEY]


def without_image(adata):
    del adata.obsm["image_features"]


def of_another_tower(adata):
    adata.uns["image_features"] = {"tower": "uni"}


def not_finite(adata):
    adata.obsm["image_features"][3, 1] = np.nan


def no_coordinates(adata):
    del adata.obsm["spatial"]


def broken_image(adata):
    without_image(adata)
    adata.uns["spatial"] = {"lib": {"images": {"hires": np.zeros((9, 9, 3), np.uint8)}, "scalefactors": {}}}


def nothing(adata):
    pass


@pytest.mark.parametrize(
    ("change", "arguments", "error", "match"),
    [
        (without_image, {}, ValueError, "no image to predict from.*image="),
        (nothing, {"image": False}, ValueError, "no image to predict from"),
        (of_another_tower, {}, ValueError, r"by the tower 'uni'.*pass the image again with image=$"),
        (not_finite, {}, ValueError, "not finite; run sfm.tl.image_features"),
        (broken_image, {}, (KeyError, ValueError), r"in uns\['spatial'\] cannot be used.*another with image=['\"]?$"),
        (no_coordinates, {}, KeyError, r"obsm\['spatial'\] is missing"),
        (nothing, {"library_key": "no"}, KeyError, "library_key='no'"),
        (nothing, {"genes": ["EPCAMM", "ACTB", "zz"]}, KeyError, "3 of the 3 genes .*'EPCAMM' .did you mean .'EPCAM'"),
        (nothing, {"genes": ["ACTB", "CD3D"]}, KeyError, "1 of the 2 genes .*'ACTB' .a gene, but the model has not"),
        (nothing, {"genes": "zzzzz"}, KeyError, "'zzzzz' .no gene of human or mouse"),
        (nothing, {"genes": ["CD3D", "EPCAM", "CD3D"]}, ValueError, r"names \['CD3D'\] more than once"),
        (nothing, {"genes": []}, ValueError, "genes is empty"),
        (nothing, {"min_confidence": 0.7}, ValueError, r"none of the 8 genes .*the largest is 0.60"),
        (nothing, {"min_confidence": 20}, ValueError, "min_confidence=20 must be a number from -1 to 1"),
        (nothing, {"model": HEISTNiche(HEISTNicheConfig())}, ValueError, "'heist-niche' reads no histology"),
        (nothing, {"model": "heist-niche"}, ValueError, "'heist-niche' reads no histology.*model='hibio'"),
        (nothing, {"model": "nowhere"}, FileNotFoundError, "no model 'nowhere'"),
        (nothing, {"model": make_model(genes=())}, ValueError, "none of the 0 genes .*take a trained model"),
    ],
)  # fmt: skip
def test_errors(change, arguments, error, match):
    adata = spots()
    change(adata)
    before = adata.copy()
    with pytest.raises(error, match=match):
        sfm.tl.predict_expression(adata, **{"model": MODEL, **arguments})
    assert set(adata.obsm) == set(before.obsm)
    assert set(adata.uns) == set(before.uns)
    assert set(adata.obsp) == set(before.obsp)


def test_no_spots():
    with pytest.raises(ValueError, match="adata has no spots"):
        sfm.tl.predict_expression(spots()[:0].copy(), model=MODEL)


def test_not_finite():
    model = make_model()
    model.decoder[0, 0] = torch.nan
    with pytest.raises(ValueError, match="'hibio' predicts values that are not finite"):
        sfm.tl.predict_expression(spots(), model=model)


def test_a_call_keeps_to_a_backed_file(tmp_path):
    spots(OF_MOUSE).write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    sfm.tl.predict_expression(backed, model=MODEL)
    assert backed.isbacked
    memory = spots(OF_MOUSE)
    sfm.tl.predict_expression(memory, model=MODEL)
    pd.testing.assert_frame_equal(backed.obsm[KEY], memory.obsm[KEY])
    backed.file.close()
