"""State of the process, which calls must not change."""

from __future__ import annotations

import os
import random
import signal
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from threadpoolctl import threadpool_info

import spatialfm as sfm

if TYPE_CHECKING:
    from collections.abc import Iterator


def process_state() -> dict[str, Any]:
    """State of the process that belongs to the user."""
    state = np.random.get_state()  # noqa: NPY002 (it is the user's)
    return {
        "random.getstate()": random.getstate(),
        "numpy.random.get_state()": (state[0], state[1].tobytes(), *state[2:]),
        "torch.get_rng_state()": torch.get_rng_state().numpy().tobytes(),
        "torch.get_num_threads()": torch.get_num_threads(),
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "torch.get_default_dtype()": torch.get_default_dtype(),
        "deterministic algorithms of torch": torch.are_deterministic_algorithms_enabled(),
        "threads of BLAS": [(pool["filepath"], pool["num_threads"]) for pool in threadpool_info()],
        "numpy.geterr()": np.geterr(),
        "warnings.filters": list(warnings.filters),
        "matplotlib.rcParams": {key: repr(value) for key, value in mpl.rcParams.items()},
        "open figures": plt.get_fignums(),
        "os.environ": dict(os.environ),
        "os.getcwd()": Path.cwd(),
        "spatialfm.settings": repr(sfm.settings),
        "sys.gettrace()": sys.gettrace(),
    }


class TooLong(BaseException):
    """Raised at a time limit. Not an Exception, so that no ``except Exception`` catches it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`TooLong` after some seconds of CPU time; no effect on Windows, which has no such timer."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def interrupted_after(n_lines: float) -> Iterator[list[int]]:
    """Raise KeyboardInterrupt before the ``n_lines``-th executed line of spatialfm; yields the number of lines."""
    package = str(Path(sfm.__file__).parent)
    counted = [0]

    def line(frame: Any, event: str, _: Any) -> Any:
        if event == "line":
            counted[0] += 1
            if counted[0] == n_lines:
                raise KeyboardInterrupt
        return line

    def call(frame: Any, event: str, _: Any) -> Any:
        return line if frame.f_code.co_filename.startswith(package) else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield counted
    finally:
        sys.settrace(before)
