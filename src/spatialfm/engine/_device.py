"""Device, precision and threads of models."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from spatialfm._settings import settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    Dtype = Literal["float32", "bfloat16"]


def choose_device(device: str | None = None) -> torch.device:
    """Choose the device to run on: ``settings.device`` if None; ``"auto"`` is CUDA if available, otherwise the CPU.

    Raises
    ------
    ValueError
        The device is unknown or not available.
    """
    import torch

    name = settings.device if device is None else device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(name)
    except (RuntimeError, TypeError) as error:
        msg = f"device={name!r} is not known; choose 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'"
        raise ValueError(msg) from error
    n_cuda = torch.cuda.device_count()
    missing = (chosen.type == "cuda" and (chosen.index or 0) >= n_cuda) or (
        chosen.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing or chosen.type not in ("cpu", "cuda", "mps"):
        found = ["cpu", *(f"cuda:{i}" for i in range(n_cuda)), *(["mps"] if torch.backends.mps.is_available() else [])]
        msg = f"device={name!r} is not available here; choose from {found} or 'auto'"
        raise ValueError(msg)
    return chosen


def sparse_device(device: torch.device) -> torch.device:
    """Choose the device for sparse matrices: the CPU instead of MPS, which supports neither these nor float64."""
    import torch

    return torch.device("cpu") if device.type == "mps" else device


def choose_dtype(dtype: str | None, device: torch.device) -> Dtype:
    """Choose the type of matrix products: if None, bfloat16 on CUDA devices that support it, otherwise float32."""
    import torch

    if dtype is None:
        return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if dtype not in ("float32", "bfloat16"):
        msg = f"dtype={dtype!r} is not known; choose 'float32', 'bfloat16' or None"
        raise ValueError(msg)
    return dtype  # type: ignore[return-value]


@contextmanager
def in_evaluation(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Move a model to a device, in evaluation mode and without gradients; mode and device are restored at the end."""
    import torch

    was_training, was_device = model.training, next(model.parameters()).device
    model.eval().to(device)
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training).to(was_device)


@contextmanager
def torch_threads(n: int | None = None) -> Iterator[None]:
    """Let torch use ``n`` threads (None leaves the number unchanged), and restore the number at the end.

    One thread is faster for small products, because on a busy machine several threads mostly wait for each other.
    """
    import torch

    before = torch.get_num_threads()
    try:
        if n is not None:
            torch.set_num_threads(n)
        yield
    finally:
        torch.set_num_threads(before)
