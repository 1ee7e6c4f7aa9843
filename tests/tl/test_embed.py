"""tl.embed with HEIST and HEIST-niche: results, invariances and errors."""

from __future__ import annotations

import pickle

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score

import spatialfm as sfm
from spatialfm.engine import find_encoder
from spatialfm.models import HEIST, HEISTConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return HEIST(HEISTConfig(width=16, heads=2, layers=3, pe_dim=16)).eval()


@pytest.fixture(scope="module")
def niche():
    return sfm.models.load("heist-niche")


def make(n=300, g=24, seed=0, *, kind="counts"):
    rng = np.random.default_rng(seed)
    group = rng.integers(3, size=n)
    mean = np.exp(rng.normal(size=(3, g)))
    x = rng.poisson(mean[group] * 2).astype(np.float32)
    if kind == "intensity":
        x = (rng.gamma(2.0, 200.0, size=(n, g)) * mean[group] - 100).astype(np.float32)
    obs = pd.DataFrame(
        {"slide": np.where(np.arange(n) < n // 2, "a", "b"), "type": group.astype(str)},
        index=[f"cell{i}" for i in range(n)],
    )
    adata = ad.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"gene{i}" for i in range(g)]))
    adata.obsm["spatial"] = rng.random((n, 2)) * [1000, 600]
    return adata


def cosine(a, b):
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.fixture(scope="module")
def embedded(model):
    return sfm.tl.embed(make(), model, library_key="slide", context_size=64, copy=True)


def test_written_fields(embedded, model):
    n = embedded.n_obs
    assert embedded.obsm["X_heist"].shape == (n, 32)
    assert embedded.obsm["X_heist"].dtype == np.float32
    assert list(embedded.uns["embeddings"]) == ["X_heist"]
    record = embedded.uns["embeddings"]["X_heist"]
    assert record["blocks"] == {"cell": [0, 16], "gene": [16, 32]}
    assert record["axes"] == "model"
    assert record["sha256"] == sfm.models.fingerprint(model)
    assert record["genes"]["n_used"] == 24
    assert {"spatial_connectivities", "spatial_distances"} <= set(embedded.obsp)
    assert {"grn", "spatial_neighbors"} <= set(embedded.uns)
    np.testing.assert_array_equal(embedded.X, make().X)


def test_one_context_is_a_plain_call_of_the_model(model):
    """Compared with encode() on the whole slide."""
    adata = make(80)
    sfm.tl.embed(adata, model)
    genes = list(adata.uns["grn"]["genes"])
    x = torch.tensor(np.log1p(adata.X / adata.X.sum(1, keepdims=True) * 1e4))[:, adata.var_names.get_indexer(genes)]
    xy = adata.obsm["spatial"]
    coords = torch.tensor((xy - xy.mean(0)) / xy.std(0), dtype=torch.float32)
    names = list(adata.uns["grn"]["names"])
    networks = [torch.tensor(np.stack(adata.uns["grn"]["groups"][str(k)].nonzero())).long() for k in range(len(names))]
    group = torch.tensor([names.index(v) for v in adata.obs["grn_group"]])
    edges = torch.tensor(np.stack(adata.obsp["spatial_connectivities"].nonzero())).long()
    with torch.no_grad():
        h, g = model.encode(coords, edges, x, networks, group)
    np.testing.assert_allclose(adata.obsm["X_heist"], np.hstack([h.numpy(), g.mean(1).numpy()]), atol=2e-3)


def in_another_form(adata, form, folder):
    """The same cells in another layout."""
    if form == "csr":
        adata.X = sp.csr_matrix(adata.X)
    elif form == "csc":
        adata.X = sp.csc_matrix(adata.X)
    elif form == "float64":
        adata.X = adata.X.astype(np.float64)
    elif form == "int":
        adata.X = adata.X.astype(np.int32)
    elif form == "view":
        adata = ad.concat([adata, adata[:5]], index_unique="-")[: adata.n_obs]
    elif form == "backed":
        adata.write_h5ad(folder / "a.h5ad")
        adata = ad.read_h5ad(folder / "a.h5ad", backed="r")
    return adata


FORMS = ["csr", "csc", "backed", "view", "float64", "int"]


