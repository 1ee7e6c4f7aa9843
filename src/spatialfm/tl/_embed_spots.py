"""Embeddings of spots by histology and expression: what :func:`spatialfm.tl.embed` does with HiBio."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatialfm._data._expression import NOT_MEASURED
from spatialfm._data._write import check_free, write
from spatialfm._settings import logger
from spatialfm.tl._domain_of_spots import warn_of_single_cells
from spatialfm.tl._provenance import made_of

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from anndata import AnnData

    from spatialfm.models import HiBio
    from spatialfm.pp._spots import Spots

# With fewer genes of the model the profile of a spot says little; gene panels of 100 and more have them.
_MIN_GENES = 20


def embed_spots(
    adata: AnnData,
    model: HiBio,
    *,
    image: Any,
    gene_sets: str | Path | Mapping[str, Any] | None,
    key_added: str,
    device: torch.device,
    batch_size: int | None,
    copy: bool,
    **how: Any,
) -> AnnData | None:
    """Embed spots; ``how`` as for :func:`spatialfm.pp._tissue.read_tissue`."""
    from spatialfm.engine import encode_spots
    from spatialfm.models import fingerprint
    from spatialfm.pp._pathways import known_sets
    from spatialfm.pp._spots import read_spots

    if adata.n_obs == 0:
        msg = "adata has no spots; there is nothing to embed"
        raise ValueError(msg)
    own = [f"X_{key_added}{name}" for name in ("", "_gene", "_image")]
    own += [f"{key_added}_{name}" for name in ("anchors", "anchors_image", "regions")]
    check_free(adata, "tl.embed", {"obsm": own})
    features, facts = find_image(
        adata, model, image, library_key=how["library_key"], basis=how["basis"], device=device, batch_size=batch_size
    )
    if features is None and adata.n_vars == 0:
        msg = "adata has neither genes nor an image; give the image with image="
        raise ValueError(msg)
    spots = read_spots(adata, image=features, idf=model.config.idf, **how)
    used = check_genes(spots, model) if spots.genes else []
    unknown = sorted(set(spots.genes) - set(used))
    warn_of_single_cells(adata, spots.expression, library_key=how["library_key"], basis=how["basis"], model=model)
    names: list[str] = []
    anchors = None
    if gene_sets is not None:
        names, membership = known_sets(list(model.config.genes), "human", gene_sets)
        if not names:
            msg = f"none of the genes of gene_sets={gene_sets!r} is known to {model.name!r}; see sfm.pp.pathways for what gene_sets takes"
            raise ValueError(msg)
        anchors = membership.T.tocsr()
    found = encode_spots(model, spots, anchors=anchors, device=device)
    if not all(np.isfinite(x).all() for x in (found.fused, *found.space.values())):
        msg = f"{model.name!r} gives embeddings that are not finite; look at the image features, or try another model"
        raise ValueError(msg)

    def placed(x: np.ndarray) -> np.ndarray:
        out = np.empty_like(x)
        out[spots.rows] = x
        return out

    def table(columns: Mapping[str, np.ndarray]) -> pd.DataFrame:
        return pd.DataFrame({name: placed(x) for name, x in columns.items()}, index=adata.obs_names)

    levels = [f"{key_added}_region_{k + 1}" for k in range(len(found.regions))]
    obsm: dict[str, Any] = {f"X_{key_added}": placed(found.fused)}
    obsm |= {f"X_{key_added}_{name}": placed(x) for name, x in found.space.items()}
    if names:
        for name, x in found.anchors.items():
            # The spot's own profile tells more of its pathways than its patch does.
            suffix = "_image" if name == "image" and "gene" in found.anchors else ""
            obsm[f"{key_added}_anchors{suffix}"] = table(dict(zip(names, x.T, strict=True)))
    obsm[f"{key_added}_regions"] = table(
        {f"{name}_{k + 1}": x for name, levels_ in found.region_similarity.items() for k, x in enumerate(levels_)}
    )
    obs = {
        column: pd.Categorical(placed(region + 1).astype(str), [str(k + 1) for k in range(region.max() + 1)])
        for column, region in zip(levels, found.regions, strict=True)
    }
    entry = {
        "model": model.name,
        "sha256": fingerprint(model),
        **made_of(adata, how["library_key"], "data", found.fused),
        "modalities": list(found.space),
        "params": {
            "library_key": how["library_key"] or "",
            "layer": how["layer"] or "",
            "basis": how["basis"],
            "values": spots.kind,
            "device": device.type,
            "gene_sets": "" if gene_sets is None else "given" if isinstance(gene_sets, Mapping) else str(gene_sets),
        },
        "genes": {
            "n_in": adata.n_vars,
            "n_used": len(used),
            "names": used,
            "left_out": [*spots.unmeasured, *unknown],
            "left_out_reasons": [NOT_MEASURED] * len(spots.unmeasured) + ["not known to the model"] * len(unknown),
        },
        "regions": levels,
    }
    records = {
        name: entry | {"axes": "data" if name == f"X_{key_added}" else "model"} for name in obsm if name.startswith("X_")
    }
    fields = {"obsm": obsm, "obs": obs, "embeddings": records}
    adata = write(adata, "tl.embed", key_added, fields, copy=copy)
    spots.store_built(adata)
    store_features(adata, features, facts)
    logger.info(
        "embed: %d spots by %s of %s (%s) on %s -> obsm['X_%s'], %s",
        adata.n_obs, " and ".join({"gene": "expression", "image": "image"}[m] for m in found.space), model.name,
        f"{len(used)} of {adata.n_vars} genes" if used else "no genes", device, key_added,
        ", ".join(f"obsm['X_{key_added}_{m}']" for m in found.space),
    )  # fmt: skip
    return adata if copy else None


def find_image(
    adata: AnnData,
    model: HiBio,
    image: Any,
    *,
    library_key: str | None,
    basis: str,
    device: torch.device,
    batch_size: int | None,
    otherwise: str = ", or image=False for expression alone",
) -> tuple[np.ndarray | None, dict[str, Any] | None]:
    """Features of the patches as ``model`` reads them, None without an image; and what to store with them, where they are new.

    ``otherwise`` ends the messages: what a caller may do without an image.
    """
    from spatialfm.pp._spots import IMAGE_FEATURES, stored_features
    from spatialfm.tl._image_features import compute

    if image is False:
        return None, None
    stored = adata.uns.get("spatial")
    in_uns = isinstance(stored, Mapping) and any(isinstance(s, Mapping) and s.get("images") for s in stored.values())
    if image is None and IMAGE_FEATURES in adata.obsm:
        features, tower = stored_features(adata)
        tower = tower or model.config.tower
        if tower != model.config.tower or features.shape[1] != model.config.n_features:
            msg = (
                f"obsm[{IMAGE_FEATURES!r}] has {features.shape[1]} columns by the tower {tower!r}, but {model.name!r} reads "
                f"{model.config.n_features} by {model.config.tower!r}; give the image again with image={otherwise}"
            )
            raise ValueError(msg)
        return features, None
    if image is None and not in_uns:
        return None, None
    check_free(adata, "tl.image_features", {"obsm": [IMAGE_FEATURES], "uns": [IMAGE_FEATURES]})
    try:
        return compute(
            adata, image, tower=model.config.tower, library_key=library_key, basis=basis, device=str(device), batch_size=batch_size
        )  # fmt: skip
    except (KeyError, ValueError) as error:
        if image is not None:
            raise
        msg = f"the image in uns['spatial'] cannot be used: {error.args[0]}. Or give another with image={otherwise}"
        raise type(error)(msg) from error


def store_features(adata: AnnData, features: np.ndarray | None, facts: dict[str, Any] | None) -> None:
    """Write features of the patches that :func:`find_image` computed anew."""
    from spatialfm.pp._spots import IMAGE_FEATURES

    if facts is not None:
        fields: dict[str, dict[str, Any]] = {"obsm": {IMAGE_FEATURES: features}, "uns": {IMAGE_FEATURES: facts}}
        write(adata, "tl.image_features", IMAGE_FEATURES, fields, copy=False)


def check_genes(spots: Spots, model: HiBio) -> list[str]:
    """Features that have a vector; raises where they are too few."""
    known = set(model.config.genes)
    used = [name for name, symbol in zip(spots.genes, spots.symbols, strict=True) if symbol in known]
    if len(used) < min(_MIN_GENES, len(known)):
        msg = (
            f"only {len(used)} of {len(spots.genes)} features are genes that {model.name!r} knows, such as {list(model.config.genes[:3])}; the "
            f"features are named like {spots.genes[:3]}. Name them with sfm.pp.resolve_genes, or leave them out (adata[:, []]) to embed the image alone"
        )
        raise ValueError(msg)
    return used
