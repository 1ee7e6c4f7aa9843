"""What was written, as tidy tables or graphs."""

from __future__ import annotations

from spatialfm.get._keywords import keywords
from spatialfm.get._pyg import pyg

__all__ = ["keywords", "pyg"]
