"""The plain PyG port, the reference of the dense HEIST, compared with arrays of the published model."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def pyg(load_script):
    return load_script("benchmarks/pyg_heist.py")


def relative_error(value: torch.Tensor, reference: np.ndarray) -> float:
    assert value.shape == reference.shape
    return float(np.abs(value.detach().numpy() - reference).max() / reference.std())


@pytest.mark.parametrize("name", ["heist_nocross", "heist_small"])
def test_parity(pyg, name):
    reference = dict(np.load(HERE / "data" / name / "graph.npz"))
    graph = {k: torch.from_numpy(v) for k, v in reference.items()}
    cell_edges, group = graph["cell_edges"].long(), graph["group"].long()
    gene_edges = [graph[f"gene_edges_{t}"].long() for t in range(int(group.max()) + 1)]
    model, decoder = pyg.load_published(HERE / "data" / name / "checkpoint.pth")
    with torch.no_grad():
        cell, gene = model(graph["coords"], cell_edges, graph["expression"], gene_edges, group)
        coords, expression = decoder(cell, gene, cell_edges, gene_edges, group)

    assert relative_error(pyg.cell_positions(graph["coords"], model.pe_dim), reference["cell_pe"]) <= 1e-5
    assert relative_error(pyg.gene_positions(graph["expression"], model.pe_dim), reference["gene_pe"]) <= 1e-5
    assert relative_error(cell, reference["cell_embedding"]) <= 5e-4
    assert relative_error(gene, reference["gene_embedding"]) <= 5e-4
    assert relative_error(coords, reference["decoded_coords"]) <= 5e-4
    assert relative_error(expression, reference["decoded_expression"]) <= 5e-4
    np.testing.assert_allclose(decoder.alpha.sigmoid().item(), reference["sigmoid_alpha"], rtol=1e-6)


def test_ties_rank_in_gene_order(pyg):
    tied = torch.tensor([[2.0, 5.0, 2.0, 0.0, 0.0, 5.0]])
    untied = torch.tensor([[4.0, 6.0, 3.0, 2.0, 1.0, 5.0]])
    torch.testing.assert_close(pyg.gene_positions(tied, 16), pyg.gene_positions(untied, 16), rtol=0, atol=0)
    constant, descending = torch.zeros(1, 300), torch.arange(300.0).flip(0)[None]
    torch.testing.assert_close(pyg.gene_positions(constant, 16), pyg.gene_positions(descending, 16), rtol=0, atol=0)


@pytest.mark.parametrize("level", ["cell", "gene"])
def test_messages_run_from_source_to_target(pyg, level):
    # All edges of the reference are symmetric, so it cannot test the direction.
    torch.manual_seed(0)
    model, decoder = pyg.PyGHEIST(16, 2, 1, 16, cross=False).eval(), pyg.PyGDecoder(16).eval()
    none, edge = torch.empty(2, 0, dtype=torch.long), torch.tensor([[0], [1]])
    cell_edges, gene_edges = (edge, [none]) if level == "cell" else (none, [edge])
    group = torch.zeros(3, dtype=torch.long)
    cell, gene = torch.rand(3, 16, requires_grad=True), torch.rand(3, 4, 16, requires_grad=True)
    embedding, output = (cell, 0) if level == "cell" else (gene, 1)

    def decode(e):
        args = (e, gene) if level == "cell" else (cell, e)
        values = decoder(*args, cell_edges, gene_edges, group)[output]
        return values.sum(1) if level == "cell" else values[0]  # one number per node

    jacobian = torch.autograd.functional.jacobian(decode, embedding)
    depends = (jacobian if level == "cell" else jacobian[:, 0]).abs().sum(-1) > 0  # (node, node it depends on)
    expected = torch.eye(len(depends), dtype=torch.bool)
    expected[1, 0] = True
    assert torch.equal(depends, expected)

    torch.nn.init.zeros_(model.convs[0].multi_head.out_proj.weight)  # without attention between all cells
    coords, expression = torch.rand(3, 2), torch.tensor([[4.0, 3.0, 2.0, 1.0]]).repeat(3, 1)

    def encode(x):  # cubes, because the entries of a normalised row sum to zero
        args = (x, cell_edges, expression) if level == "cell" else (coords, cell_edges, x)
        values = model(*args, gene_edges, group)[output].pow(3).sum(-1)
        return values if level == "cell" else values[0]

    jacobian = torch.autograd.functional.jacobian(encode, coords if level == "cell" else expression)
    depends = (jacobian.abs().sum(-1) if level == "cell" else jacobian[:, 0].abs()) > 1e-6
    assert torch.equal(depends, expected)


def test_a_file_cannot_run_code(pyg, tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"model_state_dict": {}, "args": Payload()}, tmp_path / "bad.pth")
    with pytest.raises(pickle.UnpicklingError):
        pyg.load_published(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()
