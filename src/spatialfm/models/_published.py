"""Checkpoints published by the authors of HEIST."""

from __future__ import annotations

import pickle
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from spatialfm.models.heist import HEIST, HEISTConfig

# Name in this package -> published name. A list is concatenated along the first dimension.
_ENCODER = {
    "cell_input": "mlp_high.0",
    "gene_input": "mlp_low.0",
    "norm": "norm",
}
_LAYER: dict[str, str | list[str]] = {
    "norm": "norm",
    "cell_gin.linear": "conv_high.nn",
    "cell_out": "multi_head.out_proj",
    "gene_qkvs": [f"conv_low.lin_{part}" for part in ("query", "key", "value", "skip")],
}
_DECODER = {"coordinates": "high_mlp", "expression": "low_mlp"}


def is_published(path: Path) -> bool:
    """Whether a file looks like a ``torch.save`` archive (a zip holding a pickle), whatever its name."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("data.pkl") for name in archive.namelist())


def load_published(path: Path) -> HEIST:
    """Read a published HEIST checkpoint without running code from it.

    Parameters
    ----------
    path
        File written by ``torch.save`` with ``model_state_dict``, ``decoder_state_dict`` and ``args`` (an
        ``argparse.Namespace``).

    Returns
    -------
    The model in evaluation mode, float32.

    Raises
    ------
    ValueError
        The file holds anything but tensors and plain values, or is not a HEIST checkpoint.
    """
    from spatialfm.models._files import with_weights

    checkpoint = _read(path)
    args = checkpoint["args"]
    try:
        config = _config(args, path)
        state = _translate(checkpoint["model_state_dict"], checkpoint["decoder_state_dict"], config)
    except (AttributeError, KeyError) as error:
        msg = f"{path} is not a complete HEIST checkpoint: {error} is missing"
        raise ValueError(msg) from error
    try:
        model = with_weights(lambda: HEIST(config), {key: value.float() for key, value in state.items()})
    except RuntimeError as error:
        msg = f"{path}: the weights do not fit the sizes given in its args: {error}"
        raise ValueError(msg) from error
    return model.eval()


def _read(path: Path) -> dict[str, Any]:
    try:
        # Pass an open file: torch treats a path that ends in .safetensors differently.
        with torch.serialization.safe_globals([Namespace]), open(path, "rb") as file:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        msg = (
            f"{path} was not loaded: it holds more than tensors and plain values, or is damaged. Only tensors are "
            "read, because a pickle can run code. If you trust its source, save its state dicts again as plain "
            "tensors. "
            f"({reason})"
        )
        raise ValueError(msg) from error
    wanted = ("model_state_dict", "decoder_state_dict", "args")
    if not isinstance(checkpoint, dict) or any(key not in checkpoint for key in wanted):
        found = list(checkpoint)[:5] if isinstance(checkpoint, dict) else type(checkpoint).__name__
        msg = f"{path} is not a HEIST checkpoint: it must hold {list(wanted)}, but holds {found}"
        raise ValueError(msg)
    return checkpoint


def _config(args: Namespace, path: Path) -> HEISTConfig:
    if not args.init_dim == args.hidden_dim == args.output_dim:
        msg = f"{path}: widths {args.init_dim}, {args.hidden_dim}, {args.output_dim} differ; one width is supported"
        raise ValueError(msg)
    for option in ("blending", "anchor_pe"):
        if getattr(args, option, False):
            msg = (
                f"{path} was trained with {option}=True, which is not part of the published equations and not supported"
            )
            raise ValueError(msg)
    return HEISTConfig(
        width=args.hidden_dim,
        heads=args.num_heads,
        layers=args.num_layers,
        pe_dim=args.pe_dim,
        cross=bool(args.cross_message_passing),
    )


def _translate(encoder: dict[str, Any], decoder: dict[str, Any], config: HEISTConfig) -> dict[str, torch.Tensor]:
    """Convert the state dicts of the published encoder and decoder to that of :class:`HEIST`."""
    state: dict[str, torch.Tensor] = {}

    def linear(ours: str, theirs: str | list[str], source: dict[str, Any], prefix: str = "") -> None:
        parts = [theirs] if isinstance(theirs, str) else theirs
        for kind in ("weight", "bias"):
            state[f"{ours}.{kind}"] = torch.cat([source[f"{prefix}{part}.{kind}"] for part in parts])

    for ours, name in _ENCODER.items():
        linear(ours, name, encoder)
    for i in range(config.layers):
        prefix = f"convs.{i}."
        for ours, theirs in _LAYER.items():
            linear(f"layers.{i}.{ours}", theirs, encoder, prefix)
        state[f"layers.{i}.cell_gin.eps"] = encoder[f"{prefix}conv_high.eps"].squeeze()
        for kind in ("weight", "bias"):
            state[f"layers.{i}.cell_qkv.{kind}"] = encoder[f"{prefix}multi_head.in_proj_{kind}"]
        if config.cross:
            for ours, cross in (("cell_from_genes", "cross_hl"), ("gene_from_cell", "cross_lh")):
                for part, letter in (("query", "Q"), ("key", "K"), ("value", "V")):
                    state[f"layers.{i}.{ours}.{part}.weight"] = encoder[f"{prefix}{cross}.{letter}.weight"]
    for i in range(3):
        linear(f"decoder.layers.{i}.linear", f"layers.{i}.nn", decoder)
        state[f"decoder.layers.{i}.eps"] = decoder[f"layers.{i}.eps"].squeeze()
    for ours, name in _DECODER.items():
        linear(f"decoder.{ours}", name, decoder)
    state["decoder.alpha"] = decoder["alpha"]
    return state
