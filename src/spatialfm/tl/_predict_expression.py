"""Expression predicted from H&E."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from spatialfm._checks import check_positive, checked
from spatialfm._data._adata import get_matrix
from spatialfm._data._write import check_free, write
from spatialfm._settings import logger, warn

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

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
    device: str | None = None,
    batch_size: int | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Predict the expression of genes from the H&E image, and say for each gene how far to trust it.

    Measured expression plays no part in it; there may be none (``adata`` without genes). Where there is, it tells whether the tissue is like that of the
    training data, and confidence means anything; from an image alone that cannot be told. The tissue graph is built where it is missing, by
    :func:`spatialfm.pp.spatial_neighbors`, and stored.

    Parameters
    ----------
    adata
        Spots with coordinates in ``obsm[basis]``.
    genes
        Where None, all genes of at least ``min_confidence``. ``"all"`` for every gene that the model knows, which are thousands: 4 bytes a spot and
        gene. Or names, whatever their confidence: symbols or Ensembl ids, of human or mouse (for which the human ortholog is predicted).
    model
        A model of histology: name, folder, file (see :func:`spatialfm.models.load`), or the model itself.
    image
        The H&E image, whatever :func:`spatialfm.tl.image_features` takes: a file, an array, the name of an image in ``uns["spatial"]``, a SpatialData
        object, a mapping from the slides, or the patches of :func:`spatialfm.pp.patches`. Where None, ``obsm["image_features"]`` if they are there,
        otherwise the images in ``uns["spatial"]``.
    min_confidence
        Least confidence where no genes are named, and below which the log counts those that are.
    library_key
        Column of ``obs`` naming each spot's slide. Spots of different slides are never neighbours.
    basis
        Key of the coordinates in ``obsm``.
    key_added
        Name of what is written.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``; ``settings.device`` where None.
    batch_size
        Patches of a batch where an image is read; chosen by the device where None. It changes nothing but rounding.
    copy
        Return a copy instead of writing to ``adata``.

    Returns
    -------
    ``None``, or the copy. Written:

    ``obsm[key_added]``
        float32 DataFrame (n_obs, genes), expression normalised to 10,000 a spot and logged (natural, of one plus the value), at least 0. Columns are
        the names that were given; otherwise the feature's name in ``adata`` where the gene is one of them, such as an Ensembl id or the mouse's
        symbol, and else the human symbol.
    ``uns[key_added]``
        ``confidence``: float64, one number a column, the Pearson correlation over spots of what is predicted and measured that the gene reached in
        the training data, on slides that the prediction had not seen (mean over the slides; 0 where it cannot be told). ``model``, ``sha256`` of its weights,
        ``organism`` (whose genes the features of ``adata`` are, ``""`` where there are none), ``params``.
        ``tissue``: ``trained_on``, the tissues that confidence is of; where 1,000 of the model's genes and more were measured also ``similarity``, the
        correlation of their mean profile with that of the training data, and ``alike``, whether it is at least 0.6 (0.25 below 5,000 genes, which are chosen ones). Where it is not, there is a warning,
        and figures do not show the confidence.
    ``obsm["image_features"]``, ``uns["image_features"]``
        Where an image was read: later calls need not read it again.
    ``obsp["spatial_connectivities"]``, ``obsp["spatial_distances"]``, ``uns["spatial_neighbors"]``
        Where they were missing.

    Raises
    ------
    KeyError
        A gene is not known, or ``library_key`` or ``obsm[basis]`` does not exist.
    ValueError
        There is no image, or it does not fit; no gene reaches ``min_confidence``; the model reads no histology; or an argument is out of range.
        ``adata`` is as it was.
    FileNotFoundError
        There is no such model or image.

    Notes
    -----
    Patches are compared with those of their own slide, which takes the colour of stain and scanner out: **predictions say where on a slide a gene is
    high, not on which slide.** The mean over a slide is about that of the training data. Predictions also vary less than measurements: they hold what
    histology tells. **Confidence is of the tissues of the training data**, breast tumours for the bundled model; it was reached on slides left out of these. On others it
    says nothing: on two sections of cortex genes of confidence 0.49 were predicted with correlations around 0.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> sfm.tl.predict_expression(adata, ["EPCAM", "CD3D"], image="slide.tif")  # doctest: +SKIP
    >>> sfm.pl.predicted_expression(adata)  # doctest: +SKIP
    """
    from spatialfm.engine import choose_device, find_encoder
    from spatialfm.engine._domain_of_spots import describe_tissue, warn_of_single_cells
    from spatialfm.models import fingerprint

    check_free(adata, "tl.predict_expression", {"obsm": [key_added], "uns": [key_added]})
    check_positive("batch_size", batch_size, optional=True)
    if not -1 <= min_confidence <= 1:
        msg = f"min_confidence={min_confidence!r} must be a number from -1 to 1, a correlation"
        raise ValueError(msg)
    if adata.n_obs == 0:
        msg = "adata has no spots; there is nothing to predict"
        raise ValueError(msg)
    place = choose_device(device)
    encoder = find_encoder(model, needs="predict", lacks="reads no histology", image=image, batch_size=batch_size)
    network = encoder.model
    confidence = network.confidence.cpu().numpy().astype(np.float64)
    position = {symbol: k for k, symbol in enumerate(network.config.genes)}
    measured, organism = _measured(adata, position)
    names, columns = _choose(genes, position, measured, confidence, float(min_confidence))
    # Without the features: what was measured must not change a prediction, not even through the order of the spots.
    spots = encoder.read_image(adata, library_key=library_key, basis=basis, device=place)
    if measured and adata.X is not None:
        warn_of_single_cells(adata, get_matrix(adata), library_key=library_key, basis=basis, model=network)
    values = spots.in_order(encoder.predict(spots, columns, device=place))
    if not np.isfinite(values).all():
        msg = f"{network.name!r} predicts values that are not finite; look at the image features, or try another model"
        raise ValueError(msg)

    described = describe_tissue(adata, network, measured)
    entry = {
        "confidence": confidence[columns],
        "tissue": described,
        "model": network.name,
        "sha256": fingerprint(network),
        "organism": organism,
        "params": {
            "genes": "confident" if genes is None else "all" if isinstance(genes, str) and genes == "all" else "given",
            "min_confidence": float(min_confidence),
            "library_key": library_key or "",
            "basis": basis,
            "device": place.type,
        },
    }
    fields = {
        "obsm": {key_added: pd.DataFrame(values, index=adata.obs_names, columns=names)},
        "uns": {key_added: entry},
    }
    adata = write(adata, "tl.predict_expression", key_added, fields, copy=copy)
    spots.store_built(adata)
    if not described.get("alike", True):
        warn(
            "predict_expression: the mean expression of adata correlates by %.2f alone with that of the training data (%s), so this is another tissue, where "
            "no confidence holds: compare predictions with genes that were measured, or give a model of this tissue as model= (sfm.train.pretrain with "
            "architecture='hibio' makes one)",
            described["similarity"], described["trained_on"] or network.name,
        )  # fmt: skip
    if low := int((confidence[columns] < min_confidence).sum()):
        logger.warning(
            "predict_expression: %d of %d genes have a confidence below %g; see uns[%r]['confidence']",
            low, len(names), min_confidence, key_added,
        )  # fmt: skip
    logger.info(
        "predict_expression: %d spots x %d genes, of %d that %s knows, median confidence %.2f -> obsm[%r], uns[%r]",
        adata.n_obs, len(names), len(confidence), network.name, np.median(confidence[columns]), key_added, key_added,
    )  # fmt: skip
    return adata if copy else None


