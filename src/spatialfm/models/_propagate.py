"""Propagation on the tissue graph, and principal components of propagated values."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from spatialfm._data._components import transition_matrix

if TYPE_CHECKING:
    from collections.abc import Iterable

    from scipy.sparse import csr_matrix
    from torch import Tensor


def transition_tensor(graph: csr_matrix, device: torch.device) -> Tensor:
    """Transition matrix of a tissue graph, an (n, n) sparse csr tensor.

    It takes the mean over the neighbours of each cell; cells without neighbours keep their value.
    """
    mean = transition_matrix(graph)
    with warnings.catch_warnings():
        # torch warns that its csr tensors are a beta feature, and that it does not check their indices.
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(
            torch.from_numpy(mean.indptr.astype(np.int64)),
            torch.from_numpy(mean.indices.astype(np.int64)),
            torch.from_numpy(mean.data),
            size=mean.shape,
            device=device,
        )


def propagate(x: Tensor, transition: Tensor, radii: Iterable[float]) -> list[Tensor]:
    """Propagate values ``x`` (n, k) on the tissue graph: one (n, k) result for each of the ascending ``radii``.

    A radius is a number of lazy steps. One step replaces each cell by the mean of its own value and the mean of its
    neighbours; a fraction of a step is interpolated.
    """
    out, h, done = [], x, 0
    for radius in radii:
        while done < int(radius):
            h = (h + torch.mm(transition, h)) / 2
            done += 1
        part = (radius - done) / 2
        out.append(h + part * (torch.mm(transition, h) - h) if part else h)
    return out


def component_statistics(propagated: Tensor) -> Tensor:
    """Statistics (K, 2 S + 1) of each component from its propagated values (n, K, S).

    For each of the S radii: the regression coefficient on the unpropagated values, then the logarithm of the share of
    variance that is left. The last column is the logarithm of the component's variance relative to the mean.
    """
    own = propagated[:, :, :1]
    variance = own.square().mean(0) + 1e-9
    correlation = (propagated * own).mean(0) / variance
    left = (propagated.square().mean(0) / variance + 1e-4).log() / 5
    return torch.cat([correlation, left, (variance / variance.mean()).log()], dim=1)


class Projection(NamedTuple):
    """An affine map of columns."""

    center: Tensor
    """(f,)."""
    axes: Tensor
    """(f, k)."""

    def apply(self, x: Tensor) -> Tensor:
        """Project the rows of ``x`` (n, f) to (n, k)."""
        return (x - self.center) @ self.axes

    def times(self, factor: float) -> Projection:
        """Scale the result."""
        return Projection(self.center, self.axes * factor)


def fit_unit(x: Tensor) -> Projection:
    """Centre the columns of ``x`` (n, f) and scale them together, so that their variances sum to one."""
    center = x.mean(0)
    size = (x - center).square().sum(1).mean().sqrt().clamp(min=1e-12)
    return Projection(center, torch.eye(x.shape[1], device=x.device) / size)


def fit_principal(x: Tensor, k: int) -> Projection:
    """First ``k`` principal components of the columns of ``x`` (n, f), of unit total variance and positive skewness."""
    center = x.mean(0)
    x = x - center
    _, axes = torch.linalg.eigh((x.T @ x).double().cpu())
    axes = axes.flip(1)[:, :k].to(x)
    scores = x @ axes
    rest = scores.mean(0)
    size = (scores - rest).square().sum(1).mean().sqrt().clamp(min=1e-12)
    sign = torch.where((((scores - rest) / size).double() ** 3).sum(0) < 0, -1.0, 1.0).to(x)
    return Projection(center, axes * sign / size)


def beside(*maps: Projection) -> Projection:
    """Join maps of several sets of columns into one map of all columns, side by side."""
    return Projection(torch.cat([m.center for m in maps]), torch.block_diag(*(m.axes for m in maps)))