@pytest.mark.parametrize("change", ["rows", "batch", *FORMS])
def test_result_does_not_depend_on(change, embedded, model, tmp_path):
    adata = in_another_form(make(), change, tmp_path)
    expected = embedded.obsm["X_heist"]
    if change == "rows":
        order = np.random.default_rng(3).permutation(adata.n_obs)
        adata, expected = adata[order].copy(), expected[order]
    sfm.tl.embed(adata, model, library_key="slide", context_size=64, batch_size=1 if change == "batch" else None)
    np.testing.assert_allclose(adata.obsm["X_heist"], expected, atol=1e-3)
    if change == "backed":
        adata.file.close()


def test_slides_do_not_influence_each_other(model):
    adata = make()
    sfm.tl.embed(adata, model, library_key="slide", context_size=64)
    moved = make()
    second = (moved.obs["slide"] == "b").to_numpy()
    moved.obsm["spatial"][second] = moved.obsm["spatial"][second][::-1]
    moved.uns["grn"], moved.obs["grn_group"] = adata.uns["grn"], adata.obs["grn_group"]
    sfm.tl.embed(moved, model, library_key="slide", context_size=64)
    np.testing.assert_array_equal(moved.obsm["X_heist"][~second], adata.obsm["X_heist"][~second])
    assert np.abs(moved.obsm["X_heist"][second] - adata.obsm["X_heist"][second]).max() > 0.01


def test_stored_graphs_are_used(model):
    adata = make()
    sfm.pp.spatial_neighbors(adata, method="knn", n_neighbors=3, library_key="slide")
    sfm.pp.grn(adata, groupby="type")
    stored = adata.obsp["spatial_connectivities"].copy()
    sfm.tl.embed(adata, model, library_key="slide")
    assert "grn_group" not in adata.obs
    assert adata.uns["embeddings"]["X_heist"]["params"]["groupby"] == "type"
    assert (adata.obsp["spatial_connectivities"] != stored).nnz == 0


def test_kinds_of_values(model):
    counts = make()
    logged = make()
    logged.X = np.log1p(logged.X / logged.X.sum(1, keepdims=True) * 1e4)
    logged.layers["raw"] = counts.X.copy()
    for adata, layer, values in ((logged, None, "log"), (logged.copy(), "raw", "auto")):
        sfm.tl.embed(adata, model, library_key="slide", context_size=64, layer=layer, values=values)
    proteins = make(g=14, kind="intensity")
    sfm.tl.embed(proteins, model)
    assert proteins.uns["embeddings"]["X_heist"]["params"]["values"] == "intensity"
    assert np.isfinite(proteins.obsm["X_heist"]).all()


def test_round_trip(embedded, tmp_path):
    embedded.write_h5ad(tmp_path / "a.h5ad")
    back = ad.read_h5ad(tmp_path / "a.h5ad")
    np.testing.assert_array_equal(back.obsm["X_heist"], embedded.obsm["X_heist"])
    read, record = (adata.uns["embeddings"]["X_heist"] for adata in (back, embedded))
    assert list(read["blocks"]["gene"]) == record["blocks"]["gene"]
    assert read["params"] == record["params"]


@pytest.mark.filterwarnings("ignore:grn. groups of fewer than")
@pytest.mark.parametrize("n", [1, 2, 3])
def test_very_few_cells(model, n):
    adata = make(300)[:n].copy()
    sfm.tl.embed(adata, model, groupby=None)
    assert np.isfinite(adata.obsm["X_heist"]).all()


