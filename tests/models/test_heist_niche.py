"""HEIST-niche: its symmetries, and its parts compared with plain numpy."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import combinations, pairwise

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sklearn.decomposition import PCA

from spatialfm._data._components import transition_matrix
from spatialfm.models import HEISTNiche, HEISTNicheConfig, fingerprint, heist_niche, load, save
from spatialfm.models._propagate import component_statistics, fit_principal, propagate, transition_tensor

CPU = torch.device("cpu")
CONFIG = HEISTNicheConfig(n_components=8, radii=(0, 1, 2, 5), width=8, contexts=(0.5, 3.0), niche_scale=0.15)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = HEISTNiche(CONFIG)
    with torch.no_grad():
        for weight in model.parameters():  # larger than the initial values, so that gates open and close
            weight.mul_(2)
    return model.eval()


def ring(n, seed=0):
    """A ring with chords, and one cell without neighbours."""
    rng = np.random.default_rng(seed)
    edges = np.eye(n, k=1) + np.eye(n, k=1 - n) + (rng.random((n, n)) < 1 / n)
    edges = (edges + edges.T) > 0
    np.fill_diagonal(edges, False)
    edges[5] = edges[:, 5] = False
    return sp.csr_matrix(edges.astype(np.float32))


def tissue(n=150, k=8, seed=0):
    """Skewed components of decreasing variance, the transition matrix, and the number of cells."""
    rng = np.random.default_rng(seed)
    along = np.sin(2 * np.pi * np.outer(np.arange(n), rng.uniform(1, 4, k)) / n + rng.uniform(0, 6, k))
    x = (np.exp(along + rng.normal(0, 0.5, (n, k))) - 1) * np.linspace(2, 0.5, k)
    x -= x.mean(0)
    x *= np.sqrt(k / (x**2).sum(1).mean())
    return torch.tensor(x, dtype=torch.float32), transition_tensor(ring(n), CPU), n


def tokens(n=60, k=5, seed=0):
    x, step, _ = tissue(n, k, seed)
    propagated = torch.stack(propagate(x, step, CONFIG.radii), dim=2)
    return propagated, component_statistics(propagated)


def assert_small_angles(a, b, least):
    assert a.shape == b.shape
    assert torch.cosine_similarity(a, b, dim=1).min() > least


# --- the network -----------------------------------------------------------------------------


def test_flipping_a_component_flips_its_columns_and_no_others(model):
    propagated, _ = tokens()
    sign = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0])[:, None]
    flipped = propagated * sign
    out = model(propagated, component_statistics(propagated))
    assert out.shape == (60, 5, CONFIG.heads)
    assert (out.abs().amax((0, 2)) > 0.01).all()
    torch.testing.assert_close(model(flipped, component_statistics(flipped)), out * sign, rtol=0, atol=1e-6)


def test_order_of_components_does_not_matter(model):
    propagated, _ = tokens()
    order = torch.tensor([3, 0, 4, 1, 2])
    out = model(propagated, component_statistics(propagated))
    reordered = model(propagated[:, order], component_statistics(propagated[:, order]))
    torch.testing.assert_close(reordered, out[:, order], rtol=0, atol=1e-5)


def test_a_cell_depends_only_on_its_own_tokens(model):
    propagated, statistics = tokens()
    out = model(propagated, statistics)
    torch.testing.assert_close(model(propagated[7:9], statistics), out[7:9], rtol=0, atol=1e-6)


def test_gates_depend_on_all_components_of_a_cell(model):
    propagated, statistics = tokens()
    changed = propagated.clone()
    changed[:, 3] *= 3
    assert (model(changed, statistics)[:, 0] - model(propagated, statistics)[:, 0]).abs().max() > 1e-3


def test_every_weight_is_trained(model):
    propagated, statistics = tokens()
    model(propagated, statistics).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in model.parameters())
    model.zero_grad()


# --- its parts -----------------------------------------------------------------------------


def test_propagation_is_a_power_of_the_lazy_transition_matrix():
    x, step, n = tissue(40, 3)
    dense = transition_matrix(ring(n)).toarray().astype(float)
    assert dense[5, 5] == 1  # the cell without neighbours keeps its value
    np.testing.assert_array_equal(step.to_dense().numpy(), dense.astype(np.float32))
    lazy = (np.eye(n) + dense) / 2
    radii = [0.0, 0.4, 1.0, 2.0, 2.5, 9.0, 9.25]
    for radius, propagated in zip(radii, propagate(x, step, radii), strict=True):
        whole = np.linalg.matrix_power(lazy, int(radius)) @ x.numpy()
        expected = whole + (radius - int(radius)) * (lazy @ whole - whole)
        np.testing.assert_allclose(propagated, expected, atol=1e-5)
        # One radius alone is the same as one of several.
        torch.testing.assert_close(propagate(x, step, [radius])[0], propagated)


def test_component_statistics_by_hand():
    propagated, statistics = tokens(50, 4)
    x = propagated.numpy().astype(float)
    assert statistics.shape == (4, 2 * len(CONFIG.radii) + 1)
    variance = [np.mean(x[:, k, 0] ** 2) for k in range(4)]
    for k in range(4):
        for s in range(len(CONFIG.radii)):
            assert statistics[k, s] == pytest.approx(np.mean(x[:, k, s] * x[:, k, 0]) / variance[k], abs=1e-5)
            left = np.log(np.mean(x[:, k, s] ** 2) / variance[k] + 1e-4) / 5
            assert statistics[k, len(CONFIG.radii) + s] == pytest.approx(left, abs=1e-5)
        assert statistics[k, -1] == pytest.approx(np.log(variance[k] / np.mean(variance)), abs=1e-5)
    assert (statistics[:, 0] - 1).abs().max() < 1e-5
    nothing = propagated.clone()
    nothing[:, 2] = 0
    assert component_statistics(nothing).isfinite().all()


@pytest.mark.parametrize("k", [1, 4, 9])
def test_principal_is_pca_of_unit_variance_skewed_to_the_right(k):
    x = np.random.default_rng(0).gamma(1.0, np.arange(1, 7), (80, 6)) + 3
    x32 = torch.tensor(x, dtype=torch.float32)
    found = fit_principal(x32, k).apply(x32).numpy().astype(float)
    expected = PCA(min(k, 6), svd_solver="full").fit_transform(x)
    expected *= np.where((expected**3).sum(0) < 0, -1, 1) / np.sqrt(expected.var(0).sum())
    np.testing.assert_allclose(found, expected, atol=1e-4)
    ones = torch.ones(9, 3)
    assert (fit_principal(ones, 2).apply(ones) == 0).all()


# --- a tissue -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoded(model):
    with torch.inference_mode():
        return model.fit_encode(*tissue())[1:]


def test_blocks_of_a_tissue(encoded):
    x, _, n = tissue()
    niche, state = encoded
    assert niche.shape[0] == state.shape[0] == n
    for block in encoded:
        assert block.dtype == torch.float32
        assert block.isfinite().all()
        np.testing.assert_allclose(block.mean(0), 0, atol=1e-5)
    # The state of a cell is its components, the larger ones damped.
    own = state[:, : x.shape[1]]
    correlation = [float(np.corrcoef(own[:, k], x[:, k])[0, 1]) for k in range(x.shape[1])]
    np.testing.assert_allclose(correlation, 1, atol=1e-5)
    assert own.square().sum(1).mean() == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(own.std(0) / own.std(0)[0], (x.std(0) / x.std(0)[0]) ** 0.25, rtol=1e-3)


def test_encode_on_the_axes_of_a_fit(model, encoded):
    """It reproduces the fit, and embeds a part of the cells alone as among all cells."""
    x, step, n = tissue()
    with torch.inference_mode():
        axes = model.fit_encode(x, step, n)[0]
        again = model.encode(x, step, axes)
        graph = sp.block_diag([ring(n), ring(n, seed=1)]).tocsr()
        both = torch.cat([x, 2 * x.flip(0)])
        joint, *expected = model.fit_encode(both, transition_tensor(graph, CPU), n)
        part = model.encode(both[n:], transition_tensor(ring(n, seed=1), CPU), joint)
    for a, b in zip(again, encoded, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    for a, b in zip(part, expected, strict=True):
        torch.testing.assert_close(a, b[n:], rtol=0, atol=1e-4)


def test_signs_and_order_of_components_are_arbitrary(model, encoded):
    x, step, n = tissue()
    order, sign = torch.arange(8).roll(3), torch.tensor([1.0, -1.0]).repeat(4)
    with torch.inference_mode():
        niche, state = model.fit_encode(x[:, order] * sign, step, n)[1:]
    torch.testing.assert_close(niche, encoded[0], rtol=0, atol=1e-3)
    torch.testing.assert_close(state[:, :8], encoded[1][:, :8][:, order] * sign, rtol=0, atol=1e-5)


def test_order_of_cells_changes_nothing(model, encoded):
    x, _, n = tissue()
    order = np.random.default_rng(0).permutation(n)
    with torch.inference_mode():
        result = model.fit_encode(x[order], transition_tensor(ring(n)[order][:, order], CPU), n)[1:]
    for a, b in zip(result, encoded, strict=True):
        torch.testing.assert_close(a, b[order], rtol=0, atol=1e-3)


@pytest.mark.parametrize("chunk", [1, 64, 149])
def test_chunks_change_nothing_but_rounding(model, encoded, chunk, monkeypatch):
    monkeypatch.setattr(heist_niche, "CHUNK", chunk)
    with torch.inference_mode():
        for a, b in zip(model.fit_encode(*tissue())[1:], encoded, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


def test_bfloat16_is_close(model, encoded):
    with torch.inference_mode():
        low = model.fit_encode(*tissue(), dtype=torch.bfloat16)[1:]
    assert not torch.equal(low[0], encoded[0])
    for a, b in zip(low, encoded, strict=True):
        assert a.dtype == torch.float32
        assert_small_angles(a, b, 0.99)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("n", [2, 40])
def test_fewer_components_than_requested(model, k, n):
    x, _, _ = tissue(40, k)
    graph = ring(40)[:n, :n]
    with torch.inference_mode():
        niche, state = model.fit_encode(x[:n] - x[:n].mean(0), transition_tensor(graph, CPU), n)[1:]
    assert len(niche) == len(state) == n
    assert niche.isfinite().all()
    assert state.isfinite().all()
    assert state.shape[1] <= 2 * k


def test_radius_of_the_niche_grows_with_the_slide_within_bounds(model):
    """At least one step and at most ``max_steps`` for slides of any size."""
    x, step, _ = tissue()
    short = HEISTNiche(replace(CONFIG, max_steps=12)).eval()
    with torch.inference_mode():
        cells = {n: short.fit_encode(x, step, n)[1] for n in (1, 2, 150, 600, 1e6, 1e9)}
    torch.testing.assert_close(cells[1], cells[2], rtol=0, atol=0)
    torch.testing.assert_close(cells[1e6], cells[1e9], rtol=0, atol=0)
    for n, m in ((2, 150), (150, 600), (600, 1e6)):
        assert (cells[n] - cells[m]).abs().max() > 0.01


def test_slides_do_not_influence_each_other(model):
    """In a graph of two parts, changing one part does not change the other."""
    x, _, n = tissue()
    step = transition_tensor(sp.block_diag([ring(n), ring(n, seed=1)]).tocsr(), CPU)
    both = torch.cat([x, x.flip(0)])
    other = torch.cat([x, x.flip(1)])
    for a, b in zip(propagate(both, step, [1, 2.5, 9]), propagate(other, step, [1, 2.5, 9]), strict=True):
        torch.testing.assert_close(a[:n], b[:n], rtol=0, atol=0)
        assert (a[n:] - b[n:]).abs().max() > 0.01


# --- config and file -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"radii": ()}, "radii=.* increasing .* start at 0"),
        ({"radii": (1, 2)}, "radii=.* increasing .* start at 0"),
        ({"radii": (0, 2, 2)}, "radii=.* increasing .* start at 0"),
        ({"radii": (0, 4, 2)}, "radii=.* increasing .* start at 0"),
        ({"radii": (0, 1.5)}, "whole numbers"),
        ({"width": 0}, "width must be a positive integer, got 0"),
        ({"blocks": 1.5}, "blocks must be a positive integer"),
        ({"heads": True}, "heads must be a positive integer"),
        ({"n_components": -3}, "n_components must be a positive integer"),
        ({"max_steps": 0}, "max_steps must be a positive integer"),
        ({"niche_scale": 0.0}, "niche_scale=0.0"),
        ({"contexts": (0.25, -4)}, "contexts=.* must be above 0"),
    ],
)
def test_config_is_checked(options, match):
    with pytest.raises(ValueError, match=match):
        HEISTNicheConfig(**options)


def test_config_survives_json():
    back = HEISTNicheConfig(**json.loads(json.dumps(asdict(CONFIG))))
    assert back == CONFIG
    assert hash(back) == hash(CONFIG)


def test_round_trip(model, encoded, tmp_path):
    model.name, model.record = "mine", {"data": [{"name": "a"}]}
    save(model, tmp_path)
    back = load(tmp_path)
    assert type(back) is HEISTNiche
    assert back.config == CONFIG
    assert (back.name, back.record["data"]) == ("mine", [{"name": "a"}])
    assert not back.training
    assert fingerprint(back) == fingerprint(model)
    with torch.inference_mode():
        for a, b in zip(back.fit_encode(*tissue())[1:], encoded, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    save(model, tmp_path / "half", dtype="float16")
    assert_small_angles(load(tmp_path / "half").fit_encode(*tissue())[1].detach(), encoded[0], 0.999)


def test_radii_stay_apart_on_slides_of_any_size():
    """Below the limit they are multiples of the radius of the niche; at the limit they still differ from each other."""
    config = HEISTNicheConfig()
    for n in (1000, 5000, 20_000, 52_000):
        niche, around = config.steps(n)
        assert niche == 0.07 * n**0.5
        assert around == [round(niche * c) for c in config.contexts]
    before = config.steps(52_000)
    for n in (52_300, 100_000, 400_000, 836_000, 1_000_000, 5_000_000, 1e9):
        niche, around = config.steps(n)
        radii = sorted([niche, *around])
        assert radii[-1] <= config.max_steps
        assert min(b / a for a, b in pairwise(radii)) > 1.9
        # They never shrink as slides grow.
        assert niche >= before[0]
        assert all(b >= a for a, b in zip(before[1], around, strict=True))
        before = niche, around
    assert HEISTNicheConfig(contexts=()).steps(1e9) == (256, [])


def test_columns_of_different_radii_differ():
    """Also on a slide so large that the widest radius reaches the limit."""
    x, step, _ = tissue()
    capped = HEISTNiche(HEISTNicheConfig(n_components=8, max_steps=32)).eval()
    with torch.inference_mode():
        niche, _ = capped.fit_encode(x, step, 1e6)[1:]
    blocks = niche[:, 12:].split(8, dim=1)
    assert len(blocks) == 3
    for a, b in combinations(blocks, 2):
        assert (a - b).abs().max() > 1e-3
