"""Pretraining on many slides."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
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
    max_steps: int = 2000,
    max_minutes: float | None = None,
    context_size: int | None = None,
    cells_per_step: int | None = None,
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
    **options: Any,
) -> Model:
    """Pretrain a model on tissues of any panel and technology; also ``python -m spatialfm.train CONFIG.toml``.

    Each step uses neighbouring contexts of one slide; slides are drawn in proportion to the square root of their number
    of cells. AdamW, with a linear warm-up and a cosine decay, minimises the loss of the architecture, see
    :doc:`/pretraining`. Training stops after ``patience`` validations without improvement, and the best weights are
    kept. If called again with the same arguments, a run that was interrupted continues from its last checkpoint, with
    the results of an uninterrupted run (exactly on a CPU, unless ``max_minutes`` sets the learning rate).

    Parameters
    ----------
    slides
        Paths of ``.h5ad`` and ``.zarr`` files and of folders of them, or a mapping of names to paths or AnnData.
        Panels, technologies and kinds of values may differ between slides.
    out
        Folder for the weights and the training record (:func:`spatialfm.models.save`), the checkpoint ``last.ckpt``
        and the logs. None writes nothing.
    architecture, config
        ``"heist"``, ``"heist-niche"`` or ``"hibio"``, and the options of its shape as a mapping; or only a config
        object, such as :class:`spatialfm.models.HEISTConfig`. If both are None, the published HEIST.
    library_key, layer, basis
        As for :func:`spatialfm.tl.embed`; the same for all slides.
    max_steps, max_minutes
        Training ends at the latest here. The learning rate decays towards the end that is nearer.
    context_size, cells_per_step, learning_rate
        Cells of a context, cells of a step in each process, and learning rate; None uses those of the architecture.
    weight_decay, warmup
        Weight decay of AdamW, and steps of the warm-up.
    held_out
        Data for validation: names of slides, or a share of the contexts of each slide.
    validate_every, patience, checkpoint_every, log_every
        Steps between validations, validations without improvement, steps between checkpoints and rows of the logs.
    logger
        Lightning loggers. True logs to ``logs/version_N/metrics.csv`` in ``out``; False disables logging.
    resume
        Whether to continue from the checkpoint in ``out``; False starts again and overwrites it.
    device, dtype, rng
        As for :func:`spatialfm.tl.embed`; ``rng`` is a whole number. Weights and optimiser stay float32.
    devices, strategy
        Number of processes, each with one GPU if ``device`` is CUDA, and the strategy of Lightning (``"auto"``,
        ``"ddp"``).
    options
        Options of single architectures: ``groupby``, ``mask``, ``n_genes``, ``rotate``, ``reflect`` and ``dropout`` of
        ``"heist"``, ``dropout`` of ``"hibio"``. An option that the architecture does not have is an error.

    Returns
    -------
    The model in evaluation mode on the CPU. Its ``record`` holds the data with licences, arguments, loss curve and
    duration.

    Raises
    ------
    ImportError
        Lightning is not installed (``pip install "spatialfm[train]"``).
    ValueError
        An argument is out of range, a slide cannot be read, its loss is not finite, or the checkpoint in ``out``
        belongs to another run. Messages name the slide; the last checkpoint is kept.
    """
    from spatialfm.train._fabric import check_lightning

    check_lightning()
    import torch

    from spatialfm.engine import choose_device, choose_dtype
    from spatialfm.models import save
    from spatialfm.train._fabric import open_fabric
    from spatialfm.train._loop import CHECKPOINT, Plan, Run
    from spatialfm.train._recipe import check_numbers
    from spatialfm.train._recipes import check_options, find_recipe
    from spatialfm.train._slides import read_slides

    recipe_type, shape = find_recipe(architecture, config)
    check_options(recipe_type, options)
    own = {"context_size": context_size, "cells_per_step": cells_per_step, "learning_rate": learning_rate}
    chosen = recipe_type.defaults | {name: value for name, value in own.items() if value is not None}
    chosen_device = choose_device(device)
    if chosen_device.index is not None and devices != 1:
        msg = f"device={str(chosen_device)!r} is one device, but devices={devices}; use device={chosen_device.type!r}"
        raise ValueError(msg)
    precision = choose_dtype(dtype, chosen_device)
    reading = {"library_key": library_key, "layer": layer, "basis": basis, "rng": rng}
    recipe = recipe_type(chosen_device, precision, shape, **options)
    arguments = {
        **reading, "architecture": recipe_type.architecture, "max_steps": max_steps, "max_minutes": max_minutes,
        **chosen, "weight_decay": weight_decay, "warmup": warmup, "held_out": held_out,
        "validate_every": validate_every, "patience": patience, "checkpoint_every": checkpoint_every,
        "log_every": log_every, "devices": devices, "dtype": precision,
    }  # fmt: skip
    check_numbers(**arguments)
    arguments |= {name: getattr(recipe, name) for name in recipe_type.options()}
    folder = None if out is None else Path(out)
    loggers: Any = None if isinstance(logger, bool) else list(logger) if isinstance(logger, Iterable) else logger
    if logger is True and folder is not None:
        from lightning.fabric.loggers import CSVLogger

        loggers = CSVLogger(folder, name="logs")
    with open_fabric(chosen_device, devices=devices, strategy=strategy, loggers=loggers) as fabric:
        recipe = replace(recipe, device=fabric.device)
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
        progress = run.train(validate_first=recipe.from_data)
        model = model.eval().cpu()
        model.record = record(model, data, progress, {**arguments, "device": chosen_device.type})
        if folder is not None and fabric.global_rank == 0:
            save(model, folder)
        fabric.barrier()
    return model


# Arguments that may change when a run is continued.
_FREE = ("checkpoint_every", "log_every")


def pick(kind: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """Select the arguments that are fields of a dataclass."""
    return {f.name: arguments[f.name] for f in fields(kind)}


def record(model: Any, slides: list[Slide], progress: Progress, arguments: dict[str, Any]) -> dict[str, Any]:
    """Make the training record of a model, which is saved as ``record.json``."""
    from spatialfm.models._card import shape_of

    return {
        "data": [slide.facts for slide in slides],
        "config": shape_of(asdict(model.config)),
        "arguments": arguments,
        "best_step": progress.best_step,
        "held_out_loss": progress.best,
        "cells_seen": progress.cells_seen,
        "minutes": round(progress.minutes, 1),
        "version": version("spatialfm"),
        "commit": _commit(),
        "curve": progress.curve,
    }


def _commit() -> str:
    """Git commit of the source code; empty if it is not a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
