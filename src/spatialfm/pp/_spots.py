"""Spots as a multimodal model reads them: a tissue with TF-IDF weighted genes under common names, and features of its patches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp

from spatialfm._data._genes import guess_organism, match_genes
from spatialfm.pp._tfidf import inverse_document_frequencies, weigh
from spatialfm.pp._tissue import Tissue, read_tissue

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from spatialfm._data._genes import Organism

IMAGE_FEATURES = "image_features"
"""Key of ``obsm`` and ``uns``."""
# Kinds of values that counts of molecules may come as.
_TRANSCRIPTS = ("counts", "normalized", "log")


def stored_features(adata: AnnData) -> tuple[np.ndarray, str | None]:
    """Features of the patches in ``obsm``, float32, and the name of their tower where it is known; raises unless finite."""
    given = np.asarray(adata.obsm[IMAGE_FEATURES], np.float64)
    # What is too large for float32 is infinite there.
    if not (np.abs(given) <= np.finfo(np.float32).max).all():
        msg = f"obsm[{IMAGE_FEATURES!r}] holds values that are not finite; run sfm.tl.image_features again"
        raise ValueError(msg)
    features = given.astype(np.float32)
    facts = adata.uns.get(IMAGE_FEATURES)
    tower = facts.get("tower") if isinstance(facts, Mapping) else None
    return features, None if tower is None else str(tower)


@dataclass
class Spots(Tissue):
    """A tissue with what HiBio reads; without features (g = 0) where there is an image alone."""

    organism: Organism | None
    symbols: list[str]
    """Human symbol of each feature, ``""`` where there is none."""
    profile: sp.csr_matrix
    """(n, g) float32, TF-IDF, see :func:`spatialfm.pp.tfidf`."""
    image: np.ndarray | None
    """(n, f) float32 features of the patches."""

    def by_symbol(self, values: Any, symbols: Sequence[str]) -> sp.csr_matrix:
        """Columns of ``values`` (n, g) under the given symbols, those of one symbol summed: (n, len(symbols)) csr float32."""
        position = pd.Index(list(symbols)).get_indexer(self.symbols)
        known = np.flatnonzero(position >= 0)
        entries = (np.ones(len(known), np.float32), (known, position[known]))
        return sp.csr_matrix(values) @ sp.csr_matrix(entries, shape=(len(self.symbols), len(symbols)))


def read_spots(
    adata: AnnData,
    *,
    image: np.ndarray | None,
    organism: Organism | Literal["auto"] = "auto",
    idf: bool = True,
    **how: Any,
) -> Spots:
    """Read spots, with ``adata`` untouched; ``how`` as for :func:`read_tissue`, ``image`` in the order of its rows.

    Without ``idf`` all genes weigh the same.

    Raises
    ------
    ValueError
        Values are no transcripts, names are no genes, or there are neither features nor an image.
    """
    tissue = read_tissue(adata, networks=False, features=image is None or adata.n_vars > 0, **how)
    symbols: list[str] = []
    whose: Any = None
    if tissue.genes:
        if tissue.kind not in _TRANSCRIPTS:
            msg = (
                f"the values look like {tissue.kind} values, and HiBio weighs genes as terms of a text: pass counts, normalised or logged counts "
                "with layer=, say with values= what they are, use the default model for proteins, or leave the features out (adata[:, []]) to embed the image alone"
            )
            raise ValueError(msg)
        whose = guess_organism(tissue.genes) if organism == "auto" else organism
        symbols = list(match_genes(tissue.genes, whose, to="human")["gene_symbol"])
    profile = sp.csr_matrix(tissue.expression, dtype=np.float32, copy=True)
    profile.eliminate_zeros()
    if tissue.genes:
        slides = [np.flatnonzero(tissue.slide == k) for k in np.unique(tissue.slide)]
        weigh(profile, inverse_document_frequencies(profile, slides) if idf else np.ones(profile.shape[1]))
    parts = {f.name: getattr(tissue, f.name) for f in fields(Tissue)}
    features = None if image is None else image[tissue.rows]
    return Spots(**parts, organism=whose, symbols=symbols, profile=profile, image=features)
