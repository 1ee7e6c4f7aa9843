"""Training of HEIST."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import scipy.sparse as sp
import torch

from spatialfm.engine import read_tissue
from spatialfm.engine._heist import Batch, make_batch, network_edges
from spatialfm.models import HEIST, HEISTConfig
from spatialfm.train import _objectives as objectives
from spatialfm.train._augment import Rotator, count_unit, draw_rotation, drop_counts
from spatialfm.train._recipe import Recipe, check_numbers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from spatialfm.engine import Context, Tissue


@dataclass
class HEISTSlide:
    """A slide prepared for training HEIST."""

    tissue: Tissue
    networks: list[torch.Tensor]
    radius: float
    scale: float
    rotator: Rotator
    unit: np.ndarray | None


@dataclass(frozen=True)
class HEISTRecipe(Recipe):
    """The three published objectives of HEIST on small contexts with a sample of the genes."""

    groupby: str | None = "auto"
    """Groups of cells whose gene networks are built if a slide has none, as for :func:`spatialfm.tl.embed`."""
    mask: float = 0.2
    """Share of cells whose coordinates, and of expressed genes whose values, are masked and reconstructed."""
    n_genes: int | None = 48
    """Genes of a step, drawn from the genes of the networks; None uses all."""
    rotate: bool = True
    """Whether each batch is rotated by a random angle before its coordinates are standardised."""
    reflect: bool = True
    """Whether half of the batches are mirrored."""
    dropout: float = 0.2
    """Largest share of counts that is dropped from the input; each batch draws a share up to this."""

    architecture = "heist"
    config_type = HEISTConfig
    # The learning rate of the paper, 1e-3, is too high for steps of so few cells.
    defaults: ClassVar[dict[str, Any]] = {
        "context_size": 192,
        "cells_per_step": 192,
        "learning_rate": 5e-4,
    }

    def __post_init__(self) -> None:
        check_numbers(**{name: getattr(self, name) for name in self.options() if name != "groupby"})

    def read(self, adata: AnnData, **reading: Any) -> Tissue:
        """Read a slide with its gene networks."""
        return read_tissue(adata, groupby=self.groupby, **reading)

    def build(self, config: HEISTConfig) -> HEIST:
        """Make a HEIST model with a scaled-down decoder."""
        model = HEIST(config)
        with torch.no_grad():
            # The decoder sums over neighbours three times; with the default weights its first outputs are thousands.
            for name, weight in model.decoder.layers.named_parameters():
                if name.endswith("linear.weight"):
                    weight.mul_(0.1)
        return model

    def prepare(self, tissue: Tissue) -> HEISTSlide:
        """Move the networks to the device, and compute the units of length and expression and the augmentation."""
        return HEISTSlide(
            tissue,
            network_edges(tissue.networks, self.device),
            _radius(tissue),
            _scale(tissue),
            Rotator(tissue),
            count_unit(tissue),
        )

    def batch(
        self, slide: HEISTSlide, contexts: Sequence[Context], random: np.random.Generator, *, augment: bool = True
    ) -> objectives.MaskableBatch:
        """Make a batch of contexts with a random sample of genes and their networks."""
        n_panel = len(slide.tissue.genes)
        genes = np.sort(random.permutation(n_panel)[: self.n_genes])
        b = make_batch(slide.tissue, contexts, _subnetworks(slide.networks, genes, n_panel), self.device, genes)
        cells = np.concatenate([c.cells for c in contexts])
        rotation = draw_rotation(random, rotate=self.rotate, reflect=self.reflect)
        share = random.uniform(0, self.dropout)
        coords, shown = b.coords, b.expression
        if augment and (self.rotate or self.reflect):
            coords = torch.from_numpy(slide.rotator.coords(slide.tissue, cells, rotation)).to(self.device)
        if augment and self.dropout:
            unit = None if slide.unit is None else slide.unit[cells]
            shown = torch.from_numpy(drop_counts(b.expression.cpu().numpy(), unit, share, random)).to(self.device)
        parts = {f.name: getattr(b, f.name) for f in fields(Batch)} | {"coords": coords}
        return objectives.MaskableBatch(**parts, shown=shown, position=b.coords, radius=slide.radius, scale=slide.scale)

    def losses(
        self, model: HEIST, batch: objectives.MaskableBatch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Compute :func:`spatialfm.train._objectives.losses`."""
        return objectives.losses(model, batch, mask=self.mask, n_pair_genes=4, dtype=self.dtype, generator=generator)


def _radius(tissue: Tissue) -> float:
    """Radius of a neighbourhood of about 20 to 30 cells: three median edges of the graph, standardised coordinates."""
    i, j = tissue.graph.nonzero()
    return 3 * float(np.median(np.linalg.norm(tissue.coords[i] - tissue.coords[j], axis=1))) if len(i) else 1.0


def _scale(tissue: Tissue) -> float:
    """Root mean square of the expressed values."""
    x = tissue.expression.data if sp.issparse(tissue.expression) else tissue.expression[tissue.expression != 0]
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64)))) if x.size else 1.0


def _subnetworks(edges: list[torch.Tensor], genes: np.ndarray, n_panel: int) -> list[torch.Tensor]:
    """Restrict the networks to the chosen genes, and renumber these."""
    position = torch.full((n_panel,), -1)
    position[torch.from_numpy(genes)] = torch.arange(len(genes))
    position = position.to(edges[0].device)
    inner = [position[e] for e in edges]
    return [e[:, (e >= 0).all(0)] for e in inner]
