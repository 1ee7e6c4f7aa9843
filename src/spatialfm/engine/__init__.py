"""Reading and embedding of tissues: one encoder for each architecture, contexts, device and precision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spatialfm._checks import ArgumentError, option_readers
from spatialfm.engine._contexts import Context, cut_contexts
from spatialfm.engine._device import choose_device, choose_dtype, in_evaluation, torch_threads
from spatialfm.engine._encoder import Embedding, Encoder
from spatialfm.engine._heist import HEISTEncoder
from spatialfm.engine._heist_niche import HEISTNicheEncoder, NetworkInput
from spatialfm.engine._hibio import HiBioEncoder
from spatialfm.engine._images import compute_image_features, encode_patches
from spatialfm.engine._tissue import Tissue, read_tissue
from spatialfm.models import load
from spatialfm.models._registry import described

__all__ = [
    "ENCODERS",
    "Context",
    "Embedding",
    "Encoder",
    "HEISTEncoder",
    "HEISTNicheEncoder",
    "HiBioEncoder",
    "NetworkInput",
    "Tissue",
    "choose_device",
    "choose_dtype",
    "compute_image_features",
    "cut_contexts",
    "encode_patches",
    "find_encoder",
    "in_evaluation",
    "read_tissue",
    "torch_threads",
]

ENCODERS: tuple[type[Encoder], ...] = (HEISTNicheEncoder, HEISTEncoder, HiBioEncoder)


def find_encoder(model: Any, *, needs: str | Sequence[str] = (), lacks: str = "", **options: Any) -> Any:
    """Find the encoder of a model.

    Parameters
    ----------
    model
        A model, or the argument of :func:`spatialfm.models.load`.
    needs
        Names of methods; the encoder must have at least one of them.
    lacks
        End of the error message "model='name' ..." for an encoder that has none of them.
    options
        Options of the encoder.

    Raises
    ------
    TypeError
        ``model`` is not a model of spatialfm.
    ValueError
        The encoder has none of the methods, or does not have an option.
    """
    needs = [needs] if isinstance(needs, str) else needs
    able = [kind for kind in ENCODERS if not needs or any(hasattr(kind, method) for method in needs)]
    fix = f"use model={able[0].prefix!r} or another {' or '.join(kind.model_type.__name__ for kind in able)}"
    found: Any = load(model) if isinstance(model, str | Path) else model
    kind = next((kind for kind in ENCODERS if isinstance(found, kind.model_type)), None)
    if kind is None:
        msg = f"model= is {described(found)}; {fix}, given by name, folder, file or 'hf-hub:org/name'"
        raise TypeError(msg)
    if kind not in able:
        msg = f"model={found.name!r} {lacks} (it is a {kind.model_type.__name__}); {fix}"
        raise ValueError(msg)
    for name in options:
        if name not in kind.options():
            raise ArgumentError(_unread(name, found.name, kind))
    return kind(found, **options)


def _unread(option: str, name: str, kind: type[Encoder]) -> str:
    """Explain that a model does not read an option, and which models do."""
    readers = option_readers(option, {other.prefix: other.options() for other in ENCODERS})
    own = ", ".join(f"{o}=" for o in kind.options())
    return (
        f"{option}= is an option of {' and '.join(readers)}; model={name!r} does not read it. Leave it out, or use "
        f"model={readers[0]}. The options of {name!r} are {own}"
    )
