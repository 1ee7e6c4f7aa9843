"""The interface between an architecture and the training loop: slides, batches and losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from spatialfm.engine import read_tissue

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import torch
    from anndata import AnnData

    from spatialfm.engine import Context, Tissue


@dataclass
class Slide:
    """A slide ready for training."""

    name: str
    state: Any
    """Result of :meth:`Recipe.prepare`."""
    train: list[Context]
    held_out: list[Context]
    facts: dict[str, Any]
    """Entries of the record: name, cells, genes, groups, and the origin from ``uns["source"]``."""
    digest: str
    """Hash of coordinates and expression."""


@dataclass(frozen=True)
class Recipe(ABC):
    """Training of one architecture. The fields of a subclass are its options.

    To add one, write a subclass in a new file and list it in ``RECIPES`` (:mod:`spatialfm.train._recipes`).

    The training loop (:mod:`spatialfm.train._loop`) cuts each slide into contexts of ``context_size`` cells
    (:func:`spatialfm.engine.cut_contexts`, with ``halo``). For each step it draws one slide, and neighbouring contexts
    of it with ``cells_per_step`` cells in all, and calls ``batch`` and ``losses``. Everything else is done by the loop:
    optimiser, schedule, validation, checkpoints, processes. Validation calls the same methods without augmentation.

    Random numbers must come from the generators that are passed, or from the global generator of torch (as in dropout
    layers). These are seeded from seed, step and process only, so that a run that was interrupted can be repeated.
    Batches are made in another thread, one step ahead.
    """

    device: torch.device
    """Device of the batches."""
    dtype: Literal["float32", "bfloat16"]
    """Type of the matrix products. Weights and optimiser stay float32."""
    config: Any = None
    """Shape of the model, if ``prepare`` needs it; the default of the architecture if None."""

    architecture: ClassVar[str]
    config_type: ClassVar[type]
    """Dataclass of the shape of the model; the recipe is found by it."""
    defaults: ClassVar[dict[str, Any]]
    """Defaults of ``context_size``, ``cells_per_step`` and ``learning_rate`` of ``pretrain``."""
    halo: ClassVar[int] = 0
    """Steps on the tissue graph by which contexts extend beyond their core."""
    from_data: ClassVar[bool] = False
    """Whether ``start`` computes weights from the slides; validation then also precedes the first step."""

    @classmethod
    def options(cls) -> list[str]:
        """Names of the options: the fields that a subclass adds."""
        return [f.name for f in fields(cls) if f.name not in {own.name for own in fields(Recipe)}]

    @property
    def stages(self) -> int:
        """Number of equal parts of a run with different losses; validation always uses the loss of the last stage."""
        return 1

    @abstractmethod
    def build(self, config: Any) -> Any:
        """Make the model to train, with its initial weights. The generator of torch is seeded."""

    def start(self, model: Any, slides: Sequence[Slide], *, seed: int) -> Any:
        """Return the model to train, after all slides are prepared. Override it to compute weights from the slides."""
        return model

    def read(self, adata: AnnData, **reading: Any) -> Tissue:
        """Read a slide; ``reading`` as for :func:`spatialfm.engine.read_tissue`."""
        return read_tissue(adata, **reading)

    @abstractmethod
    def prepare(self, tissue: Tissue) -> Any:
        """Compute what ``batch`` needs of a slide, once. It stays in memory for the whole run; keep it small."""

    @abstractmethod
    def batch(
        self, slide: Any, contexts: Sequence[Context], random: np.random.Generator, *, augment: bool = True
    ) -> Any:
        """Make a batch of contexts of a prepared slide on ``device``.

        With several ``stages``, it is also called with ``stage=``, counted from 1.
        """

    @abstractmethod
    def losses(self, model: Any, batch: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Compute scalars: ``"loss"``, which is minimised, and parts of it to log; the names must always be the same.

        ``generator`` is on the CPU. The loss must depend on every weight, because several processes share gradients.
        """


_LEAST = {
    "max_steps": 1, "context_size": 8, "cells_per_step": 8, "n_genes": 2, "warmup": 0, "validate_every": 1,
    "patience": 1, "checkpoint_every": 1, "log_every": 1, "devices": 1, "rng": 0,
}  # fmt: skip


def check_numbers(**arguments: Any) -> None:
    """Raise if an argument of :func:`spatialfm.train.pretrain`, or an option of a recipe, is out of range."""
    for name, value in arguments.items():
        whole, real = (isinstance(value, kinds) and not isinstance(value, bool) for kinds in (int, int | float))
        if name in _LEAST and not (whole and value >= _LEAST[name]) and not (name == "n_genes" and value is None):
            msg = f"{name} must be an integer of at least {_LEAST[name]}, got {value!r}"
        elif name == "mask" and not (real and 0 < value < 1):
            msg = f"mask must be between 0 and 1, got {value!r}"
        elif name == "held_out" and real and not 0 < value < 1:
            msg = f"held_out must be names of slides or a share between 0 and 1, got {value!r}"
        elif name in ("dropout", "weight_decay") and not (real and 0 <= value < 1):
            msg = f"{name} must be at least 0 and below 1, got {value!r}"
        elif name in ("learning_rate", "max_minutes") and value is not None and not (real and value > 0):
            msg = f"{name} must be a number above 0, got {value!r}"
        elif name in ("rotate", "reflect") and not isinstance(value, bool):
            msg = f"{name} must be True or False, got {value!r}"
        else:
            continue
        raise ValueError(msg)
