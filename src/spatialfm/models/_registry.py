"""Load and save models."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from spatialfm.models._card import CARD, is_own_card, model_card, shape_of
from spatialfm.models._files import (
    BUNDLED,
    RECORD,
    WEIGHTS,
    bundled_folder,
    fingerprint,
    hash_weights,
    read_record,
    with_weights,
)
from spatialfm.models._published import is_published, load_published
from spatialfm.models.heist import HEIST, HEISTConfig
from spatialfm.models.heist_niche import HEISTNiche, HEISTNicheConfig
from spatialfm.models.hibio import HiBio, HiBioConfig

# An architecture is a torch module with the attributes ``config`` (a dataclass that JSON can hold), ``name`` and
# ``record``. It is created from its config.
Model: TypeAlias = HEIST | HEISTNiche | HiBio
ARCHITECTURES: dict[str, tuple[type[Model], type[Any]]] = {
    "heist": (HEIST, HEISTConfig),
    "heist-niche": (HEISTNiche, HEISTNicheConfig),
    "hibio": (HiBio, HiBioConfig),
}
# Version of the safetensors metadata. Files without a version are of version 1.
_FORMAT_VERSION = "1"


def load(name_or_path: str | Path = "heist-niche") -> Model:
    """Load a model.

    Parameters
    ----------
    name_or_path
        One of

        * a bundled model: ``"heist-niche"``, ``"heist"`` or ``"hibio"``; :func:`available` describes them;
        * a folder that :func:`save` wrote, or its ``model.safetensors``;
        * a checkpoint published by the authors of HEIST (``.pth``);
        * a repository of the Hugging Face hub: ``"hf-hub:org/name"``, or ``"hf-hub:org/name@revision"`` for one branch,
          tag or commit.

        The kind of a file is recognised from its content. No code from a file is ever run.

    Returns
    -------
    The model in evaluation mode on the CPU, in float32. ``model.record`` holds its training record, if there is one.

    Raises
    ------
    FileNotFoundError
        There is no such model, folder, file, repository or revision.
    TypeError
        ``name_or_path`` is neither a string nor a path.
    ValueError
        The file is damaged or not a model, was written by a newer spatialfm, or does not match its checksum.
    ConnectionError
        The hub does not answer, and the repository was not downloaded before.
    ImportError
        ``huggingface_hub`` is needed and not installed.

    Notes
    -----
    From the hub, only ``model.safetensors`` and ``record.json`` are downloaded, once, to ``sfm.settings.cache_dir``.
    Later calls check for a newer revision if the hub can be reached, and also work offline.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> model = sfm.models.load("heist-niche")
    >>> model.config.radii
    (0, 1, 2, 4, 8, 16, 32, 64)
    """
    given: Any = name_or_path
    if not isinstance(given, str | Path):
        msg = (
            f"name_or_path must be one of {list(BUNDLED)}, a folder, a file or 'hf-hub:org/name', "
            f"got {described(given)}"
        )
        raise TypeError(msg)
    reference = str(name_or_path)
    on_hub = reference.startswith("hf-hub:")
    if on_hub:
        from spatialfm.models._hub import download

        path = download(reference)
    else:
        path = bundled_folder(reference) if reference in BUNDLED else Path(name_or_path)
    if path.is_dir():
        path = path / WEIGHTS
    if not path.is_file():
        msg = (
            f"no model {reference!r}: it is neither one of {list(BUNDLED)}, nor a file, nor a folder with {WEIGHTS}, "
            "nor 'hf-hub:org/name'"
        )
        raise FileNotFoundError(msg)
    # Files from the hub are only ever read as safetensors.
    if not on_hub and is_published(path):
        published = load_published(path)
        published.name = path.stem
        return published
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copy, because the tensors may be views of the file.
            state = {key: file.get_tensor(key).to(torch.float32, copy=True) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        msg = f"{path} is neither a safetensors file nor a published checkpoint, or it is damaged: {error}"
        raise ValueError(msg) from error
    model_class, config = _read_config(metadata, path)
    # Every layer has tensors, so a config with more layers than tensors is damaged. Building it could take forever.
    depth = max((getattr(config, name, 0) for name in ("layers", "blocks")), default=0)
    try:
        if depth > len(state):
            msg = f"{depth} layers, but only {len(state)} tensors"
            raise RuntimeError(msg)
        model = with_weights(lambda: model_class(config), state)
    except (TypeError, RuntimeError) as error:
        msg = f"{path}: weights and config do not fit each other: {error}"
        raise ValueError(msg) from error
    if fingerprint(model) != metadata.get("sha256"):
        msg = f"{path}: the weights do not match their checksum. The file is damaged or was changed; get it again"
        raise ValueError(msg)
    model.name = metadata.get("name", path.parent.name)
    model.record = _own_record(path.parent, metadata)
    return model.eval()


def described(value: Any) -> str:
    """Describe a value that was passed instead of the name of a model."""
    if isinstance(value, type):
        return f"the class {value.__name__}, not a model of it"
    if isinstance(value, torch.nn.Module):
        known = isinstance(value, tuple(known for known, _ in ARCHITECTURES.values()))
        reason = "loaded already" if known else "not one of the architectures of spatialfm"
        return f"a {type(value).__name__}, which is {reason}"
    return repr(value)[:100]


def save(
    model: Model,
    folder: str | Path,
    *,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    license: str | None = None,
) -> None:
    """Save a model to a folder.

    Writes the weights to ``model.safetensors``, the training record to ``record.json``, and a model card to
    ``README.md``. An earlier model in the folder is replaced only when the new files are complete, so that an
    interruption cannot damage it.

    Parameters
    ----------
    model
        The model; ``model.name`` and ``model.record`` are saved with it.
    folder
        Created if it does not exist. A ``README.md`` that was written or edited by hand is kept.
    dtype
        Type in which the weights are stored. :func:`load` converts them to float32.
    license
        Licence of the weights in the hub's notation (``"bsd-3-clause"``, ``"mit"``, ``"cc-by-4.0"``, ``"other"``).
        None keeps the licence in the record.

    Raises
    ------
    TypeError
        ``model`` is not one of the architectures of spatialfm.
    ValueError
        ``dtype`` is unknown, or a weight is not finite in it.

    Examples
    --------
    >>> import tempfile
    >>> import spatialfm as sfm
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sfm.models.save(sfm.models.load("heist-niche"), folder)
    ...     sfm.models.load(folder).name
    'heist-niche'
    """
    write(model, Path(folder), dtype=dtype, license=license, source="path/to/this/folder")


def write(model: Model, folder: Path, *, dtype: str, license: str | None, source: str) -> None:
    """Save as :func:`save` does; the model card gives ``source`` as the argument of :func:`load`."""
    architecture = next((name for name, (known, _) in ARCHITECTURES.items() if type(model) is known), None)
    if architecture is None:
        classes = [known.__name__ for known, _ in ARCHITECTURES.values()]
        msg = f"cannot save a {type(model).__name__}, because load could not read it; pass a model of one of {classes}"
        raise TypeError(msg)
    kinds = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in kinds:
        msg = f"dtype={dtype!r} is not known; choose from {list(kinds)}"
        raise ValueError(msg)
    state = {key: value.detach().cpu().to(kinds[dtype]).contiguous() for key, value in model.state_dict().items()}
    bad = [key for key, value in state.items() if not value.isfinite().all()]
    if bad:
        msg = f"weights are not finite in {dtype}: {bad[:3]}; a model that diverged cannot be saved"
        raise ValueError(msg)
    folder.mkdir(parents=True, exist_ok=True)
    sha256 = hash_weights(state)
    config = asdict(model.config)
    record = {**model.record, **({"license": license} if license else {}), "sha256": sha256}
    metadata = {
        "format": "pt",
        "format_version": _FORMAT_VERSION,
        "architecture": architecture,
        "name": model.name,
        "config": json.dumps(config),
        "sha256": sha256,
        # In addition to record.json, so that this file alone is a complete model.
        "record": json.dumps(record),
    }
    card = model_card(
        name=model.name,
        architecture=architecture,
        config=shape_of(config),
        n_parameters=sum(value.numel() for value in state.values()),
        record=record,
        source=source,
    )
    # Write everything to a temporary folder, then rename: the weights first, which hold all that a model needs.
    with TemporaryDirectory(prefix=".saving-", dir=folder) as beside:
        new = Path(beside)
        save_file(state, new / WEIGHTS, metadata=metadata)
        (new / RECORD).write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        # safetensors lets only the owner read the file; give the weights the permissions of the record.
        (new / WEIGHTS).chmod((new / RECORD).stat().st_mode)
        written = [WEIGHTS, RECORD]
        if is_own_card(folder / CARD):
            (new / CARD).write_text(card, "utf-8")
            written.append(CARD)
        for name in written:
            with (new / name).open("r+b") as file:
                os.fsync(file.fileno())
        for name in written:
            (new / name).replace(folder / name)


def _own_record(folder: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """Training record of the weights with this metadata: ``record.json``, unless that describes other weights."""
    record = read_record(folder)
    sha256 = metadata.get("sha256")
    if record.get("sha256", sha256) == sha256:
        return record
    # Saving was interrupted, or the files of two models were mixed.
    return dict(json.loads(metadata["record"])) if "record" in metadata else {}


def _read_config(metadata: dict[str, str], path: Path) -> tuple[type[Model], Any]:
    """Read the class and the config of a model from the metadata of its file."""
    name = metadata.get("architecture")
    if name is None:
        msg = f"{path} was not written by sfm.models.save: its metadata do not name an architecture"
        raise ValueError(msg)
    format_version = metadata.get("format_version", "1")
    if format_version != _FORMAT_VERSION:
        msg = f"{path} is of format version {format_version}, which {_newer()}"
        raise ValueError(msg)
    if name not in ARCHITECTURES:
        msg = f"{path} is of architecture {name!r}, which {_newer()}. Known: {list(ARCHITECTURES)}"
        raise ValueError(msg)
    model_class, config_class = ARCHITECTURES[name]
    try:
        values = dict(json.loads(metadata["config"]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        msg = f"{path}: the config is damaged ({error!r}); get the file again"
        raise ValueError(msg) from error
    unknown = sorted(set(values) - {field.name for field in fields(config_class)})
    if unknown:
        msg = f"{path} sets {unknown} in its {config_class.__name__}, which {_newer()}"
        raise ValueError(msg)
    try:
        return model_class, config_class(**values)
    except (TypeError, ValueError) as error:
        msg = f"{path}: the config is not valid: {error}"
        raise ValueError(msg) from error


def _newer() -> str:
    return (
        f"spatialfm {version('spatialfm')} does not know, because a newer version wrote it. "
        "Update with: pip install --upgrade spatialfm"
    )
