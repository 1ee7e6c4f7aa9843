"""HiBio compared with loops over spots, genes and regions; its image tower is tested in test_towers.py."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import spatialfm as sfm
from spatialfm.models import HiBio, HiBioConfig
from spatialfm.models._propagate import transition_tensor
from spatialfm.models.hibio import center, pool, standardize

GENES = ("TP53", "MYC", "EGFR", "ACTB", "GAPDH", "KRT5", "VIM")
N, F = 30, 5


@pytest.fixture(scope="module")
def model():
    """A model with random weights and buffers."""
    model = HiBio(HiBioConfig(genes=GENES, n_features=F, radii=(0.0, 1.5), width=4, columns=6))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(torch.randn(value.shape, generator=generator))
    return model.eval()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def draw(rng, *shape):
    return torch.from_numpy(rng.normal(size=shape).astype(np.float32))


def graph(rng, n=N):
    dense = np.triu(rng.random((n, n)) < 0.15, 1)
    dense[0], dense[:, 0] = False, False  # one spot without neighbours
    return sp.csr_matrix((dense | dense.T).astype(np.float32))


def slides(rng):
    return torch.from_numpy(np.concatenate([[0, 1, 2], rng.integers(0, 3, N - 3)]))


def test_center_and_standardize(rng):
    x, slide = 50 * draw(rng, N, F) + 7, slides(rng)
    x[slide == 1, 2] = 187.3  # constant on one slide
    x[:, 4] = 0.1
    centred, standard = center(x, slide).numpy(), standardize(x, slide).numpy()
    for k in range(3):
        here = (slide == k).numpy()
        part = x.numpy().astype(float)[here]
        np.testing.assert_allclose(centred[here], part - part.mean(0), atol=1e-4)
        spread = part.std(0)
        varies = spread > 1e-3
        expected = (part - part.mean(0))[:, varies] / spread[varies]
        np.testing.assert_allclose(standard[here][:, varies], expected, atol=1e-4)
        np.testing.assert_allclose(standard[here][:, ~varies], 0, atol=1e-3)
    np.testing.assert_allclose(standardize(x[:1], torch.zeros(1, dtype=torch.long)), 0)


def test_pool_and_attention(model, rng):
    x, weights = draw(rng, N, 4), draw(rng, N)
    region = torch.from_numpy(np.concatenate([np.arange(5), rng.integers(0, 5, N - 5)]))
    for k, row in enumerate(pool(x, weights, region)):
        expected = sum(w * v for w, v, r in zip(weights, x, region, strict=True) if r == k)
        torch.testing.assert_close(row, expected)
    for image, query in ((False, model.gene_query), (True, model.image_query)):
        weight = model.attention(x, region, image=image).detach()
        pooled = model.pool(x, region, image=image).detach()
        for k in range(5):
            here = region == k
            score = torch.stack([v / v.norm() for v in x[here]]) @ query.detach()
            torch.testing.assert_close(weight[here], score.softmax(0))
            torch.testing.assert_close(pooled[k], score.softmax(0) @ x[here])


def test_an_untrained_query_is_a_mean(rng):
    x, region = draw(rng, 6, 32), torch.tensor([0, 0, 0, 1, 1, 2])
    pooled = HiBio().pool(x, region, image=True)
    torch.testing.assert_close(pooled, torch.stack([x[:3].mean(0), x[3:5].mean(0), x[5]]))


def test_read_genes_is_the_dense_sum(model, rng):
    profile = np.maximum(rng.normal(size=(N, len(GENES))), 0).astype(np.float32)
    slide = slides(rng)
    sparse = torch.from_numpy(profile).to_sparse()
    for t in (torch.from_numpy(profile), sparse):
        e = model.read_genes(t, slide).numpy()
        for i in range(N):
            mean = profile[(slide == slide[i]).numpy()].mean(0)
            expected = sum((profile[i, g] - mean[g]) * model.gene_vectors[g].numpy() for g in range(len(GENES)))
            np.testing.assert_allclose(e[i], expected, atol=1e-5)


def test_read_image_propagates_then_weights(model, rng):
    features, slide, edges = 3 * draw(rng, N, F) + 5, slides(rng), graph(rng)
    degree = np.asarray(edges.sum(1)).ravel()
    transition = np.where(degree[:, None] > 0, edges.toarray() / np.maximum(degree, 1)[:, None], np.eye(N))
    lazy = (np.eye(N) + transition) / 2

    def standard(x):
        out = np.empty_like(x)
        for k in range(3):
            here = slide.numpy() == k
            out[here] = (x[here] - x[here].mean(0)) / np.maximum(x[here].std(0), 1e-12)
        return out

    own = standard(features.numpy().astype(float))
    far = (lazy @ own + lazy @ lazy @ own) / 2  # one step and a half
    expected = sum(standard(x) @ w for x, w in zip((own, far), model.image_weights.numpy(), strict=True))
    found = model.read_image(features, transition_tensor(edges, torch.device("cpu")), slide).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-3)
    # Another scanner: each feature scaled and shifted within a slide.
    other = features * torch.tensor([0.5, 3.0, 1.0])[slide][:, None] + torch.tensor([9.0, -4.0, 0.0])[slide][:, None]
    again = model.read_image(other, transition_tensor(edges, torch.device("cpu")), slide).numpy()
    np.testing.assert_allclose(again, found, atol=1e-3)


def test_anchors(model):
    membership = np.zeros((3, len(GENES)), np.float32)
    membership[0, 2], membership[1, [1, 3, 4]] = 1, 1  # one gene, three genes, none
    with torch.no_grad():
        found = model.anchors(torch.from_numpy(membership))
        torch.testing.assert_close(model.anchors(torch.from_numpy(membership).to_sparse()), found)
        directions = model.gene_head(model.gene_vectors)
    torch.testing.assert_close(found[0], directions[2] / directions[2].norm())
    three = directions[[1, 3, 4]].mean(0)
    torch.testing.assert_close(found[1], three / three.norm())
    assert not found[2].any()
    # A spot with a single gene has the direction of the anchor of that gene.
    spot = torch.nn.functional.cosine_similarity(model.gene_head(7 * model.gene_vectors[2]), found[0], dim=0)
    assert float(spot.detach()) == pytest.approx(1, abs=1e-5)


def test_predict(model, rng):
    e = draw(rng, 3, 4)
    expected = model.mean_expression.numpy() + e.numpy() @ model.decoder.numpy()
    np.testing.assert_allclose(model.predict(e).numpy(), expected, atol=1e-5)


def fuse(model, components, edges, regions, patches=None):
    transition = transition_tensor(edges, torch.device("cpu"))
    attention = [model.attention(components[:, :4], r, image=False).detach() for r in regions]
    return model.fit_fuse(components, transition, regions, attention, len(components), patches)[1]


@pytest.mark.parametrize("with_patches", [False, True])
def test_fuse(model, rng, with_patches):
    edges, components = graph(rng), draw(rng, N, 9) * torch.linspace(3, 0.3, 9)
    components[:, :4] += 1
    regions = [torch.arange(N) // 3, torch.arange(N) // 10]
    patches = draw(rng, N, 4) if with_patches else None
    fused = fuse(model, components, edges, regions, patches).numpy()
    assert fused.shape == (N, 6)
    np.testing.assert_allclose(fused.mean(0), 0, atol=1e-5)
    assert np.square(fused).sum(1).mean() == pytest.approx(1, abs=1e-4)
    assert (fused**3).sum(0).min() >= 0  # positive skewness
    products = fused.T @ fused
    np.testing.assert_allclose(products, np.diag(np.diag(products)), atol=1e-3)
    assert (np.diff(np.diag(products)) <= 1e-4).all()

    # By hand: one lazy step (0.07 sqrt(30) < 1), means of regions weighted by attention, the patches.
    def unit(x):
        x = x - x.mean(0)
        return x / np.sqrt(np.square(x).sum(1).mean())

    degree = np.asarray(edges.sum(1)).ravel()
    transition = np.where(degree[:, None] > 0, edges.toarray() / np.maximum(degree, 1)[:, None], np.eye(N))
    x = components.numpy().astype(float)
    parts = [unit((x + transition @ x) / 2)]
    for region in regions:
        weights = model.attention(components[:, :4], region, image=False).detach().numpy()
        means = np.stack([(weights[region == k, None] * x[region == k]).sum(0) for k in range(int(region.max()) + 1)])
        parts.append(0.5 * unit(means[region]))
    if with_patches:
        p = patches.numpy().astype(float)
        parts.append(0.3 * unit((p + transition @ p) / 2))
    both = np.hstack(parts)
    u, s, _ = np.linalg.svd(both - both.mean(0), full_matrices=False)
    expected = u[:, :6] * s[:6]
    expected /= np.sqrt(np.square(expected).sum(1).mean())
    np.testing.assert_allclose(np.abs(fused), np.abs(expected), atol=2e-3)

    order = torch.from_numpy(rng.permutation(N))
    shuffled = fuse(
        model, components[order], edges[order.numpy()][:, order.numpy()], [r[order] for r in regions],
        patches[order] if with_patches else None,
    )  # fmt: skip
    np.testing.assert_allclose(shuffled.numpy(), fused[order], atol=2e-3)


def test_fuse_does_not_depend_on_the_axes(model, rng):
    edges, components = graph(rng), draw(rng, N, 9) * torch.linspace(3, 0.3, 9)
    regions = [torch.arange(N) // 3, torch.arange(N) // 10]
    weight = torch.from_numpy(rng.random(N).astype(np.float32))
    attention = [weight / pool(weight[:, None], torch.ones(N), r)[r, 0] for r in regions]
    transition = transition_tensor(edges, torch.device("cpu"))
    turn = torch.from_numpy(np.linalg.qr(rng.normal(size=(9, 9)))[0].astype(np.float32))
    one, two = (
        model.fit_fuse(c, transition, regions, attention, N)[1].numpy() for c in (components, 5 * components @ turn - 3)
    )
    np.testing.assert_allclose(one, two, atol=2e-3)


def test_save_and_load(model, tmp_path):
    model.record = {"curve": [1]}
    sfm.models.save(model, tmp_path)
    back = sfm.models.load(tmp_path)
    assert isinstance(back, HiBio)
    assert back.config == model.config
    assert back.record["curve"] == [1]
    assert sfm.models.fingerprint(back) == sfm.models.fingerprint(model)
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    assert "hibio" in (tmp_path / "README.md").read_text("utf-8")


def test_parameters_are_trained_and_buffers_are_not():
    model = HiBio(HiBioConfig(genes=GENES))
    trained = {"gene_head.weight", "image_head.weight", "gene_query", "image_query", "log_scale"}
    assert {name for name, _ in model.named_parameters()} == trained
    found = {"gene_vectors", "image_weights", "decoder", "mean_expression", "confidence"}
    assert {name for name, _ in model.named_buffers()} == found


def test_config_accepts_lists_from_json():
    config = HiBioConfig(genes=list(GENES), radii=[0, 2], region_scales=[1], alignment=["spots"])
    assert config == HiBioConfig(genes=GENES, radii=(0.0, 2.0), region_scales=(1.0,), alignment=("spots",))
    assert hash(config)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"width": 0}, "width must be a positive integer"),
        ({"n_features": 2.5}, "n_features must be a positive integer"),
        ({"columns": -1}, "columns must be a positive integer"),
        ({"radii": ()}, r"radii=\(\) must be increasing numbers of at least 0"),
        ({"radii": (2, 2)}, "radii=.* increasing"),
        ({"radii": (-1, 2)}, "radii=.* at least 0"),
        ({"radii": (0, float("nan"))}, "radii=.* increasing"),
        ({"region_scales": (1, 0.5)}, "region_scales=.* increasing"),
        ({"alignment": ()}, r"alignment=\(\) must hold one or more of"),
        ({"alignment": ("spots", "cells")}, "alignment=.* must hold one or more of"),
        ({"alignment": ("spots", "spots")}, "alignment=.* once"),
        ({"genes": ("TP53", "TP53")}, "genes must be unique, but a name occurs twice"),
        ({"niche_scale": -1}, "niche_scale must be at least 0, got -1"),
        ({"image_weight": float("nan")}, "image_weight must be at least 0, got nan"),
    ],
)
def test_config_errors(options, match):
    with pytest.raises(ValueError, match=match):
        HiBioConfig(**options)