BAD = [
    ("nan_xy", {}, ValueError, "NaN or infinite coordinates for 1 of 300"),
    ("nan_x", {}, ValueError, "1 NaN or infinite values"),
    ("3d", {}, ValueError, "3 columns"),
    (None, {"basis": "where"}, KeyError, "obsm\\['where'\\] is missing"),
    (None, {"layer": "raw"}, KeyError, "layer='raw'"),
    (None, {"library_key": "donor"}, KeyError, "library_key='donor'"),
    (None, {"device": "toaster"}, ValueError, "toaster"),
    (None, {"dtype": "int8"}, ValueError, "dtype='int8'"),
    ("across", {"library_key": "slide"}, ValueError, "edges between slides"),
    (None, {"min_detctd": 0.1}, TypeError, "no option min_detctd=; did you mean min_detected="),
    (None, {"image": "he.tif"}, TypeError, "image= is an option of 'hibio'"),
]
BAD_HEIST = [
    ({"batch_size": 0}, ValueError, "batch_size must be a positive integer"),
    ({"batch_size": 2.5}, ValueError, "batch_size must be a whole number or None, got 2.5"),
    ({"context_size": 0}, ValueError, "context_size must be a positive integer"),
    ({"context_size": True}, ValueError, "context_size must be a whole number, got True"),
    ({"context_size": None}, ValueError, "context_size must be a whole number, got None"),
    ({"rng": -1}, ValueError, "rng=-1 is not a seed"),
    ({"groupby": 3}, ValueError, "groupby must be text or None, got 3"),
    ({"groupby": "celltype"}, KeyError, "groupby='celltype'"),
    ({"min_detected": 0.1}, ValueError, "min_detected= is an option of 'heist-niche'"),
]
BAD_NICHE = [
    ({"min_detected": 1.5}, ValueError, "min_detected must be a share of the cells, from 0 to 1, got 1.5"),
    ({"min_detected": "a"}, TypeError, "min_detected must be a number, got 'a'"),
    # Options of other models are refused, even with their default values.
    ({"groupby": "type"}, ValueError, "groupby= is an option of 'heist'; model='heist-niche' does not read it"),
    ({"context_size": 256}, ValueError, "context_size= is an option of 'heist'"),
    ({"batch_size": None}, ValueError, "batch_size= is an option of 'heist' and 'hibio'"),
    ({"rng": 0}, ValueError, "rng= is an option of 'heist'"),
]


@pytest.mark.parametrize(
    ("which", "change", "arguments", "error", "match"),
    [
        *(("model", *case) for case in BAD),
        *(("model", None, *case) for case in BAD_HEIST),
        *(("niche", None, *case) for case in BAD_NICHE),
        ("model", "grn", {"groupby": "type"}, ValueError, "uns\\['grn'\\] holds networks of groupby='grn_group'"),
        *(("niche", *case) for case in BAD),
        ("niche", "one", {}, ValueError, "none of the 24 features varies between the 1 cells"),
        (
            "niche",
            "constant",
            {"values": "log"},
            ValueError,
            "none of the 24 features varies between the 300 cells",
        ),
        ("niche", "alike", {}, ValueError, "none of the 24 features varies between the 300 cells"),
    ],
)
def test_bad_input_does_not_change_adata(which, change, arguments, error, match, request):
    model = request.getfixturevalue(which)
    adata = make()
    if change == "nan_xy":
        adata.obsm["spatial"][3, 0] = np.nan
    elif change == "nan_x":
        adata.X[3, 0] = np.nan
    elif change == "3d":
        adata.obsm["spatial"] = np.random.default_rng(0).random((300, 3))
    elif change == "across":
        sfm.pp.spatial_neighbors(adata)
    elif change == "grn":
        sfm.pp.grn(adata)
    elif change == "one":
        adata = adata[:1].copy()
    elif change == "constant":
        adata.X[:] = 3
    elif change == "alike":  # after normalisation
        adata.X = adata.X[:1] * np.arange(1, 301, dtype=np.float32)[:, None]
    before = {name: set(getattr(adata, name)) for name in ("obs", "obsm", "obsp", "uns", "layers")}
    with pytest.raises(error, match=match):
        sfm.tl.embed(adata, model, **arguments)
    assert {name: set(getattr(adata, name)) for name in before} == before


def test_unknown_model():
    with pytest.raises(FileNotFoundError, match="no model 'hiest'"):
        sfm.tl.embed(make(), "hiest")


def test_bundled_weights_on_proteins():
    adata = make(60, 14, kind="intensity")
    sfm.tl.embed(adata, "heist", groupby=None)
    assert adata.obsm["X_heist"].shape == (60, 256)
    assert np.isfinite(adata.obsm["X_heist"]).all()


@pytest.mark.slow
def test_bundled_heist_on_a_real_tissue():
    """Rows, batches, threads and precision do not matter at the published size; ten layers amplify rounding."""
    adata = sfm.datasets.merfish_mouse_brain()
    sfm.tl.embed(adata, "heist", library_key="mouse_id")

    def cosines(other):
        return cosine(adata.obsm["X_heist"], other[adata.obs_names].obsm["X_heist"])

    shuffled = sfm.datasets.merfish_mouse_brain()
    shuffled = shuffled[np.random.default_rng(0).permutation(adata.n_obs)].copy()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sfm.tl.embed(shuffled, "heist", library_key="mouse_id", batch_size=3)
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(
        shuffled.obs["grn_group"][adata.obs_names].astype(str), adata.obs["grn_group"].astype(str)
    )
    assert cosines(shuffled).min() > 0.9999
    low = sfm.datasets.merfish_mouse_brain()
    sfm.tl.embed(low, "heist", library_key="mouse_id", dtype="bfloat16")
    assert cosines(low).mean() > 0.99


