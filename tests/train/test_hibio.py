"""Training of HiBio: losses compared with loops, initial weights, and pretraining."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import spatialfm as sfm
from spatialfm.models import HiBioConfig
from spatialfm.models._propagate import transition_tensor
from spatialfm.models.hibio import standardize
from spatialfm.pp._pathways import read_sets
from spatialfm.train import pretrain
from spatialfm.train._hibio import HiBioBatch, HiBioRecipe
from spatialfm.train._slides import read_slides

CPU = torch.device("cpu")
CONFIG = {"width": 8, "n_components": 8}
SMALL = {
    "architecture": "hibio",
    "config": CONFIG,
    "context_size": 40,
    "cells_per_step": 80,
    "warmup": 2,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def slides(make_spots):
    """Three slides with graphs."""
    made = {f"s{k}": make_spots(k, 130 + 10 * k, f"s{k}") for k in range(3)}
    for adata in made.values():
        sfm.pp.spatial_neighbors(adata)
    return made


def recipe(**changes):
    arguments = {"dropout": 0.0}
    config = HiBioConfig(**CONFIG, **{k: v for k, v in changes.items() if k in ("alignment", "idf", "tower")})
    own = {k: v for k, v in changes.items() if k in arguments}
    return HiBioRecipe(device=CPU, dtype="float32", config=config, **{**arguments, **own})


def started(slides, by=None, held_out=0.2, **reading):
    by = by or recipe()
    data = read_slides(slides, by, context_size=40, held_out=held_out, seed=0, reading=reading)
    torch.manual_seed(0)
    return by.start(by.build(by.config), data, seed=0), data


@pytest.fixture(scope="module")
def start(slides):
    return started(slides)


# --- losses -----------------------------------------------------------------------------


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def info_nce(a, b, positive, scale):
    """Mean of the negative logarithm of the share of the positive pair."""
    total = 0.0
    for i, j in enumerate(positive):
        e = np.exp([scale * (unit(a)[i] @ unit(b)[k]) for k in range(len(b))])
        total -= np.log(e[j] / e.sum())
    return total / len(positive)


def by_hand(model, batch):
    heads = {name: getattr(model, f"{name}_head").weight.detach().numpy().astype(float) for name in ("image", "gene")}
    image, genes = batch.image.numpy() @ heads["image"].T, batch.genes.numpy() @ heads["gene"].T
    anchors = unit(batch.anchors.numpy() @ heads["gene"].T)
    scale, n = float(model.log_scale.detach().exp()), len(image)
    spots = (info_nce(image, genes, range(n), scale) + info_nce(genes, image, range(n), scale)) / 2
    correlations = [
        np.corrcoef([row @ anchors[k] for row in unit(z)], batch.activity.numpy()[:, k])[0, 1]
        for z in (image, genes)
        for k in range(len(anchors))
    ]
    levels = []
    for region in batch.regions:
        region = region.numpy()
        pooled = {}
        for name, z in (("image", image), ("gene", genes)):
            query = getattr(model, f"{name}_query").detach().numpy()
            weight = np.exp(unit(z) @ query)
            pooled[name] = np.stack(
                [np.average(z[region == k], axis=0, weights=weight[region == k]) for k in range(region.max() + 1)]
            )
        every = range(len(pooled["image"]))
        both = info_nce(pooled["image"], pooled["gene"], every, scale)
        both += info_nce(pooled["gene"], pooled["image"], every, scale)
        across = [info_nce(image, pooled["gene"], region, scale), info_nce(genes, pooled["image"], region, scale)]
        levels += [both / 2, *across]
    return {"spots": spots, "anchors": 1 - np.mean(correlations), "regions": np.mean(levels)}


def perturbed(model):
    """The model with queries that are not zero and heads that are not diagonal."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in (model.gene_query, model.image_query, model.gene_head.weight, model.image_head.weight):
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return model


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_losses_of_each_stage(start, stage):
    from copy import deepcopy

    model, data = perturbed(deepcopy(start[0])).eval(), start[1]
    by = recipe()
    batch = by.batch(data[0].state, data[0].train[:2], np.random.default_rng(0), stage=stage)
    assert batch.aligned == ("spots", "anchors", "regions")[:stage]
    parts = by.losses(model, batch, torch.Generator())
    expected = by_hand(model, batch)
    assert list(parts) == ["loss", "spots", "anchors", "regions"]
    for name, value in expected.items():
        assert float(parts[name].detach()) == pytest.approx(value, rel=1e-4), name
    assert float(parts["loss"].detach()) == pytest.approx(sum(expected[name] for name in batch.aligned), rel=1e-4)
    parts["loss"].backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        # Queries are only used for regions.
        assert bool(weight.grad.any()) == ("query" not in name or stage == 3), name


