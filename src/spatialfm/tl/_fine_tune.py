"""Fine-tuning on one's own tissue."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from spatialfm._checks import checked
from spatialfm._data._expression import ValuesKind
from spatialfm._data._write import check_free, write
from spatialfm._settings import logger

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

    from spatialfm.models import Model


@checked
def fine_tune(
    adata: AnnData,
    model: str | Path | Model = "heist-niche",
    *,
    library_key: str | None = None,
    layer: str | None = None,
    groupby: str | None = "auto",
    basis: str = "spatial",
    values: ValuesKind = "auto",
    max_minutes: float | None = 3.0,
    max_steps: int = 1000,
    learning_rate: float | None = None,
    validate_every: int = 20,
    patience: int = 5,
    key_added: str = "fine_tune",
    device: str | None = None,
    dtype: str | None = None,
    rng: int = 0,
    copy: bool = False,
) -> Model | tuple[Model, AnnData]:
    """Go on training a model on your own tissue, for a few minutes and without labels.

    The objectives, the masks and the augmentation are those the model was pretrained with (see :func:`spatialfm.train.pretrain`). A tenth of
    the tissue is held out; its loss is taken before the first step and every ``validate_every`` steps, always under the same masks, and the
    model of the best look is returned: where nothing was gained, that is the model as it came. Needs Lightning
    (``pip install "spatialfm[train]"``). Nothing is written to disk; :func:`spatialfm.models.save` does that.

    Parameters
    ----------
    adata
        Cells by features, as for :func:`spatialfm.tl.embed`.
    model
        Name, folder, file (see :func:`spatialfm.models.load`), or a model, which is not changed.
    library_key, layer, groupby, basis, values
        As for :func:`spatialfm.tl.embed`; give both functions the same.
    max_minutes, max_steps
        Where training ends at the latest, apart from reading the tissue. The learning rate falls to zero towards whichever is nearer its end;
        with ``max_minutes=None`` the result does not depend on how fast the machine is.
    learning_rate
        A fifth of that of pretraining where None, so that a few minutes do not undo it.
    validate_every, patience
        Training ends early after ``patience`` looks without a better one.
    key_added
        Name of what is written.
    device, dtype
        As for :func:`spatialfm.tl.embed`.
    rng
        Seed of everything drawn.
    copy
        Return a copy of ``adata`` beside the model instead of writing to it.

    Returns
    -------
    The fine-tuned model, on the CPU, for ``sfm.tl.embed(adata, model)``; with ``copy=True`` the model and the copy. Its ``record`` tells where
    it comes from. Written:

    ``uns[key_added]``
        ``model`` and ``sha256`` of its weights; ``base``: the same of the model it started from; ``params``; ``best_step``, 0 where no look was
        better than the first; ``curve``: arrays with a value a look, ``step``, ``minutes`` and ``held_out_loss``, and with a value for each look
        after the first, which is before training, the means since the look before of ``loss`` and its parts. :func:`spatialfm.pl.loss_curve` plots it.

    Raises
    ------
    ImportError
        Lightning is not installed.
    KeyError, FileNotFoundError
        As for :func:`spatialfm.tl.embed`.
    ValueError
        As for :func:`spatialfm.tl.embed`, or the tissue has too few cells to hold some out, the loss is not finite, ``key_added`` is that of an
        embedding, or the model is HiBio, which is trained from all of its slides at once. ``adata`` is as it was.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()
    >>> model = sfm.tl.fine_tune(adata, library_key="mouse_id")  # doctest: +SKIP
    >>> sfm.tl.embed(adata, model, library_key="mouse_id")  # doctest: +SKIP
    >>> sfm.pl.loss_curve(adata)  # doctest: +SKIP
    """
    from copy import deepcopy
    from inspect import signature

    from spatialfm.engine import choose_device, choose_dtype, find_encoder
    from spatialfm.models import fingerprint
    from spatialfm.train._fabric import open_fabric
    from spatialfm.train._loop import Plan, Run
    from spatialfm.train._pretrain import check_numbers, pick, pretrain, record
    from spatialfm.train._recipes import find_recipe
    from spatialfm.train._slides import read_slide

    check_free(adata, "tl.fine_tune", {"uns": [key_added]})
    place = choose_device(device)
    precision = choose_dtype(dtype, place)
    base = find_encoder(model).model
    recipe_type, _ = find_recipe(None, base.config)
    if recipe_type.from_data:
        msg = (
            f"{base.name!r} cannot be fine-tuned: most of it is found in closed form from all of its slides. Train one on yours, or on yours and "
            f"others, with sfm.train.pretrain(slides, architecture={recipe_type.architecture!r})"
        )
        raise ValueError(msg)
    own = dict(recipe_type.defaults)
    # At least ten contexts, one of them held out.
    own["context_size"] = min(own["context_size"], max(8, adata.n_obs // 10))
    own["learning_rate"] = own["learning_rate"] / 5 if learning_rate is None else learning_rate
    reading = {
        "library_key": library_key, "layer": layer, "groupby": groupby, "basis": basis, "values": values, "rng": rng
    }  # fmt: skip
    pretraining = signature(pretrain).parameters
    arguments = {
        **reading, **own, "max_minutes": max_minutes, "max_steps": max_steps, "validate_every": validate_every, "patience": patience,
        **{name: pretraining[name].default for name in ("mask", "rotate", "reflect", "dropout", "weight_decay")}, "warmup": 20, "held_out": 0.1,
        "checkpoint_every": 1, "log_every": 1, "dtype": precision,
    }  # fmt: skip
    check_numbers(**arguments)
    tuned = deepcopy(base)
    with open_fabric(place, alone=True) as fabric:
        recipe = recipe_type(**pick(recipe_type, {**arguments, "device": fabric.device, "config": base.config}))
        slide = read_slide(
            "adata", adata, recipe, context_size=own["context_size"], held_out=0.1, seed=[rng], reading=reading
        )
        at = Run(fabric, recipe, tuned, [slide], Plan(**pick(Plan, arguments))).train(look_first=True)
    tuned = tuned.eval().cpu()
    tuned.name = f"{base.name}-fine-tuned"
    origin = {"model": base.name, "sha256": fingerprint(base)}
    tuned.record = record(tuned, [slide], at, arguments)
    tuned.record["base"] = origin
    tuned.record["data"] = [*base.record.get("data", []), *tuned.record["data"]]

    columns = dict.fromkeys(name for look in at.curve for name in look)
    entry = {
        "model": tuned.name,
        "sha256": fingerprint(tuned),
        "base": origin,
        "params": {name: "" if value is None else value for name, value in arguments.items()},
        "best_step": at.best_step,
        "curve": {name: np.array([look[name] for look in at.curve if name in look]) for name in columns},
    }
    adata = write(adata, "tl.fine_tune", key_added, {"uns": {key_added: entry}}, copy=copy)
    logger.info(
        "fine_tune: %d steps in %.1f minutes, held-out loss %.4f -> %.4f (step %d) -> uns[%r]",
        at.step, at.minutes, at.curve[0]["held_out_loss"], at.best, at.best_step, key_added,
    )  # fmt: skip
    return (tuned, adata) if copy else tuned
