"""Ctrl-C at any time does not change an AnnData."""

from __future__ import annotations

import warnings

import pytest
from fuzzing.calls import CALLS, tissue_with, warm_up
from fuzzing.draw import LONG, SHORT, for_examples
from fuzzing.leaves import changes, fingerprints
from fuzzing.process import interrupted_after, process_state
from hypothesis import strategies as st

WRITING = [call for call in CALLS.values() if call.writes]


@pytest.mark.parametrize("call", WRITING, ids=[call.id for call in WRITING])
@pytest.mark.parametrize("n", [SHORT, pytest.param(LONG, marks=pytest.mark.slow, id="many")])
def test_interrupted(call, n):
    warm_up(call)
    with interrupted_after(float("inf")) as counted, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call.function(tissue_with(*call.needs), **call.keywords())
    n_lines = counted[0]

    def check(share):
        adata, arguments = tissue_with(*call.needs), call.keywords()
        before, process = fingerprints(adata), process_state()
        with warnings.catch_warnings(), interrupted_after(1 + share * n_lines // 1000):
            warnings.simplefilter("ignore")
            with pytest.raises(KeyboardInterrupt):
                call.function(adata, **arguments)
        after = fingerprints(adata)
        assert [*changes(before, after), *(after.keys() - before.keys())] == []
        assert [name for name, value in process_state().items() if value != process[name]] == []

    # The last lines write the fields, one after the other.
    for_examples(check, st.integers(0, 800), n=n, seed=f"interrupted {call.id} {n}")
