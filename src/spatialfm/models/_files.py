"""Files of models, and the fingerprint of their weights."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

Own = TypeVar("Own", bound=torch.nn.Module)
WEIGHTS = "model.safetensors"
RECORD = "record.json"
# Each bundled model is a folder of weights/, as `save` writes it.
BUNDLED = {
    "heist-niche": ("the default: niche and state of each cell, pretrained on MERFISH and Xenium of three organs"),
    "heist": "HEIST of the published size, pretrained on MERFISH and Xenium of three organs",
    "hibio": "histology and expression of spots, trained on H&E and expression of breast tumours of three patients",
}


def bundled_folder(name: str) -> Path:
    """Folder of a bundled model."""
    return Path(str(files("spatialfm.models") / "weights" / name))


def read_record(folder: Path) -> dict[str, Any]:
    """Read the training record of the model in a folder; empty if there is none."""
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text("utf-8"))
        if not isinstance(record, dict):
            msg = f"it holds a {type(record).__name__} instead of an object"
            raise TypeError(msg)
    except (TypeError, ValueError, RecursionError) as error:
        msg = f"{path} is damaged: {error}. Get it again, or delete it to load the weights alone"
        raise ValueError(msg) from error
    return record


def with_weights(make: Callable[[], Own], state: dict[str, torch.Tensor]) -> Own:
    """Make a module that holds the given weights.

    The module is not initialised first: that would change torch's random state, and a damaged config could make it
    allocate far more memory than the weights need.

    Raises
    ------
    RuntimeError
        The weights do not fit the module.
    """
    with torch.device("meta"):
        module = make()
    module.load_state_dict(state, assign=True)
    return module


def fingerprint(model: torch.nn.Module) -> str:
    """Compute a fingerprint of the weights of a model.

    Parameters
    ----------
    model
        Any torch module.

    Returns
    -------
    SHA-256 of the name, shape and float32 values of every tensor, in the order of the names, as hexadecimal digits.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> model = sfm.models.load("heist-niche")
    >>> sfm.models.fingerprint(model) == sfm.models.available().loc["heist-niche", "sha256"]
    True
    """
    return hash_weights(model.state_dict())


def hash_weights(state: dict[str, Any]) -> str:
    """Compute the :func:`fingerprint` of a state dict."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().float().contiguous()
        digest.update(f"{key}{tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()