def test_a_batch_has_the_values_of_its_spots(start):
    _, data = start
    state, contexts = data[1].state, data[1].train[:2]
    batch = recipe().batch(state, contexts, np.random.default_rng(0), stage=3)
    cells = np.concatenate([c.cells for c in contexts])
    for name in ("image", "genes", "activity"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(state, name)[cells])
    for mine, level in zip(batch.regions, state.regions, strict=True):
        pairs = set(zip(mine.tolist(), level[cells].tolist(), strict=True))
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) == int(mine.max()) + 1


def test_dropout_is_used_in_training_only(start):
    model, data = start
    by = recipe(dropout=0.5)
    batch = by.batch(data[0].state, data[0].train, np.random.default_rng(0), stage=3)
    losses = []
    for training in (False, False, True, True):
        model.train(training)
        losses.append(float(by.losses(model, batch, torch.Generator())["loss"].detach()))
    model.eval()
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


def test_without_anchors_the_other_losses_are_used(start):
    """A panel may have no gene of any pathway."""
    model, data = start
    batch = recipe().batch(data[0].state, data[0].train[:2], np.random.default_rng(0), stage=3)
    parts = [getattr(batch, name) for name in ("image", "genes")]
    none = HiBioBatch(*parts, batch.activity[:, :0], batch.anchors[:0], batch.regions, batch.aligned)
    found = recipe().losses(model, none, torch.Generator())
    assert float(found["anchors"]) == 0
    assert float(found["loss"].detach()) == pytest.approx(float((found["spots"] + found["regions"]).detach()))


# --- initial weights -----------------------------------------------------------------------------


def test_input_of_the_heads_is_that_of_the_model(start, slides):
    """Heads are trained on what the model computes for the same spots, except patches, predicted from other slides."""
    from spatialfm.engine._hibio import read_spots

    model, data = start
    names = sorted(slides["s0"].var_names)
    assert list(model.config.genes) == names
    assert model.config.n_features == 40
    sets = read_sets("hallmark", "human")[0]
    sets = {name: set(genes) & set(names) for name, genes in sets.items()}
    sets = {name: genes for name, genes in sets.items() if genes}
    for slide, adata in zip(data, slides.values(), strict=True):
        spots = read_spots(adata, image=adata.obsm["image_features"])
        one = torch.zeros(len(spots.rows), dtype=torch.long)
        profile = torch.from_numpy(spots.by_symbol(spots.profile, names).toarray())
        torch.testing.assert_close(slide.state.genes, model.read_genes(profile, one), atol=1e-4, rtol=1e-3)
        read = model.read_image(torch.from_numpy(spots.image), transition_tensor(spots.graph, CPU), one)
        similarity = torch.nn.functional.cosine_similarity(read, slide.state.image, dim=1)
        assert similarity.mean() > 0.8
        assert not torch.allclose(read, slide.state.image)

        sfm.pp.pathways(adata, min_genes=1, key_added="all")
        activity = adata.obsm["all"]
        assert list(activity.columns) == list(sets)
        expected = standardize(torch.from_numpy(activity.to_numpy()[spots.rows].astype(np.float32)), one)
        torch.testing.assert_close(slide.state.activity, expected, atol=1e-2, rtol=1e-2)
        assert slide.state.varies.all()
        assert slide.state.spots is None

    membership = np.array([[g in genes for g in names] for genes in sets.values()], np.float32)
    with torch.no_grad():
        anchors = torch.nn.functional.normalize(model.gene_head(data[0].state.anchors), dim=1)
        torch.testing.assert_close(anchors, model.anchors(torch.from_numpy(membership)), atol=1e-4, rtol=1e-3)
    # Patches predict genes in these data, and the confidence shows it.
    assert model.confidence.mean() > 0.2
    scales = torch.cat([s.state.genes[np.concatenate([c.cells for c in s.train])] for s in data]).std(0)
    torch.testing.assert_close(model.gene_head.weight.detach(), torch.diag(scales**-0.25))


def test_image_weights_of_the_model_are_those_of_the_start(slides):
    """The image of a held-out slide is read with the weights of the model."""
    model, data = started(slides, held_out="s2")
    spots = recipe().read(slides["s2"])
    one = torch.zeros(len(spots.rows), dtype=torch.long)
    read = model.read_image(torch.from_numpy(spots.image), transition_tensor(spots.graph, CPU), one)
    torch.testing.assert_close(data[2].state.image, read, atol=1e-4, rtol=1e-3)


