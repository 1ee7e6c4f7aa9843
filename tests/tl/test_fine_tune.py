"""tl.fine_tune: a better model for the same tissue, and nothing else is changed."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import torch

import spatialfm as sfm
from spatialfm.models import HEISTConfig, fingerprint
from spatialfm.train._recipes import HEISTRecipe

QUICK = {"max_minutes": None, "max_steps": 40, "learning_rate": 2e-3}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    recipe = HEISTRecipe(torch.device("cpu"), "float32", n_genes=16)
    model = recipe.build(HEISTConfig(width=16, heads=2, layers=2, pe_dim=16)).eval()
    model.name = "small"
    model.record = {"data": [{"name": "other tissue", "license": "CC0"}]}
    return model


@pytest.fixture(scope="module")
def tissue():
    adata = sfm.datasets.merfish_mouse_brain()[:600].copy()
    adata.obs["kind"] = (adata.obs["celltype"].cat.codes % 3).astype(str)
    sfm.pp.spatial_neighbors(adata)
    sfm.pp.grn(adata, groupby="kind", n_genes=40)
    # numba may change the number of threads of torch, on which the rounding of sums depends; training amplifies it.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield adata
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tuned(tissue, model):
    """Fine-tuned model, AnnData, and the fingerprint of the original model."""
    before = fingerprint(model)
    return *sfm.tl.fine_tune(tissue, model, **QUICK, copy=True), before


def fields(adata):
    return {
        name: set(getattr(adata, name)) - {None} for name in ("obs", "var", "obsm", "varm", "obsp", "layers", "uns")
    }


def test_the_held_out_loss_falls_and_nothing_else_changes(tuned, tissue, model):
    better, adata, before = tuned
    assert fingerprint(model) == before != fingerprint(better)
    assert not better.training
    assert "fine_tune" not in tissue.uns
    expected = fields(tissue)
    expected["uns"] |= {"fine_tune", "spatialfm"}
    assert fields(adata) == expected
    np.testing.assert_array_equal(adata.X.toarray(), tissue.X.toarray())
    entry = adata.uns["fine_tune"]
    curve = entry["curve"]
    np.testing.assert_array_equal(curve["step"], [0, 20, 40])
    assert curve["held_out_loss"][-1] < curve["held_out_loss"][0]
    assert len(curve["loss"]) == 2  # the first validation is before training
    assert all(np.isfinite(values).all() for values in curve.values())
    assert entry["best_step"] == curve["step"][np.argmin(curve["held_out_loss"])]
    assert entry["sha256"] == fingerprint(better)
    assert entry["base"] == {"model": "small", "sha256": before}
    assert better.record["base"] == entry["base"]
    assert [slide["name"] for slide in better.record["data"]] == ["other tissue", "adata"]


def test_the_model_can_be_used_and_saved(tuned, tissue, tmp_path):
    better, _, _ = tuned
    adata = tissue.copy()
    sfm.tl.embed(adata, better)
    assert adata.uns["embeddings"]["X_heist"]["model"] == "small-fine-tuned"
    sfm.models.save(better, tmp_path)
    again = tissue.copy()
    sfm.tl.embed(again, tmp_path)
    np.testing.assert_array_equal(again.obsm["X_heist"], adata.obsm["X_heist"])


def test_is_reproducible_in_any_order_of_rows(tuned, tissue, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shuffled = tissue[np.random.default_rng(0).permutation(tissue.n_obs)].copy()
    better = sfm.tl.fine_tune(shuffled, model, **QUICK)
    curve = tuned[1].uns["fine_tune"]["curve"]["held_out_loss"]
    np.testing.assert_allclose(shuffled.uns["fine_tune"]["curve"]["held_out_loss"], curve, rtol=1e-4)
    assert better.record["curve"][-1]["step"] == 40
    assert list(tmp_path.iterdir()) == []  # nothing on disk


def test_a_model_that_does_not_improve_is_returned_unchanged(tuned, tissue):
    adata, model = tissue.copy(), tuned[0]
    same = sfm.tl.fine_tune(adata, model, max_steps=200, learning_rate=0.5, validate_every=2, patience=3)
    assert fingerprint(same) == fingerprint(model)
    assert adata.uns["fine_tune"]["best_step"] == 0
    assert len(adata.uns["fine_tune"]["curve"]["step"]) == 4


def test_max_minutes_ends_training(tissue, model):
    adata = tissue.copy()
    sfm.tl.fine_tune(adata, model, max_minutes=0.01, max_steps=100_000, validate_every=10, patience=1000)
    assert 0.01 <= adata.uns["fine_tune"]["curve"]["minutes"][-1] < 0.2


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_round_trip(tuned, tmp_path, suffix):
    _, adata, _ = tuned
    path = tmp_path / f"a.{suffix}"
    getattr(adata, f"write_{suffix}")(path)
    back = (ad.read_h5ad if suffix == "h5ad" else ad.read_zarr)(path).uns["fine_tune"]
    entry = adata.uns["fine_tune"]
    assert back["params"] == entry["params"]
    assert back["sha256"] == entry["sha256"]
    for name, values in entry["curve"].items():
        np.testing.assert_array_equal(back["curve"][name], values)


@pytest.mark.parametrize(("n", "g"), [(300, 200), (120, 14)])
def test_default_model_on_a_small_tissue(n, g, tmp_path):
    """Far fewer cells than in a context of pretraining."""
    adata = sfm.datasets.merfish_mouse_brain()[:n, :g].copy()
    before = fields(adata)
    better = sfm.tl.fine_tune(adata, "heist-niche", max_minutes=None, max_steps=40)
    before["uns"] |= {"fine_tune", "spatialfm"}
    assert fields(adata) == before
    entry = adata.uns["fine_tune"]
    assert entry["base"] == {"model": "heist-niche", "sha256": fingerprint(sfm.models.load("heist-niche"))}
    assert entry["params"]["context_size"] == n // 10
    assert entry["curve"]["loss"][-1] < entry["curve"]["loss"][0]
    assert np.isfinite(entry["curve"]["held_out_loss"]).all()
    assert entry["sha256"] == fingerprint(better)
    sfm.tl.embed(adata, better)
    assert adata.uns["embeddings"]["X_niche"]["model"] == "heist-niche-fine-tuned"
    assert np.isfinite(adata.obsm["X_niche"]).all()
    adata.write_h5ad(tmp_path / "a.h5ad")
    assert ad.read_h5ad(tmp_path / "a.h5ad").uns["fine_tune"]["params"] == entry["params"]


def test_nothing_is_printed_at_verbosity_1(tissue, model, capfd):
    with sfm.settings.override(verbosity=1, progress=False):
        sfm.tl.fine_tune(tissue.copy(), model, max_steps=2)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("change", "arguments", "error", "match"),
    [
        ("nan", {}, ValueError, "NaN or infinite coordinates for 1 of 600"),
        (None, {"basis": "where"}, KeyError, r"obsm\['where'\] is missing"),
        (None, {"layer": "raw"}, KeyError, "layer='raw'"),
        ("networks", {"key_added": "grn"}, ValueError, r"uns\['grn'\] was written by sfm.pp.grn"),
        (None, {"model": "hiest"}, FileNotFoundError, "no model 'hiest'"),
        (None, {"max_steps": 0}, ValueError, "max_steps must be an integer of at least 1"),
        (None, {"max_minutes": -1}, ValueError, "max_minutes must be a number above 0"),
        (None, {"learning_rate": 1e30, "patience": 50}, ValueError, "slide 'adata': not finite"),
        ("few", {}, ValueError, "it has 6 cells; at least 9 are needed"),
    ],
)
def test_bad_input_does_not_change_adata(tissue, model, change, arguments, error, match):
    adata = tissue.copy()
    if change == "nan":
        adata.obsm["spatial"][3, 0] = np.nan
    elif change == "networks":
        sfm.pp.grn(adata)
    elif change == "few":
        adata = adata[:6].copy()
    before = fields(adata)
    with pytest.raises(error, match=match):
        sfm.tl.fine_tune(adata, **{"model": model, "max_steps": 30, **arguments})
    assert fields(adata) == before
