"""The training loop: one model, many slides, one or several processes.

The random numbers of a step depend only on the seed, the step and the number of the process. The loop therefore has no
random state, and a run that was interrupted continues from its last checkpoint with the same results.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from spatialfm._settings import logger, settings

if TYPE_CHECKING:
    from pathlib import Path

    from lightning.fabric import Fabric

    from spatialfm.engine import Context
    from spatialfm.train._recipe import Recipe, Slide

CHECKPOINT = "last.ckpt"
# Number of held-out contexts per slide in a validation.
_CONTEXTS = 4


@dataclass(frozen=True)
class Plan:
    """Arguments of the training loop; see :func:`spatialfm.train.pretrain`."""

    max_steps: int
    max_minutes: float | None
    cells_per_step: int
    learning_rate: float
    weight_decay: float
    warmup: int
    validate_every: int
    patience: int
    checkpoint_every: int
    log_every: int
    rng: int


@dataclass
class Progress:
    """Progress of a run, as stored in checkpoints."""

    step: int = 0
    minutes: float = 0.0
    cells_seen: int = 0
    best: float = math.inf
    best_step: int = 0
    since_best: int = 0
    ended: bool = False
    recent: dict[str, float] = field(default_factory=dict)
    """Sums of the losses since the last validation."""
    recent_steps: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)


class _Objective(torch.nn.Module):
    """The loss as the forward pass of a module, as needed for several processes to share gradients."""

    def __init__(self, recipe: Recipe, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.losses = recipe.losses

    def forward(self, batch: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return self.losses(self.model, batch, generator)


class Run:
    """One model in training.

    Parameters
    ----------
    fabric
        A fabric that was launched; the losses are written to its loggers.
    recipe, model, slides, plan
        See the classes. The model is trained in place.
    checkpoint
        File of the checkpoints. If it exists, training continues from it. None writes no checkpoints.
    identity
        Arguments and data of the run; a checkpoint of a run with another identity is refused.
    """

    def __init__(
        self,
        fabric: Fabric,
        recipe: Recipe,
        model: torch.nn.Module,
        slides: list[Slide],
        plan: Plan,
        *,
        checkpoint: Path | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        self.fabric, self.recipe, self.model, self.slides, self.plan = fabric, recipe, model, slides, plan
        self.checkpoint, self.identity = checkpoint, identity
        self.optimizer = torch.optim.AdamW(model.parameters(), weight_decay=plan.weight_decay)
        # The same module and optimiser, wrapped for several processes.
        self.objective, self.stepper = fabric.setup(_Objective(recipe, model), self.optimizer)
        self.progress = Progress()
        self.best: dict[str, torch.Tensor] = {}
        if checkpoint is not None and checkpoint.is_file():
            state = _read_checkpoint(checkpoint, identity)
            model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.progress, self.best = Progress(**state["progress"]), state["best"]
            logger.info("continuing from step %d of %s", self.progress.step, checkpoint)
        shares = np.sqrt([slide.facts["cells"] * bool(slide.train) for slide in slides])
        self.shares = shares / shares.sum()
        self.start = time.monotonic() - 60 * self.progress.minutes

    def train(self, *, validate_first: bool = False) -> Progress:
        """Train to the end; afterwards the model has the weights of the best validation.

        ``validate_first`` also validates before the first step, so that the initial weights are kept if they are best.
        """
        from tqdm.auto import tqdm

        progress, plan, device = self.progress, self.plan, self.fabric.device
        self.model.train()
        if validate_first and not progress.curve:
            self.validate({})
        outcome = "failed"
        try:
            with (
                ThreadPoolExecutor(1) as ahead,
                torch.random.fork_rng([device] if device.type == "cuda" else []),
                tqdm(
                    total=plan.max_steps,
                    initial=progress.step,
                    desc="training",
                    unit="step",
                    leave=False,
                    disable=not settings.progress,
                ) as bar,
            ):
                upcoming = ahead.submit(self.draw_batch, progress.step + 1)
                while not progress.ended:
                    progress.step += 1
                    drawn = upcoming.result()
                    upcoming = ahead.submit(self.draw_batch, progress.step + 1)
                    progress.minutes = (time.monotonic() - self.start) / 60
                    if plan.max_minutes is not None:
                        progress.minutes = self.fabric.broadcast(progress.minutes)
                    logged = self.step(*drawn)
                    last = progress.step == plan.max_steps or progress.minutes >= (plan.max_minutes or math.inf)
                    if last or progress.step % plan.validate_every == 0:
                        means = {name: summed / progress.recent_steps for name, summed in progress.recent.items()}
                        logged["held_out_loss"] = self.validate(means)
                        progress.recent, progress.recent_steps = {}, 0
                    progress.ended = last or progress.since_best >= plan.patience
                    if "held_out_loss" in logged or progress.step % plan.log_every == 0:
                        self.fabric.log_dict(logged, step=progress.step)
                    if progress.ended or progress.step % plan.checkpoint_every == 0:
                        self.write_checkpoint()
                    bar.update()
                    best = f"{progress.best:.3f}" if progress.curve else "-"
                    bar.set_postfix(loss=f"{logged['loss']:.3f}", held_out=best, refresh=False)
            outcome = "success"
        finally:
            for log in self.fabric.loggers:
                log.finalize(outcome)
        self.model.load_state_dict(self.best)
        return progress

    def draw_slide(self, step: int, process: int) -> tuple[Slide, np.random.Generator]:
        """Draw the slide of a process in a step; also returns the generator for further random numbers."""
        random = np.random.default_rng([self.plan.rng, step, process])
        return self.slides[int(random.choice(len(self.slides), p=self.shares))], random

    def draw_batch(self, step: int) -> tuple[Any, int, int]:
        """Draw the batch of this process; also returns its number of cells and a seed for the model."""
        slide, random = self.draw_slide(step, self.fabric.global_rank)
        contexts = neighboring(slide.train, self.plan.cells_per_step, random)
        try:
            batch = self.recipe.batch(slide.state, contexts, random, **self.staged(step))
        except Exception as error:
            msg = f"slide {slide.name!r}: {error}"
            raise ValueError(msg) from error
        return batch, sum(len(c.cells) for c in contexts), int(random.integers(2**62))

    def staged(self, step: int) -> dict[str, Any]:
        """Keyword argument with the stage of a step, for recipes with several stages."""
        stages = self.recipe.stages
        return {"stage": min(stages, 1 + stages * (step - 1) // self.plan.max_steps)} if stages > 1 else {}

    def step(self, batch: Any, n_cells: int, seed: int) -> dict[str, float]:
        """Update the weights once; returns values to log, means over all processes."""
        fabric, progress = self.fabric, self.progress
        rate = _rate(self.plan, progress.step, progress.minutes)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(seed)
        parts = self.objective(batch, torch.Generator().manual_seed(seed))
        # One row for each process. All processes get all rows, so that all of them raise if one of them fails.
        table = torch.zeros(fabric.world_size, len(parts) + 1, device=fabric.device)
        table[fabric.global_rank, :-1] = torch.stack([value.detach().float() for value in parts.values()])
        table[fabric.global_rank, -1] = n_cells
        table = self.sum_over_processes(table)
        names = [self.draw_slide(progress.step, process)[0].name for process in range(fabric.world_size)]
        _stop_unless_finite(table, names, list(parts))
        self.stepper.zero_grad(set_to_none=True)
        fabric.backward(parts["loss"])
        norm = fabric.clip_gradients(self.objective, self.stepper, max_norm=1.0, error_if_nonfinite=False)
        norm = cast("torch.Tensor", norm).reshape(1, 1).cpu()
        _stop_unless_finite(norm, [" or ".join(sorted(set(names)))], ["norm of the gradient"])
        self.stepper.step()

        means = dict(zip(parts, table[:, :-1].mean(0).tolist(), strict=True))
        progress.cells_seen += int(table[:, -1].sum())
        progress.recent = {name: progress.recent.get(name, 0.0) + value for name, value in means.items()}
        progress.recent_steps += 1
        return means | {"learning_rate": rate, "gradient_norm": float(norm)}

    def validate(self, means: dict[str, float]) -> float:
        """Compute the loss of the held-out contexts, the mean over slides, with the same masks each time.

        The loss is added to the curve, together with ``means``.
        """
        validated = [slide for slide in self.slides if slide.held_out]
        stage = {"stage": self.recipe.stages} if self.recipe.stages > 1 else {}
        n_contexts = max(1, _CONTEXTS * len(self.slides) // len(validated))
        found = torch.zeros(len(validated), 1, device=self.fabric.device)
        self.model.eval()
        with torch.no_grad():
            for k, slide in enumerate(validated):
                if k % self.fabric.world_size != self.fabric.global_rank:
                    continue
                picked = np.unique(np.linspace(0, len(slide.held_out) - 1, n_contexts).round().astype(int))
                random, generator = np.random.default_rng(k), torch.Generator().manual_seed(k)
                losses = []
                for contexts in _batches([slide.held_out[i] for i in picked], self.plan.cells_per_step):
                    batch = self.recipe.batch(slide.state, contexts, random, augment=False, **stage)
                    losses.append(float(self.recipe.losses(self.model, batch, generator)["loss"]))
                found[k] = float(np.mean(losses))
        self.model.train()
        found = self.sum_over_processes(found)
        _stop_unless_finite(found, [slide.name for slide in validated], ["held-out loss"])
        value, progress = float(found.mean()), self.progress
        progress.curve.append(
            {"step": progress.step, "minutes": round(progress.minutes, 2), "held_out_loss": value} | means
        )
        # Validations count towards patience in the last stage only, whose loss is the one that is validated.
        progress.since_best += self.staged(progress.step).get("stage", 1) == self.recipe.stages
        if value < progress.best:
            progress.best, progress.best_step, progress.since_best = value, progress.step, 0
            self.best = {name: weight.detach().cpu().clone() for name, weight in self.model.state_dict().items()}
        return value

    def sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all processes, on the CPU."""
        return cast("torch.Tensor", self.fabric.all_reduce(values, reduce_op="sum")).cpu()

    def write_checkpoint(self) -> None:
        """Write a checkpoint, from the first process; the old one is kept until the new one is complete."""
        if self.checkpoint is None or self.fabric.global_rank:
            return
        for log in self.fabric.loggers:
            log.save()
        state = {
            "run": self.identity,
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
        }
        unfinished = self.checkpoint.with_suffix(".tmp")
        torch.save(state, unfinished)
        os.replace(unfinished, self.checkpoint)


