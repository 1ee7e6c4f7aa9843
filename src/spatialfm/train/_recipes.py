"""What each architecture brings to the training loop: how a slide is prepared, what a batch is, and what is minimised."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import scipy.sparse as sp
import torch

from spatialfm._checks import check_choice
from spatialfm.engine import Batch, make_batch, network_edges, walk_tensor
from spatialfm.models import HEIST, HEISTConfig, HEISTNiche, HEISTNicheConfig
from spatialfm.models.heist_niche import component_statistics, hear
from spatialfm.pp._components import spatial_components
from spatialfm.pp._tissue import read_tissue
from spatialfm.train import _objectives as objectives
from spatialfm.train._augment import Turner, count_unit, draw_turn, drop_counts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from spatialfm.engine import Context
    from spatialfm.pp._tissue import Tissue


@dataclass(frozen=True)
class Recipe(ABC):
    """One architecture as the loop (:mod:`spatialfm.train._loop`) sees it. To add one: subclass, and list it in ``RECIPES``.

    The loop cuts each slide into contexts of ``context_size`` cells (:func:`spatialfm.engine.cut_contexts`, with ``halo``), draws one slide
    a step and neighbouring contexts of it until they hold ``cells_per_step`` cells, and calls, for each step, ``batch`` and ``losses``; it
    owns everything else: optimiser, schedule, validation, checkpoints, processes. Validation calls the same two without augmentation.

    What a step draws must come from the two generators it is given and torch's global one (as in dropout layers), which are seeded from
    seed, step and process alone: that is what makes a killed run repeat itself. Batches are made in another thread, one step ahead.
    """

    device: torch.device
    """Where batches go."""
    dtype: str
    """``"float32"`` or ``"bfloat16"``: type of the matrix products. Weights and optimiser stay float32."""
    mask: float
    """Share of what is there that is hidden from the model."""
    n_genes: int | None
    """Genes of a step; all where None."""
    rotate: bool
    reflect: bool
    dropout: float
    """Largest share of counts dropped from what the model is shown."""
    config: Any = None
    """Shape of the model, for what ``prepare`` has to know of it; the architecture's own where None."""

    architecture: ClassVar[str]
    config_type: ClassVar[type]
    """Dataclass of the architecture's shape, which tells whose recipe it is."""
    defaults: ClassVar[dict[str, Any]]
    """What ``pretrain`` takes for its arguments of these names where they are None: ``context_size``, ``cells_per_step``, ``n_genes``,
    ``learning_rate``."""
    halo: ClassVar[int] = 0
    """Steps on the tissue graph that contexts reach beyond their core."""

    @abstractmethod
    def build(self, config: Any) -> Any:
        """Make the model to train, with the weights it starts from; torch is seeded."""

    def read(self, adata: AnnData, **how: Any) -> Tissue:
        """Read a slide; ``how`` as for :func:`spatialfm.tl.embed`. To be overridden where an architecture reads otherwise."""
        return read_tissue(adata, **how)

    @abstractmethod
    def prepare(self, tissue: Tissue) -> Any:
        """Whatever ``batch`` needs of a slide, computed once. It stays in memory for the whole run: keep no more than that."""

    @abstractmethod
    def batch(
        self, slide: Any, contexts: Sequence[Context], random: np.random.Generator, *, augment: bool = True
    ) -> Any:
        """Contexts of a prepared slide as tensors on ``device``."""

    @abstractmethod
    def losses(self, model: Any, batch: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Scalars: ``"loss"``, which is minimised, and the parts of it worth logging; the same names each time.

        ``generator`` is on the CPU. Every weight must play a part in the loss, which several processes rely on.
        """


@dataclass
class HEISTSlide:
    """A slide as HEIST's recipe keeps it."""

    tissue: Tissue
    networks: list[torch.Tensor]
    radius: float
    scale: float
    turner: Turner
    unit: np.ndarray | None


class HEISTRecipe(Recipe):
    """The three published objectives of HEIST on small contexts with a sample of the genes."""

    architecture = "heist"
    config_type = HEISTConfig
    # The paper's rate of 1e-3 proved too high for steps of so few cells.
    defaults: ClassVar[dict[str, Any]] = {
        "context_size": 192,
        "cells_per_step": 192,
        "n_genes": 48,
        "learning_rate": 5e-4,
    }

    def build(self, config: HEISTConfig) -> HEIST:
        """HEIST, its decoder scaled down."""
        model = HEIST(config)
        with torch.no_grad():
            # The decoder sums over neighbours three times, so at torch's scale its first outputs would be thousands.
            for name, weight in model.decoder.layers.named_parameters():
                if name.endswith("linear.weight"):
                    weight.mul_(0.1)
        return model

    def prepare(self, tissue: Tissue) -> HEISTSlide:
        """Networks on the device, the unit of lengths and of expression, and what augmentation needs."""
        return HEISTSlide(
            tissue,
            network_edges(tissue.networks, self.device),
            _radius(tissue),
            _scale(tissue),
            Turner(tissue),
            count_unit(tissue),
        )

    def batch(
        self, slide: HEISTSlide, contexts: Sequence[Context], random: np.random.Generator, *, augment: bool = True
    ) -> objectives.MaskableBatch:
        """Contexts with a fresh sample of genes and the networks among them."""
        n_panel = len(slide.tissue.genes)
        genes = np.sort(random.permutation(n_panel)[: self.n_genes])
        b = make_batch(slide.tissue, contexts, _subnetworks(slide.networks, genes, n_panel), self.device, genes)
        cells = np.concatenate([c.cells for c in contexts])
        turn = draw_turn(random, rotate=self.rotate, reflect=self.reflect)
        share = random.uniform(0, self.dropout)
        coords, shown = b.coords, b.expression
        if augment and (self.rotate or self.reflect):
            coords = torch.from_numpy(slide.turner.coords(slide.tissue, cells, turn)).to(self.device)
        if augment and self.dropout:
            unit = None if slide.unit is None else slide.unit[cells]
            shown = torch.from_numpy(drop_counts(b.expression.cpu().numpy(), unit, share, random)).to(self.device)
        parts = {f.name: getattr(b, f.name) for f in fields(Batch)} | {"coords": coords}
        return objectives.MaskableBatch(**parts, shown=shown, place=b.coords, radius=slide.radius, scale=slide.scale)

    def losses(
        self, model: HEIST, batch: objectives.MaskableBatch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """See :func:`spatialfm.train._objectives.losses`."""
        return objectives.losses(model, batch, mask=self.mask, n_pair_genes=4, dtype=self.dtype, generator=generator)


@dataclass
class NicheSlide:
    """A slide as the recipe of HEIST-niche keeps it: pairs of views of every cell, each view from genes the other does not have."""

    heard: list[tuple[torch.Tensor, torch.Tensor]]
    """(n, K, S) float16 on the CPU."""
    statistics: list[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class NicheBatch:
    """The same places twice."""

    heard: tuple[torch.Tensor, torch.Tensor]  # (C, K, S) each
    statistics: tuple[torch.Tensor, torch.Tensor]


class HEISTNicheRecipe(Recipe):
    r"""Two halves of the genes have to agree on where a cell is.

    The genes of a slide are split at random, and each half gives the components of the whole panel from its own genes alone (masking, of half
    of the genes). The objective is spatial contrast: a place seen through one half has to be told from the other places of the batch seen
    through the other half, :math:`-\log \frac{e^{s_{ii}/\tau}}{\sum_j e^{s_{ij}/\tau}}` with s the cosine similarity, both ways. What
    only one half knows is noise of counting; what both know is the tissue. Negatives come from the neighbourhood (a context of 3,000 cells), as
    far ones are told apart by anything.

    ``mask``, ``dropout``, ``rotate``, ``reflect`` and ``n_genes`` play no part: halves are halves, and the model does not see coordinates.
    Restoring what the other half hears, beside or instead of the contrast, made niches worse (see the research log in the documentation).
    """

    architecture = "heist-niche"
    config_type = HEISTNicheConfig
    defaults: ClassVar[dict[str, Any]] = {
        "context_size": 1024,
        "cells_per_step": 3072,
        "n_genes": None,
        "learning_rate": 3e-3,
    }
    temperature: ClassVar[float] = 0.3
    places: ClassVar[int] = 384
    """Cells of a context that are compared."""
    panels: ClassVar[int] = 2
    """Pairs of views a slide: the first of its whole panel, the others of a part, so that small panels are learned too."""

    def build(self, config: HEISTNicheConfig) -> HEISTNiche:
        """HEIST-niche as torch starts it."""
        return HEISTNiche(config)

    def read(self, adata: AnnData, **how: Any) -> Tissue:
        """Read a slide without gene networks, which this architecture does not use."""
        return read_tissue(adata, networks=False, **how)

    def prepare(self, tissue: Tissue) -> NicheSlide:
        """Let each half of the genes hear at each radius, over the whole slide: radii reach beyond any context."""
        config = self.config or HEISTNicheConfig()
        step = walk_tensor(tissue.graph, torch.device("cpu"))
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
            heard, statistics = [], []
            for chosen in (half, ~half):
                scores = torch.from_numpy(components.project(chosen))
                tokens = torch.stack(hear(scores, step, config.radii), dim=2)
                statistics.append(component_statistics(tokens).to(self.device))
                heard.append(tokens.half())
            slide.heard.append((heard[0], heard[1]))
            slide.statistics.append((statistics[0], statistics[1]))
        return slide

    def batch(
        self, slide: NicheSlide, contexts: Sequence[Context], random: np.random.Generator, *, augment: bool = True
    ) -> NicheBatch:
        """Draw places and a panel; without augmentation the panel is the whole one."""
        cells = np.concatenate([c.cells for c in contexts])
        places = torch.from_numpy(np.sort(random.permutation(cells)[: self.places]))
        k = int(random.integers(self.panels)) if augment else 0
        a, b = (tokens[places].float().to(self.device) for tokens in slide.heard[k])
        return NicheBatch((a, b), slide.statistics[k])

    def losses(self, model: HEISTNiche, batch: NicheBatch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """``loss``; and ``hits``, the share of places found at once."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            z = [model(h, s).float().flatten(1) for h, s in zip(batch.heard, batch.statistics, strict=True)]
        z = [torch.nn.functional.normalize(v - v.mean(0), dim=1) for v in z]
        similarity = z[0] @ z[1].T / self.temperature
        same = torch.arange(len(similarity), device=similarity.device)
        loss = (
            torch.nn.functional.cross_entropy(similarity, same) + torch.nn.functional.cross_entropy(similarity.T, same)
        ) / 2
        return {"loss": loss, "hits": (similarity.argmax(1) == same).float().mean()}


RECIPES: dict[str, type[Recipe]] = {recipe.architecture: recipe for recipe in (HEISTRecipe, HEISTNicheRecipe)}


def find_recipe(architecture: str | None, config: Any = None) -> tuple[type[Recipe], Any]:
    """Recipe and config: of the config's own type where it is one, otherwise of the named architecture."""
    for recipe in RECIPES.values():
        if isinstance(config, recipe.config_type):
            if architecture not in (None, recipe.architecture):
                msg = f"architecture={architecture!r}, but config is a {type(config).__name__}; leave one of them out"
                raise ValueError(msg)
            return recipe, config
    name = architecture or "heist"
    check_choice("architecture", name, tuple(RECIPES))
    recipe = RECIPES[name]
    try:
        return recipe, recipe.config_type(**dict(config or {}))
    except TypeError as error:
        known = [f.name for f in fields(recipe.config_type)]
        msg = f"config={config!r} does not describe a {name!r} model, whose options are {known}"
        raise ValueError(msg) from error


def _radius(tissue: Tissue) -> float:
    """Three median edges of the tissue graph, in standardised coordinates: a cell's neighbourhood of some 20 to 30 cells."""
    i, j = tissue.graph.nonzero()
    return 3 * float(np.median(np.linalg.norm(tissue.coords[i] - tissue.coords[j], axis=1))) if len(i) else 1.0


def _scale(tissue: Tissue) -> float:
    """Root mean square of the expressed values."""
    x = tissue.expression.data if sp.issparse(tissue.expression) else tissue.expression[tissue.expression != 0]
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64)))) if x.size else 1.0


def _subnetworks(edges: list[torch.Tensor], genes: np.ndarray, n_panel: int) -> list[torch.Tensor]:
    """Networks among the chosen genes, renumbered."""
    position = torch.full((n_panel,), -1)
    position[torch.from_numpy(genes)] = torch.arange(len(genes))
    position = position.to(edges[0].device)
    inner = [position[e] for e in edges]
    return [e[:, (e >= 0).all(0)] for e in inner]
