r"""HEIST-niche: the hierarchy of HEIST (Madhu et al. 2025) with what the published model lacks.

* **Genes** are pooled by their loadings on the components of the tissue at hand (:mod:`spatialfm._data._components`), so each keeps its identity
  on any panel; the mean pool of HEIST forgets it.
* **Cells** hear their neighbours' values, on the tissue graph and over several radii, not one scalar and not absolute coordinates: turning,
  mirroring or scaling the slide changes nothing.
* Order and sign of components are arbitrary. **Weights are shared between components** and every map is odd, so flipping a component flips
  its columns and nothing else.

For a cell with components c (K), lazy steps :math:`h_{t+1} = (h_t + A h_t) / 2` on the tissue graph (A: mean over neighbours) give what is
heard within radius t. Each component is a token of S radii, and passes blocks

.. math:: u \leftarrow u + W (u \odot \sigma(g(s_k, e_k, \bar e))),\qquad e = \log(1 + u^2)

where :math:`s_k` are the component's own statistics (how much of its variance is left at each radius) and :math:`\bar e` is the mean of e over
the cell's components: through the gates a cell decides which radius to trust for which component.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spatialfm._checks import check_positive

if TYPE_CHECKING:
    from collections.abc import Iterable

# Cells whose tokens are in memory at once.
_CHUNK = 8192


@dataclass(frozen=True)
class HEISTNicheConfig:
    """Shape of a :class:`HEISTNiche`."""

    n_components: int = 32
    """Components of the expression that cells enter with, at most."""
    radii: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32, 64)
    """Lazy steps on the tissue graph that the network hears."""
    width: int = 16
    """Channels of a component."""
    blocks: int = 2
    heads: int = 2
    """Columns the network returns for each component."""
    niche_scale: float = 0.07
    """Steps of the niche's own radius, as a multiple of the square root of a slide's cells: between a cell and the section."""
    contexts: tuple[float, ...] = (0.25, 4.0, 16.0)
    """Further radii in the embedding, as multiples of the niche's."""
    max_steps: int = 256
    """Of the widest radius. Where it is reached, see :meth:`steps`."""
    learned_weight: float = 0.7
    """Of what the network returns, beside what is heard at the niche's radius."""
    niche_columns: int = 12
    context_columns: int = 10

    def __post_init__(self) -> None:
        # JSON knows no tuples.
        object.__setattr__(self, "radii", tuple(self.radii))
        object.__setattr__(self, "contexts", tuple(float(c) for c in self.contexts))
        whole = all(isinstance(r, int) and not isinstance(r, bool) for r in self.radii)
        if not whole or self.radii[:1] != (0,) or any(b <= a for a, b in pairwise(self.radii)):
            msg = f"radii={self.radii} must be whole numbers that ascend from 0"
            raise ValueError(msg)
        for name in ("n_components", "width", "blocks", "heads", "max_steps", "niche_columns", "context_columns"):
            check_positive(name, getattr(self, name))
        if not all(c > 0 for c in (self.niche_scale, *self.contexts)):
            msg = f"niche_scale={self.niche_scale} and contexts={self.contexts} must be above 0"
            raise ValueError(msg)

    def steps(self, n_cells: float) -> tuple[float, list[float]]:
        """Lazy steps of the niche's radius, and of each further one, on slides of ``n_cells``.

        Where the widest would take more than ``max_steps``, it takes these, and the others wider than the niche lie between as they did in logarithm. On the
        largest slides the niche stops growing, so that each has about twice the steps of the one before.
        """
        wider = [c for c in self.contexts if c > 1]
        widest = max(wider, default=1.0)
        niche = min(max(1.0, self.niche_scale * n_cells**0.5), max(1.0, self.max_steps / min(widest, 2 ** len(wider))))
        stretch = math.log(self.max_steps / niche) / math.log(widest) if niche * widest > self.max_steps else 1.0
        return niche, [float(round(niche * c ** (stretch if c > 1 else 1.0))) for c in self.contexts]


class Block(nn.Module):
    """A gated odd map of a component's channels, the gates from what has no sign."""

    def __init__(self, width: int, n_statistics: int) -> None:
        super().__init__()
        self.cell = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, 16))
        self.gate = nn.Sequential(nn.Linear(n_statistics + width + 16, 32), nn.GELU(), nn.Linear(32, width))
        self.mix = nn.Linear(width, width, bias=False)

    def forward(self, u: Tensor, statistics: Tensor) -> Tensor:
        """Pass ``u`` (C, K, width); ``statistics`` (K, n_statistics)."""
        energy = torch.log1p(u.square())
        cell = self.cell(energy.mean(1, keepdim=True)).expand(-1, u.shape[1], -1)
        gate = self.gate(torch.cat([statistics.expand(len(u), -1, -1), energy, cell], dim=2))
        return u + self.mix(u * gate.sigmoid())


