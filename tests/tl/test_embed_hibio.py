"""tl.embed with HiBio: results compared with the model by hand, invariances, errors, and use by other functions."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse.csgraph import connected_components

import spatialfm as sfm
from spatialfm._data._genes import match_genes
from spatialfm.models import HiBio, HiBioConfig
from spatialfm.models._propagate import transition_tensor
from spatialfm.pp._pathways import read_sets
from spatialfm.train import pretrain

WIDTH = 8


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """For such small matrices, several threads are slower than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(make_spots):
    """A model trained for three steps on slides that no test embeds, with queries that are not zero."""
    slides = {f"t{k}": make_spots(20 + k, 120, f"t{k}") for k in range(3)}
    model = pretrain(
        slides, architecture="hibio", config={"width": WIDTH, "n_components": 8}, max_steps=3, context_size=40,
        cells_per_step=80, device="cpu",
    )  # fmt: skip
    with torch.no_grad():
        for query in (model.gene_query, model.image_query):
            query.copy_(torch.linspace(-1, 1, WIDTH))
    return model


@pytest.fixture
def adata(make_spots):
    """Two slides side by side, with shuffled rows."""
    both = ad.concat([make_spots(0, 140, "a"), make_spots(1, 100, "b")])
    both.obsm["spatial"][140:] += np.array([5000, 0])
    return both[np.random.default_rng(0).permutation(240)].copy()


@pytest.fixture(scope="module")
def embedded(make_spots, model):
    """Both modalities of one slide."""
    adata = make_spots(0, 140, "a")
    sfm.tl.embed(adata, model)
    return adata


def torch_model(model, name, x):
    with torch.no_grad():
        return torch.nn.functional.normalize(getattr(model, name)(x), dim=1).numpy()


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_written_fields(embedded, make_spots, model):
    before, n = make_spots(0, 140, "a"), 140
    both = {"X_hibio", "X_hibio_gene", "X_hibio_image", "hibio_anchors", "hibio_anchors_image", "hibio_regions"}
    assert set(embedded.obsm) == {"spatial", "image_features", *both}
    assert set(embedded.uns) == {"spatial_neighbors", "embeddings", "spatialfm"}
    assert set(embedded.obsp) == {"spatial_connectivities", "spatial_distances"}
    assert list(embedded.obs) == [*before.obs, "hibio_region_1", "hibio_region_2"]
    assert (embedded.X != before.X).nnz == 0
    np.testing.assert_array_equal(embedded.obsm["image_features"], before.obsm["image_features"])
    for key, columns in (("X_hibio", 12), ("X_hibio_gene", WIDTH), ("X_hibio_image", WIDTH)):
        assert embedded.obsm[key].shape == (n, columns)
        assert embedded.obsm[key].dtype == np.float32
        assert np.isfinite(embedded.obsm[key]).all()
    for key in ("X_hibio_gene", "X_hibio_image"):
        np.testing.assert_allclose(np.linalg.norm(embedded.obsm[key], axis=1), 1, atol=1e-5)
    assert list(embedded.obsm["hibio_regions"]) == ["gene_1", "gene_2", "image_1", "image_2"]
    for key in ("hibio_anchors", "hibio_anchors_image", "hibio_regions"):
        assert embedded.obsm[key].index.equals(embedded.obs_names)
        assert (embedded.obsm[key].dtypes == np.float32).all()
    entry = embedded.uns["embeddings"]["X_hibio"]
    assert set(entry) == {"model", "sha256", "axes", "id", "slides", "modalities", "params", "genes", "regions"}
    assert (entry["model"], entry["sha256"]) == ("hibio", sfm.models.fingerprint(model))
    assert entry["modalities"] == ["gene", "image"]
    assert entry["regions"] == ["hibio_region_1", "hibio_region_2"]
    assert entry["genes"] == {
        "n_in": 60, "n_used": 60, "names": list(before.var_names), "left_out": [], "left_out_reasons": []
    }  # fmt: skip
    assert entry["params"] == {
        "library_key": "",
        "layer": "",
        "basis": "spatial",
        "values": "counts",
        "device": "cpu",
        "gene_sets": "hallmark",
    }