# --- the default model -----------------------------------------------------------------------------


def layered(n=600, g=40, *, kind="counts", seed=0):
    """Four curved layers that differ in expression, with differences between the cells of each."""
    rng = np.random.default_rng(seed)
    adata = make(n, g, seed, kind="counts")
    xy = adata.obsm["spatial"]
    layer = np.minimum(4 * (xy[:, 1] + 60 * np.sin(xy[:, 0] / 150)).clip(0, 599) / 600, 3).astype(int)
    depth = np.exp(rng.normal(0, 0.2, (n, 1)))
    mean = np.exp(rng.normal(0, 0.8, (4, g)))[layer] * np.exp(rng.normal(0, 0.5, (3, g)))[rng.integers(3, size=n)]
    x = rng.poisson(2 * depth * mean) if kind == "counts" else rng.gamma(2.0, 200.0, (n, g)) * mean - 100
    adata.X = x.astype(np.float32)
    adata.obs["layer"] = layer.astype(str)
    return adata


def both(adata):
    return np.hstack([adata.obsm["X_niche"], adata.obsm["X_state"]])


@pytest.fixture(scope="module")
def in_layers():
    return sfm.tl.embed(layered(), library_key="slide", copy=True)


def layer_agreement(adata):
    """Agreement of clusters of the niche with the layers."""
    clusters = KMeans(4, n_init=3, random_state=0).fit_predict(adata.obsm["X_niche"])
    return normalized_mutual_info_score(adata.obs["layer"], clusters)


def test_written_fields_of_the_default(in_layers, niche):
    before = layered()
    n = before.n_obs
    assert set(in_layers.obsm) == {"spatial", "X_niche", "X_state"}
    assert set(in_layers.uns) == {"spatial_neighbors", "embeddings", "spatialfm"}  # no gene networks
    assert set(in_layers.obsp) == {"spatial_connectivities", "spatial_distances"}
    assert list(in_layers.obs) == list(before.obs)
    assert set(in_layers.uns["embeddings"]) == {"X_niche", "X_state"}
    for key, record in in_layers.uns["embeddings"].items():
        block = in_layers.obsm[key]
        assert block.shape == (n, 42)
        assert block.dtype == np.float32
        assert np.isfinite(block).all()
        assert record["model"] == niche.name == "heist-niche"
        assert record["sha256"] == sfm.models.fingerprint(niche)
        assert record["axes"] == "data"
        assert record["slides"]["names"] == ["a", "b"]
        genes = record["genes"]
        assert (genes["n_in"], genes["n_used"], genes["names"]) == (40, 40, list(before.var_names))
        assert "groupby" not in record["params"]
    np.testing.assert_array_equal(in_layers.X, before.X)
    assert layer_agreement(in_layers) > 0.7


@pytest.mark.parametrize("change", FORMS)
def test_default_reads_every_layout(change, in_layers, niche, tmp_path):
    adata = in_another_form(layered(), change, tmp_path)
    sfm.tl.embed(adata, niche, library_key="slide")
    np.testing.assert_allclose(both(adata), both(in_layers), atol=1e-3)
    if change == "backed":
        adata.file.close()
    else:
        x = adata.X.toarray() if sp.issparse(adata.X) else adata.X
        np.testing.assert_array_equal(x, layered().X)


def test_default_does_not_depend_on_rows_or_position(in_layers, niche):
    expected = both(in_layers)
    rows = np.random.default_rng(3).permutation(600)
    shuffled = layered()[rows].copy()
    sfm.tl.embed(shuffled, niche, library_key="slide")
    assert cosine(both(shuffled), expected[rows]).min() >= 0.9999
    angle = np.deg2rad(37)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    for matrix, shift in ((turn, 0), (turn @ np.diag([-3, 3]), [-500, 1e4])):
        moved = layered()
        moved.obsm["spatial"] = moved.obsm["spatial"] @ matrix.T + shift
        sfm.tl.embed(moved, niche, library_key="slide")
        assert cosine(both(moved), expected).min() >= 0.999


