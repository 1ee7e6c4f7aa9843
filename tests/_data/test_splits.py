from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import GroupKFold

from spatialfm._data._splits import group_folds, spatial_blocks


def test_blocks_hold_equally_many_cells_and_one_slide():
    rng = np.random.default_rng(0)
    xy, slide = rng.exponential(size=(7200, 2)), np.repeat([0, 1], 3600)
    blocks = spatial_blocks(xy, slide)
    assert not set(blocks[:3600]) & set(blocks[3600:])
    strip = blocks // 6
    assert set(np.bincount(strip)) <= {599, 600, 601}
    for block in np.unique(blocks):
        inside = xy[blocks == block]
        low, high = inside.min(axis=0), inside.max(axis=0)
        # Nobody else of the slide lies inside a block's rectangle.
        within = ((xy >= low) & (xy <= high)).all(axis=1) & (slide == slide[blocks == block][0])
        assert (blocks[within] == block).all()


def test_blocks_do_not_depend_on_the_order():
    rng = np.random.default_rng(0)
    xy, slide, order = rng.integers(0, 9, size=(500, 2)).astype(float), rng.integers(0, 2, 500), rng.permutation(500)
    np.testing.assert_array_equal(spatial_blocks(xy, slide)[order], spatial_blocks(xy[order], slide[order]))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 8), min_size=12, max_size=60).filter(lambda g: len(set(g)) >= 3), st.integers(2, 3))
def test_folds_keep_groups_and_balance(groups, n_folds):
    groups = np.array(groups)
    folds = group_folds(groups, n_folds)
    assert set(folds) == set(range(n_folds))
    assert all(len(set(folds[groups == g])) == 1 for g in np.unique(groups))
    # Oracle: the same greedy rule in scikit-learn gives folds of the same sizes.
    theirs = [len(test) for _, test in GroupKFold(n_folds).split(groups, groups=groups)]
    assert sorted(np.bincount(folds)) == sorted(theirs)
    order = np.random.default_rng(0).permutation(len(groups))
    np.testing.assert_array_equal(folds[order], group_folds(groups[order], n_folds))


def test_too_few_groups():
    with pytest.raises(ValueError, match="at most the 2 groups"):
        group_folds(np.array([0, 1, 1]), 3)
