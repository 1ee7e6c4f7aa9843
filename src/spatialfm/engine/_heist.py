"""HEIST: reading and embedding of a tissue in contexts, and the attention of cells and genes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch

from spatialfm._checks import check_positive
from spatialfm._data._expression import NOT_MEASURED
from spatialfm._settings import progress
from spatialfm.engine._contexts import cut_contexts
from spatialfm.engine._device import choose_dtype, in_evaluation
from spatialfm.engine._encoder import Axes, Embedding, Encoder
from spatialfm.engine._tissue import Tissue, read_tissue
from spatialfm.models import HEIST
from spatialfm.models.heist import AttentionRecord

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from anndata import AnnData

    from spatialfm.engine._contexts import Context

# Default size of a batch in (cell, gene) rows: enough to keep the device busy without filling its memory.
_ROWS = {"cpu": 1 << 17, "cuda": 1 << 21, "mps": 1 << 19}


@dataclass
class Batch:
    """Contexts of one tissue, concatenated to the tensors that ``HEIST.encode`` takes."""

    coords: torch.Tensor  # (C, 2)
    cell_edges: torch.Tensor  # (2, E)
    expression: torch.Tensor  # (C, G)
    gene_edges: list[torch.Tensor]
    group: torch.Tensor  # (C,)
    context: torch.Tensor  # (C,)


def network_edges(networks: Sequence[sp.csr_matrix], device: torch.device) -> list[torch.Tensor]:
    """Convert gene networks to (2, E) long tensors."""
    return [torch.from_numpy(np.stack(m.nonzero()).astype(np.int64)).to(device) for m in networks]


def make_batch(
    tissue: Tissue,
    contexts: Sequence[Context],
    gene_edges: list[torch.Tensor],
    device: torch.device,
    genes: np.ndarray | slice = slice(None),
) -> Batch:
    """Make a batch of contexts; ``genes`` selects columns of the expression, ``gene_edges`` are networks of these."""
    cells = np.concatenate([c.cells for c in contexts])
    sizes = np.array([len(c.cells) for c in contexts])
    edges, start = [], 0
    for c in contexts:
        coo = tissue.graph[c.cells][:, c.cells].tocoo()
        edges.append(np.stack([coo.row, coo.col]).astype(np.int64) + start)
        start += len(c.cells)
    x: Any = tissue.expression[cells]
    x = (x.toarray() if sp.issparse(x) else np.asarray(x))[:, genes]

    def tensor(a: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(a)).to(device)

    return Batch(
        coords=tensor(tissue.coords[cells]),
        cell_edges=tensor(np.concatenate(edges, axis=1)),
        expression=tensor(x),
        gene_edges=gene_edges,
        group=tensor(tissue.group[cells]),
        context=tensor(np.repeat(np.arange(len(contexts)), sizes)),
    )


def make_batches(
    tissue: Tissue, contexts: Sequence[Context], *, device: torch.device, batch_size: int | None = None
) -> Iterator[tuple[Batch, np.ndarray, np.ndarray]]:
    """Yield all contexts in batches of ``batch_size`` contexts; if None, the size is chosen for the device.

    Yields
    ------
    The batch, the positions of its cells in the tissue, and whether each of them is a core cell. Every cell of the
    tissue is a core cell once.
    """
    n_genes = tissue.expression.shape[1]
    gene_edges = network_edges(tissue.networks, device)
    # The contexts of a batch are padded to the largest, so contexts of similar size are put together.
    by_size = sorted(range(len(contexts)), key=lambda i: (len(contexts[i].cells), i))
    batches: list[list[Context]] = []
    n_cells = 0
    for i in by_size:
        size = len(contexts[i].cells)
        full = (
            len(batches[-1]) == batch_size
            if batch_size and batches
            else (n_cells + size) * n_genes > _ROWS[device.type]
        )
        if not batches or full:
            batches.append([])
            n_cells = 0
        batches[-1].append(contexts[i])
        n_cells += size
    for batch in progress(batches, desc="embedding", unit="batch"):
        cells, is_core = (np.concatenate(parts) for parts in zip(*batch, strict=True))
        yield make_batch(tissue, batch, gene_edges, device), cells, is_core


@dataclass(frozen=True)
class HEISTEncoder(Encoder):
    """Encoder of expression, gene networks and coordinates, in contexts; see :class:`spatialfm.models.HEIST`."""

    groupby: str | None = "auto"
    """Groups of cells whose gene networks are built if ``uns["grn"]`` is missing."""
    context_size: int = 256
    """Largest number of cells of a context, without its halo."""
    batch_size: int | None = None
    """Contexts of a batch; if None, chosen for the device. It changes results by rounding only."""
    dtype: str | None = None
    """Type of the matrix products."""
    rng: int | np.random.Generator | None = 0
    """Seed or generator of the groups that ``groupby="auto"`` finds."""

    model_type = HEIST
    prefix = "heist"
    axes: ClassVar[Axes] = "model"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("context_size", self.context_size)
        check_positive("batch_size", self.batch_size, optional=True)

    def names(self, key_added: str | None) -> dict[str, str]:
        """One matrix: the cell level, then the gene level."""
        return {"both": f"X_{key_added or self.prefix}"}

    def read(self, adata: AnnData, *, device: torch.device | None = None, **reading: Any) -> Tissue:
        """Read the genes of the gene networks, which are built if they are missing."""
        return read_tissue(adata, groupby=self.groupby, rng=self.rng, **reading)

    def fit(self, tissue: Tissue, *, device: torch.device) -> None:
        """Return None: the axes are those of the model."""

    def encode(self, tissue: Tissue, state: None, *, device: torch.device) -> Embedding:
        """Encode all contexts and keep each core cell once. Needs the memory of the result and of one batch."""
        dtype = choose_dtype(self.dtype, device)
        contexts = cut_contexts(tissue.xy, tissue.graph, tissue.slide, context_size=self.context_size)
        d = self.model.config.width
        both = np.empty((len(tissue.rows), 2 * d), np.float32)
        with in_evaluation(self.model, device):
            for b, cells, is_core in make_batches(tissue, contexts, device=device, batch_size=self.batch_size):
                h, g = self.model.encode(
                    b.coords, b.cell_edges, b.expression, b.gene_edges, b.group, context=b.context, dtype=dtype
                )
                rows = cells[is_core]
                both[rows, :d] = h.cpu().numpy()[is_core]
                both[rows, d:] = g.mean(1).cpu().numpy()[is_core]
        return Embedding(
            encoder=self,
            tissue=tissue,
            blocks={"both": both},
            device=device,
            genes=tissue.genes,
            left_out=dict.fromkeys(tissue.unmeasured, NOT_MEASURED),
            params={
                "dtype": dtype,
                "groupby": tissue.network_groups,
                "context_size": int(self.context_size),
                "n_contexts": len(contexts),
            },
            facts={"blocks": {"cell": [0, d], "gene": [d, 2 * d]}},
        )

    def attend(self, tissue: Tissue, *, device: torch.device) -> Attention:
        """Compute the attention of cells and genes.

        Only the core cells of a context are counted, because cells of the halo lack some of their neighbours.
        """
        dtype = choose_dtype(self.dtype, device)
        contexts = cut_contexts(tissue.xy, tissue.graph, tissue.slide, context_size=self.context_size)
        n, n_genes = tissue.expression.shape
        itself, context_sizes = np.empty(n, np.float32), np.empty(n, np.int64)
        genes = np.zeros((len(tissue.networks), n_genes, n_genes))
        rows, columns, weights = [], [], []
        with in_evaluation(self.model, device):
            for b, cells, is_core in make_batches(tissue, contexts, device=device, batch_size=self.batch_size):
                record = AttentionRecord(torch.from_numpy(is_core).to(device))
                self.model.encode(
                    b.coords,
                    b.cell_edges,
                    b.expression,
                    b.gene_edges,
                    b.group,
                    context=b.context,
                    record=record,
                    dtype=dtype,
                )
                itself[cells[is_core]] = record.itself.cpu().numpy()[is_core]
                context = b.context.cpu().numpy()
                context_sizes[cells[is_core]] = np.bincount(context)[context][is_core]
                genes += record.genes.cpu().numpy()
                source, target = b.cell_edges.cpu().numpy()
                counted = is_core[target]
                rows.append(cells[target[counted]])
                columns.append(cells[source[counted]])
                weights.append(record.edges.cpu().numpy()[counted])
        where = np.concatenate(rows), np.concatenate(columns)
        size = np.bincount(tissue.group, minlength=len(genes))
        return Attention(
            cells=sp.csr_matrix((np.concatenate(weights), where), shape=(n, n)),
            itself=itself,
            context_sizes=context_sizes,
            genes=[
                _on_edges(m / max(k, 1), network) for m, k, network in zip(genes, size, tissue.networks, strict=True)
            ],
            n_contexts=len(contexts),
        )

    def mean_cosines(
        self,
        tissue: Tissue,
        type_of: np.ndarray,
        n_types: int,
        pairs: list[tuple[list[int], list[int]]],
        *,
        device: torch.device,
    ) -> np.ndarray:
        """Mean cosine of the ligand in the sender and the receptor in the receiver, over the edges between two types.

        Parameters
        ----------
        tissue
            Tissue of the cells. Needs the memory of one batch of contexts.
        type_of
            (n,) type of each cell, in the order of ``tissue``; edges of cells with -1 are left out.
        n_types
            Number of types.
        pairs
            Positions among ``tissue.genes`` of the subunits of each ligand and of each receptor. The direction of a
            complex is the mean of the directions of its subunits.
        device
            Device to compute on.

        Returns
        -------
        (n_types * n_types, pairs), NaN for pairs of types without edges.
        """
        sums = np.zeros((n_types**2, len(pairs)))
        contexts = cut_contexts(tissue.xy, tissue.graph, tissue.slide, context_size=self.context_size)
        with in_evaluation(self.model, device):
            for b, cells, is_core in make_batches(tissue, contexts, device=device, batch_size=self.batch_size):
                _, g = self.model.encode(b.coords, b.cell_edges, b.expression, b.gene_edges, b.group, context=b.context)
                # Count each edge once: from core cells, whose neighbours are all in the context.
                i, j = b.cell_edges[:, torch.from_numpy(is_core).to(device)[b.cell_edges[0]]]
                types = torch.from_numpy(type_of[cells]).to(device)
                counted = (types[i] >= 0) & (types[j] >= 0)
                i, j = i[counted], j[counted]
                joined = (types[i] * n_types + types[j]).cpu().numpy()
                unit = torch.nn.functional.normalize(g.float(), dim=2)
                for k, subunits in enumerate(pairs):
                    sent, received = (unit[:, own].mean(1) for own in subunits)
                    cosine = torch.nn.functional.cosine_similarity(sent[i], received[j], dim=1)
                    sums[:, k] += np.bincount(joined, cosine.cpu().numpy(), minlength=n_types**2)
        i, j = (type_of[ends] for ends in tissue.graph.nonzero())
        n_edges = np.bincount((i * n_types + j)[(i >= 0) & (j >= 0)], minlength=n_types**2)[:, None]
        return np.divide(sums, n_edges, out=np.full(sums.shape, np.nan), where=n_edges > 0)


class Attention(NamedTuple):
    """Attention weights, averaged over layers and heads, of cells and genes in the order of a tissue."""

    cells: sp.csr_matrix
    """(n, n) float32 on the edges of the tissue graph: attention of a cell (row) to a neighbour (column).

    The attention of a cell to all cells of its context sums to 1.
    """
    itself: np.ndarray
    """(n,) float32: attention of each cell to itself."""
    context_sizes: np.ndarray
    """(n,) int64: number of cells in the context of each cell."""
    genes: list[sp.csr_matrix]
    """(g, g) float32 for each group, on the edges of its network: attention of a gene (row) to a neighbour (column).

    Averaged over the cells of the group.
    """
    n_contexts: int


def _on_edges(weights: np.ndarray, network: sp.csr_matrix) -> sp.csr_matrix:
    """Select the weights (g, g) of the edges of a network."""
    edges = network.nonzero()
    return sp.csr_matrix((weights[edges].astype(np.float32), edges), shape=network.shape)
