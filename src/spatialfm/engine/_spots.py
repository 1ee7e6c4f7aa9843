"""A pass of a model that reads spots by histology and expression."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from spatialfm._data._components import spatial_components
from spatialfm.engine._device import in_evaluation, sparse_device
from spatialfm.engine._whole import walk_tensor
from spatialfm.models.heist_niche import hear
from spatialfm.pp._regions import nested_partitions

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from spatialfm.models import HiBio, HiBioConfig
    from spatialfm.pp._spots import Spots
    from spatialfm.pp._tissue import Tissue

# Spots whose genes are all in memory at once.
_ROWS = 1024


@dataclass
class SpotEmbedding:
    """What HiBio says of n spots, in the order they were read; by modality, ``"gene"`` and ``"image"``, where there is the one or the other."""

    fused: np.ndarray
    """(n, columns)."""
    space: dict[str, np.ndarray] = field(default_factory=dict)
    """(n, width) unit vectors in the shared space."""
    anchors: dict[str, np.ndarray] = field(default_factory=dict)
    """(n, k) cosine to each anchor."""
    regions: list[np.ndarray] = field(default_factory=list)
    """(n,) region of each spot, coarse level first."""
    region_similarity: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """(n,) a level: cosine to the spot's region in the other modality, or in the same where there is one alone."""


def encode_spots(model: HiBio, spots: Spots, *, anchors: csr_matrix | None, device: torch.device) -> SpotEmbedding:
    """Embed all spots of a tissue at once.

    Parameters
    ----------
    model, spots
        Genes and image of the spots as the model knows them; one of the two may be missing.
    anchors
        (k, genes of the model) memberships.
    device
        MPS, which has no sparse matrices, is replaced by the CPU.
    """
    device = sparse_device(device)
    slide = slide_tensor(spots).to(device)
    n_spots = len(slide) / (int(slide.max()) + 1)
    with in_evaluation(model, device):
        walk = walk_tensor(spots.graph, device)
        read: dict[str, torch.Tensor] = {}
        if spots.genes:
            profile = spots.by_symbol(spots.profile, model.config.genes)
            read["gene"] = model.read_genes(sparse_tensor(profile, device), slide)
        if spots.image is not None:
            read["image"] = model.read_image(torch.from_numpy(spots.image).to(device), walk, slide)
        heads = {"gene": model.gene_head, "image": model.image_head}
        z = {name: F.normalize(heads[name](e), dim=1) for name, e in read.items()}

        if spots.genes:
            own = spatial_components(spots.profile, spots.graph, n_components=model.config.n_components)
            components = torch.from_numpy(own.scores).to(device)
        else:
            components = read["image"]
        regions = [torch.from_numpy(r).to(device) for r in find_regions(components, walk, spots, model.config)]
        main = "gene" if spots.genes else "image"
        attention = [model.attention(z[main], region, image=main == "image") for region in regions]
        patches = read.get("image") if spots.genes else None
        found = SpotEmbedding(model.fuse(components, walk, regions, attention, n_spots, patches).cpu().numpy())

        directions = None if anchors is None else model.anchors(sparse_tensor(anchors, device))
        for name, spot in z.items():
            found.space[name] = spot.cpu().numpy()
            if directions is not None:
                found.anchors[name] = (spot @ directions.T).cpu().numpy()
            other = next((k for k in z if k != name), name)
            pooled = [F.normalize(model.pool(z[other], r, image=other == "image"), dim=1)[r] for r in regions[::-1]]
            found.region_similarity[name] = [(spot * p).sum(1).cpu().numpy() for p in pooled]
        found.regions = [region.cpu().numpy() for region in regions[::-1]]
    return found


def predict_spots(
    model: HiBio, tissue: Tissue, image: np.ndarray, columns: np.ndarray, *, device: torch.device
) -> np.ndarray:
    """Predict expression (n, genes) of the model's genes at ``columns`` from features of the patches (n, f), in the order of the tissue.

    All genes of the model are in memory for a thousand spots at a time. MPS is replaced by the CPU.
    """
    device = sparse_device(device)
    out = np.empty((len(tissue.rows), len(columns)), np.float32)
    with in_evaluation(model, device):
        features = torch.from_numpy(image).to(device)
        heard = model.read_image(features, walk_tensor(tissue.graph, device), slide_tensor(tissue).to(device))
        chosen = torch.from_numpy(columns).to(device)
        for start in range(0, len(out), _ROWS):
            there = slice(start, start + _ROWS)
            # Negative values would be taken for z-scores wherever they are read.
            out[there] = model.predict(heard[there])[:, chosen].clamp(min=0).cpu().numpy()
    return out


def slide_tensor(tissue: Tissue) -> torch.Tensor:
    """Slide of each cell (n,), from 0 to the number of slides that have cells less 1."""
    return torch.from_numpy(np.unique(tissue.slide, return_inverse=True)[1])


def find_regions(components: torch.Tensor, walk: torch.Tensor, spots: Spots, config: HiBioConfig) -> list[np.ndarray]:
    """Nested contiguous regions of spots whose niches have like components (n, K): labels (n,) a level, fine level first."""
    root = (len(spots.rows) / len(np.unique(spots.slide))) ** 0.5
    values = hear(components, walk, [max(1.0, config.niche_scale * root)])[0].double().cpu().numpy()
    sizes = [max(2.0, scale * root) for scale in config.region_scales]
    labels = [np.empty(len(values), np.int64) for _ in sizes]
    start = [0] * len(sizes)
    for k in np.unique(spots.slide):
        rows = np.flatnonzero(spots.slide == k)
        found = nested_partitions(values[rows], spots.graph[rows][:, rows].astype(np.float64), sizes)
        for level, part in enumerate(found):
            labels[level][rows] = part + start[level]
            start[level] += int(part.max()) + 1
    return labels


def sparse_tensor(x: csr_matrix, device: torch.device) -> torch.Tensor:
    """Sparse matrix as a torch tensor."""
    coo = x.tocoo()
    place = torch.from_numpy(np.stack([coo.row, coo.col]).astype(np.int64))
    values = torch.from_numpy(coo.data.astype(np.float32))
    return torch.sparse_coo_tensor(place, values, x.shape, device=device, check_invariants=False).coalesce()
