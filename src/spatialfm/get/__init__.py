"""Results as tables (``*_df``, as in ``scanpy.get``), AnnData or graphs."""

from __future__ import annotations

from spatialfm.get._annotation_df import annotation_df
from spatialfm.get._attention_df import attention_df
from spatialfm.get._evaluation_df import evaluation_df
from spatialfm.get._imputation_df import imputation_df
from spatialfm.get._keywords_df import keywords_df
from spatialfm.get._ligand_receptor_df import ligand_receptor_df
from spatialfm.get._niche_composition_df import niche_composition_df
from spatialfm.get._outcome_df import outcome_df
from spatialfm.get._predicted_expression import predicted_expression
from spatialfm.get._pyg import pyg
from spatialfm.get._retrieval_recall_df import retrieval_recall_df
from spatialfm.get._retrieved_df import retrieved_df
from spatialfm.get._subpopulations_df import subpopulations_df

__all__ = [
    "annotation_df",
    "attention_df",
    "evaluation_df",
    "imputation_df",
    "keywords_df",
    "ligand_receptor_df",
    "niche_composition_df",
    "outcome_df",
    "predicted_expression",
    "pyg",
    "retrieval_recall_df",
    "retrieved_df",
    "subpopulations_df",
]
