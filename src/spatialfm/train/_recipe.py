"""What an architecture brings to the training loop: how a slide is prepared, what a batch is, and what is minimised."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

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
    """What the recipe prepared."""
    train: list[Context]
    held_out: list[Context]
    facts: dict[str, Any]
    """For the record: name, cells, genes, groups, and what ``uns["source"]`` says of its origin."""
    digest: str
    """Of coordinates and expression."""


@dataclass(frozen=True)
class Recipe(ABC):
    """One architecture as the loop (:mod:`spatialfm.train._loop`) sees it. The fields of a subclass are its options.

    To add one, subclass this in a file of its own and list it in ``RECIPES`` (:mod:`spatialfm.train._recipes`).

    The loop cuts each slide into contexts of ``context_size`` cells (:func:`spatialfm.engine.cut_contexts`, with ``halo``), draws one slide
    a step and neighbouring contexts of it until they hold ``cells_per_step`` cells, and calls, for each step, ``batch`` and ``losses``; it
    owns everything else: optimiser, schedule, validation, checkpoints, processes. Validation calls the same two without augmentation.

    What a step draws must come from the two generators it is given and torch's global one (as in dropout layers), which are seeded from
    seed, step and process alone: that is what makes a killed run repeat itself. Batches are made in another thread, one step ahead.
    """

    device: torch.device
    """Where batches go."""
    dtype: str
    """``"float32"`` or ``"bfloat16"``: type of the matrix products. Weights and optimiser stay float32."""
    config: Any = None
    """Shape of the model, for what ``prepare`` has to know of it; the architecture's own where None."""

    architecture: ClassVar[str]
    config_type: ClassVar[type]
    """Dataclass of the architecture's shape, which tells whose recipe it is."""
    defaults: ClassVar[dict[str, Any]]
    """What ``pretrain`` takes for ``context_size``, ``cells_per_step`` and ``learning_rate`` where they are None."""
    halo: ClassVar[int] = 0
    """Steps on the tissue graph that contexts reach beyond their core."""
    from_data: ClassVar[bool] = False
    """Whether ``start`` finds weights in the slides: validation then also happens before the first step."""

    @classmethod
    def options(cls) -> list[str]:
        """Names of the options: the fields that a subclass adds."""
        return [f.name for f in fields(cls) if f.name not in {own.name for own in fields(Recipe)}]

    @property
    def stages(self) -> int:
        """Equal parts of a run, of which each minimises something else; validation always asks for what the last one does."""
        return 1

    @abstractmethod
    def build(self, config: Any) -> Any:
        """Make the model to train, with the weights it starts from; torch is seeded."""

    def start(self, model: Any, slides: Sequence[Slide], *, seed: int) -> Any:
        """Model to train, once all slides are prepared: for weights that are found in the slides before the first step."""
        return model

    def read(self, adata: AnnData, **reading: Any) -> Tissue:
        """Read a slide; ``reading`` as for :func:`spatialfm.engine.read_tissue`."""
        return read_tissue(adata, **reading)

    @abstractmethod
    def prepare(self, tissue: Tissue) -> Any:
        """Whatever ``batch`` needs of a slide, computed once. It stays in memory for the whole run: keep no more than that."""

    @abstractmethod
    def batch(
        self, slide: Any, contexts: Sequence[Context], random: np.random.Generator, *, augment: bool = True
    ) -> Any:
        """Contexts of a prepared slide as tensors on ``device``. Where there are several ``stages``, it gets ``stage=`` from 1 on too."""

    @abstractmethod
    def losses(self, model: Any, batch: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Scalars: ``"loss"``, which is minimised, and the parts of it worth logging; the same names each time.

        ``generator`` is on the CPU. Every weight must play a part in the loss, which several processes rely on.
        """


_LEAST = {
    "max_steps": 1, "context_size": 8, "cells_per_step": 8, "n_genes": 2, "warmup": 0, "validate_every": 1, "patience": 1,
    "checkpoint_every": 1, "log_every": 1, "devices": 1, "rng": 0,
}  # fmt: skip


def check_numbers(**arguments: Any) -> None:
    """Raise where an argument of :func:`spatialfm.train.pretrain`, or an option of a recipe, is out of range."""
    for name, value in arguments.items():
        whole, real = (isinstance(value, kinds) and not isinstance(value, bool) for kinds in (int, int | float))
        if name in _LEAST and not (whole and value >= _LEAST[name]) and not (name == "n_genes" and value is None):
            msg = f"{name} must be an integer of at least {_LEAST[name]}, got {value!r}"
        elif name == "mask" and not (real and 0 < value < 1):
            msg = f"mask must lie between 0 and 1, got {value!r}"
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
