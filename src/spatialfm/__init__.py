"""Spatial-omics foundation models on AnnData.

Import as ``import spatialfm as sfm``. Imports are lazy: ``sfm.pp``, ``sfm.tl``, ``sfm.pl`` and the other modules are
loaded on first access, and torch and matplotlib only by the functions that need them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spatialfm._settings import settings

if TYPE_CHECKING:
    from spatialfm import datasets, get, models, pl, pp, tl, train

__version__ = "0.2.0.dev0"
__all__ = ["__version__", "datasets", "get", "models", "pl", "pp", "settings", "tl", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return import_module(f"spatialfm.{name}")
    msg = f"module 'spatialfm' has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return __all__
