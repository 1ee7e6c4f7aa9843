"""Wrong values for every argument of every function: they are accepted, or refused with the name of the argument."""

from __future__ import annotations

import pytest
from fuzzing.calls import CALLS, tissue_with, warm_up
from fuzzing.draw import LONG, SHORT, for_examples
from fuzzing.examine import examine
from fuzzing.junk import JUNK
from hypothesis import strategies as st
from test_odd_data import written_by


def check(call, argument, junk):
    value = JUNK[junk]()
    arguments = {"adata": tissue_with(*call.needs), **call.keywords(), argument: value}
    adata = arguments.pop("adata")
    ours = written_by(*call.needs) if call.needs else frozenset()
    assert examine(call, adata, arguments, named=(argument, repr(value)[:40]), ours=ours).problems == []


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("n", [SHORT, pytest.param(LONG, marks=pytest.mark.slow, id="many")])
def test_odd_argument(call, n):
    warm_up(call)
    junk = st.tuples(st.sampled_from(["adata", *call.parameters]), st.sampled_from(sorted(JUNK)))
    for_examples(lambda drawn: check(call, *drawn), junk, n=n, seed=f"arguments {call.id} {n}")