def test_shared_space_and_anchors_by_hand(embedded, make_spots, model):
    adata = make_spots(0, 140, "a")
    sfm.pp.tfidf(adata)
    names = list(model.config.genes)
    profile = adata[:, names].layers["tfidf"].toarray()
    e = (profile - profile.mean(0)) @ model.gene_vectors.numpy()
    gene = torch_model(model, "gene_head", torch.from_numpy(e))
    np.testing.assert_allclose(embedded.obsm["X_hibio_gene"], gene, atol=1e-4)

    one = torch.zeros(140, dtype=torch.long)
    transition = transition_tensor(embedded.obsp["spatial_connectivities"].tocsr(), torch.device("cpu"))
    with torch.no_grad():
        e = model.read_image(torch.from_numpy(adata.obsm["image_features"]), transition, one)
    image = torch_model(model, "image_head", e)
    np.testing.assert_allclose(embedded.obsm["X_hibio_image"], image, atol=1e-3)
    # Patches and profiles of the same spot were aligned.
    own, others = (gene * image).sum(1).mean(), (gene @ image.T).mean()
    assert own > others + 0.5

    sets = {k: [g for g in names if g in v] for k, v in read_sets("hallmark", "human")[0].items()}
    sets = {k: v for k, v in sets.items() if v}
    found, found_image = embedded.obsm["hibio_anchors"], embedded.obsm["hibio_anchors_image"]
    assert list(found) == list(found_image) == list(sets)
    for name, genes in sets.items():
        vector = model.gene_vectors[[names.index(g) for g in genes]].mean(0, keepdim=True)
        anchor = torch_model(model, "gene_head", vector)[0]
        np.testing.assert_allclose(found[name], gene @ anchor, atol=1e-4)
        np.testing.assert_allclose(found_image[name], image @ anchor, atol=1e-3)


def test_regions_by_hand(embedded, model):
    codes = [embedded.obs[c].cat.codes.to_numpy() for c in ("hibio_region_1", "hibio_region_2")]
    coarse, fine = codes
    assert len({*zip(coarse, fine, strict=True)}) == fine.max() + 1 > coarse.max() + 1  # nested
    graph = embedded.obsp["spatial_connectivities"].tocsr()
    for region in codes:
        assert set(region) == set(range(region.max() + 1))
        for k in range(region.max() + 1):
            inside = np.flatnonzero(region == k)
            assert connected_components(graph[inside][:, inside])[0] == 1
    z = {name: embedded.obsm[f"X_hibio_{name}"] for name in ("gene", "image")}
    query = model.gene_query.detach().numpy()
    for mine, other in (("gene", "image"), ("image", "gene")):
        for level, region in enumerate(codes):
            weight = np.exp(z[other] @ query)
            pooled = np.stack(
                [
                    np.average(z[other][region == k], axis=0, weights=weight[region == k])
                    for k in range(region.max() + 1)
                ]
            )
            expected = (z[mine] * unit(pooled)[region]).sum(1)
            np.testing.assert_allclose(embedded.obsm["hibio_regions"][f"{mine}_{level + 1}"], expected, atol=1e-4)


def test_fused_is_smooth_on_the_tissue(embedded):
    """Neighbours are closer to each other than random pairs of spots."""
    x = embedded.obsm["X_hibio"]
    i, j = embedded.obsp["spatial_connectivities"].nonzero()
    near = np.linalg.norm(x[i] - x[j], axis=1).mean()
    random_pairs = np.linalg.norm(x - np.random.default_rng(0).permutation(x), axis=1).mean()
    assert near < 0.5 * random_pairs
    assert np.square(x).sum(1).mean() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("how", ["image=False", "no features"])
def test_expression_alone(embedded, make_spots, model, how, messages):
    adata = make_spots(0, 140, "a")
    if how == "no features":
        del adata.obsm["image_features"]
    sfm.tl.embed(adata, model, image=False if how == "image=False" else None)
    assert any("from expression by hibio" in message for message in messages())
    assert adata.uns["embeddings"]["X_hibio"]["modalities"] == ["gene"]
    assert {"X_hibio_image", "hibio_anchors_image"}.isdisjoint(adata.obsm)
    assert list(adata.obsm["hibio_regions"]) == ["gene_1", "gene_2"]
    np.testing.assert_array_equal(adata.obsm["X_hibio_gene"], embedded.obsm["X_hibio_gene"])
    pd.testing.assert_frame_equal(adata.obsm["hibio_anchors"], embedded.obsm["hibio_anchors"])
    # Regions are those of the expression in both cases; the fused embedding differs.
    pd.testing.assert_series_equal(adata.obs["hibio_region_2"], embedded.obs["hibio_region_2"])
    assert np.abs(adata.obsm["X_hibio"] - embedded.obsm["X_hibio"]).max() > 0.01
    # Similarity of each spot to its own region, in the same modality.
    assert adata.obsm["hibio_regions"].to_numpy().mean() > 0.5