def test_default_in_bfloat16(in_layers, niche):
    low = layered()
    sfm.tl.embed(low, niche, library_key="slide", dtype="bfloat16")
    assert low.uns["embeddings"]["X_niche"]["params"]["dtype"] == "bfloat16"
    assert 0.99 < cosine(both(low), both(in_layers)).min() < 1


def test_half_of_the_panel_shows_the_same_layers(in_layers, niche):
    half = layered()[:, np.random.default_rng(0).permutation(40)[:20]].copy()
    sfm.tl.embed(half, niche, library_key="slide")
    assert half.uns["embeddings"]["X_niche"]["genes"]["n_used"] == 20
    assert layer_agreement(half) > 0.9 * layer_agreement(in_layers)


def test_default_on_proteins(niche):
    proteins = layered(g=14, kind="intensity")
    assert (proteins.X < 0).any()
    sfm.tl.embed(proteins, niche)
    assert proteins.uns["embeddings"]["X_niche"]["params"]["values"] == "intensity"
    assert np.isfinite(both(proteins)).all()
    assert layer_agreement(proteins) > 0.5


def test_default_uses_stored_graphs_and_no_networks(in_layers, niche):
    adata = layered()
    sfm.pp.spatial_neighbors(adata, library_key="slide")
    adata.uns["grn"] = {"groupby": "type"}  # not read
    sfm.tl.embed(adata, niche, library_key="slide")
    assert adata.uns["grn"] == {"groupby": "type"}
    np.testing.assert_allclose(both(adata), both(in_layers), atol=1e-3)
    far = layered()
    sfm.pp.spatial_neighbors(far, method="knn", n_neighbors=20, library_key="slide")
    stored = far.obsp["spatial_connectivities"].copy()
    sfm.tl.embed(far, niche, library_key="slide")
    assert (far.obsp["spatial_connectivities"] != stored).nnz == 0
    assert cosine(far.obsm["X_niche"], in_layers.obsm["X_niche"]).min() < 0.999


