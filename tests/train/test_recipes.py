"""Recipes: batches and losses of the architectures, and a further architecture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import spatialfm as sfm
from spatialfm._data._components import Components, spatial_components
from spatialfm.engine import cut_contexts, read_tissue
from spatialfm.models import HEISTConfig, HEISTNicheConfig
from spatialfm.train import _recipes, pretrain
from spatialfm.train._heist import HEISTRecipe
from spatialfm.train._heist_niche import HEISTNicheRecipe
from spatialfm.train._recipe import Recipe
from spatialfm.train._recipes import find_recipe


@pytest.fixture
def recipe():
    return HEISTRecipe(torch.device("cpu"), "float32", mask=0.2, n_genes=16, rotate=True, reflect=True, dropout=0.4)


def test_batches_of_heist(slide, recipe):
    tissue = read_tissue(slide)
    state = recipe.prepare(tissue)
    contexts = cut_contexts(tissue.xy, tissue.graph, tissue.slide, context_size=48, halo=0)[2:4]
    cells = np.concatenate([c.cells for c in contexts])
    plain = recipe.batch(state, contexts, np.random.default_rng(5), augment=False)
    augmented = recipe.batch(state, contexts, np.random.default_rng(5))
    np.testing.assert_array_equal(plain.coords, tissue.coords[cells])
    torch.testing.assert_close(plain.shown, plain.expression)
    # Augmentation changes the input of the model, but not the genes, the targets or the neighbours.
    for name in ("expression", "position", "cell_edges", "group", "context"):
        torch.testing.assert_close(getattr(augmented, name), getattr(plain, name))
    assert not torch.allclose(augmented.coords, plain.coords, atol=0.1)
    assert not torch.allclose(augmented.shown, plain.shown, atol=0.1)
    assert (augmented.shown[plain.shown == 0] == 0).all()
    # Identify the drawn genes by their values; their networks must be the same parts of the whole networks.
    columns = [
        int(np.flatnonzero((tissue.expression[cells].toarray() == plain.expression[:, [i]].numpy()).all(0))[0])
        for i in range(16)
    ]
    assert len(set(columns)) == 16
    for network, edges in zip(tissue.networks, plain.gene_edges, strict=True):
        part = np.zeros((16, 16), bool)
        part[tuple(edges.numpy())] = True
        np.testing.assert_array_equal(part, network.toarray()[np.ix_(columns, columns)] != 0)
    again = recipe.batch(state, contexts, np.random.default_rng(5))
    torch.testing.assert_close(again.coords, augmented.coords, rtol=0, atol=0)
    torch.testing.assert_close(again.shown, augmented.shown, rtol=0, atol=0)


NICHE = HEISTNicheConfig(n_components=6, radii=(0, 1, 3), width=8)


def niche_recipe(config=NICHE):
    return HEISTNicheRecipe(torch.device("cpu"), "float32", config=config)


@pytest.mark.parametrize("n_genes", [14, 200])
def test_halves_of_heist_niche_share_no_gene(slide, n_genes, monkeypatch):
    chosen, project = [], Components.project
    monkeypatch.setattr(Components, "project", lambda self, half: chosen.append((self, half)) or project(self, half))
    recipe = niche_recipe()
    tissue = recipe.read(slide[:, :n_genes].copy())
    assert tissue.networks == []
    state = recipe.prepare(tissue)
    assert len(state.propagated) == len(state.statistics) == recipe.panels == len(chosen) // 2
    panels = []
    for (one, half), (other, rest), propagated in zip(chosen[::2], chosen[1::2], state.propagated, strict=True):
        assert one is other
        assert (half ^ rest).all()
        assert half.sum() == len(half) // 2
        panels.append(len(half))
        # At radius 0, a view has the scores from its half of the genes.
        for genes, view in zip((half, rest), propagated, strict=True):
            assert view.shape == (500, one.scores.shape[1], 3)
            np.testing.assert_allclose(view[:, :, 0].float(), project(one, genes), rtol=2e-3, atol=1e-3)
    assert panels[0] == len(spatial_components(tissue.expression, tissue.graph).features)
    assert panels[0] > panels[1] or n_genes == 14
    # The global generator is not used.
    again = recipe.prepare(tissue)
    torch.testing.assert_close(again.propagated[1][0], state.propagated[1][0], rtol=0, atol=0)


def test_batches_and_losses_of_heist_niche(slide):
    recipe = niche_recipe()
    tissue = recipe.read(slide)
    state = recipe.prepare(tissue)
    contexts = cut_contexts(tissue.xy, tissue.graph, tissue.slide, context_size=64, halo=0)[1:3]
    cells = np.sort(np.concatenate([c.cells for c in contexts]))
    plain = recipe.batch(state, contexts, np.random.default_rng(5), augment=False)
    # Two views of the same cells; of few cells, all are used.
    for k in range(2):
        torch.testing.assert_close(plain.propagated[k], state.propagated[0][k][cells].float(), rtol=0, atol=0)
        assert plain.statistics[k] is state.statistics[0][k]
    is_second_panel = {
        recipe.batch(state, contexts, np.random.default_rng(k)).statistics[0] is state.statistics[1][0]
        for k in range(9)
    }
    assert is_second_panel == {True, False}  # both panels are drawn

    torch.manual_seed(0)
    model = recipe.build(NICHE)
    found = recipe.losses(model, plain, torch.Generator())
    with torch.no_grad():
        views = [model(h, s).flatten(1).numpy() for h, s in zip(plain.propagated, plain.statistics, strict=True)]
    views = [v - v.mean(0) for v in views]
    n, (a, b) = len(cells), (v / np.linalg.norm(v, axis=1, keepdims=True) for v in views)
    similarity = a @ b.T / recipe.temperature
    logs = [similarity[i, i] - np.log(np.exp(m[i]).sum()) for m in (similarity, similarity.T) for i in range(n)]
    assert found["loss"].item() == pytest.approx(-np.mean(logs), rel=1e-4)
    assert found["hits"].item() == pytest.approx(np.mean(similarity.argmax(1) == np.arange(n)), abs=1e-6)
    found["loss"].backward()
    assert all(weight.grad is not None for weight in model.parameters())  # needed for several processes


def test_heist_niche_learns(slide, tmp_path):
    model = pretrain(
        {"a": slide},
        tmp_path,
        config=NICHE,
        max_steps=40,
        context_size=100,
        cells_per_step=200,
        validate_every=20,
        warmup=5,
        held_out=0.2,
    )
    curve = model.record["curve"]
    assert curve[-1]["loss"] < curve[0]["loss"] - 0.1
    assert curve[-1]["hits"] > curve[0]["hits"]
    assert curve[-1]["held_out_loss"] < curve[0]["held_out_loss"]
    back = sfm.models.load(tmp_path)
    assert back.config == NICHE
    assert sfm.models.fingerprint(back) == sfm.models.fingerprint(model)


def test_heist_niche_on_a_slide_of_rna_and_one_of_14_proteins(slide, other_slide, tmp_path):
    proteins = other_slide[:, :14].copy()
    proteins.X = np.random.default_rng(0).gamma(2.0, 300.0, proteins.shape).astype(np.float32)
    del proteins.uns["grn"]
    slides = {"rna": slide, "proteins": proteins}
    with pytest.raises(
        ValueError, match=r"slide 'rna': it has 500 cells; at least 1025 are needed .*smaller context_size"
    ):
        pretrain(slides, architecture="heist-niche", max_steps=1)
    how = {"max_steps": 6, "context_size": 64, "cells_per_step": 128, "warmup": 0, "validate_every": 3}
    model = pretrain(slides, tmp_path, architecture="heist-niche", **how)
    assert model.record["arguments"]["architecture"] == "heist-niche"
    assert [(s["name"], s["genes"], s["groups"]) for s in model.record["data"]] == [
        ("rna", 200, 0),
        ("proteins", 14, 0),
    ]
    assert all(np.isfinite(validation["held_out_loss"]) for validation in model.record["curve"])
    assert "grn" not in proteins.uns
    for adata in (slide.copy(), proteins):
        sfm.tl.embed(adata, tmp_path)
        assert np.isfinite(adata.obsm["X_niche"]).all()
    low = pretrain(slides, architecture="heist-niche", **how, dtype="bfloat16")
    assert low.record["held_out_loss"] == pytest.approx(model.record["held_out_loss"], rel=0.05)


def test_architectures_are_found():
    assert find_recipe(None) == (HEISTRecipe, HEISTConfig())
    assert find_recipe("heist", {"layers": 2}) == (HEISTRecipe, HEISTConfig(layers=2))
    assert find_recipe(None, HEISTConfig(width=64)) == (HEISTRecipe, HEISTConfig(width=64))
    assert find_recipe(None, HEISTNicheConfig()) == (HEISTNicheRecipe, HEISTNicheConfig())
    assert find_recipe("heist-niche", {"radii": [0, 3]}) == (HEISTNicheRecipe, HEISTNicheConfig(radii=(0, 3)))
    with pytest.raises(ValueError, match="architecture='hiest' is not known"):
        find_recipe("hiest")
    with pytest.raises(ValueError, match=r"config=\{'layer': 2\} is not valid .*'layers'"):
        find_recipe("heist", {"layer": 2})
    with pytest.raises(ValueError, match="width must be a positive integer"):
        find_recipe(None, {"width": -1})
    with pytest.raises(ValueError, match="architecture='other', but config is a HEISTConfig"):
        find_recipe("other", HEISTConfig())


@dataclass(frozen=True)
class MeanConfig:
    start: float = 3.0


class Mean(torch.nn.Module):
    """Learns one number: the mean of the expression."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.number = torch.nn.Parameter(torch.tensor(config.start))


