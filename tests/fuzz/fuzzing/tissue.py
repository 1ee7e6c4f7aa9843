"""A tissue of eighty cells in four samples, and small models for it."""

from __future__ import annotations

from functools import cache

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from spatialfm.models import HEIST, HEISTConfig, HiBio, HiBioConfig, ImageTower

N = 80
SAMPLES = ("s1", "s2", "s3", "s4")
# Genes of Hallmark sets.
GENES = [
    "JUNB",
    "CXCL2",
    "ATF3",
    "NFKBIA",
    "TNFAIP3",
    "PTGS2",
    "CXCL1",
    "IER3",
    "CD3D",
    "CD3E",
    "CD8A",
    "GZMB",
    "PRF1",
    "IL2RB",
    "MYC",
    "CCND1",
    "CDK4",
    "MCM2",
    "PCNA",
    "TOP2A",
    "VEGFA",
    "HK2",
    "PGK1",
    "LDHA",
]
SETS = {"one": GENES[:8], "two": GENES[8:14], "three": GENES[14:]}
PAIRS = [("CXCL1", "IL2RB"), ("CXCL2", "CD3D"), ("VEGFA", "MYC")]
N_FEATURES = 12


def make_tissue(seed: int = 0) -> ad.AnnData:
    """Counts in csr float32, with labels of cells, samples, an image for each sample, and features of patches."""
    rng = np.random.default_rng(seed)
    sample = np.repeat(np.arange(4), N // 4)
    # Numbers that float32 can represent.
    xy = np.round(rng.uniform(5, 55, (N, 2)), 1).astype(np.float32).astype(np.float64)
    side = (xy[:, 0] > 30).astype(int)
    kind = np.where(rng.random(N) < 0.2, 2, side)
    rate = np.exp(rng.normal(0, 0.8, (3, len(GENES))))[kind] * np.exp(rng.normal(0, 0.2, (N, 1)))
    counts = rng.poisson(2 * rate)
    marks = np.array(["left", "right"], dtype=object)[side]
    marks[rng.random(N) < 0.6] = np.nan
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(np.array(["T cell", "B cell", "other"])[kind]),
            "sample": pd.Categorical(np.array(SAMPLES)[sample]),
            "patient": pd.Categorical(np.array(["p1", "p2", "p3", "p4"])[sample]),
            "condition": pd.Categorical(np.array(["ill", "well"])[sample % 2]),
            "niche": pd.Categorical(np.array(["inner", "outer"])[side]),
            "marks": pd.Categorical(marks),
            "depth": counts.sum(1).astype(float),
        },
        index=[f"cell{i}" for i in range(N)],
    )
    adata = ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=obs, var=pd.DataFrame(index=list(GENES)))
    adata.obsm["spatial"] = xy
    features = np.eye(2)[side] @ rng.normal(size=(2, N_FEATURES)) + rng.normal(0, 0.3, (N, N_FEATURES))
    adata.obsm["image_features"] = features.astype(np.float32)
    adata.uns["spatial"] = {
        name: {
            "images": {"hires": rng.integers(0, 256, (60, 60, 3), dtype=np.uint8)},
            "scalefactors": {"tissue_hires_scalef": 1.0, "microns_per_pixel": 11.2},
        }
        for name in SAMPLES
    }
    return adata


@cache
def heist() -> HEIST:
    """A small model of the published architecture."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return HEIST(HEISTConfig(width=16, heads=2, layers=2, pe_dim=16)).eval()


@cache
def hibio() -> HiBio:
    """A HiBio model of the genes of the tissue, with random weights."""
    model = HiBio(HiBioConfig(genes=tuple(GENES), n_features=N_FEATURES, width=4, n_components=8, radii=(0.0, 2.0)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.dtype.is_floating_point:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
        model.confidence.fill_(0.5)
    return model.eval()


@cache
def tower() -> ImageTower:
    """A tower of one convolution."""
    from torch import nn

    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, N_FEATURES - 10, 8, stride=8), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return ImageTower(nn.Sequential(*layers), name="small", size=16, mean=[0.5] * 3, std=[0.25] * 3)