def test_relative_position_of_slides_does_not_matter(in_layers, niche):
    """Both slides have the same coordinates; they share components, but have no edges between them."""
    apart = layered()
    second = (apart.obs["slide"] == "b").to_numpy()
    apart.obsm["spatial"][second] += 1e5
    sfm.tl.embed(apart, niche, library_key="slide")
    assert apart.obsp["spatial_connectivities"][second][:, ~second].nnz == 0
    np.testing.assert_allclose(both(apart), both(in_layers), atol=1e-3)
    mixed = layered()
    sfm.tl.embed(mixed, niche)
    assert cosine(mixed.obsm["X_niche"], in_layers.obsm["X_niche"]).min() < 0.999


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_default_round_trip(in_layers, tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    getattr(in_layers, f"write_{suffix}")(path)
    back = (ad.read_h5ad if suffix == "h5ad" else ad.read_zarr)(path)
    for key in ("X_niche", "X_state"):
        np.testing.assert_array_equal(back.obsm[key], in_layers.obsm[key])
        read, record = (adata.uns["embeddings"][key] for adata in (back, in_layers))
        np.testing.assert_equal(read["params"], record["params"])
        assert list(read["genes"]["names"]) == record["genes"]["names"]


def test_encode_with_the_state_of_a_fit(niche):
    """The same cells get the same embedding, also one slide alone."""
    encoder = find_encoder(niche)
    tissue = encoder.read(layered(), library_key="slide", device=CPU)
    state, expected = encoder.fit_encode(tissue, device=CPU)
    again = encoder.encode(tissue, state, device=CPU)
    one = layered()[layered().obs["slide"] == "b"].copy()
    # Values are normalised for each cell, so they are the same if the slide is read alone.
    part = encoder.read(one, device=CPU)
    alone = encoder.encode(part, state, device=CPU)
    rows = np.flatnonzero(tissue.slide == 1)
    for block, x in expected.blocks.items():
        np.testing.assert_allclose(again.blocks[block], x, atol=1e-4)
        np.testing.assert_allclose(alone.blocks[block], x[rows], atol=1e-4)
    with pytest.raises(ValueError, match=r"1 of the 40 features of the state are not measured \(first: \['gene7'\]\)"):
        encoder.encode(encoder.read(one[:, one.var_names != "gene7"].copy(), device=CPU), state, device=CPU)
    assert len(pickle.dumps(state)) < 2**21


def test_keys_and_results_of_earlier_calls(in_layers, niche, model):
    adata = in_layers.copy()
    sfm.tl.embed(adata, niche, library_key="slide", key_added="a")
    np.testing.assert_array_equal(adata.obsm["X_a_niche"], adata.obsm["X_niche"])
    assert set(adata.uns["embeddings"]) == {"X_niche", "X_state", "X_a_niche", "X_a_state"}
    # A later call with the same name replaces all fields of the earlier one.
    sfm.tl.embed(adata, model, library_key="slide", key_added="a")
    assert set(adata.obsm) == {"spatial", "X_niche", "X_state", "X_a"}
    assert set(adata.uns["embeddings"]) == {"X_niche", "X_state", "X_a"}
    assert set(in_layers.uns["embeddings"]) == {"X_niche", "X_state"}
    mine = layered()
    mine.obsm["X_state"] = np.zeros((600, 2))
    with pytest.raises(ValueError, match=r"obsm\['X_state'\] is there already, and sfm.tl.embed did not write it"):
        sfm.tl.embed(mine, niche, library_key="slide")
    assert "X_niche" not in mine.obsm


def test_a_file_of_an_earlier_version(in_layers):
    adata = in_layers.copy()
    adata.obsm["X_heist_cell"], adata.obsm["X_heist_gene"] = adata.obsm.pop("X_niche"), adata.obsm.pop("X_state")
    for call in (lambda: sfm.tl.domains(adata, 3), lambda: sfm.tl.domains(adata, 3, use_rep="X_heist_cell")):
        with pytest.raises(ValueError, match=r"embedded by spatialfm 0.1.*Run sfm.tl.embed\(adata\) again"):
            call()


def test_a_module_of_another_kind():
    with pytest.raises(TypeError, match="model= is a Linear, which is not one of the architectures of spatialfm"):
        sfm.tl.embed(make(), torch.nn.Linear(2, 2))


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("g", [1, 2, 40])
def test_default_on_very_few_cells_and_features(niche, n, g):
    adata = layered(n, max(g, 2), kind="intensity")[:, :g].copy()
    sfm.tl.embed(adata, niche)
    assert np.isfinite(both(adata)).all()


def test_default_on_a_real_tissue():
    adata = sfm.datasets.merfish_mouse_brain()
    sfm.tl.embed(adata, library_key="mouse_id")
    shuffled = sfm.datasets.merfish_mouse_brain()[np.random.default_rng(0).permutation(adata.n_obs)].copy()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sfm.tl.embed(shuffled, library_key="mouse_id")
    finally:
        torch.set_num_threads(threads)
    assert cosine(both(adata), both(shuffled[adata.obs_names])).min() >= 0.9999


def test_radii_are_recorded_in_steps_and_distances(niche):
    """The distance is the root mean square distance after the steps, on a hexagonal lattice away from its border."""
    from spatialfm.models._propagate import transition_tensor

    rng = np.random.default_rng(0)
    row, column = (v.ravel() for v in np.meshgrid(np.arange(40), np.arange(40), indexing="ij"))
    xy = np.column_stack([column + 0.5 * (row % 2), row * 3**0.5 / 2]) * 37.0
    adata = ad.AnnData(rng.poisson(2, (1600, 10)).astype(np.float32), obsm={"spatial": xy})
    sfm.tl.embed(adata, niche)
    radii = adata.uns["embeddings"]["X_niche"]["params"]["radii"]
    steps, around = niche.config.steps(1600)
    assert list(radii["steps"]) == [steps, *around]
    assert "um" not in radii
    lazy = transition_tensor(adata.obsp["spatial_connectivities"].tocsr(), torch.device("cpu")).to_dense()
    lazy = (lazy + torch.eye(1600)) / 2
    start = 20 * 40 + 20
    spread = torch.zeros(1600)
    spread[start] = 1
    for _ in range(6):
        spread = spread @ lazy
    reach = float((spread.numpy() * np.square(xy - xy[start]).sum(1)).sum() ** 0.5)
    np.testing.assert_allclose(radii["distance"], reach * np.sqrt(radii["steps"] / 6), rtol=1e-3)
    # Visium: 100 µm between spots, and the spot diameter of Space Ranger.
    adata.uns["spatial"] = {"s": {"scalefactors": {"spot_diameter_fullres": 37 * 0.65}}}
    sfm.tl.embed(adata, niche)
    radii = adata.uns["embeddings"]["X_niche"]["params"]["radii"]
    np.testing.assert_allclose(radii["um"], radii["distance"] * 100 / 37, rtol=1e-3)
