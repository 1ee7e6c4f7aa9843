"""Lightning, asked to speak only when spoken to."""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from spatialfm._settings import settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.fabric import Fabric


def check_lightning() -> None:
    """Raise where Lightning is not installed, naming what to install."""
    from importlib.util import find_spec

    if find_spec("lightning") is None:
        msg = 'training needs Lightning: pip install "spatialfm[train]"'
        raise ImportError(msg)


@contextmanager
def open_fabric(**arguments: Any) -> Iterator[Fabric]:
    """Launch the processes of a ``lightning.fabric.Fabric``; inside, Lightning logs warnings only, and only the first process says anything."""
    check_lightning()
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy, SingleDeviceStrategy

    # Which of the two Lightning writes to depends on what was imported.
    logs = [logging.getLogger(f"lightning.{part}") for part in ("fabric", "pytorch")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # srun is available, devices could be more, ...: this run is as it was asked for.
            warnings.filterwarnings("ignore", category=UserWarning, module=r"lightning[.]")
            fabric = Fabric(**arguments)
            if not isinstance(fabric.strategy, DDPStrategy | SingleDeviceStrategy):
                msg = f"strategy={arguments.get('strategy')!r} is not supported; choose 'auto', 'ddp' or another form of 'ddp'"
                raise ValueError(msg)
            fabric.launch()
        with settings.override(**({"progress": False, "verbosity": 1} if fabric.global_rank else {})):
            yield fabric
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
