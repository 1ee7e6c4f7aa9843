"""Communities and the numbers of clusters."""

from __future__ import annotations

import random

import numpy as np

from spatialfm._data._leiden import leiden, neighbor_graph, number_by_size


def test_numbers_by_size():
    np.testing.assert_array_equal(number_by_size(np.array([7, 3, 3, 9, 9])), [2, 0, 0, 1, 1])
    np.testing.assert_array_equal(number_by_size(np.array([5])), [0])


def test_two_blobs_are_two_communities():
    rng = np.random.default_rng(0)
    blob = np.repeat([0, 1], [60, 40])
    before = random.getstate()
    found = number_by_size(
        leiden(neighbor_graph(rng.normal(size=(100, 3)) + 20 * blob[:, None]), resolution=0.1, seed=0)
    )
    np.testing.assert_array_equal(found, blob)
    assert random.getstate() == before
