"""What was written, as tidy tables (``*_df``, like those of ``scanpy.get``), AnnData or graphs."""

from __future__ import annotations

from spatialfm.get._keywords_df import keywords_df
from spatialfm.get._predicted_expression import predicted_expression
from spatialfm.get._pyg import pyg
from spatialfm.get._retrieval_recall_df import retrieval_recall_df
from spatialfm.get._retrieved_df import retrieved_df

__all__ = [
    "keywords_df",
    "predicted_expression",
    "pyg",
    "retrieval_recall_df",
    "retrieved_df",
]
