"""Every function on odd data: results are finite and can be saved, or an error is raised and nothing is changed."""

from __future__ import annotations

from functools import cache

import pytest
from fuzzing.calls import CALLS, tissue_with, warm_up
from fuzzing.draw import LONG, SHORT, for_examples
from fuzzing.examine import examine
from fuzzing.leaves import field_of, fingerprints
from fuzzing.oddities import NOT_FINITE, ODD, SAME, apply
from hypothesis import strategies as st

ODDITIES = st.tuples(
    st.lists(st.sampled_from(sorted({**SAME, **ODD})), min_size=1, max_size=2, unique=True),
    st.sampled_from(["", "h5ad", "zarr"]),
)


@cache
def written_by(*names: str) -> frozenset[str]:
    """Fields that these calls write."""
    return frozenset(map(field_of, fingerprints(tissue_with(*names)).keys() - fingerprints(tissue_with()).keys()))


def check(call, oddities, round_trip):
    adata = apply(tissue_with(*call.needs), oddities)
    ours = written_by(*call.needs) if call.needs else frozenset()
    finite = not NOT_FINITE.intersection(oddities)
    found = examine(call, adata, call.keywords(), ours=ours, finite=finite, round_trip=round_trip)
    assert found.problems == []


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("n", [SHORT, pytest.param(LONG, marks=pytest.mark.slow, id="many")])
def test_odd_data(call, n):
    warm_up(call)
    for_examples(lambda drawn: check(call, *drawn), ODDITIES, n=n, seed=f"data {call.id} {n}")
