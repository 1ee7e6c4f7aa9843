"""What each architecture brings to the training loop: how a slide is prepared, what a batch is, and what is minimised."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as functional

from spatialfm._checks import check_choice
from spatialfm._data._components import spatial_components
from spatialfm.engine import Batch, find_regions, make_batch, network_edges, slide_tensor, walk_tensor
from spatialfm.engine._images import N_STAIN
from spatialfm.models import HEIST, HEISTConfig, HEISTNiche, HEISTNicheConfig, HiBio, HiBioConfig
from spatialfm.models.heist_niche import component_statistics, hear
from spatialfm.models.hibio import standardize
from spatialfm.pp._pathways import activity, known_sets
from spatialfm.pp._spots import IMAGE_FEATURES, read_spots, stored_features
from spatialfm.pp._tissue import read_tissue
from spatialfm.train import _objectives as objectives
from spatialfm.train._alignment import Section, align
from spatialfm.train._augment import Turner, count_unit, draw_turn, drop_counts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from spatialfm.engine import Context
    from spatialfm.pp._spots import Spots
    from spatialfm.pp._tissue import Tissue
    from spatialfm.train._slides import Slide


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
    from_data: ClassVar[bool] = False
    """Whether ``start`` finds weights in the slides: validation then also looks before the first step."""

    @property
    def stages(self) -> int:
        """Equal parts of a run, of which each minimises something else; validation always asks for what the last one does."""
        return 1

    @abstractmethod
    def build(self, config: Any) -> Any:
        """Make the model to train, with the weights it starts from; torch is seeded."""

    def start(self, model: Any, slides: Sequence[Slide], *, seed: int) -> Any:
        """Model to train, once all slides are prepared: for weights that are found in the slides before the first step."""
        return model

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
        """Contexts of a prepared slide as tensors on ``device``. Where there are several ``stages``, it gets ``stage=`` from 1 on too."""

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


@dataclass
class HiBioSlide:
    """A slide as the recipe of HiBio keeps it."""

    spots: Spots | None
    """Until the start is found; it holds all features and genes."""
    image: torch.Tensor
    """(n, width) what is heard of the patches, by weights from other slides."""
    genes: torch.Tensor
    """(n, width) sum of the vectors of the spot's genes."""
    activity: torch.Tensor
    """(n, k) of the pathways, standardised."""
    varies: torch.Tensor
    """(k,) bool: pathways whose activity is known."""
    regions: list[torch.Tensor]
    """(n,) a level."""
    anchors: torch.Tensor
    """(k, width) sum of the vectors of each pathway's genes; the same for all slides."""


@dataclass
class HiBioBatch:
    """Spots of one slide."""

    image: torch.Tensor
    genes: torch.Tensor
    activity: torch.Tensor
    anchors: torch.Tensor
    regions: list[torch.Tensor]
    aligned: tuple[str, ...]
    """What this stage aligns."""


