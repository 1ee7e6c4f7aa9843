"""The interface between an architecture and the rest of the package, and the embedding that it returns.

To add an architecture, write its network in ``models/x.py`` and a subclass of :class:`Encoder` in ``engine/_x.py``.
Register them in ``models/_registry.py`` and in ``ENCODERS`` of ``engine/__init__.py``.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd

from spatialfm._checks import check_fields
from spatialfm._data._embeddings import RECORDS
from spatialfm._data._write import write
from spatialfm._settings import logger
from spatialfm.models import fingerprint

if TYPE_CHECKING:
    import torch
    from anndata import AnnData

    from spatialfm._data._expression import ValuesKind
    from spatialfm.engine._tissue import Tissue

Axes = Literal["model", "data"]


@dataclass(frozen=True)
class Encoder(ABC):
    """A model with its options, ready to embed tissues. The fields of a subclass are the options of the architecture.

    ``read`` reads the input of the model from an AnnData, ``fit`` computes the state, which depends on all cells at
    once, and ``encode`` embeds cells. Tissues encoded with the same state have the same columns.
    """

    model: Any
    """The torch module; None if tissues are only read."""

    model_type: ClassVar[type]
    """Class of the module."""
    prefix: ClassVar[str]
    """Default prefix of the names of further fields of an embedding."""
    axes: ClassVar[Axes]
    """``"model"`` if the columns of an embedding mean the same for all files, ``"data"`` if they depend on the data."""

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def options(cls) -> list[str]:
        """Names of the options."""
        return [f.name for f in fields(cls) if f.name != "model"]

    tables: ClassVar[tuple[str, ...]] = ()
    """Suffixes of the names of further tables in ``obsm``."""

    @abstractmethod
    def names(self, key_added: str | None) -> dict[str, str]:
        """Key of ``obsm`` of each block that an :class:`Embedding` may have."""

    def fields(self, key_added: str | None) -> dict[str, list[str]]:
        """Names of the fields that an embedding may be written to."""
        prefix = key_added or self.prefix
        return {"obsm": [*self.names(key_added).values(), *(f"{prefix}_{name}" for name in self.tables)]}

    @abstractmethod
    def read(
        self,
        adata: AnnData,
        *,
        library_key: str | None = None,
        layer: str | None = None,
        basis: str = "spatial",
        values: ValuesKind = "auto",
        device: torch.device,
    ) -> Tissue:
        """Read a tissue without changing ``adata``; see :func:`spatialfm.tl.embed` for the arguments and errors."""

    @abstractmethod
    def fit(self, tissue: Tissue, *, device: torch.device) -> Any:
        """Compute the state: what ``encode`` needs in addition to the cells. It is small, and may be None."""

    @abstractmethod
    def encode(self, tissue: Tissue, state: Any, *, device: torch.device) -> Embedding:
        """Embed the cells of a tissue on the axes of a state."""

    def fit_encode(self, tissue: Tissue, *, device: torch.device) -> tuple[Any, Embedding]:
        """Compute the state and the embedding of a tissue. Encoders override this if doing both at once is cheaper."""
        state = self.fit(tissue, device=device)
        return state, self.encode(tissue, state, device=device)


@dataclass
class Embedding:
    """Embedding of a tissue, with rows in the order of the tissue."""

    encoder: Encoder
    tissue: Tissue
    blocks: dict[str, np.ndarray]
    """(n, d) float32 matrices by the names the encoder gives them."""
    device: torch.device
    genes: list[str]
    """Features that were used."""
    left_out: dict[str, str]
    """Features that were left out, each with the reason."""
    params: dict[str, Any]
    """Options of the encoder, and other parameters of the embedding."""
    source: str = "expression"
    """Modalities that were read, for the log."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Further entries of the record."""
    own_axes: dict[str, Axes] = field(default_factory=dict)
    """Axes of the blocks whose axes differ from those of the encoder."""
    tables: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """Further tables for ``obsm`` by the suffix of their name; their columns are (n,)."""
    regions: list[np.ndarray] = field(default_factory=list)
    """For each level, the region (n,) of each cell, numbered from 0."""

    def __post_init__(self) -> None:
        bad = ~np.logical_and.reduce([np.isfinite(x).all(axis=1) for x in self.blocks.values()])
        if bad.any():
            name = self.encoder.model.name
            msg = (
                f"the embedding by {name!r} is not finite for {bad.sum()} of {len(bad)} cells; "
                "try dtype='float32', check the values (and image features), or try another model"
            )
            raise ValueError(msg)

    def write(self, adata: AnnData, key_added: str | None, *, copy: bool) -> AnnData:
        """Write the embedding, its record, and the graphs that were built; returns the AnnData that was written to.

        Every embedding is written to an AnnData by this method.
        """
        names = self.encoder.names(key_added)
        prefix = key_added or self.encoder.prefix
        obsm: dict[str, Any] = {names[block]: self.tissue.in_order(x) for block, x in self.blocks.items()}
        obsm |= {
            f"{prefix}_{name}": pd.DataFrame(
                {column: self.tissue.in_order(x) for column, x in columns.items()}, index=adata.obs_names
            )
            for name, columns in self.tables.items()
        }
        obs = {f"{prefix}_region_{k + 1}": self._categories(region) for k, region in enumerate(self.regions)}
        record = self._record() | ({"regions": list(obs)} if obs else {})
        records = {
            names[block]: record | {"axes": self.own_axes.get(block, self.encoder.axes)} for block in self.blocks
        }
        adata = write(adata, "tl.embed", prefix, {"obsm": obsm, "obs": obs, RECORDS: records}, copy=copy)
        self.tissue.store_built(adata)
        logger.info(
            "embed: %d cells, %d of %d features, from %s by %s on %s -> %s",
            adata.n_obs,
            len(self.genes),
            adata.n_vars,
            self.source,
            self.encoder.model.name,
            self.device,
            ", ".join(f"obsm[{names[block]!r}]" for block in self.blocks),
        )
        for reason in dict.fromkeys(self.left_out.values()):
            features = [name for name, r in self.left_out.items() if r == reason]
            more = ", ..." if len(features) > 5 else ""
            logger.info("embed: %d features left out, %s (%s%s)", len(features), reason, ", ".join(features[:5]), more)
        return adata

    def _categories(self, region: np.ndarray) -> pd.Categorical:
        names = [str(k + 1) for k in range(int(region.max()) + 1)]
        return pd.Categorical.from_codes(self.tissue.in_order(region), names)

    def _record(self) -> dict[str, Any]:
        """Describe how the embedding was computed, for ``uns["embeddings"]``."""
        # The rows are in the order of the tissue, so the id does not depend on the order of the AnnData.
        digest = hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in self.blocks.values()))
        return {
            "id": digest.hexdigest()[:16],
            "model": self.encoder.model.name,
            "sha256": fingerprint(self.encoder.model),
            "params": {**self.tissue.params, "device": self.device.type, **self.params},
            "slides": {
                "names": self.tissue.slides,
                "n_cells": np.bincount(self.tissue.slide, minlength=len(self.tissue.slides)),
            },
            "genes": {
                "n_in": self.tissue.n_features,
                "n_used": len(self.genes),
                "names": self.genes,
                "left_out": list(self.left_out),
                "left_out_reasons": list(self.left_out.values()),
            },
            **self.facts,
        }