def test_vocabulary(slides):
    """The genes that at least two training slides have, under any name."""
    from spatialfm._data._genes import match_genes

    names = list(slides["s0"].var_names)
    ids = slides["s0"].copy()
    ids.var_names = list(match_genes(names, "human")["gene_id"])
    parts = {"a": ids[:, :40].copy(), "b": slides["s1"][:, 10:50].copy(), "c": slides["s2"]}
    model, data = started(parts, held_out="c")
    assert set(model.config.genes) == set(names[10:40])
    assert [slide.facts["genes"] for slide in data] == [40, 40, 60]
    with pytest.raises(ValueError, match="no human gene, or ortholog of one, in common"):
        started({"a": ids[:, :25].copy(), "b": slides["s1"][:, 25:].copy()})


def test_a_pathway_that_a_panel_lacks_is_left_out(slides):
    parts = {"a": slides["s0"][:, :30].copy(), "b": slides["s1"][:, :45].copy(), "c": slides["s2"]}
    model, data = started(parts)
    names = list(model.config.genes)
    assert len(names) == 45
    known = [data[k].state.varies for k in range(3)]
    assert known[1].all()
    assert known[2].all()
    assert 0 < known[0].sum() < len(known[0])
    batch = recipe().batch(data[0].state, data[0].train, np.random.default_rng(0), stage=3)
    assert batch.activity.shape[1] == len(batch.anchors) == int(known[0].sum())
    torch.testing.assert_close(batch.anchors, data[1].state.anchors[known[0]])
    assert recipe().losses(model, batch, torch.Generator())["loss"].isfinite()


def test_fewer_genes_than_dimensions(slides):
    few = {name: adata[:, :6].copy() for name, adata in slides.items()}
    model, _ = started(few)
    assert model.config.width == 6 == model.gene_vectors.shape[1]


# --- pretraining -----------------------------------------------------------------------------


def logged(out):
    logs = sorted((out / "logs").glob("version_*/metrics.csv"))
    rows = pd.concat([pd.read_csv(log) for log in logs]).drop_duplicates("step", keep="last")
    return rows.set_index("step").sort_index().sort_index(axis=1)


