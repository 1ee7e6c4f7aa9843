"""Settings of the examples in docstrings, which ``pytest --doctest-modules src`` runs."""

from __future__ import annotations

import matplotlib as mpl
import pytest

import spatialfm as sfm

mpl.use("Agg")


@pytest.fixture(autouse=True)
def _quiet_examples(request):
    """No progress bars or messages in an example, and no figures left open after it."""
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    import matplotlib.pyplot as plt

    with sfm.settings.override(progress=False, verbosity=0):
        yield
    plt.close("all")
