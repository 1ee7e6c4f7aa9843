"""Fine-tuning of a model on your own tissue."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np

from spatialfm._checks import checked
from spatialfm._data._expression import ValuesKind
from spatialfm._data._write import check_free, record_params, write
from spatialfm._settings import logger

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from anndata import AnnData

    from spatialfm.models import Model
    from spatialfm.train._recipe import Recipe

_HELD_OUT = 0.1  # share of the contexts
# Arguments of pretraining with their defaults here, and arguments that cannot be changed.
_FURTHER = {
    "learning_rate": None,
    "validate_every": 20,
    "patience": 5,
    "weight_decay": 3e-3,
    "warmup": 20,
    "dtype": None,
}
_FIXED = {"held_out": _HELD_OUT, "checkpoint_every": 1, "log_every": 1}


@checked
def fine_tune(
    adata: AnnData,
    model: str | Path | Model = "heist-niche",
    *,
    library_key: str | None = None,
    layer: str | None = None,
    basis: str = "spatial",
    values: ValuesKind = "auto",
    max_minutes: float | None = 3.0,
    max_steps: int = 1000,
    key_added: str = "fine_tune",
    device: str | None = None,
    rng: int = 0,
    copy: bool = False,
    **options: Any,
) -> Model | tuple[Model, AnnData]:
    """Train a model further on your own tissue, for a few minutes and without labels.

    Objectives and augmentation are those of pretraining (:func:`spatialfm.train.pretrain`). A tenth of the tissue is
    held out. The weights with the lowest loss there are returned, which are those of the model you passed if training
    did not improve it. Needs Lightning (``pip install "spatialfm[train]"``). :func:`spatialfm.models.save` writes the
    result to disk.

    Parameters
    ----------
    %(adata)s
    model
        ``"heist-niche"`` or ``"heist"``, a folder, a file, or a model; it is not changed. ``"hibio"`` is fitted to all
        of its slides at once and cannot be fine-tuned.
    library_key, layer, basis, values
        As for :func:`spatialfm.tl.embed`; pass the same to both functions.
    max_minutes, max_steps
        Training ends at the latest here. The learning rate decays towards the end that is nearer. With
        ``max_minutes=None`` the result does not depend on the speed of the machine.
    %(key_added)s
    %(device)s
    rng
        Seed of all random numbers.
    %(copy)s
    options
        Further arguments of :func:`spatialfm.train.pretrain`: ``learning_rate`` (a fifth of that of pretraining),
        ``validate_every`` (20), ``patience`` (5), ``weight_decay``, ``warmup``, ``dtype``, and the options of the
        architecture, such as ``groupby`` and ``mask`` of ``"heist"``.

    Returns
    -------
    The fine-tuned model on the CPU, for ``sfm.tl.embed(adata, model)``; with ``copy=True`` the model and the copy.
    Written to ``uns[key_added]``: ``model`` and ``sha256`` of its weights; ``base``, the same of the original model;
    ``params``; ``best_step``, 0 if no validation was better than the one before training; and ``curve``, for
    :func:`spatialfm.pl.loss_curve`.

    Raises
    ------
    ImportError
        Lightning is not installed.
    KeyError, FileNotFoundError
        As for :func:`spatialfm.tl.embed`.
    ValueError
        The tissue has too few cells to hold some out, the loss is not finite, or an argument is out of range.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()[:1000].copy()
    >>> model = sfm.tl.fine_tune(adata, max_steps=10)
    >>> sfm.tl.embed(adata, model)
    >>> adata.uns["embeddings"]["X_niche"]["model"]
    'heist-niche-fine-tuned'
    """
    from spatialfm.engine import find_encoder
    from spatialfm.models import fingerprint
    from spatialfm.train._recipes import find_recipe

    check_free(adata, "tl.fine_tune", {"uns": [key_added]})
    base = find_encoder(model).model
    recipe_type, _ = find_recipe(None, base.config)
    _check(base, recipe_type, options)
    reading = {"library_key": library_key, "layer": layer, "basis": basis, "values": values, "rng": rng}
    arguments = _FURTHER | _FIXED | {"max_minutes": max_minutes, "max_steps": max_steps, **reading, **options}
    tuned, progress = _train(adata, base, recipe_type, arguments, reading, device)
    columns = dict.fromkeys(name for validation in progress.curve for name in validation)
    entry = {
        "model": tuned.name,
        "sha256": fingerprint(tuned),
        "base": tuned.record["base"],
        "params": record_params(**tuned.record["arguments"]),
        "best_step": progress.best_step,
        "curve": {name: np.array([v[name] for v in progress.curve if name in v]) for name in columns},
    }
    adata = write(adata, "tl.fine_tune", key_added, {"uns": {key_added: entry}}, copy=copy)
    logger.info(
        "fine_tune: %d steps in %.1f minutes, held-out loss %.4f -> %.4f (step %d) -> uns[%r]",
        progress.step,
        progress.minutes,
        progress.curve[0]["held_out_loss"],
        progress.best,
        progress.best_step,
        key_added,
    )
    return (tuned, adata) if copy else tuned


def _check(base: Any, recipe: type[Recipe], options: Mapping[str, Any]) -> None:
    from spatialfm.train._recipes import check_options

    if recipe.from_data:
        msg = (
            f"{base.name!r} cannot be fine-tuned, because most of its weights are fitted to all of its slides at once. "
            f"Train a new one with sfm.train.pretrain(slides, architecture={recipe.architecture!r})"
        )
        raise ValueError(msg)
    check_options(recipe, {name: value for name, value in options.items() if name not in _FURTHER})


def _train(
    adata: AnnData,
    base: Any,
    recipe_type: type[Recipe],
    arguments: dict[str, Any],
    reading: dict[str, Any],
    device: str | None,
) -> tuple[Any, Any]:
    """Train a copy of a model; returns the copy, with its record, and the progress of the run."""
    from spatialfm.engine import choose_device, choose_dtype
    from spatialfm.models import fingerprint
    from spatialfm.train._fabric import open_fabric
    from spatialfm.train._loop import Plan, Run
    from spatialfm.train._pretrain import pick, record
    from spatialfm.train._recipe import check_numbers
    from spatialfm.train._slides import read_slide

    chosen = choose_device(device)
    own = dict(recipe_type.defaults)
    # At least ten contexts, one of them held out.
    own["context_size"] = min(own["context_size"], max(8, adata.n_obs // 10))
    own["learning_rate"] = arguments["learning_rate"] or own["learning_rate"] / 5
    arguments = arguments | own | {"dtype": choose_dtype(arguments["dtype"], chosen)}
    settings = {name: arguments[name] for name in recipe_type.options() if name in arguments}
    check_numbers(**{name: value for name, value in arguments.items() if name not in settings})
    tuned = deepcopy(base)
    with open_fabric(chosen, alone=True) as fabric:
        recipe = recipe_type(fabric.device, arguments["dtype"], base.config, **settings)
        slide = read_slide(
            "adata",
            adata,
            recipe,
            context_size=own["context_size"],
            held_out=_HELD_OUT,
            seed=[arguments["rng"]],
            reading=reading,
        )
        run = Run(fabric, recipe, tuned, [slide], Plan(**pick(Plan, arguments)))
        progress = run.train(validate_first=True)
    tuned = tuned.eval().cpu()
    tuned.name = f"{base.name}-fine-tuned"
    arguments |= {name: getattr(recipe, name) for name in recipe.options()}
    tuned.record = record(tuned, [slide], progress, arguments)
    tuned.record["base"] = {"model": base.name, "sha256": fingerprint(base)}
    tuned.record["data"] = [*base.record.get("data", []), *tuned.record["data"]]
    return tuned, progress
