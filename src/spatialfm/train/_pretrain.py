"""Pretraining on many slides."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from lightning.fabric.loggers import Logger

    from spatialfm.models import HEISTConfig, HEISTNicheConfig, HiBioConfig, Model
    from spatialfm.train._loop import Progress
    from spatialfm.train._recipe import Slide


def pretrain(
    slides: Mapping[str, AnnData | str | Path] | Sequence[str | Path] | str | Path,
    out: str | Path | None = None,
    *,
    architecture: str | None = None,
    config: HEISTConfig | HEISTNicheConfig | HiBioConfig | Mapping[str, Any] | None = None,
    library_key: str | None = None,
    layer: str | None = None,
    basis: str = "spatial",
    groupby: str | None = "auto",
    max_steps: int = 2000,
    max_minutes: float | None = None,
    context_size: int | None = None,
    cells_per_step: int | None = None,
    n_genes: int | None = None,
    mask: float = 0.2,
    rotate: bool = True,
    reflect: bool = True,
    dropout: float = 0.2,
    learning_rate: float | None = None,
    weight_decay: float = 3e-3,
    warmup: int = 50,
    held_out: float | str | Sequence[str] = 0.05,
    validate_every: int = 100,
    patience: int = 10,
    checkpoint_every: int = 100,
    log_every: int = 10,
    logger: Logger | Iterable[Logger] | bool = True,
    resume: bool = True,
    device: str | None = None,
    devices: int = 1,
    strategy: str = "auto",
    dtype: str | None = None,
    rng: int = 0,
) -> Model:
    """Pretrain a model on tissues of any panel and technology; also ``python -m spatialfm.train CONFIG.toml``.

    Each step reads, in each process, neighbouring contexts of one slide; slides are drawn in proportion to the square root of their cells,
    so that a large one does not drown the others. Gene networks come from groups found without labels. What is minimised is the
    architecture's own: for HEIST its three published objectives with their learned balance, over masked cells and expressed genes (see
    :mod:`spatialfm.train._objectives`). AdamW with a linear warm-up and a cosine decay, gradients clipped to norm 1. Every
    ``validate_every`` steps the loss of what is held out is taken, always under the same masks; training ends after ``patience`` such looks
    without a better one, and the best weights are kept.

    For HiBio, slides carry features of their patches (:func:`spatialfm.tl.image_features`, once). The vectors of genes and the weights of
    features are found before the first step in closed form, and the heads are trained in three equal stages, over spots, pathways and regions
    (see :class:`spatialfm.train._hibio.HiBioRecipe`); early stopping waits for the last stage.

    Called again with the same arguments, a run that was stopped goes on from its last checkpoint, and repeats what the unbroken run would
    have done (bit for bit on a CPU; ``max_minutes`` makes the learning rate follow the clock, which nothing repeats).

    Parameters
    ----------
    slides
        Paths of ``.h5ad`` and ``.zarr`` files and of folders of them, or a mapping of names to paths or AnnData. Without a mapping a slide is
        named after its file. Panels, technologies and values may differ from slide to slide.
    out
        Folder for the weights and the training record (see :func:`spatialfm.models.save`), the checkpoint ``last.ckpt`` and the logs;
        nothing is written where None.
    architecture, config
        What to train: the name of an architecture (``"heist"``, ``"heist-niche"``, ``"hibio"``) and the options of its shape as a mapping, or a config object
        alone (such as :class:`spatialfm.models.HEISTConfig`). The published HEIST where both are None.
    library_key, layer, basis, groupby
        Where slides keep things, as for :func:`spatialfm.tl.embed`; the same for all of them.
    max_steps, max_minutes
        Where training ends at the latest. The learning rate follows whichever of the two is nearer its end.
    context_size, cells_per_step
        Cells of a context, and of a step in each process; the architecture's own where None (HEIST: 192, 192).
    n_genes
        Genes of a step, drawn from the slide's networks; the architecture's own where None (HEIST: 48).
    mask
        Share of cells whose coordinates, and of expressed genes whose values, are hidden and asked for. This and the next two are of HEIST;
        HEIST-niche sees no coordinates, and hides one half of the genes from the other.
    rotate, reflect
        Whether each batch is turned by an angle of its own, and mirrored in half of the cases, before coordinates are standardised.
    dropout
        Largest share of counts that is lost from what the model is shown; each batch draws its own share up to it. Values that are
        logarithms of counts are thinned binomially, others lose entries. What is asked for stays whole. 0 switches it off.
    learning_rate, weight_decay, warmup
        Of AdamW, the rate being the architecture's own where None (HEIST: 5e-4); ``warmup`` in steps.
    held_out
        What is kept for validation: names of slides, or a share of each slide's contexts.
    validate_every, patience
        See above.
    checkpoint_every
        Steps between checkpoints. They replace each other in one step, so that there is a whole one at any moment.
    log_every
        Steps between rows of the logs.
    logger
        Lightning loggers; True logs to ``logs/version_N/metrics.csv`` in ``out``, a new N each time a run goes on, False nowhere.
    resume
        Whether to go on from the checkpoint in ``out``; False starts anew and overwrites it.
    device, dtype
        As for :func:`spatialfm.tl.embed`. Weights and optimiser stay float32.
    devices, strategy
        Processes, a GPU each where ``device`` is CUDA, and how Lightning runs them (``"auto"``, ``"ddp"``). Several processes call the
        program that calls this function once each: run a command or a script, not a notebook.
    rng
        Seed of everything drawn.

    Returns
    -------
    The model in evaluation mode on the CPU, its ``record`` a dictionary: data with licences, config, arguments, loss curve, cost.

    Raises
    ------
    ImportError
        Lightning is not installed (``pip install "spatialfm[train]"``).
    ValueError
        An argument is out of range; a slide cannot be read, or its loss is not finite, in which case the message names it and the last
        checkpoint stays as it was; or the checkpoint in ``out`` is of another run.
    """
    from spatialfm.train._fabric import check_lightning

    check_lightning()
    import torch

    from spatialfm.engine import choose_device, choose_dtype
    from spatialfm.models import save
    from spatialfm.train._fabric import open_fabric
    from spatialfm.train._loop import CHECKPOINT, Plan, Run
    from spatialfm.train._recipes import find_recipe
    from spatialfm.train._slides import read_slides

    recipe_type, shape = find_recipe(architecture, config)
    own = {
        "context_size": context_size, "cells_per_step": cells_per_step, "n_genes": n_genes, "learning_rate": learning_rate
    }  # fmt: skip
    chosen = recipe_type.defaults | {name: value for name, value in own.items() if value is not None}
    place = choose_device(device)
    if place.index is not None and devices != 1:
        msg = f"device={str(place)!r} is one device, but devices={devices}; name the kind alone, {place.type!r}"
        raise ValueError(msg)
    precision = choose_dtype(dtype, place)
    reading = {"library_key": library_key, "layer": layer, "basis": basis, "groupby": groupby, "rng": rng}
    arguments = {
        **reading, "architecture": recipe_type.architecture, "max_steps": max_steps, "max_minutes": max_minutes, **chosen, "mask": mask,
        "rotate": rotate, "reflect": reflect, "dropout": dropout, "weight_decay": weight_decay, "warmup": warmup, "held_out": held_out,
        "validate_every": validate_every, "patience": patience, "checkpoint_every": checkpoint_every, "log_every": log_every,
        "devices": devices, "dtype": precision,
    }  # fmt: skip
    check_numbers(**arguments)
    folder = None if out is None else Path(out)
    loggers: Any = None if isinstance(logger, bool) else list(logger) if isinstance(logger, Iterable) else logger
    if logger is True and folder is not None:
        from lightning.fabric.loggers import CSVLogger

        loggers = CSVLogger(folder, name="logs")
    with open_fabric(place, devices=devices, strategy=strategy, loggers=loggers) as fabric:
        recipe = recipe_type(**pick(recipe_type, {**arguments, "device": fabric.device, "config": shape}))
        data = read_slides(
            slides, recipe, context_size=chosen["context_size"], held_out=held_out, seed=rng, reading=reading
        )
        with torch.random.fork_rng([]):
            torch.manual_seed(rng)
            model = recipe.start(recipe.build(shape), data, seed=rng)
        same = {**arguments, "config": asdict(shape), **{f"slide {slide.name}": slide.digest for slide in data}}
        identity = json.loads(json.dumps({name: same[name] for name in same if name not in _FREE}))
        checkpoint = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint = folder / CHECKPOINT
            if not resume and fabric.global_rank == 0:
                checkpoint.unlink(missing_ok=True)
            fabric.barrier()
        plan = Plan(**pick(Plan, arguments))
        run = Run(fabric, recipe, model, data, plan, checkpoint=checkpoint, identity=identity)
        at = run.train(look_first=recipe.from_data)
        model = model.eval().cpu()
        model.record = record(model, data, at, {**arguments, "device": place.type})
        if folder is not None and fabric.global_rank == 0:
            save(model, folder)
        fabric.barrier()
    return model


# What may change from one part of a run to the next.
_FREE = ("checkpoint_every", "log_every")
_LEAST = {
    "max_steps": 1, "context_size": 8, "cells_per_step": 8, "n_genes": 2, "warmup": 0, "validate_every": 1, "patience": 1,
    "checkpoint_every": 1, "log_every": 1, "devices": 1, "rng": 0,
}  # fmt: skip


def check_numbers(**arguments: Any) -> None:
    """Raise where an argument of :func:`pretrain` is out of range."""
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


def pick(kind: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those arguments that are fields of a dataclass."""
    return {f.name: arguments[f.name] for f in fields(kind)}


def record(model: Any, slides: list[Slide], at: Progress, arguments: dict[str, Any]) -> dict[str, Any]:
    """Tell what a model was trained on and how, as ``record.json`` holds it."""
    from spatialfm.models._card import shape_of

    return {
        "data": [slide.facts for slide in slides],
        "config": shape_of(asdict(model.config)),
        "arguments": arguments,
        "best_step": at.best_step,
        "held_out_loss": at.best,
        "cells_seen": at.cells_seen,
        "minutes": round(at.minutes, 1),
        "version": version("spatialfm"),
        "commit": _commit(),
        "curve": at.curve,
    }


def _commit() -> str:
    """Commit of the source this runs from; empty where it is no checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
