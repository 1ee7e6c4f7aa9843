r"""HEIST-niche: the hierarchy of HEIST (Madhu et al. 2025), with three changes.

* **Genes** are pooled by their loadings on the components of the slide itself (:mod:`spatialfm._data._components`).
  Each gene keeps its identity on any panel, which the mean pool of HEIST loses.
* **Cells** receive the values of their neighbours on the tissue graph, over several radii, instead of one scalar and
  absolute coordinates. Rotating, mirroring or scaling the slide changes nothing.
* Order and sign of components are arbitrary. **Weights are shared between components** and every map is odd, so
  flipping a component only flips its columns.

For a cell with components c (K), lazy steps :math:`h_{t+1} = (h_t + A h_t) / 2` on the tissue graph (A: mean over
neighbours) give the values propagated within radius t. Each component is a token of S radii, and passes through blocks

.. math:: u \leftarrow u + W (u \odot \sigma(g(s_k, e_k, \bar e))),\qquad e = \log(1 + u^2)

where :math:`s_k` are the component's own statistics (how much of its variance is left at each radius) and
:math:`\bar e` is the mean of e over the components of the cell. The gates weight the radii of each component.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from spatialfm._checks import check_positive
from spatialfm.models._propagate import Projection, beside, component_statistics, fit_principal, fit_unit, propagate

if TYPE_CHECKING:
    from collections.abc import Iterable

# Cells whose tokens are in memory at a time.
CHUNK = 8192


@dataclass(frozen=True)
class HEISTNicheConfig:
    """Shape of a :class:`HEISTNiche`."""

    n_components: int = 32
    """Largest number of components of expression."""
    radii: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32, 64)
    """Lazy steps on the tissue graph after which the network reads the components."""
    width: int = 16
    """Channels of a component."""
    blocks: int = 2
    heads: int = 2
    """Columns the network returns for each component."""
    niche_scale: float = 0.07
    """Radius of the niche in steps, as a multiple of the square root of the number of cells of a slide."""
    contexts: tuple[float, ...] = (0.25, 4.0, 16.0)
    """Further radii in the embedding, as multiples of the radius of the niche."""
    max_steps: int = 256
    """Largest number of steps of a radius, see :meth:`steps`."""
    learned_weight: float = 0.7
    """Weight of the output of the network, relative to the components within the radius of the niche."""
    niche_columns: int = 12
    """Columns of the niche in the embedding."""
    context_columns: int = 10
    """Columns of each further radius in the embedding."""

    def __post_init__(self) -> None:
        # JSON turns tuples into lists.
        object.__setattr__(self, "radii", tuple(self.radii))
        object.__setattr__(self, "contexts", tuple(float(c) for c in self.contexts))
        whole = all(isinstance(r, int) and not isinstance(r, bool) for r in self.radii)
        if not whole or self.radii[:1] != (0,) or any(b <= a for a, b in pairwise(self.radii)):
            msg = f"radii={self.radii} must be increasing whole numbers that start at 0"
            raise ValueError(msg)
        for name in ("n_components", "width", "blocks", "heads", "max_steps", "niche_columns", "context_columns"):
            check_positive(name, getattr(self, name))
        if not all(c > 0 for c in (self.niche_scale, *self.contexts)):
            msg = f"niche_scale={self.niche_scale} and contexts={self.contexts} must be above 0"
            raise ValueError(msg)

    def steps(self, n_cells: float) -> tuple[float, list[float]]:
        """Lazy steps of the radius of the niche, and of each further radius, on slides of ``n_cells``.

        If the widest radius would take more than ``max_steps``, it takes ``max_steps``, and the radii between it and
        the niche keep their proportions on a logarithmic scale. On the largest slides the niche stops growing, so that
        each radius takes about twice the steps of the radius before.
        """
        wider = [c for c in self.contexts if c > 1]
        widest = max(wider, default=1.0)
        niche = min(max(1.0, self.niche_scale * n_cells**0.5), max(1.0, self.max_steps / min(widest, 2 ** len(wider))))
        stretch = math.log(self.max_steps / niche) / math.log(widest) if niche * widest > self.max_steps else 1.0
        return niche, [float(round(niche * c ** (stretch if c > 1 else 1.0))) for c in self.contexts]


class Block(nn.Module):
    """A gated odd map of the channels of a component; the gates do not depend on its sign."""

    def __init__(self, width: int, n_statistics: int) -> None:
        super().__init__()
        self.cell = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, 16))
        self.gate = nn.Sequential(nn.Linear(n_statistics + width + 16, 32), nn.GELU(), nn.Linear(32, width))
        self.mix = nn.Linear(width, width, bias=False)

    def forward(self, u: Tensor, statistics: Tensor) -> Tensor:
        """Update ``u`` (C, K, width), given ``statistics`` (K, n_statistics)."""
        energy = torch.log1p(u.square())
        cell = self.cell(energy.mean(1, keepdim=True)).expand(-1, u.shape[1], -1)
        gate = self.gate(torch.cat([statistics.expand(len(u), -1, -1), energy, cell], dim=2))
        return u + self.mix(u * gate.sigmoid())


class NicheAxes(NamedTuple):
    """Axes of an embedding by :class:`HEISTNiche`, with which other slides are embedded in the same columns."""

    steps: tuple[float, ...]
    """Lazy steps on the tissue graph: of the niche, then of each further radius."""
    statistics: Tensor
    """(K, 2 S + 1), see :func:`component_statistics`."""
    niche: Projection
    """Projection of the components within the radius of the niche and the output of the network, side by side."""
    contexts: list[Projection]
    """Projection of the components at each further radius."""
    state: Tensor
    """(K,) factor of each component."""
    neighbors: Projection
    """Projection of the mean of the direct neighbours."""


class HEISTNiche(nn.Module):
    """Embed the niche of each cell in one block of columns and its own state in another."""

    name = "heist-niche"

    def __init__(self, config: HEISTNicheConfig | None = None) -> None:
        super().__init__()
        self.config = config or HEISTNicheConfig()
        self.record: dict[str, Any] = {}
        n_radii = len(self.config.radii)
        self.enter = nn.Linear(n_radii, self.config.width, bias=False)
        self.blocks = nn.ModuleList(Block(self.config.width, 2 * n_radii + 1) for _ in range(self.config.blocks))
        self.leave = nn.Linear(self.config.width, self.config.heads, bias=False)

    def forward(self, propagated: Tensor, statistics: Tensor) -> Tensor:
        """Run the network on the propagated values of each component at each radius.

        Parameters
        ----------
        propagated
            (C, K, S), see :func:`spatialfm.models._propagate.propagate`.
        statistics
            (K, 2 S + 1), see :func:`component_statistics`.

        Returns
        -------
        (C, K, heads); flipping the sign of a component flips its columns.
        """
        u = self.enter(propagated)
        for block in self.blocks:
            u = block(u, statistics)
        return self.leave(u)

    def fit_encode(
        self, components: Tensor, transition: Tensor, n_cells: float, *, dtype: torch.dtype = torch.float32
    ) -> tuple[NicheAxes, Tensor, Tensor]:
        """Fit the axes of the embedding of a tissue, and embed all of its cells.

        Parameters
        ----------
        components
            (n, K) components of each cell, largest variance first, the mean squared length of a row K.
        transition
            (n, n) sparse csr: mean over the neighbours in the tissue graph.
        n_cells
            Number of cells of a slide (the mean if there are several), which sets the radius of the niche.
        dtype
            Type of the matrix products of the network; everything else is float32.

        Returns
        -------
        axes
            Axes on which :meth:`encode` embeds other cells.
        niche
            (n, d) niche of each cell. The first 12 columns are principal components, of unit total variance, of the
            values propagated within the radius of the niche and the output of the network, side by side. Each further
            radius adds 10 columns of standard deviation 0.05, which hardly change distances but can be used by a
            classifier that scales its columns.
        state
            (n, d) state of each cell: its components, each scaled to the fourth root of its standard deviation, then 10
            columns of the mean of its neighbours (0.05).
        """
        config = self.config
        niche, around = config.steps(n_cells)
        propagated = self._propagate(components, transition, (niche, *around))
        statistics = component_statistics(self._tokens(propagated))
        learned = self._run(propagated, statistics, dtype)
        both = beside(fit_unit(propagated[niche]), fit_unit(learned).times(config.learned_weight))
        principal = fit_principal(both.apply(torch.cat([propagated[niche], learned], dim=1)), config.niche_columns)
        spread = components.std(0, correction=0).clamp(min=1e-6)
        damped = components / spread**0.75
        axes = NicheAxes(
            steps=(niche, *around),
            statistics=statistics,
            # Scaled columns are centred, so one map combines both steps.
            niche=Projection(both.center, both.axes @ principal.axes),
            contexts=[fit_principal(propagated[r], config.context_columns).times(0.05) for r in around],
            state=1 / (spread**0.75 * damped.square().sum(1).mean().sqrt()),
            neighbors=fit_principal(torch.mm(transition, components), config.context_columns).times(0.05),
        )
        return axes, *self._project(axes, components, transition, propagated, learned)

    def encode(
        self, components: Tensor, transition: Tensor, axes: NicheAxes, *, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Embed cells on given axes; arguments and both results are those of :meth:`fit_encode`."""
        propagated = self._propagate(components, transition, axes.steps)
        learned = self._run(propagated, axes.statistics, dtype)
        return self._project(axes, components, transition, propagated, learned)

    def _propagate(self, components: Tensor, transition: Tensor, steps: Iterable[float]) -> dict[float, Tensor]:
        """Propagate to all radii of the network and of the embedding."""
        radii = sorted({*map(float, self.config.radii), *steps})
        return dict(zip(radii, propagate(components, transition, radii), strict=True))

    def _tokens(self, propagated: dict[float, Tensor]) -> Tensor:
        return torch.stack([propagated[float(r)] for r in self.config.radii], dim=2)

    def _run(self, propagated: dict[float, Tensor], statistics: Tensor, dtype: torch.dtype) -> Tensor:
        """Run the network on all cells: (n, K * heads)."""
        tokens = self._tokens(propagated)
        parts = tokens.split(CHUNK)
        with torch.autocast(tokens.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return torch.cat([self(part, statistics).float().flatten(1) for part in parts])

    def _project(
        self,
        axes: NicheAxes,
        components: Tensor,
        transition: Tensor,
        propagated: dict[float, Tensor],
        learned: Tensor,
    ) -> tuple[Tensor, Tensor]:
        niche, *around = axes.steps
        cell = [axes.niche.apply(torch.cat([propagated[niche], learned], dim=1))]
        cell += [projection.apply(propagated[r]) for projection, r in zip(axes.contexts, around, strict=True)]
        own = [components * axes.state, axes.neighbors.apply(torch.mm(transition, components))]
        return torch.cat(cell, dim=1), torch.cat(own, dim=1)