class HiBioRecipe(Recipe):
    r"""Patch and profile of a spot have to find each other, then pathways, then regions.

    The vectors of genes and the weights of features are found before the first step (:mod:`spatialfm.train._alignment`). Then the heads are
    trained in three stages, each keeping the ones before it; with s the cosine similarity and c the learned scale:

    1. **Spots**: a patch finds the profile of its own spot among the spots of the batch, and the profile the patch, symmetric InfoNCE,
       :math:`-\log \frac{e^{c s_{ii}}}{\sum_j e^{c s_{ij}}}`.
    2. **Anchors**: over the spots, similarity to a pathway's anchor follows the pathway's measured activity: one less their correlation, mean
       over pathways and both modalities.
    3. **Regions**: pooled patches of a region find its pooled profiles among the regions, and spots find the region they lie in, across
       modalities; all symmetric InfoNCE.

    Slides carry features of their patches in ``obsm["image_features"]`` (:func:`spatialfm.tl.image_features`). ``mask``, ``rotate``,
    ``reflect`` and ``n_genes`` play no part; ``dropout`` is the share of the shared space's dimensions that heads do not get to see.
    """

    architecture = "hibio"
    config_type = HiBioConfig
    from_data = True
    # A higher rate, or training all of it from random weights, lost what the closed form had found.
    defaults: ClassVar[dict[str, Any]] = {
        "context_size": 64,
        "cells_per_step": 256,
        "n_genes": None,
        "learning_rate": 3e-4,
    }
    gene_sets: ClassVar[str] = "hallmark"
    stain_weight: ClassVar[float] = 0.5
    """Of the stain's statistics in the ridge, all together, beside the tower's features."""
    balance: ClassVar[float] = 0.25
    """Heads start as scalings by the standard deviation to the power of minus this: 0 favours anchors, 0.5 retrieval."""

    @property
    def stages(self) -> int:
        """As many as there are levels to align."""
        return len((self.config or HiBioConfig()).alignment)

    def build(self, config: HiBioConfig) -> HiBio:
        """HiBio without genes, which the slides bring."""
        return HiBio(config)

    def read(self, adata: AnnData, **how: Any) -> Spots:
        """Read spots with the features of their patches."""
        if IMAGE_FEATURES not in adata.obsm:
            msg = f"obsm[{IMAGE_FEATURES!r}] is missing; run sfm.tl.image_features(adata, image=...) and save the slide with it"
            raise ValueError(msg)
        if adata.n_vars == 0:
            msg = "it has no genes; HiBio learns from patches and expression of the same spots"
            raise ValueError(msg)
        config = self.config or HiBioConfig()
        image, tower = stored_features(adata)
        if tower not in (None, config.tower):
            msg = (
                f"obsm[{IMAGE_FEATURES!r}] is of the tower {tower!r}, but the model is to read {config.tower!r}; "
                f"pass config={{'tower': {tower!r}}}, or run sfm.tl.image_features again"
            )
            raise ValueError(msg)
        return read_spots(adata, image=image, idf=config.idf, **how)

    def prepare(self, tissue: Tissue) -> HiBioSlide:
        """Keep what was read: what batches need can only be told of all slides together."""
        none = torch.zeros(0)
        return HiBioSlide(cast("Spots", tissue), none, none, none, none, [], none)

    def start(self, model: HiBio, slides: Sequence[Slide], *, seed: int) -> HiBio:
        """Choose the genes, align in closed form, and make of each slide what batches need."""
        spots = [cast("Spots", slide.state.spots) for slide in slides]
        widths = {cast("np.ndarray", s.image).shape[1] for s in spots}
        if len(widths) > 1:
            msg = f"obsm[{IMAGE_FEATURES!r}] has {sorted(widths)} columns on different slides; use one tower for all"
            raise ValueError(msg)
        learned = [s for s, slide in zip(spots, slides, strict=True) if slide.train]
        seen = Counter(symbol for s in learned for symbol in set(s.symbols) - {""})
        genes = tuple(sorted(g for g, count in seen.items() if count >= min(2, len(learned))))
        if not genes:
            msg = "the slides have no human gene, or ortholog of one, in common; name the features with sfm.pp.resolve_genes"
            raise ValueError(msg)
        config = replace(model.config, genes=genes, n_features=widths.pop())

        scale = torch.ones(config.n_features)
        scale[-N_STAIN:] = self.stain_weight * (config.n_features / N_STAIN) ** 0.5
        walks = [walk_tensor(s.graph, torch.device("cpu")) for s in spots]
        sections = []
        for s, slide, walk in zip(spots, slides, walks, strict=True):
            of = slide_tensor(s)
            heard = hear(standardize(torch.from_numpy(s.image), of), walk, config.radii)
            sections.append(
                Section(
                    heard=torch.cat([standardize(h, of) * scale for h in heard], dim=1),
                    profile=s.by_symbol(s.profile, genes),
                    expression=s.by_symbol(s.expression, genes),
                    slide=of,
                    measured=np.isin(genes, s.symbols),
                    contexts=[context.cells for context in slide.train],
                )
            )
        found = align(sections, config.width, seed=seed)
        # Few genes have fewer directions.
        model = HiBio(replace(config, width=found.gene_vectors.shape[1]))
        rows = [section.rows for section in sections]
        spread = {
            name: torch.cat([e[r] for e, r in zip(read, rows, strict=True)]).std(0).clamp(min=1e-6)
            for name, read in (("image", found.image), ("genes", found.genes))
        }
        with torch.no_grad():
            model.gene_vectors.copy_(found.gene_vectors)
            model.image_weights.copy_(found.image_weights.view(*model.image_weights.shape) * scale[:, None])
            model.decoder.copy_(found.decoder)
            model.mean_expression.copy_(found.mean_expression)
            model.confidence.copy_(found.confidence)
            model.image_head.weight.copy_(torch.diag(spread["image"] ** -self.balance))
            model.gene_head.weight.copy_(torch.diag(spread["genes"] ** -self.balance))

        _, membership = known_sets(list(genes), "human", self.gene_sets)
        anchors = torch.from_numpy(membership.T @ found.gene_vectors.numpy()).to(self.device)
        for slide, s, section, walk, image, own in zip(
            slides, spots, sections, walks, found.image, found.genes, strict=True
        ):
            measured = standardize(_activity_by_slide(section, membership), section.slide)
            components = spatial_components(s.profile, s.graph, n_components=config.n_components)
            regions = find_regions(torch.from_numpy(components.scores), walk, s, config)
            slide.state = HiBioSlide(
                None, image, own, measured, measured.any(0), [torch.from_numpy(r) for r in regions], anchors
            )
        return model

    def batch(
        self,
        slide: HiBioSlide,
        contexts: Sequence[Context],
        random: np.random.Generator,
        *,
        augment: bool = True,
        stage: int = 1,
    ) -> HiBioBatch:
        """Spots of the contexts, and what the stage aligns."""
        cells = torch.from_numpy(np.concatenate([c.cells for c in contexts]))
        regions = [torch.unique(level[cells], return_inverse=True)[1].to(self.device) for level in slide.regions]
        image, genes, activity = (
            x[cells].to(self.device) for x in (slide.image, slide.genes, slide.activity[:, slide.varies])
        )
        aligned = (self.config or HiBioConfig()).alignment[:stage]
        return HiBioBatch(image, genes, activity, slide.anchors[slide.varies], regions, aligned)

    def losses(self, model: HiBio, batch: HiBioBatch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """``loss``, the sum of ``spots``, ``anchors`` and ``regions`` as far as the stage has them, which are logged in all stages."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            drop = self.dropout if model.training else 0.0
            image, genes = (
                head(functional.dropout(e, drop)).float()
                for head, e in ((model.image_head, batch.image), (model.gene_head, batch.genes))
            )
            anchors = functional.normalize(model.gene_head(batch.anchors).float(), dim=1)
        scale = model.log_scale.exp()
        parts = {"spots": _find_each_other(image, genes, scale)}
        followed = [
            _correlation(functional.normalize(z, dim=1) @ anchors.T, batch.activity).mean() for z in (image, genes)
        ]
        # A panel may have no gene of any pathway.
        parts["anchors"] = 1 - torch.stack(followed).mean() if len(anchors) else image.new_zeros(())
        levels = []
        for region in batch.regions:
            pooled_image, pooled_genes = model.pool(image, region, image=True), model.pool(genes, region, image=False)
            levels += [
                _find_each_other(pooled_image, pooled_genes, scale),
                _find(image, pooled_genes, region, scale),
                _find(genes, pooled_image, region, scale),
            ]
        parts["regions"] = torch.stack(levels).mean()
        # Times zero, so that every weight plays a part in every stage.
        loss = torch.stack([value * (name in batch.aligned) for name, value in parts.items()]).sum()
        return {"loss": loss, **parts}


def _find(a: torch.Tensor, b: torch.Tensor, right: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of rows of ``a`` finding rows ``right`` of ``b`` by cosine similarity."""
    similarity = functional.normalize(a, dim=1) @ functional.normalize(b, dim=1).T
    return functional.cross_entropy(scale * similarity, right)


def _find_each_other(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    same = torch.arange(len(a), device=a.device)
    return (_find(a, b, same, scale) + _find(b, a, same, scale)) / 2


def _correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Pearson correlation of columns."""
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / (a.square().sum(0) * b.square().sum(0)).sqrt().clamp(min=1e-8)


def _activity_by_slide(section: Section, membership: sp.csr_matrix) -> torch.Tensor:
    """Activity (n, k) as :func:`spatialfm.pp.pathways` has it, each slide by itself."""
    out = torch.zeros(len(section.slide), membership.shape[1])
    for k in range(int(section.slide.max()) + 1):
        rows = np.flatnonzero(section.slide.numpy() == k)
        out[rows] = torch.from_numpy(activity(section.expression[rows], membership, "zscore"))
    return out


RECIPES: dict[str, type[Recipe]] = {
    recipe.architecture: recipe for recipe in (HEISTRecipe, HEISTNicheRecipe, HiBioRecipe)
}


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
