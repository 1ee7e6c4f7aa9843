"""Expression predicted from H&E."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from spatialfm._checks import checked
from spatialfm._data._adata import get_matrix
from spatialfm._data._write import check_free, record_params, write
from spatialfm._settings import logger, warn

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

    from spatialfm.engine import Tissue
    from spatialfm.models import HiBio


@checked
def predict_expression(
    adata: AnnData,
    genes: Literal["all"] | str | Sequence[str] | None = None,
    *,
    model: str | Path | HiBio = "hibio",
    image: Any = None,
    min_confidence: float = 0.2,
    library_key: str | None = None,
    basis: str = "spatial",
    key_added: str = "predicted_expression",
    copy: bool = False,
) -> AnnData | None:
    """Predict the expression of genes from the H&E image, with a confidence for each gene.

    Measured expression is not used. Where there is some, it shows whether the tissue resembles that of the training
    data, outside of which confidence means nothing. Predictions say where on a slide a gene is high, not on which
    slide: patches are compared with those of their own slide, so that stain and scanner do not matter. They vary less
    than measurements.

    Parameters
    ----------
    %(adata)s
    genes
        Symbols or Ensembl ids of human or mouse (for which the human ortholog is predicted), or ``"all"`` genes of the
        model. Where None, those that reach ``min_confidence``.
    model
        ``"hibio"``, or another model of that architecture: a name, folder, file or model.
    image
        As for :func:`spatialfm.tl.image_features`. Where None, ``obsm["image_features"]`` if present (write them
        yourself for further options), otherwise the images in ``uns["spatial"]``.
    min_confidence
        Least confidence where no genes are named.
    %(library_key)s
    %(basis)s
    %(key_added)s
    %(copy)s

    Returns
    -------
    ``None``, or the copy. Written, besides missing image features and tissue graph:

    ``obsm[key_added]``
        float32 DataFrame (n_obs, genes): natural logarithm of one plus the expression, normalised to 10,000 a spot.
        Columns are named as in ``genes``, otherwise as in ``adata`` or, for other genes, by the human symbol.
    ``uns[key_added]``
        ``confidence`` of each column: Pearson correlation over spots of predicted and measured expression on slides
        left out of training (mean over slides). ``tissue``: ``trained_on``, and where 1,000 genes were measured
        ``similarity``, the correlation of the mean profile with that of the training data, and ``alike``, whether it
        is large enough; otherwise there is a warning. ``model``, ``sha256``, ``organism``, ``params``.

    Raises
    ------
    KeyError
        A gene is not known, or a column or the coordinates are missing.
    ValueError
        There is no image, or it does not fit; no gene reaches ``min_confidence``; or the model reads no histology.
    FileNotFoundError
        There is no such model or image.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.her2_breast_tumour()[:60].copy()
    >>> sfm.tl.predict_expression(adata, ["ERBB2", "CD3D"])
    >>> adata.obsm["predicted_expression"].shape
    (60, 2)
    """
    check_free(adata, "tl.predict_expression", {"obsm": [key_added], "uns": [key_added]})
    if not -1 <= min_confidence <= 1:
        msg = f"min_confidence={min_confidence!r} must be a number from -1 to 1, a correlation"
        raise ValueError(msg)
    if adata.n_obs == 0:
        msg = "adata has no spots; there is nothing to predict"
        raise ValueError(msg)

    reading = {"library_key": library_key, "basis": basis}
    found = _predict(adata, genes, model, image, min_confidence=min_confidence, reading=reading)

    which = "confident" if genes is None else "all" if isinstance(genes, str) and genes == "all" else "given"
    entry = {
        "confidence": found.confidence,
        "tissue": found.tissue,
        "model": found.model,
        "sha256": found.sha256,
        "organism": found.organism,
        "params": record_params(genes=which, min_confidence=float(min_confidence), device=found.device, **reading),
    }
    fields = {"obsm": {key_added: found.expression}, "uns": {key_added: entry}}
    adata = write(adata, "tl.predict_expression", key_added, fields, copy=copy)
    found.spots.store_built(adata)
    if not found.tissue.get("alike", True):
        warn(
            "predict_expression: the mean expression of adata has a correlation of only %.2f with that of the training "
            "data (%s), so this is another tissue, where no confidence holds: compare predictions with genes that were "
            "measured, or give a model of this tissue as model= (sfm.train.pretrain with architecture='hibio' trains "
            "one)",
            found.tissue["similarity"],
            found.tissue["trained_on"] or found.model,
        )
    low = int((found.confidence < min_confidence).sum())
    logger.info(
        "predict_expression: %d spots x %d genes by %s, median confidence %.2f%s -> obsm[%r], uns[%r]",
        adata.n_obs, found.expression.shape[1], found.model, np.median(found.confidence),
        f", {low} of them with a confidence below {min_confidence:g}" if low else "", key_added, key_added,
    )  # fmt: skip
    return adata if copy else None


class _Predicted(NamedTuple):
    expression: pd.DataFrame
    """(n_obs, genes)."""
    confidence: np.ndarray
    """(genes,) correlation that each gene reached on slides left out of the training."""
    tissue: dict[str, Any]
    """What is known of the tissue, see :func:`describe_tissue`."""
    model: str
    sha256: str
    organism: str
    device: str
    spots: Tissue


def _predict(
    adata: AnnData,
    genes: str | Sequence[str] | None,
    model: str | Path | HiBio,
    image: Any,
    *,
    min_confidence: float,
    reading: dict[str, Any],
) -> _Predicted:
    """Run the model; ``reading`` as for ``HiBioEncoder.read_image``."""
    from spatialfm.engine import choose_device, find_encoder
    from spatialfm.engine._domain_of_spots import describe_tissue, warn_of_single_cells
    from spatialfm.models import fingerprint

    on = choose_device()
    encoder = find_encoder(model, needs="predict", lacks="reads no histology", image=image)
    network = encoder.model
    confidence = network.confidence.cpu().numpy().astype(np.float64)
    position = {symbol: k for k, symbol in enumerate(network.config.genes)}
    measured, organism = _measured(adata, position)
    names, columns = _choose(genes, position, measured, confidence, float(min_confidence))
    # Without the expression: what was measured must not change a prediction, not even by the order of the spots.
    spots = encoder.read_image(adata, device=on, **reading)
    if measured and adata.X is not None:
        warn_of_single_cells(adata, get_matrix(adata), model=network, **reading)
    values = spots.in_order(encoder.predict(spots, columns, device=on))
    if not np.isfinite(values).all():
        msg = f"{network.name!r} predicts values that are not finite; check the image features, or try another model"
        raise ValueError(msg)
    return _Predicted(
        pd.DataFrame(values, index=adata.obs_names, columns=names),
        confidence[columns],
        describe_tissue(adata, network, measured),
        network.name,
        fingerprint(network),
        organism,
        on.type,
        spots,
    )


def _choose(
    genes: str | Sequence[str] | None,
    position: dict[str, int],
    measured: dict[str, int],
    confidence: np.ndarray,
    min_confidence: float,
) -> tuple[list[str], np.ndarray]:
    """Names of the genes to predict, and their positions among the model's.

    ``measured`` are the positions of the features of ``adata``.
    """
    symbols = list(position)
    if genes is not None and not (isinstance(genes, str) and genes == "all"):
        given = [genes] if isinstance(genes, str) else list(map(str, genes))
        return given, _find(given, position, measured)
    chosen = np.arange(len(symbols)) if genes == "all" else np.flatnonzero(confidence >= min_confidence)
    if not len(chosen):
        fix = f"the largest is {confidence.max():.2f}. Lower it, or name genes" if symbols else "take a trained model"
        msg = f"min_confidence={min_confidence:g}: none of the {len(symbols)} genes of the model reaches it; {fix}"
        raise ValueError(msg)
    own: dict[int, str] = {}
    for name, k in measured.items():
        own.setdefault(k, name)
    # Another feature may have the human symbol as its name, and would be taken for this gene.
    kept = [k for k in chosen.tolist() if k in own or symbols[k] not in measured]
    return [own.get(k, symbols[k]) for k in kept], np.array(kept, np.int64)


def _measured(adata: AnnData, position: dict[str, int]) -> tuple[dict[str, int], str]:
    """Position of each feature of ``adata`` that is a gene of the model, and the organism.

    Nothing where the features are no genes.
    """
    from spatialfm._data._genes import guess_organism, match_genes

    names = list(map(str, adata.var_names))
    try:
        organism = guess_organism(names)
    except ValueError:
        return {}, ""
    found = match_genes(names, organism, to="human")["gene_symbol"]
    return {
        name: position[symbol] for name, symbol in zip(names, found, strict=True) if symbol in position
    }, organism  # fmt: skip


def _find(names: list[str], position: dict[str, int], measured: dict[str, int]) -> np.ndarray:
    """Positions of genes by name: of a feature of ``adata``, else of a symbol of the model, else by Ensembl's table."""
    from spatialfm._data._genes import gene_table, match_genes

    if not names:
        msg = "genes is empty; name some, or leave it out for all that reach min_confidence"
        raise ValueError(msg)
    twice = pd.Index(names)[pd.Index(names).duplicated()]
    if len(twice):
        msg = f"genes names {list(twice[:3])} more than once; name each gene once"
        raise ValueError(msg)
    of_human, of_mouse = (match_genes(names, o, to="human")["gene_symbol"].tolist() for o in ("human", "mouse"))
    out, missing = np.full(len(names), -1, np.int64), []
    for k, name in enumerate(names):
        # A mouse symbol may, in capitals, be that of another human gene.
        mouse = name in gene_table("mouse").by_symbol and name not in gene_table("human").by_symbol
        symbol = (of_mouse[k] or of_human[k]) if mouse else (of_human[k] or of_mouse[k])
        out[k] = measured.get(name, position.get(name, position.get(symbol, -1)))
        if out[k] < 0:
            missing.append((name, symbol))
    if missing:
        import difflib

        said = []
        for name, symbol in missing[:3]:
            near = difflib.get_close_matches(str(name).upper(), list(position))
            said.append(
                f"{name!r} (a gene, but the model has not learned it)" if symbol
                else f"{name!r} (did you mean {near}?)" if near else f"{name!r} (no gene of human or mouse)"
            )  # fmt: skip
        msg = (
            f"{len(missing)} of the {len(names)} genes cannot be predicted: {', '.join(said)}; genes='all' gives the "
            f"{len(position)} of the model"
        )
        raise KeyError(msg)
    return out
