"""Processes and devices of Lightning, without its messages."""

from __future__ import annotations

import logging
import sys
import warnings
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from spatialfm._checks import check_choice
from spatialfm._settings import settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from lightning.fabric import Fabric


def check_lightning() -> None:
    """Raise if Lightning is not installed."""
    if find_spec("lightning") is None:
        msg = 'training needs Lightning: pip install "spatialfm[train]"'
        raise ImportError(msg)


@contextmanager
def open_fabric(
    device: torch.device, *, devices: int = 1, strategy: str = "auto", loggers: Any = None, alone: bool = False
) -> Iterator[Fabric]:
    """Launch ``devices`` processes. Only the first of them logs, and Lightning only logs warnings.

    ``alone`` starts one process whatever the environment: a notebook in a SLURM job is not part of a larger run.
    """
    check_lightning()
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import LightningEnvironment

    check_choice("strategy", strategy, ("auto", "ddp", "ddp_find_unused_parameters_true"))
    if devices > 1 and hasattr(sys, "ps1"):
        msg = (
            f"devices={devices} cannot start from a notebook or prompt; "
            "put the call into a script, or use python -m spatialfm.train"
        )
        raise ValueError(msg)
    # The logger that Lightning uses depends on what was imported.
    logs = [logging.getLogger(f"lightning.{part}") for part in ("fabric", "pytorch")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Hints about unused devices, srun etc.; the arguments of this run are intended.
            warnings.filterwarnings("ignore", category=UserWarning, module=r"lightning[.]")
            fabric = Fabric(
                accelerator=device.type,
                devices=devices if device.index is None else [device.index],
                strategy=strategy,
                loggers=loggers,
                plugins=[LightningEnvironment()] if alone else None,
            )
            fabric.launch()
        share = {"n_jobs": max(1, settings.n_jobs // fabric.world_size)}
        with settings.override(**share, **({"progress": False, "verbosity": 1} if fabric.global_rank else {})):
            yield fabric
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
