"""HiBio-ST: reading, fitting and embedding of spots and their H&E patches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
import torch.nn.functional as F

from spatialfm._checks import check_positive
from spatialfm._data._components import ComponentAxes, spatial_components
from spatialfm._data._expression import NOT_MEASURED
from spatialfm._data._genes import guess_organism, match_genes
from spatialfm._data._images import image_entries
from spatialfm._data._write import check_free, write
from spatialfm.engine._device import in_evaluation, sparse_device
from spatialfm.engine._domain_of_spots import warn_of_single_cells
from spatialfm.engine._encoder import Axes, Embedding, Encoder
from spatialfm.engine._images import compute_image_features
from spatialfm.engine._tissue import Tissue, read_tissue
from spatialfm.models import HiBio
from spatialfm.models._propagate import propagate, transition_tensor
from spatialfm.pp._pathways import known_sets
from spatialfm.pp._regions import nested_partitions
from spatialfm.pp._tfidf import inverse_document_frequencies, weigh

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from anndata import AnnData

    from spatialfm._data._genes import Organism
    from spatialfm.models import HiBioConfig
    from spatialfm.models.hibio import FusedAxes

IMAGE_FEATURES = "image_features"
"""Key of ``obsm`` and ``uns``."""
# Kinds of values that are transcript counts, raw or transformed.
_TRANSCRIPTS = ("counts", "normalized", "log")
# With fewer genes of the model, the profile of a spot is not informative; panels of 100 genes have more.
_MIN_GENES = 20
# Spots whose predicted genes are all in memory at a time.
_ROWS = 1024


# --- spots -----------------------------------------------------------------------------


@dataclass
class Spots(Tissue):
    """A tissue with the input of HiBio; without features (g = 0) if there is only an image."""

    organism: Organism | None
    symbols: list[str]
    """Human symbol of each feature, ``""`` if there is none."""
    profile: sp.csr_matrix
    """(n, g) float32, TF-IDF, see :func:`spatialfm.pp.tfidf`."""
    image: np.ndarray | None
    """(n, f) float32 features of the patches."""
    image_facts: dict[str, Any] | None
    """Record to store with the features of the patches, if they are new."""

    def by_symbol(self, values: Any, symbols: Sequence[str]) -> sp.csr_matrix:
        """Reorder the columns of ``values`` (n, g) to the given symbols; columns of the same symbol are summed.

        Returns (n, len(symbols)) csr float32.
        """
        position = pd.Index(list(symbols)).get_indexer(self.symbols)
        known = np.flatnonzero(position >= 0)
        entries = (np.ones(len(known), np.float32), (known, position[known]))
        return sp.csr_matrix(values) @ sp.csr_matrix(entries, shape=(len(self.symbols), len(symbols)))

    def slide_tensor(self) -> torch.Tensor:
        """Slide of each spot (n,), numbered from 0 without gaps."""
        return torch.from_numpy(np.unique(self.slide, return_inverse=True)[1])

    def store_built(self, adata: AnnData) -> None:
        """Write the graphs and the patch features that were computed to the AnnData."""
        super().store_built(adata)
        if self.image_facts is not None and self.image is not None:
            new: dict[str, dict[str, Any]] = {
                "obsm": {IMAGE_FEATURES: self.in_order(self.image)},
                "uns": {IMAGE_FEATURES: self.image_facts},
            }
            write(adata, "tl.image_features", IMAGE_FEATURES, new, copy=False)


def read_spots(
    adata: AnnData,
    *,
    image: np.ndarray | None,
    image_facts: dict[str, Any] | None = None,
    organism: Organism | Literal["auto"] = "auto",
    idf: bool = True,
    features: bool = True,
    **reading: Any,
) -> Spots:
    """Read spots without changing ``adata``; ``reading`` as for :func:`read_tissue`.

    ``image`` (n, f) is in the row order of ``adata``. Without ``idf``, all genes have the same weight. Without
    ``features``, the expression is not read.

    Raises
    ------
    ValueError
        Values are not transcripts, features are not genes, or there are neither features nor an image.
    """
    features = features and (image is None or adata.n_vars > 0)
    tissue = read_tissue(adata, networks=False, features=features, **reading)
    symbols: list[str] = []
    whose: Any = None
    genes = tissue.genes if features else []
    if genes:
        if tissue.kind not in _TRANSCRIPTS:
            msg = (
                f"the values look like {tissue.kind} values, but HiBio needs transcripts: pass counts, normalised or "
                "logged counts with layer=, name their kind with values=, use the default model for proteins, or leave "
                "the features out (adata[:, []]) to embed the image alone"
            )
            raise ValueError(msg)
        whose = guess_organism(genes) if organism == "auto" else organism
        symbols = list(match_genes(genes, whose, to="human")["gene_symbol"])
    profile = sp.csr_matrix(tissue.expression, dtype=np.float32, copy=True)
    profile.eliminate_zeros()
    if genes:
        slides = [np.flatnonzero(tissue.slide == k) for k in np.unique(tissue.slide)]
        weigh(profile, inverse_document_frequencies(profile, slides) if idf else np.ones(profile.shape[1]))
    parts = {f.name: getattr(tissue, f.name) for f in fields(Tissue)}
    return Spots(
        **parts | {"genes": genes},
        organism=whose,
        symbols=symbols,
        profile=profile,
        image=None if image is None else image[tissue.rows],
        image_facts=image_facts,
    )


def stored_features(adata: AnnData) -> tuple[np.ndarray, str | None]:
    """Features of the patches in ``obsm``, float32, and the name of their tower, if known; raises unless finite."""
    given = np.asarray(adata.obsm[IMAGE_FEATURES], np.float64)
    # Values that are too large for float32 would become infinite.
    if not (np.abs(given) <= np.finfo(np.float32).max).all():
        msg = f"obsm[{IMAGE_FEATURES!r}] holds values that are not finite; run sfm.tl.image_features again"
        raise ValueError(msg)
    facts = adata.uns.get(IMAGE_FEATURES)
    tower = facts.get("tower") if isinstance(facts, Mapping) else None
    return given.astype(np.float32), None if tower is None else str(tower)


# --- the encoder -----------------------------------------------------------------------------


class HiBioState(NamedTuple):
    """Axes of the fused embedding of a dataset."""

    features: list[str]
    """Names of the features of the components; empty if there was only an image."""
    components: ComponentAxes | None
    fused: FusedAxes


@dataclass(frozen=True)
class HiBioEncoder(Encoder):
    """Encoder of expression and H&E patches of spots, or of one of them; see :class:`spatialfm.models.HiBio`."""

    image: Any = None
    """The H&E image, see :func:`spatialfm.tl.image_features`; False for expression alone."""
    gene_sets: str | Path | Mapping[str, Iterable[str]] | None = "hallmark"
    """Gene sets with whose anchors spots are compared, see :func:`spatialfm.pp.pathways`."""
    batch_size: int | None = None
    """Patches of a batch; if None, chosen for the device."""

    model_type = HiBio
    prefix = "hibio"
    axes: ClassVar[Axes] = "data"
    tables = ("anchors", "anchors_image", "regions")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("batch_size", self.batch_size, optional=True)

    def names(self, key_added: str | None) -> dict[str, str]:
        """Keys of the fused modalities, and of each modality in the shared space."""
        key = f"X_{key_added or self.prefix}"
        return {"fused": key, "gene": f"{key}_gene", "image": f"{key}_image"}

    def read(self, adata: AnnData, *, device: torch.device, values: Any = "auto", **reading: Any) -> Spots:
        """Read expression and patches, or one of them; features of patches are computed if they are missing."""
        if adata.n_obs == 0:
            msg = "adata has no spots; there is nothing to embed"
            raise ValueError(msg)
        found = self._find_image(adata, device=device, **reading)
        if found.features is None and adata.n_vars == 0:
            msg = "adata has neither genes nor an image; pass the image with image="
            raise ValueError(msg)
        spots = read_spots(
            adata, image=found.features, image_facts=found.facts, idf=self.model.config.idf, values=values, **reading
        )
        if spots.genes:
            self._check_genes(spots)
        warn_of_single_cells(
            adata,
            spots.expression,
            library_key=reading.get("library_key"),
            basis=reading.get("basis", "spatial"),
            model=self.model,
        )
        return spots

    def read_image(self, adata: AnnData, *, device: torch.device, **reading: Any) -> Spots:
        """Read the patches only; the expression is left out."""
        found = self._find_image(adata, device=device, otherwise="", **reading)
        if found.features is None:
            msg = (
                f"there is no image to predict from: neither obsm[{IMAGE_FEATURES!r}] nor an image in uns['spatial']; "
                "pass one with image=, as for sfm.tl.image_features"
            )
            raise ValueError(msg)
        return read_spots(adata, image=found.features, image_facts=found.facts, features=False, **reading)

    def fit(self, tissue: Tissue, *, device: torch.device) -> HiBioState:
        """Compute the components of the tissue, and the axes of the fused embedding."""
        return self.fit_encode(tissue, device=device)[0]

    def encode(self, tissue: Tissue, state: HiBioState, *, device: torch.device) -> Embedding:
        """Embed spots on the axes of a state. The tissue must have all features of the state."""
        return self._encode(tissue, state, device)[1]

    def fit_encode(self, tissue: Tissue, *, device: torch.device) -> tuple[HiBioState, Embedding]:
        """Compute the state and the embedding at once."""
        return self._encode(tissue, None, device)

    def predict(self, spots: Spots, columns: np.ndarray, *, device: torch.device) -> np.ndarray:
        """Predict the expression (n, genes) of the genes of the model at ``columns`` from the patches only.

        Rows are in the order of the spots. All genes of the model are in memory for a thousand spots at a time.
        """
        device = sparse_device(device)
        out = np.empty((len(spots.rows), len(columns)), np.float32)
        with in_evaluation(self.model, device):
            patches = self._read_patches(spots, transition_tensor(spots.graph, device), device)
            chosen = torch.from_numpy(columns).to(device)
            for start in range(0, len(out), _ROWS):
                here = slice(start, start + _ROWS)
                # Other functions would take negative values for z-scores.
                out[here] = self.model.predict(patches[here])[:, chosen].clamp(min=0).cpu().numpy()
        return out

    def _read_patches(self, spots: Spots, transition: torch.Tensor, device: torch.device) -> torch.Tensor:
        image = torch.from_numpy(spots.image).to(device)
        return self.model.read_image(image, transition, spots.slide_tensor().to(device))

    def _encode(self, spots: Tissue, state: HiBioState | None, device: torch.device) -> tuple[HiBioState, Embedding]:
        assert isinstance(spots, Spots)  # what `read` returns
        device = sparse_device(device)
        slide = spots.slide_tensor().to(device)
        model, config = self.model, self.model.config
        with in_evaluation(model, device):
            transition = transition_tensor(spots.graph, device)
            vectors: dict[str, torch.Tensor] = {}
            if spots.genes:
                profile = spots.by_symbol(spots.profile, config.genes)
                vectors["gene"] = model.read_genes(sparse_tensor(profile, device), slide)
            if spots.image is not None:
                vectors["image"] = self._read_patches(spots, transition, device)
            heads = {"gene": model.gene_head, "image": model.image_head}
            z = {name: F.normalize(heads[name](e), dim=1) for name, e in vectors.items()}

            components = self._components(spots, vectors.get("image"), state, device)
            regions = [
                torch.from_numpy(r).to(device) for r in find_regions(components.scores, transition, spots, config)
            ]
            main = "gene" if spots.genes else "image"
            attention = [model.attention(z[main], region, image=main == "image") for region in regions]
            patches = vectors.get("image") if spots.genes else None
            tissue = components.scores, transition, regions, attention
            if state is None:
                fused_axes, fused = model.fit_fuse(*tissue, spots.slide_size, patches)
                state = HiBioState(components.features, components.axes, fused_axes)
            else:
                fused = model.fuse(*tissue, state.fused, patches)
            tables = self._anchors(z, device) | {"regions": self._region_similarity(z, regions)}
        used = self._known_genes(spots)
        known = set(used)
        return state, Embedding(
            encoder=self,
            tissue=spots,
            blocks={"fused": fused.cpu().numpy()} | {name: spot.cpu().numpy() for name, spot in z.items()},
            own_axes={"gene": "model", "image": "model"},
            device=device,
            genes=used,
            left_out=dict.fromkeys(spots.unmeasured, NOT_MEASURED)
            | {name: "not known to the model" for name in sorted(spots.genes) if name not in known},
            params={
                "gene_sets": ""
                if self.gene_sets is None
                else "given"
                if isinstance(self.gene_sets, Mapping)
                else str(self.gene_sets)
            },
            facts={"modalities": list(z)},
            source=" and ".join({"gene": "expression", "image": "image"}[name] for name in z),
            tables=tables,
            regions=[region.cpu().numpy() for region in regions[::-1]],
        )

    def _components(
        self, spots: Spots, patches: torch.Tensor | None, state: HiBioState | None, device: torch.device
    ) -> _Components:
        """Components of the expression, or of the patches without expression; on the axes of a state, if given."""
        if state is not None and bool(state.features) != bool(spots.genes):
            without = "no expression" if state.features else "expression"
            msg = f"these spots have {without}, unlike those of the state; embed all spots together instead"
            raise ValueError(msg)
        if not spots.genes:
            assert patches is not None  # `read` refuses spots with neither
            return _Components(patches, [], None)
        if state is None:
            own = spatial_components(spots.profile, spots.graph, n_components=self.model.config.n_components)
            features = [spots.genes[i] for i in own.features]
            return _Components(torch.from_numpy(own.scores).to(device), features, own.axes)
        assert state.components is not None  # since there are features
        scores = state.components.scores(spots.profile, spots.genes, state.features)
        return _Components(torch.from_numpy(scores).to(device), state.features, state.components)

    def _anchors(self, z: dict[str, torch.Tensor], device: torch.device) -> dict[str, dict[str, np.ndarray]]:
        """Cosine of each spot to the anchor of each gene set, for its profile and its patch."""
        if self.gene_sets is None:
            return {}
        names, membership = known_sets(list(self.model.config.genes), "human", self.gene_sets)
        if not names:
            msg = (
                f"{self.model.name!r} has none of the genes of gene_sets={self.gene_sets!r}; see sfm.pp.pathways for "
                "possible gene sets"
            )
            raise ValueError(msg)
        directions = self.model.anchors(sparse_tensor(membership.T.tocsr(), device))
        # The profile of a spot is more informative about pathways than its patch.
        ends = {"gene": "anchors", "image": "anchors_image" if "gene" in z else "anchors"}
        return {
            ends[name]: dict(zip(names, (spot @ directions.T).cpu().numpy().T, strict=True)) for name, spot in z.items()
        }

    def _region_similarity(self, z: dict[str, torch.Tensor], regions: list[torch.Tensor]) -> dict[str, np.ndarray]:
        """Cosine of each spot to its region in the other modality (in the same if there is only one), by level."""
        found = {}
        for name, spot in z.items():
            other = next((k for k in z if k != name), name)
            for k, region in enumerate(regions[::-1]):
                pooled = F.normalize(self.model.pool(z[other], region, image=other == "image"), dim=1)[region]
                found[f"{name}_{k + 1}"] = (spot * pooled).sum(1).cpu().numpy()
        return found

    def _known_genes(self, spots: Spots) -> list[str]:
        known = set(self.model.config.genes)
        return [name for name, symbol in zip(spots.genes, spots.symbols, strict=True) if symbol in known]

    def _check_genes(self, spots: Spots) -> None:
        """Raise if too few features are genes of the model."""
        known, used = self.model.config.genes, self._known_genes(spots)
        if len(used) < min(_MIN_GENES, len(known)):
            msg = (
                f"only {len(used)} of {len(spots.genes)} features are genes of {self.model.name!r}, such as "
                f"{list(known[:3])}; the first features are {spots.genes[:3]}. Rename them with "
                "sfm.pp.resolve_genes, or leave them out (adata[:, []]) to embed the image alone"
            )
            raise ValueError(msg)

    def _find_image(
        self,
        adata: AnnData,
        *,
        device: torch.device,
        library_key: str | None = None,
        basis: str = "spatial",
        otherwise: str = ", or image=False for expression alone",
        **_: Any,
    ) -> _Image:
        """Features of the patches, and the record to store with them if they are new.

        ``otherwise`` is the end of error messages: what to do without an image.
        """
        image, config = self.image, self.model.config
        if image is False:
            return _Image(None, None)
        in_uns = any(entry.get("images") for entry in image_entries(adata).values())
        if image is None and IMAGE_FEATURES in adata.obsm:
            features, tower = stored_features(adata)
            tower = tower or config.tower
            if tower != config.tower or features.shape[1] != config.n_features:
                msg = (
                    f"obsm[{IMAGE_FEATURES!r}] has {features.shape[1]} columns by the tower {tower!r}, but "
                    f"{self.model.name!r} needs {config.n_features} by {config.tower!r}; pass the image again with "
                    f"image={otherwise}"
                )
                raise ValueError(msg)
            return _Image(features, None)
        if image is None and not in_uns:
            return _Image(None, None)
        check_free(adata, "tl.image_features", {"obsm": [IMAGE_FEATURES], "uns": [IMAGE_FEATURES]})
        try:
            return _Image(
                *compute_image_features(
                    adata,
                    image,
                    tower=config.tower,
                    library_key=library_key,
                    basis=basis,
                    device=str(device),
                    batch_size=self.batch_size,
                )
            )
        except (KeyError, ValueError) as error:
            if image is not None:
                raise
            msg = f"the image in uns['spatial'] cannot be used: {error.args[0]}. Or pass another with image={otherwise}"
            raise type(error)(msg) from error


class _Image(NamedTuple):
    features: np.ndarray | None
    facts: dict[str, Any] | None


class _Components(NamedTuple):
    scores: torch.Tensor
    features: list[str]
    axes: ComponentAxes | None


def find_regions(
    components: torch.Tensor, transition: torch.Tensor, spots: Spots, config: HiBioConfig
) -> list[np.ndarray]:
    """Find nested contiguous regions of spots with similar components (n, K) of their niches.

    Returns labels (n,) for each level, the finest first.
    """
    root = spots.slide_size**0.5
    values = propagate(components, transition, [max(1.0, config.niche_scale * root)])[0].double().cpu().numpy()
    sizes = [max(2.0, scale * root) for scale in config.region_scales]
    labels = [np.empty(len(values), np.int64) for _ in sizes]
    start = [0] * len(sizes)
    for k in np.unique(spots.slide):
        rows = np.flatnonzero(spots.slide == k)
        found = nested_partitions(values[rows], spots.graph[rows][:, rows].astype(np.float64), sizes)
        for level, part in enumerate(found):
            labels[level][rows] = part + start[level]
            start[level] += int(part.max()) + 1
    return labels


def sparse_tensor(x: sp.csr_matrix, device: torch.device) -> torch.Tensor:
    """Convert a sparse matrix to a torch tensor."""
    coo = x.tocoo()
    entries = torch.from_numpy(np.stack([coo.row, coo.col]).astype(np.int64))
    values = torch.from_numpy(coo.data.astype(np.float32))
    return torch.sparse_coo_tensor(entries, values, x.shape, device=device, check_invariants=False).coalesce()
