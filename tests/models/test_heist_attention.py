"""AttentionRecord compared with plain numpy."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from spatialfm.models import HEIST, HEISTConfig
from spatialfm.models import heist as module
from spatialfm.models._published import load_published
from spatialfm.models.heist import AttentionRecord

HERE = Path(__file__).parent


def softmax(scores):
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def weights_of(linear, norm, x, heads):
    """Attention scores of (n, d) states, (heads, n, n) float64."""
    x = x.numpy().astype(np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + norm.eps)
    x = x * norm.weight.detach().double().numpy() + norm.bias.detach().double().numpy()
    d = x.shape[-1]
    q, k = (
        (x @ linear.weight[part].detach().double().numpy().T + linear.bias[part].detach().double().numpy()).reshape(
            len(x), heads, -1
        )
        for part in (slice(0, d), slice(d, 2 * d))
    )
    return np.einsum("ihd,jhd->hij", q, k) / np.sqrt(d / heads)


def brute_force(model, args, context, counted):
    """Weights of all pairs of cells, and of all pairs of genes summed over the counted cells, from inputs of layers."""
    coords, cell_edges, expression, networks, group = args
    inputs = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, a: inputs.append((a[0].clone(), a[1].clone())))
        for layer in model.layers
    ]
    with torch.no_grad():
        model.encode(coords, cell_edges, expression, networks, group, context=context)
    for hook in hooks:
        hook.remove()
    rank = np.argsort(np.argsort(group.numpy(), kind="stable"))
    n, g = expression.shape
    heads = model.config.heads
    cells, genes = np.zeros((n, n)), np.zeros((len(networks), g, g))
    for layer, (h, states) in zip(model.layers, inputs, strict=True):
        h, states = h[rank], states[rank]
        for c in np.unique(context):
            own = np.flatnonzero(context == c)
            cells[np.ix_(own, own)] += softmax(weights_of(layer.cell_qkv, layer.norm, h[own], heads)).mean(0)
        for i in np.flatnonzero(counted):
            scores = weights_of(layer.gene_qkvs, layer.norm, states[i], heads)
            source, target = networks[group[i]].numpy()
            for t in np.unique(target):
                near = np.unique(source[target == t])
                genes[group[i], t, near] += softmax(scores[:, t, near]).mean(0)
    return cells / len(model.layers), genes / len(model.layers)


@pytest.fixture(scope="module")
def fixture():
    reference = dict(np.load(HERE / "data" / "heist_small" / "graph.npz"))
    t = {k: torch.from_numpy(v) for k, v in reference.items()}
    networks = [t[f"gene_edges_{k}"].long() for k in range(int(reference["group"].max()) + 1)]
    model = load_published(next((HERE / "data" / "heist_small").glob("*.pth"))).eval()
    return model, (t["coords"], t["cell_edges"].long(), t["expression"], networks, t["group"].long())


@pytest.mark.parametrize("grad", [False, True])  # with gradients, genes use the same code as on other devices
@pytest.mark.parametrize("sharper", [1, 100])  # scores beyond the range of exponentials
@pytest.mark.parametrize("n_contexts", [1, 3])
def test_brute_force(fixture, n_contexts, sharper, grad, monkeypatch):
    for name, size in (("RECORDED_SCORES", 5000), ("CPU_BLOCK_BYTES", 5000), ("CPU_BLOCK_ROWS", 50)):  # several blocks
        monkeypatch.setattr(module, name, size)
    model, args = copy.deepcopy(fixture[0]), fixture[1]
    d = model.config.width
    with torch.no_grad():
        for layer in model.layers:
            layer.gene_qkvs.weight[:d] *= sharper
    n, g = args[2].shape
    context = torch.arange(n) * n_contexts // n
    inside = context[args[1][0]] == context[args[1][1]]
    args = (args[0], args[1][:, inside], *args[2:])
    counted = np.arange(n) % 3 > 0
    cells, genes = brute_force(model, args, context, counted)
    with torch.set_grad_enabled(grad):
        plain = model.encode(*args, context=context)
        record = AttentionRecord(torch.from_numpy(counted))
        recorded = model.encode(*args, context=context, record=record)
    if not grad:  # recording does not change the embedding at all
        assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))
    source, target = args[1].numpy()
    found = {k: getattr(record, k).detach().numpy() for k in ("edges", "itself", "genes")}
    np.testing.assert_allclose(found["edges"], cells[target, source], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["itself"], cells.diagonal(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["genes"], genes, rtol=1e-4, atol=1e-5)
    assert record.genes.shape == (len(args[3]), g, g)
    np.testing.assert_allclose(cells.sum(1), 1)
    # The test is sensitive: weights differ from equal weights, and from the weights of the opposite direction.
    assert np.abs(cells[target, source] * np.bincount(context)[context[target]] - 1).max() > 0.1
    assert np.abs(cells[target, source] / cells[source, target] - 1).max() > 0.05


def test_threads_and_precision(fixture):
    model, args = fixture
    before = torch.get_num_threads()

    def record(threads, dtype):
        torch.set_num_threads(threads)
        found = AttentionRecord(torch.ones(len(args[0]), dtype=torch.bool))
        with torch.inference_mode():
            model.encode(*args, record=found, dtype=dtype)
        return found.edges, found.itself, found.genes

    try:
        found = {k: record(*k) for k in [(1, "float32"), (3, "float32"), (1, "bfloat16"), (3, "bfloat16")]}
    finally:
        torch.set_num_threads(before)
    for dtype in ("float32", "bfloat16"):
        assert all(torch.equal(a, b) for a, b in zip(found[1, dtype], found[3, dtype], strict=True))
    for full, low in zip(found[1, "float32"], found[1, "bfloat16"], strict=True):
        torch.testing.assert_close(low, full, rtol=0.02, atol=0)


@pytest.mark.parametrize("n_bytes", [1, 1 << 20])
@pytest.mark.parametrize("sizes", [[150], [10, 150, 70]])
def test_log_sums_in_any_blocks(sizes, n_bytes, monkeypatch):
    monkeypatch.setattr(module, "CPU_BLOCK_BYTES", n_bytes)
    query, key = torch.randn(2, len(sizes), 2, max(sizes), 4)
    real = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    bias = torch.zeros(real.shape).masked_fill_(~real, -torch.inf)[:, None, None]
    expected = (query @ key.mT / 2 + bias).logsumexp(-1)
    torch.testing.assert_close(module.softmax_log_sums(query, key, bias if len(sizes) > 1 else None, map), expected)


@pytest.mark.parametrize("context", [None, torch.tensor([0, 0, 0, 1, 1, 1, 1])])
def test_weights_sum_to_one(context):
    """Those of a cell over its context, and those of a gene over its network; a gene without neighbours has none."""
    torch.manual_seed(0)
    model = HEIST(HEISTConfig(width=8, heads=2, layers=2, pe_dim=8)).eval()
    n, g = 7, 5
    sizes = context if context is not None else torch.zeros(n, dtype=torch.long)
    pairs = (sizes[:, None] == sizes).nonzero().T
    networks = [torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), torch.zeros(2, 0, dtype=torch.long)]
    group = torch.tensor([1, 0, 0, 1, 0, 0, 1])
    counted = torch.tensor([True, True, False, True, True, False, True])
    record = AttentionRecord(counted)
    with torch.no_grad():
        model.encode(torch.randn(n, 2), pairs, torch.rand(n, g), networks, group, context=context, record=record)
    sums = torch.zeros(n).index_add_(0, pairs[1], record.edges)
    torch.testing.assert_close(sums, torch.ones(n))
    diagonal = pairs[0] == pairs[1]
    torch.testing.assert_close(record.edges[diagonal], record.itself)
    torch.testing.assert_close(record.genes.sum(2), torch.tensor([[2.0, 2, 2, 0, 0], [0] * 5]))
    outside = torch.ones(g, g, dtype=torch.bool)
    outside[networks[0][1], networks[0][0]] = False
    assert (record.genes[:, outside] == 0).all()