def test_image_alone(embedded, make_spots, model, messages):
    adata = make_spots(0, 140, "a")[:, []].copy()
    sfm.tl.embed(adata, model)
    assert any("0 of 0 features, from image by hibio" in message for message in messages())
    assert adata.uns["embeddings"]["X_hibio"]["modalities"] == ["image"]
    assert adata.uns["embeddings"]["X_hibio"]["genes"] == {
        "n_in": 0, "n_used": 0, "names": [], "left_out": [], "left_out_reasons": []
    }  # fmt: skip
    assert adata.uns["embeddings"]["X_hibio"]["params"]["values"] == "none"
    assert {"X_hibio_gene", "hibio_anchors_image"}.isdisjoint(adata.obsm)
    np.testing.assert_allclose(adata.obsm["X_hibio_image"], embedded.obsm["X_hibio_image"], atol=1e-5)
    np.testing.assert_allclose(adata.obsm["hibio_anchors"], embedded.obsm["hibio_anchors_image"], atol=1e-5)
    assert list(adata.obsm["hibio_regions"]) == ["image_1", "image_2"]
    assert adata.obsm["X_hibio"].shape[0] == 140
    assert np.isfinite(adata.obsm["X_hibio"]).all()
    with pytest.raises(ValueError, match="neither genes nor an image; pass the image with image="):
        sfm.tl.embed(adata, model, image=False)


def test_results_of_an_earlier_call_are_removed(embedded, model):
    adata = embedded.copy()
    sfm.tl.embed(adata, model, image=False, gene_sets=None)
    assert {k for k in adata.obsm if "hibio" in k} == {"X_hibio", "X_hibio_gene", "hibio_regions"}
    assert adata.uns["embeddings"]["X_hibio"]["params"]["gene_sets"] == ""
    sfm.tl.embed(
        adata, model, image=False, key_added="other", gene_sets={"one/two": ["no such gene", *adata.var_names[:3]]}
    )
    assert list(adata.obsm["other_anchors"]) == ["one-two"]
    assert {"X_other", "X_other_gene", "other_regions"} <= set(adata.obsm)
    assert {"other_region_1", "other_region_2"} <= set(adata.obs)
    assert adata.uns["embeddings"]["X_other"]["params"]["gene_sets"] == "given"
    assert adata.uns["embeddings"]["X_hibio"]["params"]["gene_sets"] == ""


def test_a_key_holds_results_of_one_model(embedded, model):
    """Another model with the same key replaces all fields, in either order."""
    adata = embedded.copy()
    columns = list(adata.obs)
    sfm.tl.embed(adata, key_added="hibio")
    assert {k for k in adata.obsm if "hibio" in k} == {"X_hibio_niche", "X_hibio_state"}
    assert list(adata.obs) == [c for c in columns if not c.startswith("hibio_region")]
    assert {k: r["model"] for k, r in adata.uns["embeddings"].items()} == dict.fromkeys(
        ("X_hibio_niche", "X_hibio_state"), "heist-niche"
    )
    sfm.tl.embed(adata, model)
    assert {k for k in adata.obsm if "hibio" in k} == {k for k in embedded.obsm if "hibio" in k}
    assert list(adata.obs) == columns
    assert adata.uns["embeddings"]["X_hibio"]["sha256"] == sfm.models.fingerprint(model)


def test_gene_sets_of_a_file(embedded, model, tmp_path):
    path = tmp_path / "own.gmt"
    path.write_text("\t".join(["mine", "", *embedded.var_names[:4]]) + "\n")
    adata = embedded.copy()
    for given in (path, str(path)):
        sfm.tl.embed(adata, model, image=False, gene_sets=given)
        assert list(adata.obsm["hibio_anchors"]) == ["mine"]
        assert adata.uns["embeddings"]["X_hibio"]["params"]["gene_sets"] == str(path)


