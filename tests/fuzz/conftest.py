"""Settings of the fuzzing suite: one thread, no log, no open figures."""

from __future__ import annotations

import logging

import matplotlib.pyplot as plt
import pytest
import torch

import spatialfm as sfm


@pytest.fixture(autouse=True)
def _one_thread():
    """For such small matrices, several threads are slower than one."""
    threads, level = torch.get_num_threads(), logging.getLogger("spatialfm").level
    torch.set_num_threads(1)
    with sfm.settings.override(n_jobs=1):
        logging.getLogger("spatialfm").setLevel(logging.ERROR)
        yield
    logging.getLogger("spatialfm").setLevel(level)
    torch.set_num_threads(threads)
    plt.close("all")
