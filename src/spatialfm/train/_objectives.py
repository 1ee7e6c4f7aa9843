r"""The three pretraining objectives of HEIST (Madhu et al. 2025).

.. math:: L = \sigma(\alpha) L_\text{contrastive} + (1 - \sigma(\alpha)) L_\text{mae} + L_\text{orthogonal}

The paper fixes what the objectives compare, not every constant; choices of ours are the temperature, cosine similarity, and a sample of
genes for the gene-gene pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from spatialfm.engine._heist import Batch

if TYPE_CHECKING:
    from torch import Tensor

    from spatialfm.models import HEIST

TEMPERATURE = 0.2


@dataclass
class MaskableBatch(Batch):
    """A batch to train on: ``coords`` as augmented, ``expression`` the truth, and beside them what the objectives need."""

    shown: Tensor  # (C, G) expression as augmented, which the model is shown
    place: Tensor  # (C, 2) coordinates in which the radius is measured
    radius: float
    scale: float


class Masked(NamedTuple):
    """What a masked batch hides."""

    coords: Tensor  # (C, 2) with masked cells at the origin
    expression: Tensor  # (C, G) with masked entries at zero
    cells: Tensor  # (C,) bool
    entries: Tensor  # (C, G) bool, expressed ones only


def mask_batch(batch: MaskableBatch, fraction: float, generator: torch.Generator) -> Masked:
    """Hide the coordinates of a fraction of cells and a fraction of the expressed genes of every cell."""
    device = batch.coords.device
    cells = (torch.rand(len(batch.coords), generator=generator) < fraction).to(device)
    entries = (torch.rand(batch.expression.shape, generator=generator) < fraction).to(device) & (batch.expression != 0)
    return Masked(batch.coords.masked_fill(cells[:, None], 0), batch.shown.masked_fill(entries, 0), cells, entries)


def info_nce(a: Tensor, b: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    r"""Mean over rows of :math:`-\log \frac{\sum_{+} e^{s/\tau}}{\sum_{+} e^{s/\tau} + \sum_{-} e^{s/\tau}}`, s the cosine similarity.

    ``a``, ``b`` are (..., C, d); ``positive``, ``negative`` (C, C) bool. Rows without a positive or a negative take no part.
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
    """Cell-cell, cell-gene and gene-gene pairs within the batch's radius: positive of one group, negative of two.

    ``h`` (C, d), ``g`` (C, G, d); ``genes`` (k,) long, the genes compared between cells. A cell's genes enter the cell-gene pairs as their
    mean.

    Negatives lie within the radius too. Were they anywhere, most would lie far off, and a model tells these from the positives by place
    alone: trained so, the loss fell by a third and the embedding knew nothing of the groups.
    """
    same_group = batch.group[:, None] == batch.group
    near = (batch.context[:, None] == batch.context) & (torch.cdist(batch.place, batch.place) <= batch.radius)
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
    dtype: str,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """All objectives of one batch: ``loss`` and its parts ``contrastive``, ``coordinates``, ``expression``, ``orthogonal``.

    The batch's ``scale`` is the unit of expression in its squared error. Coordinates come standardised; without a unit the values of small panels (5 and
    more after the logarithm) make that error, and after clipping the gradient, everything.
    """
    hidden = mask_batch(batch, mask, generator)
    h, g = model.encode(
        hidden.coords,
        batch.cell_edges,
        hidden.expression,
        batch.gene_edges,
        batch.group,
        context=batch.context,
        dtype=dtype,  # type: ignore[arg-type]
    )
    coords, expression = model.decode(h, g, batch.cell_edges, batch.gene_edges, batch.group, dtype=dtype)  # type: ignore[arg-type]
    on_cells = (coords - batch.coords)[hidden.cells].square()
    on_genes = ((expression - batch.expression)[hidden.entries] / batch.scale).square()
    parts = {
        "contrastive": contrastive(
            h, g, batch, torch.randperm(g.shape[1], generator=generator)[:n_pair_genes].to(g.device)
        ),
        "coordinates": on_cells.mean() if len(on_cells) else coords.sum() * 0,
        "expression": on_genes.mean() if len(on_genes) else expression.sum() * 0,
        # A sample of (cell, gene) rows gives the gene level's correlations well enough.
        "orthogonal": orthogonal(h) + orthogonal(g.flatten(0, 1)[:: max(1, g.shape[0] * g.shape[1] // 2048)]),
    }
    share = model.decoder.alpha.sigmoid()
    mae = parts["coordinates"] + parts["expression"]
    parts["loss"] = share * parts["contrastive"] + (1 - share) * mae + parts["orthogonal"]
    return parts