def same_partition(a, b):
    return len({*zip(a, b, strict=True)}) == len(set(a)) == len(set(b))


@pytest.mark.parametrize("form", ["rows", "dense", "csc", "int", "view", "backed", "copy"])
def test_does_not_depend_on_the_form(adata, model, form, tmp_path):
    expected = sfm.tl.embed(adata, model, library_key="slide", copy=True)
    assert "embeddings" not in adata.uns
    order = np.arange(240)
    other = adata.copy()
    if form == "rows":
        order = np.random.default_rng(1).permutation(240)
        other = other[order].copy()
    elif form == "view":
        other = ad.concat([adata, adata[:5]], index_unique="-")[:240]
    elif form == "backed":
        other.write_h5ad(tmp_path / "a.h5ad")
        other = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    elif form != "copy":
        x = {"dense": other.X.toarray(), "csc": other.X.tocsc(), "int": other.X.astype(np.int64)}[form]
        other.X = x
    if form == "copy":
        other = sfm.tl.embed(other, model, library_key="slide", copy=True, batch_size=1)
    else:
        assert sfm.tl.embed(other, model, library_key="slide") is None
    for key in ("X_hibio", "X_hibio_gene", "X_hibio_image", "hibio_anchors", "hibio_anchors_image", "hibio_regions"):
        np.testing.assert_allclose(np.asarray(other.obsm[key]), np.asarray(expected.obsm[key])[order], atol=2e-4)
    for column in ("hibio_region_1", "hibio_region_2"):
        assert same_partition(other.obs[column], expected.obs[column].iloc[order])
    if form == "backed":
        other.file.close()


@pytest.mark.parametrize("idf", [True, False])
def test_slides_do_not_change_each_other(adata, model, idf):
    """Patches and expression of slides are read separately, except that all slides share weights of genes."""
    from dataclasses import replace

    own = HiBio(replace(model.config, idf=idf)).eval()
    own.load_state_dict(model.state_dict())
    a = adata.obs["slide"] == "a"
    together = sfm.tl.embed(adata, own, library_key="slide", copy=True)[a]
    alone = sfm.tl.embed(adata[a].copy(), own, copy=True)
    np.testing.assert_allclose(together.obsm["X_hibio_image"], alone.obsm["X_hibio_image"], atol=1e-4)
    gap = np.abs(together.obsm["X_hibio_gene"] - alone.obsm["X_hibio_gene"]).max()
    assert gap > 1e-3 if idf else gap < 1e-4
    # No region spans several slides.
    whole = sfm.tl.embed(adata, own, library_key="slide", copy=True)
    for column in ("hibio_region_1", "hibio_region_2"):
        assert (whole.obs.groupby(column, observed=True)["slide"].nunique() == 1).all()


def test_mouse_by_orthologs(embedded, make_spots, model):
    adata = make_spots(0, 140, "a")
    human = np.array(adata.var_names)
    mouse = match_genes(human, "human", to="mouse")["gene_symbol"].to_numpy()
    back = match_genes(mouse, "mouse", to="human")["gene_symbol"].to_numpy()
    kept = np.flatnonzero((mouse != "") & (back == human))
    assert 40 < len(kept) < 60 or len(kept) == 60
    expected = adata[:, kept].copy()
    adata = adata[:, kept].copy()
    adata.var_names = mouse[kept]
    sfm.tl.embed(adata, model)
    sfm.tl.embed(expected, model)
    np.testing.assert_allclose(adata.obsm["X_hibio_gene"], expected.obsm["X_hibio_gene"], atol=1e-5)
    pd.testing.assert_frame_equal(adata.obsm["hibio_anchors"], expected.obsm["hibio_anchors"], atol=1e-5)
    assert adata.uns["embeddings"]["X_hibio"]["genes"]["names"] == list(mouse[kept])