class HEISTNiche(nn.Module):
    """The cell's own state in one block, its place in the tissue in the other."""

    name = "heist-niche"

    def __init__(self, config: HEISTNicheConfig | None = None) -> None:
        super().__init__()
        self.config = config or HEISTNicheConfig()
        self.record: dict[str, Any] = {}
        n_radii = len(self.config.radii)
        self.enter = nn.Linear(n_radii, self.config.width, bias=False)
        self.blocks = nn.ModuleList(Block(self.config.width, 2 * n_radii + 1) for _ in range(self.config.blocks))
        self.leave = nn.Linear(self.config.width, self.config.heads, bias=False)

    def forward(self, heard: Tensor, statistics: Tensor) -> Tensor:
        """Embed cells by what they hear of each component at each radius.

        Parameters
        ----------
        heard
            (C, K, S), see :func:`hear`.
        statistics
            (K, 2 S + 1), see :func:`component_statistics`.

        Returns
        -------
        (C, K, heads); flipping the sign of a component flips its columns.
        """
        u = self.enter(heard)
        for block in self.blocks:
            u = block(u, statistics)
        return self.leave(u)

    def encode(
        self, components: Tensor, walk: Tensor, n_cells: float, *, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Embed all cells of a tissue.

        Parameters
        ----------
        components
            (n, K) components of each cell, largest variance first, the mean squared length of a row K.
        walk
            (n, n) sparse csr: mean over the neighbours in the tissue graph.
        n_cells
            Cells of a slide (their mean, of several): sets the niche's radius.
        dtype
            Type of the network's matrix products; all else is float32.

        Returns
        -------
        cell
            (n, d) the niche. The first 12 columns are the principal components of what is heard within the niche's radius beside what the
            network returns, of unit total variance: components chosen after smoothing. Then those of each further radius, 10 a radius and
            0.05 in standard deviation, which hardly moves a distance; but a classifier that scales its columns hears them.
        gene
            (n, d) the cell's own state: its components, the larger ones damped to the fourth root of their standard deviation; then 10 of
            its neighbours' mean (0.05).
        """
        config = self.config
        niche, around = config.steps(n_cells)
        radii = sorted({*map(float, config.radii), niche, *around})
        heard = dict(zip(radii, hear(components, walk, radii), strict=True))
        tokens = torch.stack([heard[float(r)] for r in config.radii], dim=2)
        statistics = component_statistics(tokens)
        learned = torch.cat(
            [
                self._forward_as(tokens[s : s + _CHUNK], statistics, dtype).flatten(1)
                for s in range(0, len(tokens), _CHUNK)
            ]
        )
        niche_heard = torch.cat([unit(heard[niche]), config.learned_weight * unit(learned)], dim=1)
        cell = [principal(niche_heard, config.niche_columns)]
        cell += [0.05 * principal(heard[r], config.context_columns) for r in around]
        spread = components.std(0, correction=0).clamp(min=1e-6)
        own = components / spread**0.75
        gene = [
            own / own.square().sum(1).mean().sqrt(),
            0.05 * principal(torch.mm(walk, components), config.context_columns),
        ]
        return torch.cat(cell, dim=1), torch.cat(gene, dim=1)

    def _forward_as(self, heard: Tensor, statistics: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.autocast(heard.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return self(heard, statistics).float()


def hear(components: Tensor, walk: Tensor, radii: Iterable[float]) -> list[Tensor]:
    """Components (n, K) after so many lazy steps on the tissue graph, ``radii`` ascending; a fraction of a step goes that part of the way."""
    out, h, done = [], components, 0
    for radius in radii:
        while done < int(radius):
            h = (h + torch.mm(walk, h)) / 2
            done += 1
        part = (radius - done) / 2
        out.append(h + part * (torch.mm(walk, h) - h) if part else h)
    return out


def component_statistics(heard: Tensor) -> Tensor:
    """Tell components apart (K, 2 S + 1): at each radius, correlation with the cell itself and variance left; and the variance."""
    own = heard[:, :, :1]
    variance = own.square().mean(0) + 1e-9
    correlation = (heard * own).mean(0) / variance
    left = (heard.square().mean(0) / variance + 1e-4).log() / 5
    return torch.cat([correlation, left, (variance / variance.mean()).log()], dim=1)


def unit(x: Tensor) -> Tensor:
    """Columns of ``x`` (n, f) centred, their variances summing to one."""
    x = x - x.mean(0)
    return x / x.square().sum(1).mean().sqrt().clamp(min=1e-12)


def principal(x: Tensor, k: int) -> Tensor:
    """First ``k`` principal components of the columns of ``x`` (n, f), of unit total variance, skewed to the right."""
    x = x - x.mean(0)
    _, axes = torch.linalg.eigh((x.T @ x).double().cpu())
    scores = unit(x @ axes.flip(1)[:, :k].to(x))
    return scores * torch.where((scores.double() ** 3).sum(0) < 0, -1.0, 1.0).to(x)