def _choose(
    genes: str | Sequence[str] | None,
    position: dict[str, int],
    measured: dict[str, int],
    confidence: np.ndarray,
    min_confidence: float,
) -> tuple[list[str], np.ndarray]:
    """Names and positions among the model's genes of those to predict; ``measured`` are the positions of the features of ``adata``."""
    symbols = list(position)
    if genes is not None and not (isinstance(genes, str) and genes == "all"):
        given = [genes] if isinstance(genes, str) else list(map(str, genes))
        return given, _find(given, position, measured)
    chosen = np.arange(len(symbols)) if genes == "all" else np.flatnonzero(confidence >= min_confidence)
    if not len(chosen):
        msg = f"min_confidence={min_confidence:g}: none of the {len(symbols)} genes that the model knows reaches it; " + (
            f"the largest is {confidence.max():.2f}. Lower it, or name genes" if len(symbols) else "take a trained model"
        )  # fmt: skip
        raise ValueError(msg)
    own: dict[int, str] = {}
    for name, k in measured.items():
        own.setdefault(k, name)
    # A feature of another gene may bear a human symbol, an ortholog of another name; it would be taken for this one.
    kept = [k for k in chosen.tolist() if k in own or symbols[k] not in measured]
    return [own.get(k, symbols[k]) for k in kept], np.array(kept, np.int64)


def _measured(adata: AnnData, position: dict[str, int]) -> tuple[dict[str, int], str]:
    """Position of each feature of ``adata`` that is a known gene, and the organism; nothing where the features are no genes."""
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
    """Positions of genes by name: as in ``adata`` first, then as in the model, then as the spelling says."""
    from spatialfm._data._genes import gene_table, match_genes

    if not names:
        msg = "genes is empty; leave it out for all of min_confidence, or name some"
        raise ValueError(msg)
    twice = pd.Index(names)[pd.Index(names).duplicated()]
    if len(twice):
        msg = f"genes names {list(twice[:3])} more than once; name each gene once"
        raise ValueError(msg)
    of_human, of_mouse = (match_genes(names, o, to="human")["gene_symbol"].tolist() for o in ("human", "mouse"))
    out, missing = np.full(len(names), -1, np.int64), []
    for k, name in enumerate(names):
        # A mouse's symbol may be, in capitals, that of another human gene.
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
            f"{len(missing)} of the {len(names)} genes cannot be predicted: {', '.join(said)}; genes='all' gives the {len(position)} that the "
            "model knows"
        )
        raise KeyError(msg)
    return out
