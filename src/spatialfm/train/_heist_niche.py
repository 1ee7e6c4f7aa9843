"""Training of HEIST-niche."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from spatialfm._data._components import spatial_components
from spatialfm.engine import read_tissue
from spatialfm.models import HEISTNiche, HEISTNicheConfig
from spatialfm.models._propagate import component_statistics, propagate, transition_tensor
from spatialfm.train._recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from spatialfm.engine import Context, Tissue


@dataclass
class NicheSlide:
    """A slide prepared for training HEIST-niche: pairs of views of every cell, from disjoint sets of genes."""

    propagated: list[tuple[torch.Tensor, torch.Tensor]]
    """(n, K, S) float16 on the CPU."""
    statistics: list[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class NicheBatch:
    """Two views of the same cells."""

    propagated: tuple[torch.Tensor, torch.Tensor]  # (C, K, S) each
    statistics: tuple[torch.Tensor, torch.Tensor]


class HEISTNicheRecipe(Recipe):
    r"""Spatial contrast between two halves of the genes.

    The genes of a slide are split at random, and each half predicts the components of the whole panel from its own
    genes only (the other half is masked). A cell seen through one half has to be distinguished from the other cells of
    the batch seen through the other half, :math:`-\log \frac{e^{s_{ii}/\tau}}{\sum_j e^{s_{ij}/\tau}}` with s the
    cosine similarity, in both directions. Counting noise differs between the halves; the tissue is the same. Negatives
    come from the neighbourhood (a context of 3,000 cells), because distant cells are too easy to distinguish.

    There are no options. Reconstructing the propagated values of the other half, in addition to the contrast or instead
    of it, made niches worse (see the research log in the documentation).
    """

    architecture = "heist-niche"
    config_type = HEISTNicheConfig
    defaults: ClassVar[dict[str, Any]] = {
        "context_size": 1024,
        "cells_per_step": 3072,
        "learning_rate": 3e-3,
    }
    temperature: ClassVar[float] = 0.3
    n_compared: ClassVar[int] = 384
    """Number of cells of a batch that are compared."""
    panels: ClassVar[int] = 2
    """Pairs of views per slide: the first of its whole panel, the others of a part, to train for small panels too."""

    def build(self, config: HEISTNicheConfig) -> HEISTNiche:
        """Make a HEIST-niche model with random weights."""
        return HEISTNiche(config)

    def read(self, adata: AnnData, **reading: Any) -> Tissue:
        """Read a slide; gene networks are not needed."""
        return read_tissue(adata, networks=False, **reading)

    def prepare(self, tissue: Tissue) -> NicheSlide:
        """Propagate the components of each half of the genes over the whole slide, because radii exceed contexts."""
        config = self.config or HEISTNicheConfig()
        transition = transition_tensor(tissue.graph, torch.device("cpu"))
        slide = NicheSlide([], [])
        n_genes = tissue.expression.shape[1]
        for k in range(self.panels):
            random = np.random.default_rng(k)
            genes = np.arange(n_genes)
            if k:
                n_chosen = max(min(20, n_genes), int(n_genes * random.uniform(0.4, 1)))
                genes = np.sort(random.permutation(n_genes)[:n_chosen])
            components = spatial_components(tissue.expression[:, genes], tissue.graph, n_components=config.n_components)
            half = np.zeros(len(components.features), bool)
            half[random.permutation(len(half))[: len(half) // 2]] = True
            propagated, statistics = [], []
            for chosen in (half, ~half):
                scores = torch.from_numpy(components.project(chosen))
                tokens = torch.stack(propagate(scores, transition, config.radii), dim=2)
                statistics.append(component_statistics(tokens).to(self.device))
                propagated.append(tokens.half())
            slide.propagated.append((propagated[0], propagated[1]))
            slide.statistics.append((statistics[0], statistics[1]))
        return slide

    def batch(
        self, slide: NicheSlide, contexts: Sequence[Context], random: np.random.Generator, *, augment: bool = True
    ) -> NicheBatch:
        """Draw cells and a panel; without augmentation, use the whole panel."""
        cells = np.concatenate([c.cells for c in contexts])
        rows = torch.from_numpy(np.sort(random.permutation(cells)[: self.n_compared]))
        k = int(random.integers(self.panels)) if augment else 0
        a, b = (tokens[rows].float().to(self.device) for tokens in slide.propagated[k])
        return NicheBatch((a, b), slide.statistics[k])

    def losses(self, model: HEISTNiche, batch: NicheBatch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Compute ``loss``, and ``hits``, the share of cells whose other view is the most similar one."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            z = [model(h, s).float().flatten(1) for h, s in zip(batch.propagated, batch.statistics, strict=True)]
        z = [torch.nn.functional.normalize(v - v.mean(0), dim=1) for v in z]
        similarity = z[0] @ z[1].T / self.temperature
        same = torch.arange(len(similarity), device=similarity.device)
        loss = (
            torch.nn.functional.cross_entropy(similarity, same) + torch.nn.functional.cross_entropy(similarity.T, same)
        ) / 2
        return {"loss": loss, "hits": (similarity.argmax(1) == same).float().mean()}
