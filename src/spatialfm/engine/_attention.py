"""What the cells and genes of a tissue attend to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch

from spatialfm.engine._batches import make_batches
from spatialfm.engine._device import in_evaluation
from spatialfm.models.heist import AttentionRecord

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spatialfm.engine._contexts import Context
    from spatialfm.models import HEIST
    from spatialfm.pp._tissue import Tissue


class Attention(NamedTuple):
    """Attention weights, averaged over layers and heads, of cells and genes in the order of a tissue."""

    cells: sp.csr_matrix
    """(n, n) float32 on the edges of the tissue graph: what a cell (row) gives to a neighbour, of the 1 it gives to all cells of its context."""
    itself: np.ndarray
    """(n,) float32: what each cell gives to itself."""
    seen: np.ndarray
    """(n,) int64: how many cells each cell's context has."""
    genes: list[sp.csr_matrix]
    """(g, g) float32 a group on the edges of its network: what a gene (row) gives to its neighbour, averaged over the group's cells."""


def attend_tissue(
    model: HEIST,
    tissue: Tissue,
    contexts: Sequence[Context],
    *,
    device: torch.device,
    dtype: Literal["float32", "bfloat16"],
    batch_size: int | None = None,
) -> Attention:
    """Run an encoder over all contexts and keep what it attended to; see :func:`encode_tissue`.

    A cell counts where it belongs to the core of a context: as part of a halo it does not see all of its own neighbours.
    """
    n, n_genes = tissue.expression.shape
    itself, seen = np.empty(n, np.float32), np.empty(n, np.int64)
    genes = np.zeros((len(tissue.networks), n_genes, n_genes))
    rows, columns, weights = [], [], []
    with in_evaluation(model, device):
        for b, cells, is_core in make_batches(tissue, contexts, device=device, batch_size=batch_size):
            record = AttentionRecord(torch.from_numpy(is_core).to(device))
            model.encode(
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
            seen[cells[is_core]] = np.bincount(context)[context][is_core]
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
        seen=seen,
        genes=[_on_edges(m / max(k, 1), network) for m, k, network in zip(genes, size, tissue.networks, strict=True)],
    )


def _on_edges(weights: np.ndarray, network: sp.csr_matrix) -> sp.csr_matrix:
    """Weights (g, g) of the edges of a network."""
    edges = network.nonzero()
    return sp.csr_matrix((weights[edges].astype(np.float32), edges), shape=network.shape)
