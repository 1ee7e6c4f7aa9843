"""A pass of a model that reads a tissue whole."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from spatialfm._data._components import spatial_components, walk
from spatialfm.engine._device import in_evaluation, sparse_device, torch_threads

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from scipy.sparse import csr_matrix

    from spatialfm._data._components import Components
    from spatialfm.models import HEISTNiche
    from spatialfm.pp._tissue import Tissue

# Cells up to which one thread is as fast as several, and on a busy machine many times faster: products are too small to share.
_SMALL = 20_000


def walk_tensor(graph: csr_matrix, device: torch.device) -> torch.Tensor:
    """Mean over the neighbours in a tissue graph, as an (n, n) sparse csr tensor; a cell without neighbours is its own."""
    mean = walk(graph)
    with warnings.catch_warnings():
        # torch calls its csr tensors beta, and says that it trusts what it is given.
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(
            torch.from_numpy(mean.indptr.astype(np.int64)),
            torch.from_numpy(mean.indices.astype(np.int64)),
            torch.from_numpy(mean.data),
            size=mean.shape,
            device=device,
        )


def encode_whole(
    model: HEISTNiche,
    tissue: Tissue,
    *,
    device: torch.device,
    dtype: Literal["float32", "bfloat16"],
    min_detected: float = 0.02,
) -> tuple[np.ndarray, np.ndarray, Components]:
    """Embed all cells at once.

    Parameters
    ----------
    model, tissue
        Memory is that of the components at each radius: with the bundled weights 1 KiB a cell.
    device, dtype
        See :func:`choose_device` and :func:`choose_dtype`; MPS is replaced by the CPU.
    min_detected
        See :func:`spatialfm._data._components.spatial_components`.

    Returns
    -------
    (n, d) niche and (n, d') own state of each cell, float32, in the order of ``tissue`` (see :meth:`spatialfm.models.HEISTNiche.encode`), and
    the components that were found, which know the features that took part.
    """
    scores, mean, components = _read(model, tissue, device, min_detected)
    return *_encode(model, tissue, scores, mean, dtype), components


def hear_whole(
    model: HEISTNiche, tissue: Tissue, *, device: torch.device
) -> tuple[np.ndarray, np.ndarray, torch.Tensor, torch.Tensor]:
    """Niche and own state as :func:`encode_whole` finds them, and what the network is given: of each cell (n, K, S), and of the components (K, 2 S + 1)."""
    from spatialfm.models.heist_niche import component_statistics, hear

    scores, mean, _ = _read(model, tissue, device)
    cell, gene = _encode(model, tissue, scores, mean, "float32")
    # Not in inference mode: gradients go through the network that is given this.
    with _threads(tissue):
        heard = torch.stack(hear(scores, mean, model.config.radii), dim=2)
        return cell, gene, heard, component_statistics(heard)


def _read(
    model: HEISTNiche, tissue: Tissue, device: torch.device, min_detected: float = 0.02
) -> tuple[torch.Tensor, torch.Tensor, Components]:
    """Scores (n, K) of the components, :func:`walk_tensor` (n, n), and the components."""
    device = sparse_device(device)
    components = spatial_components(
        tissue.expression, tissue.graph, n_components=model.config.n_components, min_detected=min_detected
    )
    return torch.from_numpy(components.scores).to(device), walk_tensor(tissue.graph, device), components


def _encode(
    model: HEISTNiche,
    tissue: Tissue,
    scores: torch.Tensor,
    mean: torch.Tensor,
    dtype: Literal["float32", "bfloat16"],
) -> tuple[np.ndarray, np.ndarray]:
    with in_evaluation(model, scores.device), _threads(tissue):
        cell, gene = model.encode(scores, mean, slide_size(tissue), dtype=getattr(torch, dtype))
        return cell.cpu().numpy(), gene.cpu().numpy()


def slide_size(tissue: Tissue) -> float:
    """Cells of a slide; their mean, of several."""
    return len(tissue.rows) / len(np.unique(tissue.slide))


def _threads(tissue: Tissue) -> AbstractContextManager[None]:
    return torch_threads(1 if len(tissue.rows) <= _SMALL else None)
