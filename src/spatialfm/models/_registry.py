"""Models by name, folder or file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from spatialfm.models._published import is_published, load_published
from spatialfm.models.heist import HEIST, HEISTConfig

_BUNDLED = {"heist": "HEIST of the published size, pretrained on MERFISH and Xenium of three organs"}
_WEIGHTS = "model.safetensors"
_RECORD = "record.json"


def load(name_or_path: str | Path = "heist") -> HEIST:
    """Load a model.

    Parameters
    ----------
    name_or_path
        A bundled model (``"heist"``), a folder that :func:`save` wrote, its ``model.safetensors``, or a checkpoint published by HEIST's
        authors (``.pth``). Files are told apart by their content. No code from a file is ever run.

    Returns
    -------
    The model in evaluation mode on the CPU, float32; ``model.record`` holds its training record where there is one.

    Raises
    ------
    FileNotFoundError
        There is no such model, folder or file.
    ValueError
        The file is damaged, of another kind, or does not match its checksum.
    """
    path = (
        Path(str(files("spatialfm.models") / "weights" / str(name_or_path)))
        if str(name_or_path) in _BUNDLED
        else Path(name_or_path)
    )
    if path.is_dir():
        path = path / _WEIGHTS
    if not path.is_file():
        msg = f"no model {str(name_or_path)!r}: it is neither one of {list(_BUNDLED)}, nor a file, nor a folder with {_WEIGHTS}"
        raise FileNotFoundError(msg)
    if is_published(path):
        model = load_published(path)
        model.name = path.stem
        return model
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        msg = f"{path} is neither a safetensors file nor a published checkpoint, or is damaged: {error}"
        raise ValueError(msg) from error
    if metadata.get("architecture") != "heist":
        msg = f"{path} was not written by sfm.models.save: its metadata name architecture={metadata.get('architecture')!r}, not 'heist'"
        raise ValueError(msg)
    try:
        model = HEIST(HEISTConfig(**json.loads(metadata["config"])))
        model.load_state_dict(state)
    except (KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
        msg = f"{path}: weights and config do not fit each other: {error}"
        raise ValueError(msg) from error
    if fingerprint(model) != metadata.get("sha256"):
        msg = f"{path}: the weights do not match their checksum; the file is damaged or was changed, get it again"
        raise ValueError(msg)
    model.name = metadata.get("name", path.parent.name)
    record = path.parent / _RECORD
    model.record = json.loads(record.read_text()) if record.is_file() else {}
    return model.eval()


def save(model: HEIST, folder: str | Path, *, dtype: Literal["float32", "float16", "bfloat16"] = "float32") -> None:
    """Write a model as ``model.safetensors`` and its training record as ``record.json``.

    Parameters
    ----------
    model
        The model; ``model.name`` and ``model.record`` go with it.
    folder
        Made where it does not exist.
    dtype
        Type the weights are stored as; they are float32 again when loaded.

    Raises
    ------
    ValueError
        ``dtype`` is not known, or a weight is not finite in it.
    """
    kinds = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in kinds:
        msg = f"dtype={dtype!r} is not known; choose from {list(kinds)}"
        raise ValueError(msg)
    state = {key: value.detach().cpu().to(kinds[dtype]).contiguous() for key, value in model.state_dict().items()}
    bad = [key for key, value in state.items() if not value.isfinite().all()]
    if bad:
        msg = f"weights are not finite as {dtype}: {bad[:3]}; a model that diverged cannot be saved"
        raise ValueError(msg)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sha256 = _hash(state)
    metadata = {
        "format": "pt",
        "architecture": "heist",
        "name": model.name,
        "config": json.dumps(asdict(model.config)),
        "sha256": sha256,
    }
    save_file(state, folder / _WEIGHTS, metadata=metadata)
    (folder / _RECORD).write_text(json.dumps({**model.record, "sha256": sha256}, indent=1) + "\n")


def fingerprint(model: torch.nn.Module) -> str:
    """Tell which weights a model holds.

    Parameters
    ----------
    model
        Any torch module.

    Returns
    -------
    SHA-256 of every tensor's name, shape and float32 values, in the order of the names, as hexadecimal digits.
    """
    return _hash(model.state_dict())


def _hash(state: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().float().contiguous()
        digest.update(f"{key}{tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()