def _rate(plan: Plan, step: int, minutes: float) -> float:
    """Learning rate: linear warm-up, then a cosine to 2 % over the steps or the minutes, whichever end is nearer."""
    done = max(step / plan.max_steps, 0.0 if plan.max_minutes is None else min(1.0, minutes / plan.max_minutes))
    warm = min(1.0, step / max(1, plan.warmup))
    return plan.learning_rate * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)


def _stop_unless_finite(values: torch.Tensor, slides: list[str], names: list[str]) -> None:
    """Raise if a row of ``values`` (slides, values) is not finite, naming the slide. All processes raise alike."""
    bad = (~values.isfinite()).any(1).nonzero().flatten().tolist()
    if bad:
        found = {slides[k]: dict(zip(names, values[k].tolist(), strict=False)) for k in bad}
        msg = f"slide {' and '.join(map(repr, found))}: not finite: {found}; check its values, or lower learning_rate"
        raise ValueError(msg)


def _read_checkpoint(path: Path, identity: dict[str, Any] | None) -> dict[str, Any]:
    """Read a checkpoint of the same run; no code in the file is ever run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files of another kind
            state = torch.load(path, map_location="cpu", weights_only=True)
        stored = state["run"]
    except Exception as error:  # torch raises errors of many types for damaged files
        msg = (
            f"{path} is not a checkpoint of a training run, or is damaged; "
            f"pass resume=False to start again ({type(error).__name__})"
        )
        raise ValueError(msg) from error
    if stored != identity:
        now = identity or {}
        changed = [
            f"{key}={stored.get(key)!r} became {now.get(key)!r}"
            for key in sorted({*stored, *now})
            if stored.get(key) != now.get(key)
        ]
        msg = (
            f"{path} belongs to a run with other arguments: {'; '.join(changed)}. "
            "Undo these changes to continue it, choose another out=, or pass resume=False to start again"
        )
        raise ValueError(msg)
    return state


def neighboring(contexts: list[Context], n_cells: int, random: np.random.Generator) -> list[Context]:
    """Draw consecutive contexts, which are adjacent in the tissue, with about ``n_cells`` cells in all."""
    start = int(random.integers(len(contexts)))
    chosen: list[Context] = []
    while sum(len(c.cells) for c in chosen) < n_cells and len(chosen) < len(contexts):
        chosen.append(contexts[(start + len(chosen)) % len(contexts)])
    return chosen


def _batches(contexts: list[Context], n_cells: int) -> list[list[Context]]:
    """Split contexts into batches of about ``n_cells``."""
    batches: list[list[Context]] = []
    for context in contexts:
        if not batches or sum(len(c.cells) for c in batches[-1]) >= n_cells:
            batches.append([])
        batches[-1].append(context)
    return batches
