r"""HEIST: a graph transformer over a tissue of cells and, inside every cell, a network of genes.

Madhu et al., *HEIST: A Graph Foundation Model for Spatial Transcriptomics and Proteomics Data* (2025). This file holds
the whole architecture, top to bottom: positions, one layer, the decoder, the model. Symbols are those of the equations:

==============  ====================================================================================================
``C``           cells of a call, in one or several contexts (a context is a piece of tissue; cells attend within it)
``G``           genes of the panel
``d``, ``H``    width, attention heads
``h``, ``g``    states of the cells (C, d) and of the genes of each cell (C, G, d)
``x``           mean over the genes of each cell (C, d)
==============  ====================================================================================================

All cells of a group share one gene network. Gene attention is therefore dense attention over (cells, heads, genes,
d_head), masked by the adjacency of the network, rather than a scatter over millions of edges. The update of a gene
depends only on its own cell, so genes are processed in blocks of cells that fit into the cache.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import repeat
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

# On a CPU without autograd, genes are processed in blocks that fit into the cache: (cell, gene) rows of a block in the
# last-level cache, and bytes of its attention scores in the second-level cache.
CPU_BLOCK_ROWS = 4096
CPU_BLOCK_BYTES = 1536 * 1024
# Attention scores in memory at a time while attention is recorded, if not limited by the block of a CPU.
RECORDED_SCORES = 1 << 26


@dataclass(frozen=True)
class HEISTConfig:
    """Shape and options of a HEIST model; the defaults are the published size (2.65 M parameters).

    Parameters
    ----------
    width
        Columns of a state, d. A multiple of ``heads``.
    heads
        Attention heads, H, on both levels.
    layers
        Number of layers, L.
    pe_dim
        Columns of a positional encoding, P. A multiple of 4.
    cross
        Whether the two levels exchange messages.
    gene_pe
        Frequencies of the positional encoding of genes: ``"published"``, or ``"geometric"``, evenly spaced on a
        logarithmic scale from 1 to ``10000`` turns.
    dtype
        Type of the matrix products: ``"float32"``, or ``"bfloat16"`` (autocast; states, norms and sums stay float32).
    """

    width: int = 128
    heads: int = 8
    layers: int = 10
    pe_dim: int = 128
    cross: bool = True
    gene_pe: Literal["published", "geometric"] = "published"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for name in ("width", "heads", "layers", "pe_dim"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                msg = f"{name} must be a positive integer, got {value!r}"
                raise ValueError(msg)
        if self.width % self.heads:
            msg = f"width={self.width} must be a multiple of heads={self.heads}"
            raise ValueError(msg)
        if self.pe_dim % 4:
            msg = f"pe_dim={self.pe_dim} must be a multiple of 4 (sine and cosine for x and for y)"
            raise ValueError(msg)
        for name, choices in (("gene_pe", ("published", "geometric")), ("dtype", ("float32", "bfloat16"))):
            if getattr(self, name) not in choices:
                msg = f"{name}={getattr(self, name)!r} is not known; choose from {list(choices)}"
                raise ValueError(msg)


# --- positions -----------------------------------------------------------------------------


def cell_positions(coords: Tensor, pe_dim: int) -> Tensor:
    r"""Positional encoding of cells at standardised coordinates.

    :math:`[\sin(x/\omega_0), \cos(x/\omega_0), \sin(x/\omega_1), \dots \mid \text{the same for } y]` with
    :math:`\omega_i = 10000^{4i/h}`, :math:`h = P/2`, :math:`i < h/2`.

    Parameters
    ----------
    coords
        (C, 2) float, standardised per slide.
    pe_dim
        P.

    Returns
    -------
    (C, P) float.
    """
    half = pe_dim // 2
    omega = 10000.0 ** (4 * torch.arange(half // 2, device=coords.device, dtype=coords.dtype) / half)
    angle = coords[:, :, None] / omega  # (C, 2, P/4)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).reshape(len(coords), pe_dim)


def gene_position_table(n_genes: int, config: HEISTConfig, device: torch.device) -> Tensor:
    r"""Positional encoding of each rank of expression within a cell.

    With :math:`r` = ``linspace(0, 1, G)[rank]``, columns :math:`2m, 2m+1` are :math:`\sin(r f_m), \cos(r f_m)`, where
    :math:`f_m = 10000 \cdot (4m / h)`, :math:`h = P/2` (published). Arguments reach 40,000, so float32 rounding (of the
    quotient first) is part of the definition.

    Returns
    -------
    (G, P) float32; row k belongs to the gene of rank k (0 is the most expressed one).
    """
    m = torch.arange(config.pe_dim // 2, device=device, dtype=torch.float32)
    if config.gene_pe == "published":
        frequency = 10000.0 * (4 * m / (config.pe_dim // 2))
    else:
        frequency = 2 * math.pi * 10000.0 ** (m / (config.pe_dim // 2))
    angle = torch.linspace(0, 1, n_genes, device=device)[:, None] * frequency  # (G, P/2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).reshape(n_genes, config.pe_dim)


def gene_ranks(expression: Tensor) -> Tensor:
    """Rank genes within each cell, (C, G) float -> (C, G) long; 0 is the most expressed, ties keep their order."""
    order = expression.argsort(dim=1, descending=True, stable=True)
    return torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )


# --- graphs -----------------------------------------------------------------------------


class _Graph:
    """The graphs of one call, with cells sorted by group."""

    def __init__(
        self, cell_edges: Tensor, gene_edges: Sequence[Tensor], group: Tensor, context: Tensor | None, n_genes: int
    ) -> None:
        device = group.device
        self.order = group.argsort(stable=True)  # sorted position -> position in the call
        self.rank = torch.empty_like(self.order)  # position in the call -> sorted position
        self.rank[self.order] = torch.arange(len(group), device=device)
        self.cell_edges = self.rank[cell_edges]
        self.map: Callable[..., Iterable[Any]] = map  # runs the work on blocks of genes
        self.record: AttentionRecord | None = None
        self.networks: list[GeneNetwork] = []
        start = 0
        sizes_of_groups = torch.bincount(group, minlength=len(gene_edges)).tolist()
        for k, (edges, size) in enumerate(zip(gene_edges, sizes_of_groups, strict=True)):
            if size:
                self.networks.append(GeneNetwork.from_edges(edges, n_genes, slice(start, start + size), k))
            start += size
        sizes = None if context is None else torch.unique_consecutive(context, return_counts=True)[1]
        self.padded: Tensor | None = None
        if sizes is not None and len(sizes) > 1:
            offset = torch.arange(int(sizes.max()), device=device)
            real = offset < sizes[:, None]  # (contexts, longest)
            rows = (sizes.cumsum(0) - sizes)[:, None] + offset
            self.padded = self.rank[rows.masked_fill(~real, 0)]
            self.slot = real.flatten().nonzero()[:, 0][self.order]  # position of each sorted cell in the padded table
            self.padding_bias = torch.zeros(real.shape, device=device).masked_fill_(~real, -math.inf)[:, None, None]

    def blocks(self, g: Tensor) -> tuple[list[GeneNetwork], list[int]]:
        """Split ``g`` (C, G, d) into blocks of cells; returns the network and the number of cells of each block."""
        n_cells, n_genes = g.shape[:2]
        if torch.is_grad_enabled() and self.record is None:
            return [self.every_cell], [n_cells]
        most = n_cells
        if g.device.type == "cpu":
            # At least eight blocks to share among cores. The number of cores is not used: no result may depend on it.
            most = max(1, min(CPU_BLOCK_ROWS // n_genes, -(-n_cells // 8)))
        starts = [(n, start) for n in self.networks for start in range(n.rows.start, n.rows.stop, most)]
        return [n for n, _ in starts], [min(most, n.rows.stop - start) for n, start in starts]

    @cached_property
    def every_cell(self) -> GeneNetwork:
        """The network of every cell, stacked: with autograd, a few large products are faster than many small ones."""
        sizes = torch.tensor([n.rows.stop - n.rows.start for n in self.networks], device=self.order.device)
        adjacency = torch.stack([n.adjacency for n in self.networks]).repeat_interleave(sizes, dim=0)
        return GeneNetwork(adjacency[:, None], slice(0, len(self.order)))

    def neighbor_sum(self, h: Tensor) -> Tensor:
        """Sum over each cell's neighbours, (C, d) -> (C, d)."""
        return torch.zeros_like(h).index_add_(0, self.cell_edges[1], h[self.cell_edges[0]])

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of all cells of a context to each other, three (C, H, d_head) -> (C, d)."""
        # each (contexts, longest, H, d_head)
        q, k, v = (t[None] if self.padded is None else t[self.padded] for t in (query, key, value))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        bias = None if self.padded is None else self.padding_bias.to(q.dtype)
        if self.record is not None:
            self.record.add_cells(query, key, softmax_log_sums(q, k, bias, self.map), self)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(0, 1).flatten(1)
        return out if self.padded is None else out[self.slot]


class GeneNetwork:
    """The gene network of one group, the rows of its cells after sorting by group, and the number of the group."""

    def __init__(self, adjacency: Tensor, rows: slice, group: int = 0) -> None:
        self.rows, self.group = rows, group
        self.adjacency = adjacency  # ([cells, 1,] G, G), 1 on edges: row = target, column = source
        isolated = adjacency.sum(-1) == 0
        # A softmax over nothing is NaN: genes without a neighbour attend to all genes, and are set to zero afterwards.
        self.bias = torch.where(adjacency.bool() | isolated[..., None], 0.0, -math.inf)
        self.isolated = isolated.reshape(*adjacency.shape[:-3], -1) if bool(isolated.any()) else None  # ([cells,] G)

    @classmethod
    def from_edges(cls, edges: Tensor, n_genes: int, rows: slice, group: int = 0) -> GeneNetwork:
        """Network of the (source, target) edges."""
        adjacency = torch.zeros(n_genes, n_genes, device=edges.device)
        adjacency[edges[1], edges[0]] = 1
        return cls(adjacency, rows, group)

    @cached_property
    def keep(self) -> NDArray[np.int32]:
        """``bias`` as a bit mask."""
        return torch.where(self.bias == 0, -1, 0).int().numpy()


# --- layers -----------------------------------------------------------------------------


class GIN(nn.Module):
    r"""Graph isomorphism layer, :math:`W(\sum_{j \in N(i)} h_j + (1 + \epsilon) h_i) + b` (Xu et al. 2019, eq. 4.1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.zeros(()))
        self.linear = nn.Linear(width, width)

    def forward(self, h: Tensor, neighbor_sum: Tensor) -> Tensor:
        """States and the sums of their neighbours, (..., d) both -> (..., d)."""
        return self.linear(neighbor_sum + (1 + self.eps) * h)