class MeanRecipe(Recipe):
    architecture = "mean"
    config_type = MeanConfig
    defaults = {"context_size": 48, "cells_per_step": 96, "learning_rate": 0.05}  # noqa: RUF012
    made = []  # noqa: RUF012

    def build(self, config):
        return Mean(config)

    def prepare(self, tissue):
        return tissue

    def batch(self, slide, contexts, random, *, augment=True):
        cells = np.concatenate([c.cells for c in contexts])
        if augment:
            self.made.append((len(slide.rows), set(slide.rows[cells].tolist())))
        return torch.from_numpy(slide.expression[cells].toarray())

    def losses(self, model, batch, generator):
        return {"loss": (model.number - batch).square().mean()}


@pytest.fixture
def made(monkeypatch):
    """Number of cells of the slide and cells of the batch, for each step."""
    monkeypatch.setitem(_recipes.RECIPES, "mean", MeanRecipe)
    MeanRecipe.made = []
    return MeanRecipe.made


def test_another_architecture(slide, made):
    model = pretrain({"a": slide}, architecture="mean", config={"start": 2.0}, max_steps=300, warmup=0)
    assert isinstance(model, Mean)
    assert model.number.item() == pytest.approx(read_tissue(slide).expression.mean(), rel=0.1)
    assert model.record["arguments"]["cells_per_step"] == 96


