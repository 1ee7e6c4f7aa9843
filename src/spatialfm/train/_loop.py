"""The training loop: one model, many slides, one or several processes.

What step t draws follows from the seed, t, and the number of the process alone. So a run that was killed goes on from its last checkpoint
as if nothing had happened, and the loop below holds no random state.
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
    from spatialfm.train._recipes import Recipe
    from spatialfm.train._slides import Slide

CHECKPOINT = "last.ckpt"
# Held-out contexts of a look, a slide.
_LOOK = 4


@dataclass(frozen=True)
class Plan:
    """How long and how to train; see :func:`spatialfm.train.pretrain`."""

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
    """Where a run stands; all of it goes into checkpoints."""

    step: int = 0
    minutes: float = 0.0
    cells_seen: int = 0
    best: float = math.inf
    best_step: int = 0
    since_best: int = 0
    ended: bool = False
    recent: dict[str, float] = field(default_factory=dict)
    """Sums of the losses since the last look."""
    recent_steps: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)


class _Objective(torch.nn.Module):
    """Loss of a batch as a module's forward pass, which is where several processes share gradients."""

    def __init__(self, recipe: Recipe, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.losses = recipe.losses

    def forward(self, batch: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return self.losses(self.model, batch, generator)


def train(
    fabric: Fabric,
    recipe: Recipe,
    model: torch.nn.Module,
    slides: list[Slide],
    plan: Plan,
    *,
    checkpoint: Path | None = None,
    run: dict[str, Any] | None = None,
    look_first: bool = False,
) -> Progress:
    """Train ``model`` in place; it ends with the weights of the best look.

    Parameters
    ----------
    fabric
        Launched; its loggers get the losses.
    recipe, model, slides, plan
        See the classes.
    checkpoint
        File of the checkpoints; where it exists, training goes on from it. None writes nothing.
    run
        What tells this run from others: a checkpoint of another one is refused.
    look_first
        Whether to look before the first step, so that weights which were better before are kept.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay)
    objective, stepper = fabric.setup(_Objective(recipe, model), optimizer)
    at = Progress()
    best: dict[str, torch.Tensor] | None = None
    if checkpoint is not None and checkpoint.is_file():
        state = _read_checkpoint(checkpoint, run)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        at, best = Progress(**state["progress"]), state["best"]
        logger.info("going on from step %d of %s", at.step, checkpoint)

    shares = np.sqrt([slide.facts["cells"] * bool(slide.train) for slide in slides])
    shares /= shares.sum()

    def total(values: torch.Tensor) -> torch.Tensor:
        """Sum over the processes."""
        return cast("torch.Tensor", fabric.all_reduce(values, reduce_op="sum")).cpu()

    def draw(step: int, rank: int) -> tuple[np.random.Generator, Slide]:
        random = np.random.default_rng([plan.rng, step, rank])
        return random, slides[int(random.choice(len(slides), p=shares))]

    def make(step: int) -> tuple[Any, int, int]:
        """Batch of this process, its number of cells, and a seed."""
        random, slide = draw(step, fabric.global_rank)
        contexts = _neighboring(slide.train, plan.cells_per_step, random)
        try:
            batch = recipe.batch(slide.state, contexts, random)
        except Exception as error:
            msg = f"slide {slide.name!r}: {error}"
            raise ValueError(msg) from error
        return batch, sum(len(c.cells) for c in contexts), int(random.integers(2**62))

    def look() -> float:
        """Mean loss over the slides' held-out contexts, under the same masks each time."""
        model.eval()
        watched = [slide for slide in slides if slide.held_out]
        n_contexts = max(1, _LOOK * len(slides) // len(watched))
        found = torch.zeros(len(watched), dtype=torch.float64)
        with torch.no_grad():
            for k, slide in enumerate(watched):
                if k % fabric.world_size != fabric.global_rank:
                    continue
                picked = np.unique(np.linspace(0, len(slide.held_out) - 1, n_contexts).round().astype(int))
                random, generator = np.random.default_rng(k), torch.Generator().manual_seed(k)
                losses = []
                for contexts in _batches([slide.held_out[i] for i in picked], plan.cells_per_step):
                    batch = recipe.batch(slide.state, contexts, random, augment=False)
                    losses.append(float(recipe.losses(model, batch, generator)["loss"]))
                found[k] = float(np.mean(losses))
        found = total(found)
        model.train()
        _stop_unless_finite(found[:, None], [slide.name for slide in watched], ["held-out loss"])
        return float(found.mean())

    def write() -> None:
        if checkpoint is None or fabric.global_rank:
            return
        for log in fabric.loggers:
            log.save()
        at_now = asdict(at) | {"minutes": clock()}
        state = {
            "run": run, "progress": at_now, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "best": best
        }  # fmt: skip
        unfinished = checkpoint.with_suffix(".tmp")
        torch.save(state, unfinished)
        os.replace(unfinished, checkpoint)

    before, start = at.minutes, time.monotonic()

    def clock() -> float:
        return before + (time.monotonic() - start) / 60

    def note_look(value: float, minutes: float, means: dict[str, float]) -> None:
        nonlocal best
        at.curve.append({"step": at.step, "minutes": round(minutes, 2), "held_out_loss": value} | means)
        at.since_best += 1
        if value < at.best:
            at.best, at.best_step, at.since_best = value, at.step, 0
            best = {name: v.detach().cpu().clone() for name, v in model.state_dict().items()}

    model.train()
    if look_first and not at.curve:
        note_look(look(), 0.0, {})
    from tqdm.auto import tqdm

    finished = "failed"
    try:
        with (
            ThreadPoolExecutor(1) as ahead,
            torch.random.fork_rng([fabric.device] if fabric.device.type == "cuda" else []),
            tqdm(
                total=plan.max_steps,
                initial=at.step,
                desc="training",
                unit="step",
                leave=False,
                disable=not settings.progress,
            ) as bar,
        ):
            coming = ahead.submit(make, at.step + 1)
            while not at.ended:
                at.step += 1
                batch, n_cells, seed = coming.result()
                coming = ahead.submit(make, at.step + 1)
                minutes = clock() if plan.max_minutes is None else float(fabric.broadcast(clock()))
                rate = _rate(plan, at.step, minutes)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                torch.manual_seed(seed)
                parts = objective(batch, torch.Generator().manual_seed(seed))
                everyone = torch.zeros(fabric.world_size, len(parts) + 1, dtype=torch.float64, device=fabric.device)
                everyone[fabric.global_rank, :-1] = torch.stack([v.detach() for v in parts.values()])
                everyone[fabric.global_rank, -1] = n_cells
                everyone = total(everyone)
                names = [draw(at.step, rank)[1].name for rank in range(fabric.world_size)]
                _stop_unless_finite(everyone, names, list(parts))
                stepper.zero_grad(set_to_none=True)
                fabric.backward(parts["loss"])
                clipped = fabric.clip_gradients(objective, stepper, max_norm=1.0, error_if_nonfinite=False)
                norm = cast("torch.Tensor", clipped).reshape(1, 1).cpu()
                _stop_unless_finite(norm, [" or ".join(sorted(set(names)))], ["norm of the gradient"])
                stepper.step()

                means = dict(zip(parts, everyone[:, :-1].mean(0).tolist(), strict=True))
                at.cells_seen += int(everyone[:, -1].sum())
                at.recent = {name: at.recent.get(name, 0.0) + value for name, value in means.items()}
                at.recent_steps += 1
                last = at.step == plan.max_steps or (plan.max_minutes is not None and minutes >= plan.max_minutes)
                logged = means | {"learning_rate": rate, "gradient_norm": float(norm)}
                looked = at.step % plan.validate_every == 0 or last
                if looked:
                    logged["held_out_loss"] = look()
                    since = {name: summed / at.recent_steps for name, summed in at.recent.items()}
                    note_look(logged["held_out_loss"], minutes, since)
                    at.recent, at.recent_steps = {}, 0
                at.ended = last or at.since_best >= plan.patience
                if looked or at.step % plan.log_every == 0:
                    fabric.log_dict(logged, step=at.step)
                if at.ended or at.step % plan.checkpoint_every == 0:
                    write()
                bar.update()
                bar.set_postfix(loss=f"{means['loss']:.3f}", held_out=f"{at.best:.3f}", refresh=False)
        finished = "success"
    finally:
        for log in fabric.loggers:
            log.finalize(finished)
    at.minutes = clock()
    if best is not None:
        model.load_state_dict(best)
    return at


def _rate(plan: Plan, step: int, minutes: float) -> float:
    """Learning rate: linear warm-up, then a cosine to a fiftieth over the steps or the minutes, whichever is nearer its end."""
    done = max(step / plan.max_steps, 0.0 if plan.max_minutes is None else min(1.0, minutes / plan.max_minutes))
    warm = min(1.0, step / max(1, plan.warmup))
    return plan.learning_rate * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)


def _stop_unless_finite(values: torch.Tensor, slides: list[str], names: list[str]) -> None:
    """Raise, naming the slides, where a row of ``values`` (slides, values) is not finite; all processes know all rows, so all of them do."""
    bad = (~values.isfinite()).any(1).nonzero().flatten().tolist()
    if bad:
        found = {slides[k]: dict(zip(names, values[k].tolist(), strict=False)) for k in bad}
        msg = f"slide {' and '.join(map(repr, found))}: not finite: {found}; look at its values, or lower learning_rate"
        raise ValueError(msg)


def _read_checkpoint(path: Path, run: dict[str, Any] | None) -> dict[str, Any]:
    """Read a checkpoint of the same run; no code in the file is ever run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a file of another kind looks like
            state = torch.load(path, map_location="cpu", weights_only=True)
        stored = state["run"]
    except Exception as error:  # torch's reader gives whatever it stumbles over
        msg = f"{path} is no checkpoint of a training run, or is damaged; pass resume=False to start anew ({type(error).__name__})"
        raise ValueError(msg) from error
    if stored != run:
        now = run or {}
        changed = [
            f"{key}={stored.get(key)!r} became {now.get(key)!r}"
            for key in sorted({*stored, *now})
            if stored.get(key) != now.get(key)
        ]
        msg = (
            f"{path} belongs to a run with other arguments: {'; '.join(changed)}. "
            "Take those back to go on with it, choose another out=, or pass resume=False to start anew"
        )
        raise ValueError(msg)
    return state


def _neighboring(contexts: list[Context], n_cells: int, random: np.random.Generator) -> list[Context]:
    """Contexts of about ``n_cells`` in all, that follow each other in the cut and so lie side by side."""
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
