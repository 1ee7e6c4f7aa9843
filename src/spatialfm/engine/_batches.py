"""Contexts as tensors, and a pass of a model over all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import scipy.sparse as sp
import torch

from spatialfm._checks import check_positive
from spatialfm._settings import progress
from spatialfm.engine._device import in_evaluation

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from spatialfm.engine._contexts import Context
    from spatialfm.models import HEIST
    from spatialfm.pp._tissue import Tissue

# (cell, gene) rows of a batch where no batch size is given: what keeps a device busy without filling it.
_ROWS = {"cpu": 1 << 17, "cuda": 1 << 21, "mps": 1 << 19}


@dataclass
class Batch:
    """Contexts of one tissue as the tensors that ``HEIST.encode`` takes, their cells one context after the other."""

    coords: torch.Tensor  # (C, 2)
    cell_edges: torch.Tensor  # (2, E)
    expression: torch.Tensor  # (C, G)
    gene_edges: list[torch.Tensor]
    group: torch.Tensor  # (C,)
    context: torch.Tensor  # (C,)


def network_edges(networks: Sequence[sp.csr_matrix], device: torch.device) -> list[torch.Tensor]:
    """Gene networks as (2, E) long tensors."""
    return [torch.from_numpy(np.stack(m.nonzero()).astype(np.int64)).to(device) for m in networks]


def make_batch(
    tissue: Tissue,
    contexts: Sequence[Context],
    gene_edges: list[torch.Tensor],
    device: torch.device,
    genes: np.ndarray | slice = slice(None),
) -> Batch:
    """Gather contexts; ``genes`` selects columns of the expression, and ``gene_edges`` are the networks among them."""
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
    """Go through all contexts in batches of ``batch_size``, or of the device's size where None.

    Yields
    ------
    The batch; the positions of its cells in the tissue; and which of them are core cells, as each cell of the tissue is once.
    """
    check_positive("batch_size", batch_size, optional=True)
    n_genes = tissue.expression.shape[1]
    gene_edges = network_edges(tissue.networks, device)
    # Contexts of a batch are padded to its largest.
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


def encode_tissue(
    model: HEIST,
    tissue: Tissue,
    contexts: Sequence[Context],
    *,
    device: torch.device,
    dtype: Literal["float32", "bfloat16"],
    batch_size: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Run an encoder over all contexts and keep each core cell once.

    Parameters
    ----------
    model, tissue, contexts
        Of one tissue; beside the result, memory is that of one batch.
    device, dtype
        See :func:`choose_device` and :func:`choose_dtype`.
    batch_size
        See :func:`make_batches`. The result depends on it by rounding alone.

    Returns
    -------
    (n, d) cell embedding and (n, d) mean gene embedding, float32, in the order of ``tissue``.
    """
    cell, gene = (np.empty((len(tissue.rows), model.config.width), np.float32) for _ in range(2))
    with in_evaluation(model, device):
        for b, cells, is_core in make_batches(tissue, contexts, device=device, batch_size=batch_size):
            h, g = model.encode(
                b.coords, b.cell_edges, b.expression, b.gene_edges, b.group, context=b.context, dtype=dtype
            )
            rows = cells[is_core]
            cell[rows] = h.cpu().numpy()[is_core]
            gene[rows] = g.mean(1).cpu().numpy()[is_core]
    return cell, gene
