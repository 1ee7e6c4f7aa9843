"""A model read with its input, so that it can be trained on labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from spatialfm.engine import choose_device, hear_whole
from spatialfm.models import HEISTNiche
from spatialfm.models._registry import take_model
from spatialfm.pp._tissue import read_tissue
from spatialfm.tl._joined import join
from spatialfm.train._label_network import HeardCells, fit_label_network

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

    from spatialfm.models import HEIST, HiBio


class Tuner:
    """Embeds the cells of all files together, and trains copies of the model on labels; model and files stay as they are."""

    def __init__(
        self,
        files: list[AnnData],
        model: str | Path | HEIST | HEISTNiche | HiBio,
        reading: dict[str, Any],
        device: str | None,
    ) -> None:
        place = choose_device(device)
        encoder = take_model(
            model, HEISTNiche, lacks="cannot be trained on labels by method='fine_tune'", default="heist-niche"
        )
        self.model = encoder
        if len(files) > 1:
            joined = join(*files, **reading)
            reading = reading | {"library_key": "slide", "layer": None, "values": "log"}
        else:
            joined = files[0]
        tissue = read_tissue(joined, **reading, networks=False)
        self.values = str(joined.uns["values"]) if len(files) > 1 else tissue.kind
        cell, gene, self._heard, self._statistics = hear_whole(encoder, tissue, device=place)
        self._position = np.argsort(tissue.rows)
        self.embedding = np.hstack([cell, gene])[self._position]

    def take(self, rows: np.ndarray, columns: np.ndarray) -> None:
        """Bring the cells into the order of ``rows``; ``columns`` (rows, d) is the embedding as the probe has it."""
        heard = self._heard[torch.from_numpy(self._position[rows]).to(self._heard.device)]
        self._cells = HeardCells(heard, self._statistics, torch.from_numpy(columns).to(heard.device))

    def fit(self, codes: np.ndarray, rows: np.ndarray, probe: np.ndarray, *, seed: int) -> np.ndarray:
        """Probability (n, labels), see :func:`spatialfm.train._label_network.fit_label_network`."""
        return fit_label_network(self.model, self._cells, codes, rows, probe, seed=seed)
