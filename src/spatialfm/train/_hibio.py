"""Training of HiBio-ST."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F

from spatialfm._data._components import spatial_components
from spatialfm.engine._hibio import IMAGE_FEATURES, find_regions, read_spots, stored_features
from spatialfm.engine._images import N_STAIN
from spatialfm.models import HiBio, HiBioConfig
from spatialfm.models._propagate import propagate, transition_tensor
from spatialfm.models.hibio import standardize
from spatialfm.pp._pathways import activity, known_sets
from spatialfm.train._alignment import Section, align
from spatialfm.train._recipe import Recipe, check_numbers

if TYPE_CHECKING:
    from collections.abc import Sequence

    import scipy.sparse as sp
    from anndata import AnnData

    from spatialfm.engine import Context, Tissue
    from spatialfm.engine._hibio import Spots
    from spatialfm.train._recipe import Slide


@dataclass
class HiBioSlide:
    """A slide prepared for training HiBio."""

    spots: Spots | None
    """All features and genes of the spots; None after :meth:`HiBioRecipe.start`."""
    image: torch.Tensor
    """(n, width) the patches around each spot, with weights fitted to other slides."""
    genes: torch.Tensor
    """(n, width) weighted sum of the vectors of the genes of each spot."""
    activity: torch.Tensor
    """(n, k) standardised activity of the pathways."""
    varies: torch.Tensor
    """(k,) bool, whether the activity of each pathway varies."""
    regions: list[torch.Tensor]
    """(n,) region of each spot, for each level."""
    anchors: torch.Tensor
    """(k, width) sum of the vectors of the genes of each pathway; the same for all slides."""


@dataclass
class HiBioBatch:
    """Spots of one slide."""

    image: torch.Tensor
    genes: torch.Tensor
    activity: torch.Tensor
    anchors: torch.Tensor
    regions: list[torch.Tensor]
    aligned: tuple[str, ...]
    """Objectives of this stage."""


@dataclass(frozen=True)
class HiBioRecipe(Recipe):
    r"""Alignment of patches and profiles of spots, then of pathways, then of regions.

    The vectors of genes and the weights of features are computed before the first step
    (:mod:`spatialfm.train._alignment`). Then the heads are trained in three stages; each stage keeps the objectives of
    the stages before it. With s the cosine similarity and c the learned scale:

    1. **Spots**: symmetric InfoNCE between the patch and the profile of each spot of the batch,
       :math:`-\log \frac{e^{c s_{ii}}}{\sum_j e^{c s_{ij}}}`.
    2. **Anchors**: one minus the correlation, over the spots, of the similarity to the anchor of a pathway with the
       measured activity of the pathway; mean over pathways and both modalities.
    3. **Regions**: symmetric InfoNCE between the pooled patches and the pooled profiles of each region, and InfoNCE
       between spots and the region they belong to in the other modality.

    Slides carry features of their patches in ``obsm["image_features"]`` (:func:`spatialfm.tl.image_features`).
    """

    dropout: float = 0.2
    """Share of the inputs of the heads that is dropped in each step."""

    architecture = "hibio"
    config_type = HiBioConfig
    from_data = True
    # A higher learning rate, or training all weights from random values, was worse than the closed form.
    defaults: ClassVar[dict[str, Any]] = {
        "context_size": 64,
        "cells_per_step": 256,
        "learning_rate": 3e-4,
    }
    gene_sets: ClassVar[str] = "hallmark"
    stain_weight: ClassVar[float] = 0.5
    """Weight of all statistics of the stain in the ridge regression, relative to the features of the tower."""
    balance: ClassVar[float] = 0.25
    """Heads are initialised as a division by the standard deviation to this power: 0 favours anchors, 0.5 retrieval."""

    def __post_init__(self) -> None:
        check_numbers(dropout=self.dropout)

    @property
    def stages(self) -> int:
        """Number of levels to align."""
        return len((self.config or HiBioConfig()).alignment)

    def build(self, config: HiBioConfig) -> HiBio:
        """Make a HiBio model without genes; :meth:`start` chooses the genes."""
        return HiBio(config)

    def read(self, adata: AnnData, **reading: Any) -> Spots:
        """Read spots with the features of their patches."""
        if IMAGE_FEATURES not in adata.obsm:
            msg = (
                f"obsm[{IMAGE_FEATURES!r}] is missing; run sfm.tl.image_features(adata, image=...) "
                "and save the slide with it"
            )
            raise ValueError(msg)
        if adata.n_vars == 0:
            msg = "it has no genes; HiBio is trained on patches and expression of the same spots"
            raise ValueError(msg)
        config = self.config or HiBioConfig()
        image, tower = stored_features(adata)
        if tower not in (None, config.tower):
            msg = (
                f"obsm[{IMAGE_FEATURES!r}] is of the tower {tower!r}, but the model needs {config.tower!r}; "
                f"pass config={{'tower': {tower!r}}}, or run sfm.tl.image_features again"
            )
            raise ValueError(msg)
        return read_spots(adata, image=image, idf=config.idf, **reading)

    def prepare(self, tissue: Tissue) -> HiBioSlide:
        """Keep the spots, because the input of batches depends on all slides; :meth:`start` computes it."""
        none = torch.zeros(0)
        return HiBioSlide(cast("Spots", tissue), none, none, none, none, [], none)

    def start(self, model: HiBio, slides: Sequence[Slide], *, seed: int) -> HiBio:
        """Choose the genes, align in closed form, and compute the input of batches for each slide."""
        spots = [cast("Spots", slide.state.spots) for slide in slides]
        widths = {cast("np.ndarray", s.image).shape[1] for s in spots}
        if len(widths) > 1:
            msg = f"obsm[{IMAGE_FEATURES!r}] has {sorted(widths)} columns on different slides; use one tower for all"
            raise ValueError(msg)
        trained = [s for s, slide in zip(spots, slides, strict=True) if slide.train]
        n_slides = Counter(symbol for s in trained for symbol in set(s.symbols) - {""})
        genes = tuple(sorted(g for g, count in n_slides.items() if count >= min(2, len(trained))))
        if not genes:
            msg = (
                "the slides have no human gene, or ortholog of one, in common; "
                "rename the features with sfm.pp.resolve_genes"
            )
            raise ValueError(msg)
        config = replace(model.config, genes=genes, n_features=widths.pop())

        scale = torch.ones(config.n_features)
        scale[-N_STAIN:] = self.stain_weight * (config.n_features / N_STAIN) ** 0.5
        transitions = [transition_tensor(s.graph, torch.device("cpu")) for s in spots]
        sections = []
        for s, slide, transition in zip(spots, slides, transitions, strict=True):
            slide_of = s.slide_tensor()
            around = propagate(standardize(torch.from_numpy(s.image), slide_of), transition, config.radii)
            sections.append(
                Section(
                    patches=torch.cat([standardize(x, slide_of) * scale for x in around], dim=1),
                    profile=s.by_symbol(s.profile, genes),
                    expression=s.by_symbol(s.expression, genes),
                    slide=slide_of,
                    measured=np.isin(genes, s.symbols),
                    contexts=[context.cells for context in slide.train],
                )
            )
        found = align(sections, config.width, seed=seed)
        # With few genes there are fewer directions.
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
        for slide, s, section, transition, image, own in zip(
            slides, spots, sections, transitions, found.image, found.genes, strict=True
        ):
            measured = standardize(_activity_by_slide(section, membership), section.slide)
            components = spatial_components(s.profile, s.graph, n_components=config.n_components)
            regions = find_regions(torch.from_numpy(components.scores), transition, s, config)
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
        """Make a batch of the spots of the contexts."""
        cells = torch.from_numpy(np.concatenate([c.cells for c in contexts]))
        regions = [torch.unique(level[cells], return_inverse=True)[1].to(self.device) for level in slide.regions]
        image, genes, activity = (
            x[cells].to(self.device) for x in (slide.image, slide.genes, slide.activity[:, slide.varies])
        )
        aligned = (self.config or HiBioConfig()).alignment[:stage]
        return HiBioBatch(image, genes, activity, slide.anchors[slide.varies], regions, aligned)

    def losses(self, model: HiBio, batch: HiBioBatch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Compute ``spots``, ``anchors`` and ``regions``, and ``loss``, the sum of those that the stage aligns."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            drop = self.dropout if model.training else 0.0
            image, genes = (
                head(F.dropout(e, drop)).float()
                for head, e in ((model.image_head, batch.image), (model.gene_head, batch.genes))
            )
            anchors = F.normalize(model.gene_head(batch.anchors).float(), dim=1)
        scale = model.log_scale.exp()
        parts = {"spots": _symmetric_info_nce(image, genes, scale)}
        correlations = [_correlation(F.normalize(z, dim=1) @ anchors.T, batch.activity).mean() for z in (image, genes)]
        # A panel may have no gene of any pathway.
        parts["anchors"] = 1 - torch.stack(correlations).mean() if len(anchors) else image.new_zeros(())
        levels = []
        for region in batch.regions:
            pooled_image, pooled_genes = model.pool(image, region, image=True), model.pool(genes, region, image=False)
            levels += [
                _symmetric_info_nce(pooled_image, pooled_genes, scale),
                _info_nce(image, pooled_genes, region, scale),
                _info_nce(genes, pooled_image, region, scale),
            ]
        parts["regions"] = torch.stack(levels).mean()
        # Objectives of later stages are multiplied by zero, so that every weight has a gradient in every stage.
        loss = torch.stack([value * (name in batch.aligned) for name, value in parts.items()]).sum()
        return {"loss": loss, **parts}


def _info_nce(a: torch.Tensor, b: torch.Tensor, positive: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """InfoNCE by cosine similarity: row i of ``a`` and row ``positive[i]`` of ``b`` are the positive pairs."""
    similarity = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    return F.cross_entropy(scale * similarity, positive)


def _symmetric_info_nce(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    same = torch.arange(len(a), device=a.device)
    return (_info_nce(a, b, same, scale) + _info_nce(b, a, same, scale)) / 2


def _correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Pearson correlation of columns."""
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / (a.square().sum(0) * b.square().sum(0)).sqrt().clamp(min=1e-8)


def _activity_by_slide(section: Section, membership: sp.csr_matrix) -> torch.Tensor:
    """Compute the activity (n, k) of pathways as :func:`spatialfm.pp.pathways` does, for each slide separately."""
    out = torch.zeros(len(section.slide), membership.shape[1])
    for k in range(int(section.slide.max()) + 1):
        rows = np.flatnonzero(section.slide.numpy() == k)
        out[rows] = torch.from_numpy(activity(section.expression[rows], membership, "zscore"))
    return out
