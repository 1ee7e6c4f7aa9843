"""Features of patches."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from spatialfm._checks import check_positive
from spatialfm._settings import progress
from spatialfm.engine._device import choose_device, choose_dtype, in_evaluation

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from spatialfm.models._towers import ImageTower

    T = TypeVar("T")

# Patches of a batch: on a CPU so few that activations stay in cache.
_CPU_BATCH = 16
_BATCH = 128


class Patches(Protocol):
    """What :class:`spatialfm.pp.TissuePatches` is to a tower."""

    def __len__(self) -> int: ...

    def batches(self, n: int = ...) -> Iterator[np.ndarray]:
        """Yield patches in order, uint8 (at most n, side, side, 3)."""


def encode_patches(
    tower: ImageTower,
    patches: Patches,
    *,
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int | None = None,
) -> np.ndarray:
    """Features of patches; the next batch is decoded while the tower computes, so that two are in memory.

    Parameters
    ----------
    tower
        Goes to the device, and back as it came.
    patches
        Its ``batches(n)`` are asked for once.
    device
        As for :func:`choose_device`.
    dtype
        ``"float32"`` or ``"bfloat16"`` (autocast). None is float32 on every device: bfloat16 moves the features of the built-in tower by a tenth.
    batch_size
        Patches a batch, 16 on a CPU and 128 elsewhere where None. Features do not depend on it but by rounding.

    Returns
    -------
    float32 (patches, features), in the order of the patches.
    """
    import torch

    chosen = choose_device(device)
    low = choose_dtype(dtype or "float32", chosen) == "bfloat16"
    if batch_size is None:
        batch_size = _CPU_BATCH if chosen.type == "cpu" else _BATCH
    check_positive("batch_size", batch_size)
    found = np.empty((len(patches), tower.n_features), dtype=np.float32)
    batches = progress(
        _ahead(patches.batches(batch_size)),
        desc="image features",
        total=math.ceil(len(patches) / batch_size),
        unit="batch",
    )
    start = 0
    with in_evaluation(tower, chosen), torch.autocast(chosen.type, dtype=torch.bfloat16, enabled=low):
        for batch in batches:
            found[start : start + len(batch)] = tower.encode(batch).cpu().numpy()
            start += len(batch)
    return found


def _ahead(items: Iterable[T]) -> Iterator[T]:
    """Yield items, of which a thread makes the next one meanwhile."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, iterator, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, iterator, None)
            yield item
