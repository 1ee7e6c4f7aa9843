"""Contexts: a partition into compact pieces, independent of row order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.spatial import cKDTree

from spatialfm.engine import cut_contexts


def graph_of(xy, slide):
    """Graph of the four nearest cells of the same slide."""
    a = np.zeros((len(xy), len(xy)), np.float32)
    for s in np.unique(slide):
        rows = np.flatnonzero(slide == s)
        k = min(5, len(rows))
        if k > 1:
            near = cKDTree(xy[rows]).query(xy[rows], k=k)[1]
            for i, js in zip(rows, rows[near], strict=True):
                a[i, js] = a[js, i] = 1
    np.fill_diagonal(a, 0)
    return csr_matrix(a)


@given(n=st.integers(1, 150), size=st.integers(1, 60), n_slides=st.integers(1, 3), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_cores_partition_and_halos_are_neighbours(n, size, n_slides, seed):
    rng = np.random.default_rng(seed)
    xy, slide = rng.random((n, 2)), np.sort(rng.integers(n_slides, size=n))
    graph = graph_of(xy, slide)
    contexts = cut_contexts(xy, graph, slide, context_size=size)
    cores = np.concatenate([c.cells[c.is_core] for c in contexts])
    assert sorted(cores) == list(range(n))
    for c in contexts:
        core = c.cells[c.is_core]
        assert len(core) <= size
        assert len(np.unique(slide[c.cells])) == 1
        expected = set(core) | set(graph[core].indices)
        assert list(c.cells) == sorted(expected)
    for s in np.unique(slide):
        sizes = [c.is_core.sum() for c in contexts if slide[c.cells[0]] == s]
        assert len(sizes) == -(-int((slide == s).sum()) // size)
        assert max(sizes) - min(sizes) <= max(1, max(sizes) // 2)


@pytest.mark.parametrize("halo", [0, 1, 2, 3])
def test_halo_extends_by_the_given_steps(halo):
    xy = np.column_stack([np.arange(30.0), np.zeros(30)])
    graph = csr_matrix(np.diag(np.ones(29), 1) + np.diag(np.ones(29), -1))
    contexts = cut_contexts(xy, graph, np.zeros(30, int), context_size=10, halo=halo)
    middle = next(c for c in contexts if 15 in c.cells[c.is_core])
    assert middle.cells.min() == middle.cells[middle.is_core].min() - halo


def test_pieces_are_compact():
    rng = np.random.default_rng(0)
    xy = rng.random((4000, 2)) * [4, 1]
    contexts = cut_contexts(xy, csr_matrix((4000, 4000)), np.zeros(4000, int), context_size=250)
    assert len(contexts) == 16
    for c in contexts:
        assert np.ptp(xy[c.cells], axis=0).max() < 3 * np.sqrt(4 / 16)


def test_row_order_does_not_matter():
    rng = np.random.default_rng(1)
    xy = rng.random((500, 2))
    order = rng.permutation(500)
    slide = np.zeros(500, int)
    empty = csr_matrix((500, 500))
    expected = {frozenset(c.cells) for c in cut_contexts(xy, empty, slide, context_size=64)}
    found = {frozenset(order[c.cells]) for c in cut_contexts(xy[order], empty, slide, context_size=64)}
    assert found == expected


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "many"])
def test_context_size_is_checked(size):
    with pytest.raises(ValueError, match="context_size must be a positive integer"):
        cut_contexts(np.zeros((3, 2)), csr_matrix((3, 3)), np.zeros(3, int), context_size=size)
