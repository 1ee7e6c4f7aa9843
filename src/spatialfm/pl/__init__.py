"""Plots of data and results in an AnnData; every function returns matplotlib axes."""

from __future__ import annotations

from spatialfm.pl._annotation import annotation
from spatialfm.pl._attention import attention
from spatialfm.pl._embedding_blocks import embedding_blocks
from spatialfm.pl._evaluation import evaluation
from spatialfm.pl._grn import grn
from spatialfm.pl._imputation import imputation
from spatialfm.pl._keywords import keywords
from spatialfm.pl._ligand_receptor import ligand_receptor
from spatialfm.pl._loss_curve import loss_curve
from spatialfm.pl._niche_composition import niche_composition
from spatialfm.pl._outcome import outcome
from spatialfm.pl._patches import patches
from spatialfm.pl._pathways import pathways
from spatialfm.pl._predicted_expression import predicted_expression
from spatialfm.pl._retrieval import retrieval
from spatialfm.pl._spatial import spatial
from spatialfm.pl._subpopulations import subpopulations

__all__ = [
    "annotation",
    "attention",
    "embedding_blocks",
    "evaluation",
    "grn",
    "imputation",
    "keywords",
    "ligand_receptor",
    "loss_curve",
    "niche_composition",
    "outcome",
    "patches",
    "pathways",
    "predicted_expression",
    "retrieval",
    "spatial",
    "subpopulations",
]