def test_slides_are_drawn_by_the_square_root_of_their_cells(slide, other_slide, made):
    slides = {"a": slide, "b": other_slide[:90].copy()}
    pretrain(slides, architecture="mean", max_steps=600, patience=100)
    share = np.mean([n == 500 for n, _ in made])
    expected = 500**0.5 / (500**0.5 + 90**0.5)
    assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 600) ** 0.5)


def test_held_out_cells_are_not_used_for_training(slide, other_slide, made):
    pretrain({"a": slide}, architecture="mean", max_steps=150, held_out=0.3, patience=100)
    trained = set.union(*(cells for _, cells in made))
    assert 0.6 * 500 < len(trained) < 0.8 * 500
    made.clear()
    model = pretrain({"a": slide, "b": other_slide}, architecture="mean", max_steps=150, held_out=["b"], patience=100)
    assert {n for n, _ in made} == {500}
    assert len(set.union(*(cells for _, cells in made))) == 500
    # Validation uses the cells of the other slide.
    best = model.number.item()
    spread = float(np.square(best - read_tissue(other_slide).expression.toarray()).mean())
    assert model.record["held_out_loss"] == pytest.approx(spread, rel=0.15)


def test_training_stops_without_improvement(slide, made):
    model = pretrain({"a": slide}, architecture="mean", max_steps=2000, learning_rate=0.5, validate_every=5, patience=4)
    losses = [validation["held_out_loss"] for validation in model.record["curve"]]
    assert len(losses) < 300
    assert min(losses) == losses[-5] == model.record["held_out_loss"]
    assert model.record["best_step"] == 5 * (len(losses) - 4)
