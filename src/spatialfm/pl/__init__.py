"""Plots of what stands in an AnnData; every function returns matplotlib axes."""

from __future__ import annotations

from spatialfm.pl._embedding_blocks import embedding_blocks
from spatialfm.pl._grn import grn
from spatialfm.pl._keywords import keywords
from spatialfm.pl._loss_curve import loss_curve
from spatialfm.pl._patches import patches
from spatialfm.pl._pathways import pathways
from spatialfm.pl._predicted_expression import predicted_expression
from spatialfm.pl._retrieval import retrieval
from spatialfm.pl._spatial import spatial
from spatialfm.pl._subpopulations import subpopulations

__all__ = [
    "embedding_blocks",
    "grn",
    "keywords",
    "loss_curve",
    "patches",
    "pathways",
    "predicted_expression",
    "retrieval",
    "spatial",
    "subpopulations",
]
