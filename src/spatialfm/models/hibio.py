"""HiBio-ST: histology and expression of spots in one space, aligned at the level of spots, pathways and regions.

Its authors published an abstract; this is our interpretation of it. The file holds the built-in image tower, then the
model.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spatialfm._checks import check_positive
from spatialfm.models._propagate import Projection, beside, fit_principal, fit_unit, propagate

if TYPE_CHECKING:
    from collections.abc import Sequence

# --- image tower -----------------------------------------------------------------------------

# Stages of EfficientNet-Lite0: kernel, stride of the first block, expansion, channels, blocks.
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


class SameConv(nn.Conv2d):
    """Convolution to ``ceil(size / stride)`` pixels, padded as in TensorFlow.

    If the padding is odd, the right and the lower side get one pixel more.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding=kernel // 2 if stride == 1 else 0, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, ceil(H / stride), ceil(W / stride))."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        if stride > 1:
            height, width = (max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[-2:])
            x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return super().forward(x)


class InvertedBottleneck(nn.Module):
    """Expansion, depthwise convolution and projection, with a residual if the shape stays (Sandler et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = SameConv(inputs, wide) if expansion > 1 else None
        self.depthwise = SameConv(wide, wide, kernel, stride, groups=wide)
        self.project = SameConv(wide, outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, ceil(H / stride), ceil(W / stride))."""
        wide = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        out = self.project(F.relu6(self.depthwise(wide), inplace=True))
        return out.add_(x) if self.residual else out


class EfficientNetLite0(nn.Module):
    """Features of EfficientNet-Lite0, 3.4 M parameters.

    EfficientNet-B0 (Tan & Le 2019) with ReLU6 and without squeeze-and-excitation. Batch normalisation is folded into
    the convolutions, which therefore have biases. The classifier is left out.
    """

    n_features = 1280

    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv(3, 32, 3, stride=2)
        blocks, channels = [], 32
        for kernel, stride, expansion, outputs, n_blocks in _STAGES:
            for i in range(n_blocks):
                blocks.append(InvertedBottleneck(channels, outputs, kernel, stride if i == 0 else 1, expansion))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = SameConv(channels, self.n_features)

    def forward(self, image: Tensor) -> Tensor:
        """Compute the mean of the last features over the image, normalised RGB (B, 3, H, W) -> (B, 1280)."""
        x = self.blocks(F.relu6(self.stem(image), inplace=True))
        return F.relu6(self.head(x), inplace=True).mean(dim=(2, 3))


# --- the model -----------------------------------------------------------------------------


ALIGNMENTS = ("spots", "anchors", "regions")


@dataclass(frozen=True)
class HiBioConfig:
    """Shape of a :class:`HiBio`."""

    genes: tuple[str, ...] = ()
    """Human symbols of the genes that have a vector."""
    tower: str = "efficientnet-lite0"
    """Image tower whose features are used, see :func:`load_tower`."""
    n_features: int = 1290
    """Number of features of a patch."""
    radii: tuple[float, ...] = (0.0, 2.0, 8.0)
    """Lazy steps on the tissue graph over which the patches around a spot are propagated."""
    width: int = 32
    """Dimensions of the space that both modalities share."""
    n_components: int = 32
    """Largest number of components of the slide itself that are fused."""
    niche_scale: float = 0.07
    """Radius of the niche in steps, as a multiple of the square root of the number of spots of a slide."""
    region_scales: tuple[float, ...] = (0.22, 0.92)
    """Mean number of spots of a region, fine to coarse, as multiples of the same square root.

    The defaults are 12 and 50 on a Visium section of 3,000 spots."""
    region_weight: float = 0.5
    """Weight of each level of regions in the fused embedding, relative to the niche."""
    image_weight: float = 0.3
    """Weight of the patches in the fused embedding, relative to the expression."""
    columns: int = 12
    """Columns of the fused embedding."""
    idf: bool = True
    """Whether genes are weighted by their inverse document frequency."""
    alignment: tuple[str, ...] = ALIGNMENTS
    """Stages of the alignment in pretraining. Each stage keeps the objectives of the stages before it."""

    def __post_init__(self) -> None:
        # JSON turns tuples into lists.
        for name, kind in (("genes", str), ("radii", float), ("region_scales", float), ("alignment", str)):
            object.__setattr__(self, name, tuple(kind(v) for v in getattr(self, name)))
        for name in ("n_features", "width", "n_components", "columns"):
            check_positive(name, getattr(self, name))
        for name in ("radii", "region_scales"):
            values = getattr(self, name)
            if not values or not values[0] >= 0 or not all(a < b for a, b in pairwise(values)):
                msg = f"{name}={values} must be increasing numbers of at least 0"
                raise ValueError(msg)
        if not 0 < len(self.alignment) == len(set(self.alignment) & set(ALIGNMENTS)):
            msg = f"alignment={self.alignment} must hold one or more of {ALIGNMENTS}, each once"
            raise ValueError(msg)
        if len(set(self.genes)) < len(self.genes):
            msg = "genes must be unique, but a name occurs twice"
            raise ValueError(msg)
        for name in ("niche_scale", "region_weight", "image_weight"):
            if not getattr(self, name) >= 0:
                msg = f"{name} must be at least 0, got {getattr(self, name)!r}"
                raise ValueError(msg)


