"""Checks of arguments; every message names the value and the fix."""

from __future__ import annotations

from typing import Any

import numpy as np

from spatialfm._settings import settings


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        msg = f"{name}={value!r} is not known; choose from {list(choices)}"
        raise ValueError(msg)


def check_positive(name: str, value: Any, *, optional: bool = False) -> None:
    """Raise unless ``value`` is an integer of at least 1, or None where it is optional."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        msg = f"{name} must be a positive integer{' or None' if optional else ''}, got {value!r}"
        raise ValueError(msg)


def check_n_jobs(n_jobs: int | None) -> int:
    """Resolve a number of threads: ``settings.n_jobs`` where None, all cores where -1."""
    if n_jobs is None:
        return settings.n_jobs
    if n_jobs == -1:
        from spatialfm._settings import _cores

        return _cores()
    if isinstance(n_jobs, bool) or not isinstance(n_jobs, int | np.integer) or n_jobs < 1:
        msg = f"n_jobs must be a positive integer, -1 (all cores) or None (settings.n_jobs), got {n_jobs!r}"
        raise ValueError(msg)
    return int(n_jobs)