def test_an_image_is_read_and_kept(make_spots, model):
    """A model of the built-in tower writes the same features as tl.image_features."""
    adata = make_spots(3, 30, "a")
    del adata.obsm["image_features"]
    own = HiBio(HiBioConfig(genes=tuple(adata.var_names), width=4, n_components=4)).eval()
    generator = torch.Generator().manual_seed(0)
    own.gene_vectors.copy_(torch.randn(own.gene_vectors.shape, generator=generator))
    own.image_weights.copy_(torch.randn(own.image_weights.shape, generator=generator))
    adata.obsm["spatial"] += 50
    image = np.random.default_rng(0).integers(0, 255, (650, 650, 3), dtype=np.uint8)
    patches = sfm.pp.patches(adata, image, size_px=48, out_px=48)
    expected = sfm.tl.image_features(adata, patches, copy=True)
    sfm.tl.embed(adata, own, image=patches, batch_size=4)
    np.testing.assert_allclose(adata.obsm["image_features"], expected.obsm["image_features"], atol=1e-3)
    assert adata.uns["image_features"]["tower"] == own.config.tower
    assert adata.uns["embeddings"]["X_hibio"]["modalities"] == ["gene", "image"]
    again = adata.copy()
    sfm.tl.embed(again, own)  # the image is not read again
    np.testing.assert_array_equal(again.obsm["X_hibio_image"], adata.obsm["X_hibio_image"])
    again.uns["image_features"]["tower"] = "phikon"
    with pytest.raises(
        ValueError, match=r"1290 columns by the tower 'phikon', but 'hibio' needs 1290 by 'efficientnet-lite0'"
    ):
        sfm.tl.embed(again, own)


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize("alone", [None, "gene", "image"])
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_round_trip(embedded, make_spots, model, tmp_path, suffix, alone):
    adata = embedded.copy()
    if alone:
        adata = make_spots(0, 140, "a")
        adata = adata if alone == "gene" else adata[:, []].copy()
        sfm.tl.embed(adata, model, image=False if alone == "gene" else None)
    path = tmp_path / f"a.{suffix}"
    getattr(adata, f"write_{suffix}")(path)
    back = (ad.read_h5ad if suffix == "h5ad" else ad.read_zarr)(path)
    assert set(back.obsm) == set(adata.obsm)
    for key in adata.obsm:
        if isinstance(adata.obsm[key], pd.DataFrame):
            pd.testing.assert_frame_equal(back.obsm[key], adata.obsm[key], check_index_type=False)
        else:
            np.testing.assert_array_equal(back.obsm[key], adata.obsm[key])
    for column in ("hibio_region_1", "hibio_region_2"):
        assert list(back.obs[column]) == list(adata.obs[column])
        assert list(back.obs[column].cat.categories) == list(adata.obs[column].cat.categories)
    entry, read = adata.uns["embeddings"]["X_hibio"], back.uns["embeddings"]["X_hibio"]
    assert set(read) == set(entry)
    assert read["params"] == entry["params"]
    for key in ("modalities", "regions"):
        assert list(read[key]) == entry[key]
    assert list(read["genes"]["names"]) == entry["genes"]["names"]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("modality", ["gene", "image"])
def test_very_few_spots(make_spots, model, n, modality):
    adata = make_spots(0, 140, "a")[:n].copy()
    if modality == "image":
        adata = adata[:, []].copy()
    if (n, modality) == (1, "gene"):
        with pytest.raises(ValueError, match="none of the 60 features varies between the 1 cells"):
            sfm.tl.embed(adata, model)
        return
    sfm.tl.embed(adata, model)
    for key in ("X_hibio", f"X_hibio_{modality}", "hibio_anchors", "hibio_regions"):
        assert np.isfinite(np.asarray(adata.obsm[key])).all()


def spoil(adata, how):
    if how == "features":
        adata.obsm["image_features"][0, 0] = np.nan
    elif how == "width":
        adata.obsm["image_features"] = adata.obsm["image_features"][:, :30]
    elif how == "other genes":
        sets = list(read_sets("hallmark", "human")[0].values())
        known = set(adata.var_names)
        new = [g for g in dict.fromkeys(g for s in sets[10:] for g in s) if g not in known]
        adata.var_names = [*adata.var_names[:19], *new[:41]]
    elif how == "no genes":
        adata.var_names = [f"probe{i}" for i in range(60)]
    elif how == "scaled":
        adata.X = np.random.default_rng(0).normal(size=adata.shape).astype(np.float32)
    elif how == "coordinates":
        adata.obsm["spatial"][0] = np.nan
    elif how == "empty":
        return adata[:0].copy()
    return adata


