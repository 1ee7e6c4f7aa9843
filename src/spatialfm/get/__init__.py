"""What was written, as tidy tables or graphs."""

from __future__ import annotations

from spatialfm.get._keywords import keywords
from spatialfm.get._predicted_expression import predicted_expression
from spatialfm.get._pyg import pyg
from spatialfm.get._retrieval_recall import retrieval_recall
from spatialfm.get._retrieved import retrieved

__all__ = ["keywords", "predicted_expression", "pyg", "retrieval_recall", "retrieved"]
