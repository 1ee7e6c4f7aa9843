"""HEIST as a plain PyTorch Geometric port: the oracle of the tests and the competitor of ``heist_encode.py``.

Written from the equations, independently of ``spatialfm.models``, with standard layers (``GINConv``,
``TransformerConv``, ``torch.nn.MultiheadAttention``) on a ``Batch`` that holds one gene graph for each cell. Written to
be clear; no work is shared between cells.

Shapes: ``C`` cells, ``G`` genes, ``d`` width, ``P`` ``pe_dim``, ``T`` groups.

- ``coords``: (C, 2) standardised coordinates; ``expression``: (C, G)
- ``cell_edges``: (2, E) long, rows source and target; ``gene_edges``: the same over the genes for each of the T groups
- ``group``: (C,) long, which of the T networks a cell has
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GINConv, TransformerConv, global_mean_pool

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# Stored in every published checkpoint, used by no published embedding.
UNUSED = ("beta", "projection_head.", "hierarchical_blending.")


def cell_positions(coords: Tensor, pe_dim: int) -> Tensor:
    """Sines and cosines of x, then those of y, (C, P)."""
    half = pe_dim // 2
    wavelength = torch.tensor([10_000.0 ** (4 * i / half) for i in range(half // 2)], device=coords.device)
    angle = coords.float()[:, :, None] / wavelength  # (C, 2, P / 4)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def gene_positions(expression: Tensor, pe_dim: int) -> Tensor:
    """Sines and cosines of a gene's rank within its cell (largest first, ties in gene order), (C, G, P).

    The angles reach 40,000, so that float32 rounding of the rank and of the product is part of what the model learned.
    """
    n_genes, half = expression.shape[1], pe_dim // 2
    order = expression.argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)  # the inverse permutation
    r = torch.linspace(0, 1, n_genes, dtype=torch.float32, device=expression.device)[rank]
    frequency = 10_000.0 * (torch.tensor([4.0 * m for m in range(half)], device=expression.device) / half)
    angle = r[:, :, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(2)


def gene_batch(features: Tensor, gene_edges: Sequence[Tensor], group: Tensor) -> Batch:
    """One graph a cell, its genes the nodes with ``features`` (C, G, F), its edges those of the cell's group."""
    return Batch.from_data_list(
        [Data(x=x, edge_index=gene_edges[t]) for x, t in zip(features, group.tolist(), strict=True)]
    )


class CrossMessage(nn.Module):
    """``GELU((Q target . K source) / sqrt(d) * V target)``, one scalar a target; without biases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.Q = nn.Linear(width, width, bias=False)
        self.K = nn.Linear(width, width, bias=False)
        self.V = nn.Linear(width, width, bias=False)

    def forward(self, target: Tensor, source: Tensor, index: Tensor | None = None) -> Tensor:
        """``index`` names each target's row of ``source``; by default they correspond row by row."""
        key = self.K(source)
        score = (self.Q(target) * (key if index is None else key[index])).sum(-1, keepdim=True)
        return F.gelu(score / target.shape[-1] ** 0.5 * self.V(target))


class Layer(nn.Module):
    """One HEIST layer: messages within the tissue, within each cell's gene network, and between the two levels."""

    def __init__(self, width: int, heads: int, *, cross: bool, first: bool) -> None:
        super().__init__()
        self.cross, self.first = cross, first
        self.conv_high = GINConv(nn.Linear(width, width), train_eps=True)
        self.multi_head = nn.MultiheadAttention(width, heads)
        self.conv_low = TransformerConv(width, width // heads, heads=heads, concat=True, beta=False, root_weight=True)
        self.norm = nn.LayerNorm(width)
        # A checkpoint holds these two also where the model ran without cross messages.
        self.cross_lh = CrossMessage(width)
        self.cross_hl = CrossMessage(width)

    def forward(self, h_in: Tensor, g_in: Tensor, cell_edges: Tensor, genes: Batch) -> tuple[Tensor, Tensor]:
        """Cells (C, d) and genes (C * G, d) in, the same out."""
        h, g = self.norm(h_in), self.norm(g_in)
        h = self.conv_high(h, cell_edges) + self.multi_head(h, h, h)[0]
        g = self.conv_low(g, genes.edge_index)
        if self.cross:
            x = global_mean_pool(g, genes.batch)
            h, g = self.cross_hl(h, x), self.cross_lh(g, h, genes.batch)
        else:
            h, g = F.gelu(h), F.gelu(g)
        return (h, g) if self.first else (h + h_in, g + g_in)


class PyGHEIST(nn.Module):
    """The encoder; parameters are named as in a published checkpoint."""

    def __init__(self, width: int, heads: int, layers: int, pe_dim: int, cross: bool = True) -> None:
        super().__init__()
        self.pe_dim = pe_dim
        self.mlp_high = nn.Sequential(nn.Linear(2 + pe_dim, width), nn.GELU())
        self.mlp_low = nn.Sequential(nn.Linear(1 + pe_dim, width), nn.GELU())
        self.convs = nn.ModuleList(Layer(width, heads, cross=cross, first=i == 0) for i in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(
        self, coords: Tensor, cell_edges: Tensor, expression: Tensor, gene_edges: Sequence[Tensor], group: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Embeddings of the cells (C, d) and of each cell's genes (C, G, d)."""
        high = torch.cat([coords, cell_positions(coords, self.pe_dim).to(coords)], dim=-1)
        low = torch.cat([expression[..., None], gene_positions(expression, self.pe_dim).to(expression)], dim=-1)
        genes = gene_batch(low, gene_edges, group)
        h, g = self.mlp_high(high), self.mlp_low(genes.x)
        for conv in self.convs:
            h, g = conv(h, g, cell_edges, genes)
        return self.norm(h), self.norm(g).unflatten(0, expression.shape)


class PyGDecoder(nn.Module):
    """Coordinates and expression from the embeddings; the same three layers serve both levels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GINConv(nn.Linear(width, width), train_eps=True) for _ in range(3))
        self.high_mlp = nn.Linear(width, 2)
        self.low_mlp = nn.Linear(width, 1)
        self.alpha = nn.Parameter(torch.zeros(()))

    def _convolve(self, x: Tensor, edges: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.dropout(F.relu(layer(x, edges)), 0.5, training=self.training)
        return x

    def forward(
        self,
        cell_embedding: Tensor,
        gene_embedding: Tensor,
        cell_edges: Tensor,
        gene_edges: Sequence[Tensor],
        group: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Coordinates (C, 2) and expression (C, G)."""
        genes = gene_batch(gene_embedding, gene_edges, group)
        coords = self.high_mlp(self._convolve(cell_embedding, cell_edges))
        expression = self.low_mlp(self._convolve(genes.x, genes.edge_index)).abs()
        return coords, expression.view(gene_embedding.shape[:2])


def load_published(path: str | Path) -> tuple[PyGHEIST, PyGDecoder]:
    """Read encoder and decoder of a published checkpoint in evaluation mode on the CPU, without running its code."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    args = checkpoint["args"]
    model = PyGHEIST(args.hidden_dim, args.num_heads, args.num_layers, args.pe_dim, args.cross_message_passing)
    model.load_state_dict({k: v for k, v in checkpoint["model_state_dict"].items() if not k.startswith(UNUSED)})
    decoder = PyGDecoder(args.hidden_dim)
    decoder.load_state_dict(checkpoint["decoder_state_dict"])
    return model.eval(), decoder.eval()