@pytest.mark.parametrize(
    ("how", "arguments", "error", "match"),
    [
        ("features", {}, ValueError, r"obsm\['image_features'\] holds values that are not finite"),
        ("width", {}, ValueError, r"has 30 columns.*'hibio' needs 40.*or image=False for expression alone"),
        ("other genes", {}, ValueError, r"only 19 of 60 features are genes of 'hibio'.*sfm.pp.resolve_genes"),
        ("no genes", {}, ValueError, "probe0"),
        ("scaled", {}, ValueError, "look like scaled values"),
        ("coordinates", {}, ValueError, "NaN or infinite coordinates for 1 of 240"),
        ("empty", {}, ValueError, "no spots"),
        (None, {"gene_sets": {"a": ["nope"]}}, ValueError, r"has none of the genes of gene_sets="),
        (None, {"gene_sets": "kegg"}, FileNotFoundError, "'kegg' is neither one of"),
        (None, {"library_key": "donor"}, KeyError, "library_key='donor'"),
        (None, {"layer": "raw"}, KeyError, "layer='raw'"),
        (None, {"basis": "where"}, KeyError, r"obsm\['where'\] is missing"),
        (None, {"device": "toaster"}, ValueError, "toaster"),
        (None, {"batch_size": 0}, ValueError, "batch_size must be a positive integer"),
    ],
)
def test_bad_input_does_not_change_adata(adata, model, how, arguments, error, match):
    adata = spoil(adata, how)
    before = adata.copy()
    with pytest.raises(error, match=match):
        sfm.tl.embed(adata, model, **{"library_key": "slide", **arguments})
    for name in ("obs", "obsm", "obsp", "uns", "layers", "var"):
        assert set(getattr(adata, name)) == set(getattr(before, name))


def test_twenty_genes_are_enough(adata, model):
    sfm.tl.embed(adata[:, :20].copy(), model, library_key="slide")


def test_image_is_an_option_of_hibio_only(adata):
    for image in ("slide.png", False):
        with pytest.raises(ValueError, match=r"image= is an option of 'hibio'.*Leave it out, or use model='hibio'"):
            sfm.tl.embed(adata, image=image)
    assert "embeddings" not in adata.uns


def test_embeddings_that_are_not_finite_are_refused(adata, model):
    from copy import deepcopy

    broken = deepcopy(model)
    broken.gene_vectors.fill_(float("inf"))
    with pytest.raises(ValueError, match="the embedding by 'hibio' is not finite"):
        sfm.tl.embed(adata, broken, library_key="slide")
    assert "embeddings" not in adata.uns


def test_use_by_other_functions(adata, model, make_spots):
    import matplotlib.pyplot as plt

    sfm.tl.embed(adata, model, library_key="slide")
    other = make_spots(7, 100, "c")
    sfm.tl.embed(other, model)
    sfm.tl.retrieve(other, adata, "image->gene", n=5)
    assert other.uns["retrieved"]
    sfm.tl.retrieve(other, other.copy(), "image->gene", n=5, paired=True)
    recall = sfm.get.retrieval_recall_df(other, at=[0.1])
    assert recall["recall"].item() > 3 * recall["chance"].item()
    sfm.tl.domains(adata, 4, use_rep="X_hibio", library_key="slide")
    assert adata.obs["domain"].nunique() <= 4
    labels = adata.obs["dominant"].astype(object).copy()
    hidden = np.random.default_rng(0).permutation(240)[80:]
    labels.iloc[hidden] = np.nan
    adata.obs["few"] = pd.Categorical(labels)
    sfm.tl.annotate_regions(adata, "few", use_rep="X_hibio")
    right = (adata.obs["region_label"].astype(str) == adata.obs["dominant"]).to_numpy()[hidden].mean()
    assert right > 0.4  # four patterns, chance about a quarter
    axes = sfm.pl.pathways(adata, key="hibio_anchors", n=2, library_key="slide")
    assert axes
    plt.close("all")
    # Similarity to anchors follows the activity of pathways.
    sfm.pp.pathways(other, min_genes=8)
    activity, similarity = other.obsm["pathways"], other.obsm["hibio_anchors"]
    found = [activity[c].corr(similarity[c], method="spearman") for c in activity]
    assert len(found) >= 4
    assert np.mean(found) > 0.5
