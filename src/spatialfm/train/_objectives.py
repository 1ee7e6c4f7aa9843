r"""The three pretraining objectives of HEIST (Madhu et al. 2025).

.. math:: L = \sigma(\alpha) L_\text{contrastive} + (1 - \sigma(\alpha)) L_\text{mae} + L_\text{orthogonal}

The paper defines what the objectives compare, but not every constant. The temperature, the cosine similarity and the
sample of genes for the gene-gene pairs are our choices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F

from spatialfm.engine._heist import Batch

if TYPE_CHECKING:
    from torch import Tensor

    from spatialfm.models import HEIST

TEMPERATURE = 0.2


@dataclass
class MaskableBatch(Batch):
    """A batch for training: augmented ``coords``, measured ``expression``, and further input of the objectives."""

    shown: Tensor  # (C, G) augmented expression, the input of the model before masking
    position: Tensor  # (C, 2) coordinates in which the radius is measured
    radius: float
    scale: float


class Masked(NamedTuple):
    """A batch after masking, and its masks."""

    coords: Tensor  # (C, 2), zero for masked cells
    expression: Tensor  # (C, G), zero for masked entries
    cells: Tensor  # (C,) bool, masked cells
    entries: Tensor  # (C, G) bool, masked entries; only expressed ones


def mask_batch(batch: MaskableBatch, fraction: float, generator: torch.Generator) -> Masked:
    """Mask the coordinates of a fraction of cells, and a fraction of the expressed genes of every cell."""
    device = batch.coords.device
    cells = (torch.rand(len(batch.coords), generator=generator) < fraction).to(device)
    entries = (torch.rand(batch.expression.shape, generator=generator) < fraction).to(device) & (batch.expression != 0)
    return Masked(batch.coords.masked_fill(cells[:, None], 0), batch.shown.masked_fill(entries, 0), cells, entries)


def info_nce(a: Tensor, b: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    r"""Mean over rows of :math:`-\log \frac{\sum_{+} e^{s/\tau}}{\sum_{+} e^{s/\tau} + \sum_{-} e^{s/\tau}}`.

    s is the cosine similarity of ``a`` and ``b`` (..., C, d); ``positive`` and ``negative`` are (C, C) bool. Rows
    without a positive or without a negative are left out.
    """
    similarity = F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).transpose(-1, -2) / TEMPERATURE
    rows = positive.any(1) & negative.any(1)
    if not rows.any():
        return similarity.sum() * 0
    below = torch.finfo(similarity.dtype).min
    good = similarity.masked_fill(~positive, below).logsumexp(-1)
    both = similarity.masked_fill(~(positive | negative), below).logsumexp(-1)
    return (both - good)[..., rows].mean()


def contrastive(h: Tensor, g: Tensor, batch: MaskableBatch, genes: Tensor) -> Tensor:
    """Contrast of cell-cell, cell-gene and gene-gene pairs of cells within the radius of the batch.

    Pairs of one group are positive, pairs of different groups negative. ``h`` is (C, d), ``g`` (C, G, d), and ``genes``
    (k,) long are the genes of the gene-gene pairs. In cell-gene pairs, the genes of a cell are represented by their
    mean.

    Negatives are also within the radius. Elsewhere, most would be far away, and a model could distinguish them from
    positives by location alone: trained like that, the loss fell by a third, but the embedding did not separate groups.
    """
    same_group = batch.group[:, None] == batch.group
    near = (batch.context[:, None] == batch.context) & (torch.cdist(batch.position, batch.position) <= batch.radius)
    self_pair = torch.eye(len(h), dtype=torch.bool, device=h.device)
    positive, negative = near & same_group, near & ~same_group
    x = g.mean(1)
    between = g[:, genes].transpose(0, 1)  # (k, C, d)
    return (
        info_nce(h, h, positive & ~self_pair, negative)
        + info_nce(h, x, positive, negative)
        + info_nce(between, between, positive & ~self_pair, negative)
    ) / 3


def orthogonal(z: Tensor) -> Tensor:
    """Mean squared correlation between different columns of ``z`` (n, d)."""
    z = z.float() - z.float().mean(0)
    z = z / (z.norm(dim=0) + 1e-6)
    correlation = z.T @ z
    d = len(correlation)
    return (correlation.square().sum() - correlation.diagonal().square().sum()) / (d * (d - 1))


def losses(
    model: HEIST,
    batch: MaskableBatch,
    *,
    mask: float,
    n_pair_genes: int,
    dtype: Literal["float32", "bfloat16"],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Compute ``loss`` and its parts ``contrastive``, ``coordinates``, ``expression`` and ``orthogonal``.

    Expression is divided by the ``scale`` of the batch in the squared error, because coordinates are standardised.
    Otherwise the large values of small panels (5 and more after the logarithm) would dominate the loss and its clipped
    gradient.
    """
    masked = mask_batch(batch, mask, generator)
    h, g = model.encode(
        masked.coords,
        batch.cell_edges,
        masked.expression,
        batch.gene_edges,
        batch.group,
        context=batch.context,
        dtype=dtype,
    )
    coords, expression = model.decode(h, g, batch.cell_edges, batch.gene_edges, batch.group, dtype=dtype)
    on_cells = (coords - batch.coords)[masked.cells].square()
    on_genes = ((expression - batch.expression)[masked.entries] / batch.scale).square()
    parts = {
        "contrastive": contrastive(
            h, g, batch, torch.randperm(g.shape[1], generator=generator)[:n_pair_genes].to(g.device)
        ),
        "coordinates": on_cells.mean() if len(on_cells) else coords.sum() * 0,
        "expression": on_genes.mean() if len(on_genes) else expression.sum() * 0,
        # A sample of (cell, gene) rows is enough to estimate the correlations of the gene level.
        "orthogonal": orthogonal(h) + orthogonal(g.flatten(0, 1)[:: max(1, g.shape[0] * g.shape[1] // 2048)]),
    }
    share = model.decoder.alpha.sigmoid()
    mae = parts["coordinates"] + parts["expression"]
    parts["loss"] = share * parts["contrastive"] + (1 - share) * mae + parts["orthogonal"]
    return parts
