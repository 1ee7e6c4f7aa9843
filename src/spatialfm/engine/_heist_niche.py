"""HEIST-niche: reading, fitting and embedding of a whole tissue."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch

from spatialfm._data._components import ComponentAxes, spatial_components, transition_matrix
from spatialfm._data._expression import NOT_MEASURED
from spatialfm.engine._device import choose_dtype, in_evaluation, sparse_device, torch_threads
from spatialfm.engine._encoder import Axes, Embedding, Encoder
from spatialfm.engine._tissue import Tissue, read_tissue
from spatialfm.models import HEISTNiche
from spatialfm.models._propagate import component_statistics, propagate, transition_tensor

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from anndata import AnnData

    from spatialfm._data._components import Components
    from spatialfm.models.heist_niche import NicheAxes

# Up to this many cells, the products are so small that one thread is as fast as several.
_SMALL = 20_000


class NicheState(NamedTuple):
    """Axes of the embedding of a dataset."""

    features: list[str]
    """Names of the features that were used."""
    components: ComponentAxes
    axes: NicheAxes

    def scores(self, tissue: Tissue) -> np.ndarray:
        """Scores (n, K) float32 of the cells of a tissue on the components; raises if a feature is missing."""
        return self.components.scores(tissue.expression, tissue.genes, self.features)


class NetworkInput(NamedTuple):
    """Input of the network, for cells in the order of a tissue."""

    propagated: torch.Tensor
    """(n, K, S) components at each radius."""
    statistics: torch.Tensor
    """(K, 2 S + 1) statistics of the components."""


@dataclass(frozen=True)
class HEISTNicheEncoder(Encoder):
    """Encoder of expression and the tissue graph; see :class:`spatialfm.models.HEISTNiche`."""

    min_detected: float = 0.02
    """Features detected in a smaller share of cells are left out, except for the 50 detected in most cells."""
    dtype: str | None = None
    """Type of the matrix products of the network."""

    model_type = HEISTNiche
    prefix = "heist-niche"
    axes: ClassVar[Axes] = "data"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.min_detected <= 1:
            msg = f"min_detected must be a share of the cells, from 0 to 1, got {self.min_detected!r}"
            raise ValueError(msg)

    def names(self, key_added: str | None) -> dict[str, str]:
        """Niche and state."""
        middle = "" if key_added is None else f"_{key_added}"
        return {block: f"X{middle}_{block}" for block in ("niche", "state")}

    def read(self, adata: AnnData, *, device: torch.device | None = None, **reading: Any) -> Tissue:
        """Read all features; gene networks are not needed."""
        return read_tissue(adata, networks=False, **reading)

    def fit(self, tissue: Tissue, *, device: torch.device) -> NicheState:
        """Compute the components of the expression, and the axes of the propagated components."""
        return self.fit_encode(tissue, device=device)[0]

    def fit_encode(self, tissue: Tissue, *, device: torch.device) -> tuple[NicheState, Embedding]:
        """Compute state and embedding with one propagation.

        Needs the memory of the components at each radius, 1 KiB per cell for the bundled weights.
        """
        found = self._components(tissue)
        dtype = choose_dtype(self.dtype, device)
        device = sparse_device(device)
        transition = transition_tensor(tissue.graph, device)
        scores = torch.from_numpy(found.scores).to(device)
        with in_evaluation(self.model, device), _threads(tissue):
            axes, *blocks = self.model.fit_encode(scores, transition, tissue.slide_size, dtype=getattr(torch, dtype))
        state = NicheState([tissue.genes[i] for i in found.features], found.axes, axes)
        left_out = {tissue.genes[i]: reason for reason, features in found.left_out.items() for i in features}
        return state, self._embedding(tissue, state, blocks, left_out, device)

    def encode(self, tissue: Tissue, state: NicheState, *, device: torch.device) -> Embedding:
        """Embed cells on the axes of a state. The tissue must have all features of the state."""
        dtype = choose_dtype(self.dtype, device)
        device = sparse_device(device)
        scores = torch.from_numpy(state.scores(tissue)).to(device)
        transition = transition_tensor(tissue.graph, device)
        with in_evaluation(self.model, device), _threads(tissue):
            blocks = self.model.encode(scores, transition, state.axes, dtype=getattr(torch, dtype))
        used = set(state.features)
        left_out = {name: "not among the features of the state" for name in tissue.genes if name not in used}
        return self._embedding(tissue, state, list(blocks), left_out, device)

    def encode_panel(self, tissue: Tissue, expression: Any, *, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
        """Compute niche and state of the cells of a tissue from another ``expression`` (n, f), dense or csr."""
        genes = [str(i) for i in range(expression.shape[1])]
        blocks = self.fit_encode(replace(tissue, expression=expression, genes=genes), device=device)[1].blocks
        return blocks["niche"], blocks["state"]

    def network_input(self, tissue: Tissue, state: NicheState, *, device: torch.device) -> NetworkInput:
        """Prepare the input of the network, for fine-tuning."""
        device = sparse_device(device)
        scores = torch.from_numpy(state.scores(tissue)).to(device)
        transition = transition_tensor(tissue.graph, device)
        with _threads(tissue):
            propagated = torch.stack(propagate(scores, transition, self.model.config.radii), dim=2)
            return NetworkInput(propagated, component_statistics(propagated))

    def smoothed_expression(self, values: Any, graph: sp.csr_matrix, features: list[int]) -> np.ndarray:
        """Reconstruct the expression (n, features), float32, from the components after one lazy step on the graph.

        Each gene is regressed on the components; its coefficients times the propagated components of a cell are the
        value of the gene there. Negative values are set to 0.
        """
        scores = spatial_components(values, graph, n_components=self.model.config.n_components).scores
        smoothed = (scores + transition_matrix(graph) @ scores) / 2
        x = values[:, features]
        mean = np.asarray(x.mean(axis=0), np.float64).ravel()
        product = np.asarray((x.T @ scores), np.float64) - np.outer(mean, scores.sum(axis=0, dtype=np.float64))
        coefficients = product / np.maximum(np.square(scores).sum(axis=0, dtype=np.float64), 1e-12)
        return np.maximum(smoothed @ coefficients.T.astype(np.float32) + mean.astype(np.float32), 0)

    def _components(self, tissue: Tissue) -> Components:
        return spatial_components(
            tissue.expression,
            tissue.graph,
            n_components=self.model.config.n_components,
            min_detected=self.min_detected,
        )

    def _embedding(
        self,
        tissue: Tissue,
        state: NicheState,
        blocks: list[torch.Tensor],
        left_out: dict[str, str],
        device: torch.device,
    ) -> Embedding:
        return Embedding(
            encoder=self,
            tissue=tissue,
            blocks={name: x.cpu().numpy() for name, x in zip(("niche", "state"), blocks, strict=True)},
            device=device,
            genes=state.features,
            left_out=dict.fromkeys(tissue.unmeasured, NOT_MEASURED) | left_out,
            params={
                "dtype": choose_dtype(self.dtype, device),
                "min_detected": float(self.min_detected),
                "radii": _radii(tissue, state.axes.steps),
            },
        )


def _radii(tissue: Tissue, steps: tuple[float, ...]) -> dict[str, np.ndarray]:
    """Radii of the niche and of each further block: in steps, in the unit of the coordinates, and in micrometres."""
    i, j = tissue.graph.nonzero()
    edges = np.linalg.norm(tissue.xy[i] - tissue.xy[j], axis=1)
    # A lazy step moves along an edge with probability 1/2.
    reach = np.sqrt(np.array(steps) / 2)
    radii = {"steps": np.array(steps), "distance": reach * float(np.median(edges) if len(edges) else 0)}
    if len(edges) and all(factor is not None for factor in tissue.um):
        radii["um"] = reach * float(np.median(edges * np.array(tissue.um, float)[tissue.slide[i]]))
    return radii


def _threads(tissue: Tissue) -> AbstractContextManager[None]:
    return torch_threads(1 if len(tissue.rows) <= _SMALL else None)
