"""Settings, warnings and progress bars."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import TypeVar

    T = TypeVar("T")

logger = logging.getLogger("spatialfm")

_LEVELS = {0: logging.ERROR, 1: logging.WARNING, 2: logging.INFO, 3: logging.DEBUG}


class _StderrHandler(logging.StreamHandler):
    """Write to the current ``sys.stderr``, which notebooks and tests replace."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        import sys

        return sys.stderr


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "spatialfm"


@dataclass
class Settings:
    """Package-wide settings, read at each call.

    Change them for good, ``sfm.settings.n_jobs = 4``, or in a block, ``with sfm.settings.override(progress=False):``.

    Parameters
    ----------
    device
        Device of models: ``"auto"`` (CUDA if available, else CPU), ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"mps"``.
    n_jobs
        Threads of the graph builders; the number of usable cores by default.
    verbosity
        0 only errors, 1 also warnings, 2 also what was assumed and written, 3 everything.
    progress
        Whether long computations show a progress bar.
    cache_dir
        Folder of downloaded models.
    """

    device: str = "auto"
    n_jobs: int = field(default_factory=_cores)
    verbosity: Literal[0, 1, 2, 3] = 2
    progress: bool = True
    cache_dir: Path = field(default_factory=_default_cache)

    def __setattr__(self, name: str, value: Any) -> None:
        names = [f.name for f in fields(self)]
        if name not in names:
            msg = f"settings has no {name!r}; choose from {names}"
            raise AttributeError(msg)
        if name == "n_jobs" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            msg = f"settings.n_jobs must be an integer of at least 1, got {value!r}"
            raise ValueError(msg)
        if name == "verbosity":
            if value not in _LEVELS:
                msg = f"settings.verbosity must be one of {list(_LEVELS)}, got {value!r}"
                raise ValueError(msg)
            logger.setLevel(_LEVELS[value])
        if name == "progress" and not isinstance(value, bool):
            msg = f"settings.progress must be True or False, got {value!r}"
            raise ValueError(msg)
        super().__setattr__(name, Path(value) if name == "cache_dir" else value)

    @contextmanager
    def override(self, **changes: Any) -> Iterator[Settings]:
        """Change settings inside a ``with`` block and restore them after it."""
        before = {f.name: getattr(self, f.name) for f in fields(self)}
        try:
            for name, value in changes.items():
                setattr(self, name, value)
            yield self
        finally:
            for name, value in before.items():
                setattr(self, name, value)


if not logger.handlers:
    _handler = _StderrHandler()
    _handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(_handler)
    logger.propagate = False

settings = Settings()


def warn(message: str, *args: Any) -> None:
    """Give a ``UserWarning`` that points to the user's own line, unless ``settings.verbosity`` is 0.

    ``args`` are inserted into ``message`` as by a logger.
    """
    import sys
    import warnings

    if settings.verbosity < 1:
        return
    frame, depth = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "spatialfm":
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message % args if args else message, UserWarning, stacklevel=depth)


def progress(iterable: Iterable[T], *, desc: str, total: int | None = None, unit: str = "it") -> Iterable[T]:
    """Wrap ``iterable`` in a progress bar unless ``settings.progress`` is off."""
    from tqdm.auto import tqdm

    return tqdm(iterable, desc=desc, total=total, unit=unit, disable=not settings.progress, leave=False)
