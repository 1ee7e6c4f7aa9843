"""Drawing of examples: the same in every run, but different for each call."""

from __future__ import annotations

import os
import zlib
from typing import TYPE_CHECKING, Any

import hypothesis
from hypothesis import HealthCheck, Phase, given

if TYPE_CHECKING:
    from collections.abc import Callable

    from hypothesis.strategies import SearchStrategy

# Examples of each call: few in the normal run, many in the slow run.
SHORT, LONG = 3, int(os.environ.get("FUZZ_EXAMPLES", "20"))


def for_examples(check: Callable[[Any], None], strategy: SearchStrategy[Any], *, n: int, seed: str) -> None:
    """Call ``check`` with ``n`` examples of a strategy that depend only on ``seed``; a failure names its example."""
    settings = hypothesis.settings(
        max_examples=n,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    hypothesis.seed(zlib.crc32(seed.encode()))(settings(given(strategy)(check)))()
