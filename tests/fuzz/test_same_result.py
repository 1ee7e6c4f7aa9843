"""Layout, order, threads and batches do not change results."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from fuzzing.calls import CALLS, tissue_with
from fuzzing.draw import LONG, SHORT, for_examples
from fuzzing.oddities import ODD, SAME, apply
from fuzzing.same import in_order, results, unlike
from hypothesis import strategies as st

import spatialfm as sfm

READING = [call for call in CALLS.values() if not call.name.startswith("pl.")]
# Their results have one row for each cell.
WRITING = [call for call in CALLS.values() if call.writes or call.name == "tl.outcome"]
# Data with many ties and few neighbours.
HARD = [
    name
    for name in ODD
    if name.startswith(("values", "one value", "coordinates on", "embeddings", "a cell", "a gene", "7 ", "cells of"))
]
MANY = pytest.param(LONG, marks=pytest.mark.slow, id="many")


@cache
def plain(call):
    return results(call, tissue_with(*call.needs), call.keywords())


@pytest.mark.parametrize("call", READING, ids=[call.id for call in READING])
@pytest.mark.parametrize("n", [SHORT, MANY])
def test_layout(call, n):
    def check(name):
        adata = apply(tissue_with(*call.needs), [name])
        assert unlike(plain(call), results(call, adata, call.keywords())) == []

    for_examples(check, st.sampled_from(sorted(SAME)), n=n, seed=f"layout {call.id} {n}")


def outcome(call, adata):
    """Results, or the type of the error."""
    try:
        return results(call, adata, call.keywords())
    except (ValueError, KeyError) as error:
        return {"error": type(error).__name__}


@pytest.mark.parametrize("call", WRITING, ids=[call.id for call in WRITING])
@pytest.mark.parametrize("n", [1, MANY])
def test_order_of_rows(call, n):
    def check(name, seed):
        adata = apply(tissue_with(*call.needs), [name] if name else [])
        order = np.random.default_rng(seed).permutation(adata.n_obs)
        other = outcome(call, adata[order].copy())
        assert unlike(outcome(call, adata), in_order(other, order)) == []

    check("", 0)
    # With several cells at the same coordinates, the nearest neighbours depend on the order.
    hard = [name for name in HARD if not (call.variant == "knn" and name.startswith("coordinates on"))]
    drawn = st.tuples(st.sampled_from(hard), st.integers(0, 99))
    for_examples(lambda drawn: check(*drawn), drawn, n=n, seed=f"rows {call.id} {n}")


@pytest.mark.parametrize("call", WRITING, ids=[call.id for call in WRITING])
def test_threads_and_batches(call):
    others = [{name: value} for name, value in (("n_jobs", 2), ("batch_size", 7)) if name in call.parameters]
    for changed in others:
        found = results(call, tissue_with(*call.needs), {**call.keywords(), **changed})
        assert unlike(plain(call), found) == [], changed
    torch.set_num_threads(2)
    with sfm.settings.override(n_jobs=2):
        assert unlike(plain(call), results(call, tissue_with(*call.needs), call.keywords())) == []


@pytest.mark.parametrize("call", WRITING, ids=[call.id for call in WRITING])
def test_order_of_slides(call):
    """Slides that were concatenated in another order; results for each slide are in the order of the slides."""
    other = tissue_with(*call.needs)
    other.obs["sample"] = other.obs["sample"].cat.reorder_categories(["s3", "s1", "s4", "s2"])
    of_cells = ("obs >", "obsm", "obsp", "layers", "returned > X")
    found = results(call, other, call.keywords())
    both = [{k: v for k, v in some.items() if k.startswith(of_cells)} for some in (plain(call), found)]
    assert unlike(*both) == []