class FusedAxes(NamedTuple):
    """Axes of a fused embedding by :class:`HiBio`, with which other slides are embedded in the same columns."""

    radius: float
    """Radius of the niche in lazy steps on the tissue graph."""
    projection: Projection
    """Projection of the niche, the regions and the patches, side by side."""


class HiBio(nn.Module):
    r"""Histology and expression of spots in one space, aligned at the level of spots, pathways and regions.

    * **Genes.** The TF-IDF weighted profile t of a spot, minus the mean of its slide, weights the vectors :math:`v_g`
      of its genes: :math:`e = \sum_g (t_g - \bar t_g) v_g`, and :math:`z = G e`.
    * **Image.** Features f of the patch (:class:`EfficientNetLite0` and its stain) are standardised within the slide,
      which removes the colour of stain and scanner, and propagated on the tissue graph over several radii,
      :math:`e' = \sum_r W_r f_r`; :math:`z' = I e'`.
    * **Anchors.** A pathway is placed at the mean of its genes: :math:`a_k = G \frac{1}{|k|} \sum_{g \in k} v_g`. Any
      gene set can be an anchor, without training.
    * **Regions.** The spots of a contiguous region are pooled by attention,
      :math:`\sum_i \mathrm{softmax}_i(q \cdot z_i) z_i`.
    * **Fusion.** Components of the slide itself (on its own axes, because no vocabulary of genes covers every tissue)
      within a niche and within nested regions, side by side with those of the patches.

    Similarity is the cosine of z, z' and a. G and I start as scalings; :class:`spatialfm.train._hibio.HiBioRecipe`
    describes how they are trained.
    """

    name = "hibio"

    def __init__(self, config: HiBioConfig | None = None) -> None:
        super().__init__()
        self.config = config or HiBioConfig()
        self.record: dict[str, Any] = {}
        genes, width = len(self.config.genes), self.config.width
        # These are computed in closed form, and not trained further.
        self.register_buffer("gene_vectors", torch.zeros(genes, width))
        self.register_buffer("image_weights", torch.zeros(len(self.config.radii), self.config.n_features, width))
        self.register_buffer("decoder", torch.zeros(width, genes))
        self.register_buffer("mean_expression", torch.zeros(genes))
        self.register_buffer("confidence", torch.zeros(genes))
        self.gene_head = nn.Linear(width, width, bias=False)
        self.image_head = nn.Linear(width, width, bias=False)
        self.gene_query = nn.Parameter(torch.zeros(width))
        self.image_query = nn.Parameter(torch.zeros(width))
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())

    gene_vectors: Tensor
    image_weights: Tensor
    decoder: Tensor
    mean_expression: Tensor
    confidence: Tensor

    def read_image(self, features: Tensor, transition: Tensor, slide: Tensor) -> Tensor:
        """Compute e' (n, width) from the patches around each spot.

        ``features`` is (n, n_features), ``transition`` the (n, n) sparse csr transition matrix of the tissue graph, and
        ``slide`` (n,).
        """
        around = propagate(standardize(features, slide), transition, self.config.radii)
        return torch.stack([standardize(x, slide) @ w for x, w in zip(around, self.image_weights, strict=True)]).sum(0)

    def read_genes(self, profile: Tensor, slide: Tensor) -> Tensor:
        """Compute e (n, width) from TF-IDF profiles (n, genes), sparse csr or dense, and the slides (n,) of spots."""
        return center(profile @ self.gene_vectors, slide)

    def anchors(self, membership: Tensor) -> Tensor:
        """Compute unit vectors (k, width) of gene sets from memberships (k, genes) of 0 and 1, sparse or dense."""
        return F.normalize(self.gene_head(membership @ self.gene_vectors), dim=1)

    def attention(self, z: Tensor, region: Tensor, *, image: bool) -> Tensor:
        """Weight (n,) of each spot ``z`` (n, width) in its ``region`` (n,), 0 to r - 1; sums to one in each region."""
        weight = (F.normalize(z, dim=1) @ (self.image_query if image else self.gene_query)).exp()
        return weight / pool(weight[:, None], torch.ones_like(weight), region)[region, 0]

    def pool(self, z: Tensor, region: Tensor, *, image: bool) -> Tensor:
        """Pool spots (n, width) to regions (r, width) by attention within each region."""
        return pool(z, self.attention(z, region, image=image), region)

    def predict(self, e: Tensor) -> Tensor:
        """Predict log-normalised expression (n, genes) from the result of :meth:`read_image`."""
        return self.mean_expression + e @ self.decoder

    def fit_fuse(
        self,
        components: Tensor,
        transition: Tensor,
        regions: Sequence[Tensor],
        attention: Sequence[Tensor],
        n_spots: float,
        patches: Tensor | None = None,
    ) -> tuple[FusedAxes, Tensor]:
        """Fit the axes of the fused embedding of a tissue, and embed all of its spots.

        Parameters
        ----------
        components
            (n, K) components of the expression of the tissue, or of its patches if expression is missing.
        transition
            (n, n) sparse csr: mean over the neighbours in the tissue graph.
        regions, attention
            For each level of regions, the region (n,) of each spot and its weight (n,) there, see :meth:`attention`.
        n_spots
            Number of spots of a slide (the mean if there are several), which sets the radius of the niche.
        patches
            (n, P) components of the patches, to be fused with the expression.

        Returns
        -------
        Axes on which :meth:`fuse` embeds other spots, and the embedding: (n, columns) principal components of the
        niche, the regions and the patches, of unit total variance.
        """
        radius = max(1.0, self.config.niche_scale * n_spots**0.5)
        parts = self._parts(radius, components, transition, regions, attention, patches)
        weights = [1.0, *[self.config.region_weight] * len(regions), self.config.image_weight]
        scaled = beside(*(fit_unit(x).times(weight) for x, weight in zip(parts, weights, strict=False)))
        principal = fit_principal(scaled.apply(torch.cat(parts, dim=1)), self.config.columns)
        # Scaled columns are centred, so one map combines both steps.
        axes = FusedAxes(radius, Projection(scaled.center, scaled.axes @ principal.axes))
        return axes, axes.projection.apply(torch.cat(parts, dim=1))

    def fuse(
        self,
        components: Tensor,
        transition: Tensor,
        regions: Sequence[Tensor],
        attention: Sequence[Tensor],
        axes: FusedAxes,
        patches: Tensor | None = None,
    ) -> Tensor:
        """Embed spots on given axes; arguments and result are as for :meth:`fit_fuse`."""
        parts = self._parts(axes.radius, components, transition, regions, attention, patches)
        return axes.projection.apply(torch.cat(parts, dim=1))

    @staticmethod
    def _parts(
        radius: float,
        components: Tensor,
        transition: Tensor,
        regions: Sequence[Tensor],
        attention: Sequence[Tensor],
        patches: Tensor | None,
    ) -> list[Tensor]:
        """Compute the parts to fuse: the niche, the mean of the region at each level, and the niche of the patches."""
        parts = propagate(components, transition, [radius])
        parts += [pool(components, weights, region)[region] for region, weights in zip(regions, attention, strict=True)]
        return parts if patches is None else [*parts, *propagate(patches, transition, [radius])]


def pool(x: Tensor, weights: Tensor, region: Tensor) -> Tensor:
    """Weighted sums (r, d) of the rows of ``x`` (n, d) in each region (n,), 0 to r - 1."""
    return x.new_zeros(int(region.max()) + 1, x.shape[1]).index_add(0, region, x * weights[:, None])


def center(x: Tensor, slide: Tensor) -> Tensor:
    """Subtract the mean of its slide (n,) from each row."""
    share = 1 / torch.bincount(slide).to(x)
    return x - pool(x, share[slide], slide)[slide]


def standardize(x: Tensor, slide: Tensor) -> Tensor:
    """Scale each column to mean 0 and standard deviation 1 within each slide (n,); constant columns become 0."""
    # Centre twice: rounding leaves a remainder in constant columns, which the division would scale up.
    x = center(center(x, slide), slide)
    share = 1 / torch.bincount(slide).to(x)
    spread = pool(x.square(), share[slide], slide).sqrt()
    return x / (spread + 1e-6)[slide]