class CrossMessage(nn.Module):
    r"""Message between the levels: :math:`\mathrm{GELU}((Q t \cdot K s) / \sqrt{d} \; V t)` for target t and source s.

    The three maps have no biases.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        """Targets (..., n, d) and their one source (..., d) -> (..., n, d)."""
        # Q t . K s = t . (K s Q): Q is applied once per source instead of once per target.
        folded = (self.key(source) @ self.query.weight) * target.shape[-1] ** -0.5  # (..., d)
        gate = folded[..., None, :] @ target.transpose(-1, -2)  # (..., 1, n)
        return F.gelu(gate.transpose(-1, -2) * self.value(target))


def attention_weights(query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
    """``softmax(q.k / sqrt(d_head) + bias)``, two (..., n, d_head) -> (..., n, n); rows attend to columns."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return torch.softmax(scores if bias is None else scores + bias, dim=-1)


class AttentionRecord:
    """Attention weights of a call of :meth:`HEIST.encode`, averaged over layers and heads.

    They are computed in addition to the embedding, which they do not change.

    Parameters
    ----------
    counted
        (C,) bool, the cells whose gene attention is summed.

    Attributes
    ----------
    edges : Tensor
        (E,) float32: attention of the target of each cell edge to its source. The attention of a cell to all cells of
        its context sums to 1.
    itself : Tensor
        (C,) float32: attention of each cell to itself.
    genes : Tensor
        (groups, G, G) float32: attention of a target gene (row) to a source gene (column), summed over the counted
        cells of each group. In one cell, the row of a gene sums to 1 if the gene has a neighbour in the network of its
        group, and is zero otherwise.
    """

    edges: Tensor
    itself: Tensor
    genes: Tensor

    def __init__(self, counted: Tensor) -> None:
        self.counted = counted

    def start(self, graph: _Graph, shape: tuple[int, int, int]) -> None:
        """Set all sums to zero, for ``shape`` (groups, G, G)."""
        n, device = len(graph.order), graph.order.device
        self.genes = torch.zeros(shape, device=device)
        # Every cell also has an edge to itself.
        self.pairs = torch.cat([graph.cell_edges, torch.arange(n, device=device).expand(2, n)], dim=1)
        self.shares = torch.zeros(self.pairs.shape[1], device=device)
        self.sorted = self.counted[graph.order]

    def finish(self, graph: _Graph, n: int) -> None:
        """Turn the sums over ``n`` layers and heads into means."""
        self.genes /= n
        self.edges, itself = (self.shares / n).split([graph.cell_edges.shape[1], len(graph.order)])
        self.itself = itself[graph.rank]

    def add_cells(self, query: Tensor, key: Tensor, log_sums: Tensor, graph: _Graph) -> None:
        """Add the cell attention of one layer, from two (C, H, d_head) and :func:`softmax_log_sums`.

        Only the weights of the edges are computed, whatever the size of the contexts.
        """
        log_sums = log_sums.transpose(1, 2).flatten(0, 1)
        log_sums = log_sums if graph.padded is None else log_sums[graph.slot]  # (C, H)

        def weights_of(pairs: Tensor) -> Tensor:
            source, target = pairs
            scores = (query[target].float() * key[source].float()).sum(-1) * query.shape[-1] ** -0.5
            return (scores - log_sums[target]).exp().sum(-1)

        n_pairs = max(1, (CPU_BLOCK_BYTES // 8 if query.device.type == "cpu" else RECORDED_SCORES) // query[0].numel())
        self.shares += torch.cat(list(graph.map(weights_of, self.pairs.split(n_pairs, dim=1))))

    def add_genes(self, network: GeneNetwork, weights: Tensor) -> None:
        """Add the gene attention (G, G) of a block of cells."""
        self.genes[network.group] += (
            weights if network.isolated is None else weights.masked_fill(network.isolated[:, None], 0)
        )


def softmax_log_sums(query: Tensor, key: Tensor, bias: Tensor | None, run: Callable[..., Iterable[Tensor]]) -> Tensor:
    """Logarithms of the denominators of a softmax, (contexts, H, n), from two (contexts, H, n, d_head).

    Only few scores are in memory at a time.
    """
    _, heads, n, d_head = query.shape
    most = CPU_BLOCK_BYTES // 4 if query.device.type == "cpu" else RECORDED_SCORES
    n_heads, n_rows = max(1, most // n**2), max(16, most // n)

    def block_log_sums(query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            key = key.float().transpose(-1, -2)
            scores = (rows.float() * d_head**-0.5 @ key for rows in query.split(n_rows, dim=1))
            return torch.cat([(s if bias is None else s.add_(bias)).logsumexp(-1) for s in scores], dim=1)

    q, k = query.flatten(0, 1), key.flatten(0, 1)  # (contexts * H, n, d_head)
    biases = repeat(None) if bias is None else bias[:, 0].repeat_interleave(heads, dim=0).split(n_heads)
    return torch.cat(list(run(block_log_sums, q.split(n_heads), k.split(n_heads), biases))).view(-1, heads, n)


class _GeneWeights:
    """Gene attention of a block of cells, summed over its counted cells and the heads.

    Parameters
    ----------
    counted
        (cells,) bool.
    n_genes
        G.

    Attributes
    ----------
    total : Tensor
        (G, G) float32; rows attend to columns.
    """

    def __init__(self, counted: Tensor, n_genes: int) -> None:
        self.counted = counted
        self.total = torch.zeros(n_genes, n_genes, device=counted.device)

    def compute(self, query: Tensor, key: Tensor, bias: Tensor) -> None:
        """Compute the total from two (cells, H, G, d_head)."""
        _, heads, n_genes, _ = query.shape
        parts = (t[self.counted].split(max(1, RECORDED_SCORES // (heads * n_genes**2))) for t in (query, key))
        self.total.zero_()
        for q, k in zip(*parts, strict=True):
            self.total += attention_weights(q, k, bias).sum((0, 1))


def cached_attention(
    query: Tensor, key: Tensor, value: Tensor, network: GeneNetwork, record: _GeneWeights | None = None
) -> Tensor:
    """Attention masked by the adjacency of a network on a CPU, three (cells, H, G, d_head) -> (cells, H, G, d_head).

    For short sequences and narrow heads, torch's kernel spends most of its time on exponentials. Here the scores of a
    few heads stay in cache between the two products, one pass turns them into weights, and the result is divided by the
    sum of the weights. No row maximum is subtracted: if a sum leaves the safe range, torch's kernel is used instead.
    """
    from spatialfm.models._softmax import masked_exp2_bfloat16, masked_exp2_float32

    n_cells, heads, n_genes, d_head = query.shape
    scale = np.float32(d_head**-0.5 * math.log2(math.e))
    low = query.dtype == torch.bfloat16
    step = min(max(1, CPU_BLOCK_BYTES // (n_genes**2 * query.element_size())), n_cells * heads)  # heads at a time
    one_cell = heads <= step < 2 * heads and not low  # its heads need no copy; with bfloat16, each product would copy
    step = heads if one_cell else step
    scores = torch.empty(step, n_genes, n_genes, dtype=query.dtype)
    bits = scores.view(torch.int16).numpy() if low else scores.numpy()
    masked_exp2 = masked_exp2_bfloat16 if low else masked_exp2_float32
    out = torch.empty(n_cells * heads, n_genes, d_head, dtype=query.dtype)
    total = torch.empty(n_cells * heads, n_genes)
    parts = (t.unbind() if one_cell else t.reshape(-1, n_genes, d_head).split(step) for t in (query, key, value))
    recorded: Iterable[tuple[NDArray[np.bool_], NDArray[np.float32]] | None] = repeat(None, -(-len(out) // step))
    if record is not None:
        recorded = [(c.numpy(), record.total.numpy()) for c in record.counted.repeat_interleave(heads).split(step)]
    for q, k, v, o, t, r in zip(*parts, out.split(step), total.split(step), recorded, strict=True):
        weights = torch.bmm(q, k.transpose(1, 2), out=scores[: len(q)])
        masked_exp2(bits[: len(q)], scale, network.keep, t.numpy(), r)
        torch.bmm(weights, v, out=o)
    smallest, largest = total.aminmax()
    if not (smallest > 2.0**-100 and largest < 2.0**100):  # also if it is NaN
        bias = network.bias.to(query.dtype)
        if record is not None:
            record.compute(query, key, bias)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    # Division is vectorised in float32. The copy puts the heads of each gene side by side.
    result = torch.empty(n_cells, n_genes, heads, d_head, dtype=query.dtype).transpose(1, 2)
    return result.copy_(out.float().div_(total[..., None]).view(query.shape))


@contextmanager
def _thread_map() -> Iterator[Callable[..., Iterator[Any]]]:
    """``map`` over as many threads as torch may use; each thread processes whole blocks.

    The threads of torch itself would synchronise after every operation on a block, and wait for the slowest.
    """
    n_threads = torch.get_num_threads()
    # The modes of torch are set for each thread.
    no_grad = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad
    cast: dict[str, Any] = {"dtype": torch.get_autocast_dtype("cpu"), "enabled": torch.is_autocast_enabled("cpu")}

    def run(function: Callable[..., Any], *args: Any) -> Any:
        with no_grad(), torch.autocast("cpu", **cast):
            return function(*args)

    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield lambda function, *iterables: pool.map(partial(run, function), *iterables)
    finally:
        torch.set_num_threads(n_threads)


class Layer(nn.Module):
    """One HEIST layer: messages within the cells, within the genes of each cell, and between the two."""

    def __init__(self, config: HEISTConfig) -> None:
        super().__init__()
        d = config.width
        self.heads = config.heads
        self.norm = nn.LayerNorm(d)  # shared by both levels
        self.cell_gin = GIN(d)
        self.cell_qkv = nn.Linear(d, 3 * d)
        self.cell_out = nn.Linear(d, d)
        self.gene_qkvs = nn.Linear(d, 4 * d)  # query, key, value and skip
        self.cell_from_genes = CrossMessage(d) if config.cross else None
        self.gene_from_cell = CrossMessage(d) if config.cross else None

    def cell_messages(self, h_in: Tensor, graph: _Graph) -> Tensor:
        """``h = GIN(LN(h_in)) + MHA(LN(h_in))``, attention over all cells of a context."""
        h = self.norm(h_in)
        query, key, value = self.cell_qkv(h).unflatten(-1, (3, self.heads, -1)).unbind(1)  # each (C, H, d_head)
        return self.cell_gin(h, graph.neighbor_sum(h)) + self.cell_out(graph.attention(query, key, value))

    def gene_projections(self, g_in: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key and value, each (cells, H, G, d_head), and skip (cells, G, d)."""
        d = g_in.shape[-1]
        qkv, skip = self.gene_qkvs(self.norm(g_in)).split([3 * d, d], dim=-1)
        query, key, value = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return query, key, value, skip

    def gene_messages(self, g_in: Tensor, network: GeneNetwork, record: _GeneWeights | None = None) -> Tensor:
        """``g = softmax(q.k / sqrt(d/H)) v + W_skip LN(g_in)``, softmax over the neighbours of the gene.

        For a gene without neighbours, ``g = W_skip LN(g_in)``.
        """
        query, key, value, skip = self.gene_projections(g_in)
        bias = network.bias.to(query.dtype)
        cached = query.device.type == "cpu" and not torch.is_grad_enabled()
        if cached:
            attended = cached_attention(query, key, value, network, record)
        elif query.device.type == "cpu":  # faster than the gradient of torch's kernel, much faster in bfloat16
            attended = attention_weights(query, key, bias) @ value
        else:
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        if record is not None and not cached:
            record.compute(query, key, bias)
        g = attended.transpose(1, 2).flatten(2)
        if network.isolated is not None:
            g = g.masked_fill(network.isolated[..., None], 0)
        return g + skip if torch.is_grad_enabled() else g.add_(skip)

    def update_genes(
        self, network: GeneNetwork, g_in: Tensor, h: Tensor, counted: Tensor | None, *, residual: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Update the genes of a block: ``x``, the new states, and the attention (G, G) of the ``counted`` cells.

        Without autograd, the new states overwrite ``g_in``.
        """
        record = None if counted is None else _GeneWeights(counted, g_in.shape[1])
        g = self.gene_messages(g_in, network, record)
        weights = None if record is None else record.total
        x = g.mean(1)
        g = F.gelu(g) if self.gene_from_cell is None else self.gene_from_cell(g, h)
        if torch.is_grad_enabled():
            return x, g_in + g if residual else g, weights
        return x, g_in.add_(g) if residual else g_in.copy_(g), weights

    def forward(self, h_in: Tensor, g_in: Tensor, graph: _Graph, *, residual: bool) -> tuple[Tensor, Tensor]:
        """Update ``h_in`` (C, d) and ``g_in`` (C, G, d), sorted by group. Overwrites ``g_in`` without autograd."""
        h = self.cell_messages(h_in, graph)
        networks, sizes = graph.blocks(g_in)
        counted = repeat(None) if graph.record is None else graph.record.sorted.split(sizes)
        # split instead of slices: its gradient is one concatenation; that of a slice is a zeroed copy of the whole.
        update = partial(self.update_genes, residual=residual)
        x, g = [], []
        # Results are added in order, so that no sum depends on the threads.
        for network, (mean, state, weights) in zip(
            networks, graph.map(update, networks, g_in.split(sizes), h.split(sizes), counted), strict=True
        ):
            x.append(mean)
            g.append(state)
            if graph.record is not None:
                graph.record.add_genes(network, weights)
        h = F.gelu(h) if self.cell_from_genes is None else self.cell_from_genes(h[:, None], torch.cat(x))[:, 0]
        return h + h_in if residual else h, torch.cat(g) if torch.is_grad_enabled() else g_in


class Decoder(nn.Module):
    r"""Reconstruct coordinates and expression: three GIN layers shared by both levels, then one linear map per level.

    ``alpha`` weighs the two pretraining losses, :math:`\sigma(\alpha) L_{contrastive} + (1 - \sigma(\alpha)) L_{mae}`.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GIN(width) for _ in range(3))
        self.dropout = nn.Dropout(0.5)
        self.coordinates = nn.Linear(width, 2)
        self.expression = nn.Linear(width, 1)
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, h: Tensor, g: Tensor, graph: _Graph) -> tuple[Tensor, Tensor]:
        """``h`` (C, d) and ``g`` (C, G, d) -> coordinates (C, 2) and expression (C, G)."""
        for layer in self.layers:
            h = self.dropout(F.relu(layer(h, graph.neighbor_sum(h))))
            parts = g.split([n.rows.stop - n.rows.start for n in graph.networks])
            parts = [layer(p, n.adjacency.to(p.dtype) @ p) for n, p in zip(graph.networks, parts, strict=True)]
            g = self.dropout(F.relu(torch.cat(parts)))
        return self.coordinates(h), self.expression(g).squeeze(-1).abs()


# --- the model -----------------------------------------------------------------------------


class HEIST(nn.Module):
    """HEIST encoder and decoder.

    Parameters
    ----------
    config
        Shape and options.

    Examples
    --------
    >>> import torch
    >>> from spatialfm.models import HEIST, HEISTConfig
    >>> model = HEIST(HEISTConfig(width=16, heads=2, layers=2, pe_dim=16)).eval()
    >>> coords, expression = torch.randn(3, 2), torch.rand(3, 5)
    >>> cells = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    >>> genes = [torch.tensor([[0, 1], [1, 0]])]
    >>> h, g = model.encode(coords, cells, expression, genes, torch.zeros(3, dtype=torch.long))
    >>> h.shape, g.shape
    (torch.Size([3, 16]), torch.Size([3, 5, 16]))
    """

    def __init__(self, config: HEISTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or HEISTConfig()
        self.name = "heist"
        self.record: dict[str, Any] = {}  # training record
        self.cell_input = nn.Linear(2 + config.pe_dim, config.width)
        self.gene_input = nn.Linear(1 + config.pe_dim, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)  # shared by both levels
        self.decoder = Decoder(config.width)

    def encode(
        self,
        coords: Tensor,
        cell_edges: Tensor,
        expression: Tensor,
        gene_edges: Sequence[Tensor],
        group: Tensor,
        *,
        context: Tensor | None = None,
        record: AttentionRecord | None = None,
        dtype: Literal["float32", "bfloat16"] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Embed cells and their genes.

        Parameters
        ----------
        coords
            (C, 2) float, coordinates standardised per slide.
        cell_edges
            (2, E) long, tissue graph as (source, target). An undirected edge is listed in both directions.
        expression
            (C, G) float.
        gene_edges
            The gene network of each group, a (2, E_t) long tensor of (source, target).
        group
            (C,) long, the position of each cell's network in ``gene_edges``.
        context
            (C,) long, non-decreasing: cells with equal values attend to each other. If None, all cells are one context.
        record
            If given, it is filled with the attention weights.
        dtype
            Overrides ``config.dtype``.

        Returns
        -------
        (C, d) cell and (C, G, d) gene embedding, float32.

        Raises
        ------
        ValueError
            Shapes, types or indices that do not fit each other.
        """
        _check_cells(cell_edges, gene_edges, group, context, expression.shape[1])
        if coords.shape != (len(group), 2) or expression.shape[0] != len(group):
            shapes = (
                f"coords {tuple(coords.shape)}, expression {tuple(expression.shape)} and group {tuple(group.shape)}"
            )
            msg = f"{shapes} must be (C, 2), (C, G) and (C,)"
            raise ValueError(msg)
        with self._autocast(group.device, dtype):
            graph = _Graph(cell_edges, gene_edges, group, context, expression.shape[1])
            graph.record = record
            if record is not None:
                record.start(graph, (len(gene_edges), *2 * expression.shape[1:]))
            coords, expression = coords[graph.order], expression[graph.order]
            h = F.gelu(self.cell_input(torch.cat([coords, cell_positions(coords, self.config.pe_dim)], dim=1)).float())
            # [expression, pe] W = expression * w_0 + table[rank] W_pe: the table of ranks is projected once, not once
            # per cell, and in float64, because the following layers amplify rounding errors (MPS has no float64).
            wide = torch.float32 if group.device.type == "mps" else torch.float64
            table = gene_position_table(expression.shape[1], self.config, group.device).to(wide)
            table = F.linear(table, self.gene_input.weight[:, 1:].to(wide), self.gene_input.bias.to(wide)).float()
            g = F.gelu(table[gene_ranks(expression)].addcmul_(expression[:, :, None], self.gene_input.weight[:, 0]))
            threads = h.device.type == "cpu" and not torch.is_grad_enabled()
            with _thread_map() if threads else nullcontext(map) as graph.map:
                for i, layer in enumerate(self.layers):
                    h, g = layer(h, g, graph, residual=i > 0)
            if record is not None:
                record.finish(graph, self.config.layers * self.config.heads)
        return self.norm(h.float())[graph.rank], self.norm(g.float())[graph.rank]

    def decode(
        self,
        cell_embedding: Tensor,
        gene_embedding: Tensor,
        cell_edges: Tensor,
        gene_edges: Sequence[Tensor],
        group: Tensor,
        *,
        dtype: Literal["float32", "bfloat16"] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Reconstruct coordinates and expression from an embedding.

        Parameters
        ----------
        cell_embedding, gene_embedding
            (C, d) and (C, G, d), as :meth:`encode` returns them.
        cell_edges, gene_edges, group, dtype
            As for :meth:`encode`.

        Returns
        -------
        (C, 2) standardised coordinates and (C, G) non-negative expression, float32.

        Raises
        ------
        ValueError
            Shapes, types or indices that do not fit each other.
        """
        _check_cells(cell_edges, gene_edges, group, None, gene_embedding.shape[1])
        with self._autocast(group.device, dtype):
            graph = _Graph(cell_edges, gene_edges, group, None, gene_embedding.shape[1])
            coords, expression = self.decoder(cell_embedding[graph.order], gene_embedding[graph.order], graph)
        return coords.float()[graph.rank], expression.float()[graph.rank]

    def _autocast(self, device: torch.device, dtype: str | None) -> torch.autocast:
        dtype = dtype or self.config.dtype
        if dtype not in ("float32", "bfloat16"):
            msg = f"dtype={dtype!r} is not known; choose from ['float32', 'bfloat16']"
            raise ValueError(msg)
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")


def _check_cells(
    cell_edges: Tensor, gene_edges: Sequence[Tensor], group: Tensor, context: Tensor | None, n_genes: int
) -> None:
    """Raise on graphs that do not fit C cells and G genes."""
    n_cells = len(group)
    if not n_cells or not n_genes:
        msg = f"at least one cell and one gene are needed, got {n_cells} cells and {n_genes} genes"
        raise ValueError(msg)
    named = [("cell_edges", cell_edges, n_cells), *((f"gene_edges[{i}]", e, n_genes) for i, e in enumerate(gene_edges))]
    for name, edges, n in named:
        if edges.dtype != torch.long or edges.ndim != 2 or edges.shape[0] != 2:
            msg = f"{name} must be a (2, E) long tensor of (source, target), got {tuple(edges.shape)} {edges.dtype}"
            raise ValueError(msg)
        if edges.numel() and (int(edges.min()) < 0 or int(edges.max()) >= n):
            node = int(edges.min() if edges.min() < 0 else edges.max())
            msg = f"{name} has node {node}, but there are only {n} nodes, numbered from 0"
            raise ValueError(msg)
    if group.dtype != torch.long or int(group.min()) < 0 or int(group.max()) >= len(gene_edges):
        msg = (
            f"group must be long and index the {len(gene_edges)} gene networks, "
            f"got {group.dtype} in [{group.min()}, {group.max()}]"
        )
        raise ValueError(msg)
    if context is not None and (context.shape != group.shape or bool((context.diff() < 0).any())):
        msg = f"context must be of shape ({n_cells},) and non-decreasing, so that the cells of a context are contiguous"
        raise ValueError(msg)
