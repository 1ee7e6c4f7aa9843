"""Preprocessing: tissue graphs and gene networks, written to an AnnData."""

from __future__ import annotations

from spatialfm.pp._grn import grn
from spatialfm.pp._patches import TissuePatches, patches
from spatialfm.pp._pathways import pathways
from spatialfm.pp._regions import regions
from spatialfm.pp._resolve_genes import resolve_genes
from spatialfm.pp._spatial_neighbors import spatial_neighbors
from spatialfm.pp._squidpy_builder import squidpy_builder
from spatialfm.pp._tfidf import tfidf

__all__ = [
    "TissuePatches",
    "grn",
    "patches",
    "pathways",
    "regions",
    "resolve_genes",
    "spatial_neighbors",
    "squidpy_builder",
    "tfidf",
]
