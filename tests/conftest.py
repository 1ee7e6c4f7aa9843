"""Fixtures shared by all tests."""

from __future__ import annotations

import matplotlib as mpl
import pytest

import spatialfm as sfm

mpl.use("Agg")


@pytest.fixture(autouse=True)
def _quiet():
    with sfm.settings.override(progress=False):
        yield