def test_stages_advance_and_a_stopped_run_continues(slides, tmp_path, monkeypatch):
    arguments = {**SMALL, "max_steps": 12, "validate_every": 4, "checkpoint_every": 3, "log_every": 1}
    whole = pretrain(slides, tmp_path / "whole", **arguments)
    rows = logged(tmp_path / "whole")
    assert list(rows.index) == list(range(1, 13))
    parts = ["spots", "anchors", "regions"]
    for step, row in rows.iterrows():
        assert row["loss"] == pytest.approx(row[parts[: 1 + (step - 1) // 4]].sum(), rel=1e-4)
    curve = whole.record["curve"]
    assert [validation["step"] for validation in curve] == [0, 4, 8, 12]
    assert set(parts) <= set(curve[-1])
    assert whole.record["config"]["alignment"] == ("spots", "anchors", "regions")
    assert whole.record["held_out_loss"] == min(validation["held_out_loss"] for validation in curve)

    original, calls = HiBioRecipe.losses, 0

    def stopping(self, model, batch, generator):
        nonlocal calls
        calls += model.training
        if calls == 8 and model.training:
            raise KeyboardInterrupt
        return original(self, model, batch, generator)

    with monkeypatch.context() as patch:
        patch.setattr(HiBioRecipe, "losses", stopping)
        with pytest.raises(KeyboardInterrupt):
            pretrain(slides, tmp_path / "stopped", **arguments)
    assert torch.load(tmp_path / "stopped" / "last.ckpt", weights_only=True)["progress"]["step"] == 6
    again = pretrain(slides, tmp_path / "stopped", **arguments)
    assert sfm.models.fingerprint(again) == sfm.models.fingerprint(whole)
    assert [{**row, "minutes": 0} for row in again.record["curve"]] == [{**row, "minutes": 0} for row in curve]
    pd.testing.assert_frame_equal(logged(tmp_path / "stopped"), rows, check_exact=True)
    back = sfm.models.load(tmp_path / "whole")
    assert sfm.models.fingerprint(back) == sfm.models.fingerprint(whole)
    assert back.config == whole.config
    other = {**slides, "s1": slides["s1"].copy()}
    other["s1"].obsm["image_features"][0, 0] += 1
    with pytest.raises(ValueError, match="belongs to a run with other arguments: slide s1="):
        pretrain(other, tmp_path / "whole", **arguments)


def test_learns(slides):
    model = pretrain(slides, **SMALL, max_steps=60, validate_every=20, learning_rate=3e-3)
    first, *_, last = (validation["held_out_loss"] for validation in model.record["curve"])
    assert last < first


def test_early_stopping_waits_for_the_last_stage(slides, monkeypatch):
    monkeypatch.setattr(HiBioRecipe, "losses", worse(HiBioRecipe.losses))
    model = pretrain(slides, **SMALL, max_steps=30, validate_every=2, patience=2)
    assert model.record["best_step"] == 0
    # Two validations in the third stage, which starts at step 21.
    assert model.record["curve"][-1]["step"] == 24


def worse(original):
    """Losses whose held-out value increases at every validation."""
    calls = 0

    def losses(self, model, batch, generator):
        nonlocal calls
        calls += not model.training
        parts = original(self, model, batch, generator)
        return parts if model.training else {**parts, "loss": parts["loss"] * 0 + calls}

    return losses


@pytest.mark.parametrize("max_steps", [1, 2])
def test_the_shortest_run_is_validated_on_all_levels(slides, max_steps, monkeypatch):
    stages = []
    original = HiBioRecipe.batch

    def recorded(self, slide, contexts, random, *, augment=True, stage=1):
        if not augment:
            stages.append(stage)
        return original(self, slide, contexts, random, augment=augment, stage=stage)

    monkeypatch.setattr(HiBioRecipe, "batch", recorded)
    pretrain(slides, **SMALL, max_steps=max_steps)
    assert set(stages) == {3}


@pytest.mark.parametrize("alignment", [["spots"], ["anchors", "regions"]])
def test_ablations(slides, alignment):
    arguments = {**SMALL, "config": {**CONFIG, "alignment": alignment, "idf": False}}
    model = pretrain(slides, **arguments, max_steps=2, validate_every=1)
    last = model.record["curve"][-1]
    assert last["loss"] == pytest.approx(sum(last[name] for name in alignment), rel=1e-4)
    assert model.config.alignment == tuple(alignment)


def test_several_slides_in_one_file(slides):
    together = ad.concat(list(slides.values()))
    model, data = started({"all": together}, library_key="slide")
    state = data[0].state
    # Each slide is standardised separately.
    slide = torch.from_numpy(recipe().read(together, library_key="slide").slide)
    for k in range(3):
        torch.testing.assert_close(state.genes[slide == k].mean(0), torch.zeros(8), atol=1e-4, rtol=0)
        torch.testing.assert_close(state.activity[slide == k].std(0, correction=0), torch.ones(state.activity.shape[1]))
        for level in state.regions:
            assert not set(level[slide == k].tolist()) & set(level[slide != k].tolist())
    trained = pretrain({"all": together}, **SMALL, library_key="slide", max_steps=3)
    assert trained.record["data"][0]["cells"] == 420
    assert model.confidence.mean() > 0.2


def test_bad_slides_are_named(slides):
    broken = {name: slides["s1"].copy() for name in ("lost", "nan", "tower", "genes")}
    del broken["lost"].obsm["image_features"]
    broken["nan"].obsm["image_features"][3, 3] = np.nan
    broken["tower"].uns["image_features"] = {"tower": "phikon"}
    broken["genes"] = broken["genes"][:, []].copy()
    match = {
        "lost": r"slide 'lost': obsm\['image_features'\] is missing; run sfm.tl.image_features\(adata, image=...\)",
        "nan": r"slide 'nan': obsm\['image_features'\] holds values that are not finite",
        "tower": r"slide 'tower': obsm\['image_features'\] is of the tower 'phikon'.*config=\{'tower': 'phikon'\}",
        "genes": "slide 'genes': it has no genes",
    }
    for name, adata in broken.items():
        with pytest.raises(ValueError, match=match[name]):
            pretrain({"s0": slides["s0"], name: adata}, **SMALL, max_steps=1)
    narrow = slides["s1"].copy()
    narrow.obsm["image_features"] = narrow.obsm["image_features"][:, :30]
    with pytest.raises(ValueError, match=r"has \[30, 40\] columns on different slides; use one tower for all"):
        pretrain({"s0": slides["s0"], "narrow": narrow}, **SMALL, max_steps=1)
    with pytest.raises(ValueError, match="its options are"):
        pretrain(slides, **{**SMALL, "config": {"height": 3}})


def test_another_tower_is_used_by_name(slides):
    other = {name: adata.copy() for name, adata in slides.items()}
    for adata in other.values():
        adata.uns["image_features"] = {"tower": "phikon"}
    model, _ = started(other, by=recipe(tower="phikon"))
    assert model.config.tower == "phikon"


def test_fine_tune_refuses(slides, start):
    adata = slides["s0"].copy()
    with pytest.raises(
        ValueError, match=r"'hibio' cannot be fine-tuned, because .*pretrain\(slides, architecture='hibio'\)"
    ):
        sfm.tl.fine_tune(adata, start[0])
    assert "fine_tune" not in adata.uns
