"""HEIST compared with arrays of the published model and with the plain PyG port; invariances and errors."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from spatialfm.models import HEIST, HEISTConfig
from spatialfm.models import heist as module
from spatialfm.models._published import load_published

HERE = Path(__file__).parent
FIXTURES = ["heist_nocross", "heist_small"]


@pytest.fixture(scope="session")
def bench(load_script):
    """The benchmark, which converts our weights to those of the port."""
    return load_script("benchmarks/heist_encode.py")


def relative_error(value, reference):
    assert value.shape == reference.shape
    return float(np.abs(value.detach().numpy() - reference).max() / reference.std())


def assert_equal(result, expected):
    """Equal up to rounding, which the final norm amplifies in the rare rows that are nearly constant."""
    for a, b in zip(result, expected, strict=True):
        assert a.shape == b.shape
        error = ((a - b).norm(dim=-1) / b.norm(dim=-1)).detach().flatten()
        assert error.median() <= 1e-5
        assert error.quantile(0.99) <= 2e-4
        assert error.max() <= 1e-2


def fixture_graph(name):
    reference = dict(np.load(HERE / "data" / name / "graph.npz"))
    tensors = {k: torch.from_numpy(v) for k, v in reference.items()}
    networks = [tensors[f"gene_edges_{t}"].long() for t in range(int(reference["group"].max()) + 1)]
    args = (tensors["coords"], tensors["cell_edges"].long(), tensors["expression"], networks, tensors["group"].long())
    return reference, args


def trained_like(config, seed=0):
    """Random weights in which norms, biases and epsilons differ from their initial values, as after training."""
    torch.manual_seed(seed)
    model = HEIST(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("norm.weight"):
                p.uniform_(0.5, 1.5)
            elif p.ndim < 2:
                p.normal_(0, 0.2)
            else:
                p.normal_(0, p.shape[1] ** -0.5)
    return model.eval()


def random_graph(n_cells, n_genes, n_groups, seed=0, density=0.2):
    """A graph with directed edges, self-loops, isolated cells and genes, an empty network, tied and zero expression."""
    g = torch.Generator().manual_seed(seed)
    coords = torch.randn(n_cells, 2, generator=g)
    cell_edges = (torch.rand(n_cells, n_cells, generator=g) < 3 / n_cells).nonzero().T
    cell_edges = cell_edges[:, cell_edges[1] > 0]
    networks = []
    for t in range(n_groups):
        adjacency = torch.rand(n_genes, n_genes, generator=g) < (density if t else 0)
        adjacency[:, 1:2] = False
        networks.append(adjacency.nonzero().T)
    expression = (3 * torch.rand(n_cells, n_genes, generator=g)).round()
    group = torch.randint(n_groups, (n_cells,), generator=g)
    return coords, cell_edges, expression, networks, group


SMALL = HEISTConfig(width=32, heads=4, layers=3, pe_dim=16)
ARGS = random_graph(23, 19, 4)


# --- parity -----------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", FIXTURES)
def test_parity_with_the_published_model(name, grad):
    reference, args = fixture_graph(name)
    model = load_published(HERE / "data" / name / "checkpoint.pth")
    coords, cell_edges, expression, networks, group = args
    with torch.set_grad_enabled(grad):
        h, g = model.encode(*args)
        decoded = model.decode(h, g, cell_edges, networks, group)
    ranks = module.gene_ranks(expression)
    table = module.gene_position_table(expression.shape[1], model.config, torch.device("cpu"))
    assert relative_error(module.cell_positions(coords, model.config.pe_dim), reference["cell_pe"]) <= 1e-5
    assert relative_error(table[ranks], reference["gene_pe"]) <= 1e-5
    assert relative_error(h, reference["cell_embedding"]) <= 5e-4
    assert relative_error(g, reference["gene_embedding"]) <= 5e-4
    assert relative_error(decoded[0], reference["decoded_coords"]) <= 5e-4
    assert relative_error(decoded[1], reference["decoded_expression"]) <= 5e-4
    np.testing.assert_allclose(model.decoder.alpha.detach().sigmoid(), reference["sigmoid_alpha"], rtol=1e-6)


@pytest.mark.parametrize("pe_dim", [8, 12, 24, 40, 128])
def test_gene_frequencies_round_the_quotient_first(pe_dim):
    """Arguments reach 40,000, so the last bit of a frequency matters to the sine if P/2 is not a power of two."""
    m, half = np.arange(pe_dim // 2, dtype=np.float32), np.float32(pe_dim // 2)
    frequency = np.float32(10000) * (np.float32(4) * m / half)
    angle = torch.linspace(0, 1, 50).numpy()[:, None] * frequency
    assert angle.dtype == np.float32
    found = module.gene_position_table(50, HEISTConfig(width=8, heads=2, layers=1, pe_dim=pe_dim), torch.device("cpu"))
    expected = np.stack([np.sin(angle.astype(float)), np.cos(angle.astype(float))], axis=-1).reshape(50, pe_dim)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (SMALL, (23, 19, 4)),
        (HEISTConfig(width=24, heads=3, layers=2, pe_dim=12, cross=False), (9, 70, 2)),
        (HEISTConfig(width=32, heads=2, layers=2, pe_dim=8), (6, 300, 2)),
        (SMALL, (1, 1, 1)),
    ],
)
def test_equal_to_the_pyg_port(bench, config, shape, grad):
    model = trained_like(config)
    args = random_graph(*shape, seed=1)
    with torch.set_grad_enabled(grad):
        ours, theirs = model.encode(*args), bench.pyg_port(model)(*args)
    assert_equal(ours, theirs)


def test_decoder_equals_the_pyg_port(bench):
    model = trained_like(SMALL)
    port = sys.modules[bench.PyGHEIST.__module__].PyGDecoder(32).eval()
    ours = model.decoder.state_dict()
    names = {"coordinates": "high_mlp", "expression": "low_mlp"}
    state = {"alpha": ours["alpha"]}
    for k, v in ours.items():
        head, *rest = k.split(".")
        if head in names:
            state[".".join([names[head], *rest])] = v
        elif k.endswith("eps"):
            state[k] = v[None]
        elif head == "layers":
            state[k.replace("linear", "nn")] = v
    port.load_state_dict(state)
    _, cell_edges, _, networks, group = ARGS
    h, g = torch.randn(23, 32), torch.randn(23, 19, 32)
    with torch.no_grad():
        for a, b in zip(
            model.decode(h, g, cell_edges, networks, group), port(h, g, cell_edges, networks, group), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# --- invariances -----------------------------------------------------------------------------


def encode(args, **kwargs):
    with torch.inference_mode():
        return trained_like(SMALL).encode(*args, **kwargs)


def test_gradients_reach_every_weight_and_agree_with_finite_differences():
    model = trained_like(SMALL)
    ends = [
        torch.randn(*shape) / n**0.5
        for shape, n in (((23, 32), 736), ((23, 19, 32), 13984), ((23, 2), 46), ((23, 19), 437))
    ]

    def loss():
        h, g = model.encode(*ARGS)
        outputs = (h, g, *model.decode(h, g, ARGS[1], ARGS[3], ARGS[4]))
        return sum((a * b).sum() for a, b in zip(outputs, ends, strict=True))

    loss().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == ["decoder.alpha"]  # the weight of the training losses
    weight = model.layers[1].gene_qkvs.weight
    direction = weight.grad / weight.grad.norm()
    step = 1e-3
    with torch.no_grad():  # the path without autograd, at two points
        weight += step * direction
        up = loss()
        weight -= 2 * step * direction
        down = loss()
    torch.testing.assert_close((up - down) / (2 * step), weight.grad.norm(), rtol=0.05, atol=0)


def test_contexts_in_one_call_equal_separate_calls():
    coords, cell_edges, expression, networks, group = ARGS
    sizes = [10, 1, 12]
    context = torch.repeat_interleave(torch.tensor([3, 5, 9]), torch.tensor(sizes))
    within = cell_edges[:, context[cell_edges[0]] == context[cell_edges[1]]]
    together = encode((coords, within, expression, networks, group), context=context)
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        edges = within[:, (within[1] >= start) & (within[1] < start + size)] - start
        alone = encode((coords[rows], edges, expression[rows], networks, group[rows]))
        assert_equal([t[rows] for t in together], alone)
        start += size


def test_cells_in_another_order():
    coords, cell_edges, expression, networks, group = ARGS
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    args = (coords[order], order.argsort()[cell_edges], expression[order], networks, group[order])
    assert_equal(encode(args), [t[order] for t in encode(ARGS)])


def test_genes_in_another_order():
    coords, cell_edges, _, networks, group = ARGS
    expression = torch.rand(23, 19, generator=torch.Generator().manual_seed(1))  # no ties, which are ranked by order
    order = torch.randperm(19, generator=torch.Generator().manual_seed(0))
    h, g = encode((coords, cell_edges, expression, networks, group))
    args = (coords, cell_edges, expression[:, order], [order.argsort()[e] for e in networks], group)
    assert_equal(encode(args), (h, g[:, order]))


def test_equal_values_rank_in_gene_order():
    expression = torch.tensor([[1.0, 2.0, 1.0, 2.0, 0.0]])
    assert module.gene_ranks(expression).tolist() == [[2, 0, 3, 1, 4]]


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_blocks_change_nothing(monkeypatch, threads):
    expected = encode(ARGS)
    before = torch.get_num_threads()
    monkeypatch.setattr(module, "CPU_BLOCK_ROWS", 25)
    monkeypatch.setattr(module, "CPU_BLOCK_BYTES", 5000)
    torch.set_num_threads(threads)
    try:
        result = encode(ARGS)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert_equal(result, expected)


def test_an_error_in_a_thread_is_raised_and_the_number_of_threads_is_restored(monkeypatch):
    before = torch.get_num_threads()

    def fail(*_):
        msg = "from a thread"
        raise RuntimeError(msg)

    monkeypatch.setattr(module, "cached_attention", fail)
    with pytest.raises(RuntimeError, match="from a thread"):
        encode(ARGS)
    assert torch.get_num_threads() == before


def test_bfloat16_is_close():
    for name in FIXTURES:
        _, args = fixture_graph(name)
        model = load_published(HERE / "data" / name / "checkpoint.pth")
        with torch.inference_mode():
            full, low = model.encode(*args), model.encode(*args, dtype="bfloat16")
        for a, b in zip(full, low, strict=True):
            assert a.dtype == b.dtype == torch.float32
            assert torch.cosine_similarity(a, b, dim=-1).mean() >= 0.99
        assert torch.cosine_similarity(full[0], low[0]).min() >= 0.99


# --- attention -----------------------------------------------------------------------------


def attention_case(n_genes, dtype, factor=1.0, n_cells=5, density=0.3):
    g = torch.Generator().manual_seed(0)
    edges = (torch.rand(n_genes, n_genes, generator=g) < density).nonzero().T
    network = module.GeneNetwork.from_edges(edges, n_genes, slice(0, n_cells))
    # Views of one table, not contiguous, as in the layer.
    table = torch.randn(n_cells, n_genes, 3, 4, 16, generator=g) * torch.tensor([factor, 1, 1])[:, None, None]
    q, k, v = table.to(dtype).permute(2, 0, 3, 1, 4)
    bias = network.bias.to(dtype)
    return (q, k, v, network), F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=bias.float())


@pytest.mark.parametrize("n_genes", [1, 2, 29, 64, 130, 201])
def test_cached_attention_equals_torch(n_genes):
    case, expected = attention_case(n_genes, torch.float32)
    torch.testing.assert_close(module.cached_attention(*case), expected, rtol=1e-5, atol=1e-5)
    case, expected = attention_case(n_genes, torch.bfloat16)
    result = module.cached_attention(*case)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, rtol=0, atol=0.06)


@pytest.mark.parametrize("n_bytes", [1, 4 * 29**2 * 3, 4 * 29**2 * 4, 4 * 29**2 * 9])
def test_cached_attention_in_any_blocks(monkeypatch, n_bytes):
    monkeypatch.setattr(module, "CPU_BLOCK_BYTES", n_bytes)
    case, expected = attention_case(29, torch.float32)
    torch.testing.assert_close(module.cached_attention(*case), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [30.0, 300.0, 1e4])
def test_cached_attention_with_scores_beyond_the_range_of_exponentials(factor, dtype):
    case, _ = attention_case(29, dtype, factor)
    q, k, v, network = case
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=network.bias.to(dtype))
    result = module.cached_attention(*case)
    assert result.isfinite().all()
    tolerance = 1e-4 * factor**0.5 if dtype == torch.float32 else 0.1
    # In bfloat16, the last bit of scores of this size decides which neighbour has all the weight; most agree.
    wrong = (result.float() - expected.float()).abs() > tolerance
    assert wrong.float().mean() <= (0 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_cached_attention_does_not_hide_nan(bad, dtype):
    (q, k, v, network), _ = attention_case(29, dtype, density=1.0)
    q = q.clone()
    q[1, 2, 3] = bad
    result = module.cached_attention(q, k, v, network)
    assert result[1, 2, 3].isnan().all()
    assert result[0].isfinite().all()


def test_nan_in_one_cell_stays_in_its_context():
    coords, _, expression, networks, group = ARGS
    expression = expression.clone()
    expression[0, 0] = torch.nan
    context = torch.arange(23)
    h, g = encode((coords, torch.empty(2, 0, dtype=torch.long), expression, networks, group), context=context)
    assert h[0].isnan().all()
    assert h[1:].isfinite().all()
    assert g[1:].isfinite().all()


# --- errors -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"width": 0}, "width must be a positive integer"),
        ({"layers": 1.5}, "layers must be a positive integer"),
        ({"heads": True}, "heads must be a positive integer"),
        ({"width": 30, "heads": 4}, "multiple of heads"),
        ({"pe_dim": 6}, "multiple of 4"),
        ({"gene_pe": "sine"}, r"gene_pe='sine' is not known; choose from \['published', 'geometric'\]"),
        ({"dtype": "float16"}, "dtype='float16' is not known"),
    ],
)
def test_config_errors(kwargs, match):
    with pytest.raises(ValueError, match=match):
        HEISTConfig(**kwargs)


EMPTY = torch.empty(0, dtype=torch.long)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({0: torch.zeros(22, 2)}, "coords"),
        ({0: torch.zeros(23, 3)}, "coords"),
        ({1: torch.tensor([[0], [23]])}, "cell_edges has node 23, but there are only 23"),
        ({1: torch.tensor([[0], [-1]])}, "cell_edges has node -1"),
        ({1: torch.zeros(2, 3)}, "cell_edges must be a"),
        ({1: torch.zeros(3, 2, dtype=torch.long)}, "cell_edges must be a"),
        ({2: torch.zeros(4, 19)}, "expression"),
        ({3: [torch.tensor([[0], [19]])] * 4}, r"gene_edges\[0\] has node 19, but there are only 19"),
        ({3: [torch.zeros(2, 0, dtype=torch.long)]}, "index the 1 gene networks"),
        ({4: torch.full((23,), -1)}, "group must be long"),
        ({4: torch.zeros(23)}, "group must be long"),
        ({0: torch.zeros(0, 2), 1: EMPTY.view(2, 0), 2: torch.zeros(0, 19), 4: EMPTY}, "at least one cell"),
        ({"context": torch.zeros(22)}, "context must be"),
        ({"context": torch.arange(23).flip(0)}, "non-decreasing"),
        ({"dtype": "float64"}, "dtype='float64' is not known"),
    ],
)
def test_encode_errors(change, match):
    args = [change.get(i, a) for i, a in enumerate(ARGS)]
    kwargs = {k: v for k, v in change.items() if isinstance(k, str)}
    with pytest.raises(ValueError, match=match):
        encode(args, **kwargs)


# --- published checkpoints -----------------------------------------------------------------------------


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_a_checkpoint_cannot_run_code(tmp_path):
    torch.save({"model_state_dict": {}, "args": Payload(tmp_path / "ran")}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="more than tensors"):
        load_published(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "bad.pth", weights_only=False)
    assert (tmp_path / "ran").exists()  # the payload does run if it is unpickled


def test_a_damaged_checkpoint(tmp_path):
    whole = (HERE / "data" / "heist_small" / "checkpoint.pth").read_bytes()
    for i, part in enumerate((whole[: len(whole) // 2], whole[:100], b"", b"no checkpoint")):
        path = tmp_path / f"{i}.pth"
        path.write_bytes(part)
        with pytest.raises(ValueError, match=f"{i}.pth"):
            load_published(path)


def test_an_incomplete_checkpoint(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"not a HEIST checkpoint.*holds \['weights'\]"):
        load_published(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"not a HEIST checkpoint.*holds list"):
        load_published(path)
    with torch.serialization.safe_globals([Namespace]):
        good = torch.load(HERE / "data" / "heist_small" / "checkpoint.pth", weights_only=True)
    first = next(k for k in good["model_state_dict"] if k.startswith("convs.0.conv_low"))
    without = {k: v for k, v in good["model_state_dict"].items() if k != first}
    torch.save(good | {"model_state_dict": without}, path)
    with pytest.raises(ValueError, match="is not a complete HEIST checkpoint"):
        load_published(path)
    torch.save(good | {"args": Namespace()}, path)
    with pytest.raises(ValueError, match="is not a complete HEIST checkpoint"):
        load_published(path)
