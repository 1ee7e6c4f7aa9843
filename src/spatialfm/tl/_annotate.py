"""Labels of annotated cells, transferred to others with probabilities that were checked on held-out tissue."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from spatialfm._checks import check_choice, checked
from spatialfm._data._adata import canonical_order, get_coordinates, get_embedding, get_libraries, slide_codes
from spatialfm._data._embeddings import NICHE_AND_STATE, rep_name
from spatialfm._data._expression import ValuesKind
from spatialfm._data._splits import check_folds, group_folds, spatial_blocks
from spatialfm._data._write import check_free, write
from spatialfm._settings import logger, progress
from spatialfm.tl._calibration import (
    blended,
    calibration_error,
    find_temperature,
    find_threshold,
    find_weight,
    reliability,
    with_temperature,
)
from spatialfm.tl._probe import (
    annotation_fields,
    annotation_keys,
    fit_probe,
    given_colors,
    given_labels,
    half_standardised,
)
from spatialfm.tl._provenance import check_networks, check_same_axes, check_slides

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData

    from spatialfm.models import HEIST, HEISTNiche, HiBio
    from spatialfm.tl._tuned import Tuner

_UNSURE = "unsure"
_UNSURE_COLOR = "#D3D3D3"
# Labels of fewer cells do not decide whether whole slides are held out.
_MIN_COMMON = 20


@checked
def annotate(
    adata: AnnData,
    reference: AnnData | None = None,
    *,
    groupby: str,
    use_rep: str | Sequence[str] | None = None,
    model: str | Path | HEIST | HEISTNiche | HiBio = "heist-niche",
    method: Literal["probe", "fine_tune"] = "probe",
    min_accuracy: float | None = 0.9,
    n_folds: int = 5,
    library_key: str | None = None,
    layer: str | None = None,
    basis: str = "spatial",
    values: ValuesKind = "auto",
    key_added: str = "annotation",
    device: str | None = None,
    rng: int = 0,
    copy: bool = False,
) -> AnnData | None:
    """Transfer labels from annotated cells to the others, or from another AnnData, and say where it is unsure.

    A logistic regression on the embedding, which stays as it is: for labels of cell types or of regions, on many cells. (For ten spots a region, see
    :func:`annotate_regions`.) To check it, the labelled tissue is cut into folds of whole slides, or of blocks of tissue where there are not enough
    slides, and each fold is predicted by a model that did not see it. These predictions set the temperature that makes probabilities mean what
    they say, and the probability from which on labels are right as often as asked; cells below it are ``"unsure"``.

    All of it holds for tissue like the labelled. Where the labels stand on one slide, accuracy on another one may be lower than estimated (from mouse to
    mouse 0.93 and 0.87 where 0.9 was asked), and only labels on further slides can tell by how much. So may that of regions in parts of a slide that are
    far from any label: held-out blocks stand closer to labels.

    Parameters
    ----------
    adata
        Cells or spots with coordinates. Without a `reference`, ``obs[groupby]`` names the label of some of them; nothing but NaN counts as missing.
    reference
        Annotated cells, which are not changed; those without a label are left out. All cells of `adata` are annotated then, and its own
        ``obs[groupby]``, if there is one, is not read. Dissociated cells, without ``obsm[basis]``, need `use_rep`: an embedding of both by expression
        alone. Quality is estimated among them then, on groups of random cells.
    groupby
        Column of ``obs`` with the labels.
    use_rep
        Key of ``obsm`` with the embedding, or several, whose columns are put side by side. None without a `reference`:
        ``("X_niche", "X_state")``. None with one: both are embedded together here, by `model`, on the genes that they share;
        symbols match Ensembl ids, and mouse genes their human orthologs. Nothing of it is kept.
        A key must stand in both, with columns that mean the same in both: those of ``"heist"``, ``"X_hibio_gene"`` and ``"X_hibio_image"`` do.
        Columns of ``"heist-niche"`` and ``"X_hibio"`` are axes of the data set they were computed on, and are refused.
    model
        What embeds `adata` and `reference` together where `use_rep` is None, as for :func:`embed`. Otherwise it plays no part. With
        ``method="fine_tune"`` always what is embedded with and trained, which must be of ``"heist-niche"``; it is not changed.
    method
        ``"probe"``: the logistic regression. ``"fine_tune"``: a copy of the model goes on learning from the labels, with a small network on top that
        corrects the probe, one copy a fold. On the held-out predictions it is decided how much of the correction is taken, ``weight`` in ``uns``: none
        (0: the result is the probe's) unless it is better beyond chance. Worth trying for labels of regions, and for others that may be no linear
        function of the embedding, where cells of the same slides, or two labelled slides, are at hand (see Notes).
    min_accuracy
        Accuracy that labels must reach on held-out tissue, with 95 % certainty; cells of a lower probability become ``"unsure"``. None: no cell does.
    n_folds
        Folds of the held-out predictions, at most.
    library_key
        Column of ``obs`` with the slide of each cell, in `reference` too. Whole slides are held out where each label of 20 cells or more stands on two.
    layer, basis, values
        As for :func:`embed`, where something is embedded; `basis` also gives the blocks of tissue.
    key_added
        Where the result is written, in ``obs``, ``obsm`` and ``uns``; not the column of the labels itself.
    device
        As for :func:`embed`.
    rng
        Seed of the training of ``method="fine_tune"``.
    copy
        Whether to return a changed copy instead of changing ``adata``.

    Returns
    -------
    None, or the copy. Written are

    ``obs[key_added]``
        Categorical, no value missing: the labels in use, and ``"unsure"`` unless `min_accuracy` is None. A labelled cell keeps its label.
    ``obs["{key_added}_probability"]``
        float64, probability of the likeliest label (also where ``"unsure"``); of a labelled cell, that of its own label as predicted without
        it: low ones are worth a second look.
    ``obsm["{key_added}_probabilities"]``
        Table (n_obs, labels) of float64 with the labels as columns, in the order of ``names`` (``-`` for ``/`` and whatever else no file can hold): calibrated probabilities, which sum to 1, of labelled cells as
        predicted without them.
    ``uns["{key_added}_colors"]``
        Colours of the labels, where ``uns["{groupby}_colors"]`` holds them; grey for ``"unsure"``.
    ``uns[key_added]``
        ``params``; ``names`` of the labels; ``n_labelled`` cells of each, int array; ``n_assigned``, cells that got each; ``n_unsure``;
        ``temperature``; ``threshold``, the probability from which on labels are taken (0 where `min_accuracy` is None; where no probability will do it is left out, and
        ``no_threshold`` says why);
        ``held_out``: ``folds`` (``"slides"``, ``"blocks"``, or ``"cells"`` without a place), ``n_folds``, ``n_units`` (how many of these), and of the held-out predictions ``accuracy`` and ``macro_f1`` of all,
        ``coverage`` (share from the threshold on), ``accuracy_sure`` of these (left out where there are none), ``calibration_error`` and ``calibration_error_before`` (expected calibration
        error, 15 bins); ``confusion``, int array (labels, labels + 1): cells of each label (row) by what they were given, the last column
        unsure; ``best_guess``, the same (labels, labels) with no cell unsure; ``reliability``, ``reliability_before``: tables of those of 15 equal
        bins of probability that hold any, with ``n``, mean ``confidence`` and ``accuracy``. With ``method="fine_tune"`` also ``fine_tune``: ``weight``, 0 to 1, of the network
        beside the probe, and ``accuracy_probe``, ``macro_f1_probe`` of the probe alone on the held-out cells.

    Raises
    ------
    KeyError
        If the column, the embedding or the coordinates are missing.
    ValueError
        If there are fewer than two different labels or no cell without one, the embedding comes from gene networks of the groups of `groupby`, its columns
        are axes of each file, too few genes are shared, values are on different scales, labelled cells stand at too few places, an argument is out of
        range, or ``method="fine_tune"`` is given a `use_rep` or another model than ``"heist-niche"``. ``adata`` is as it was.

    Notes
    -----
    The columns of the embedding are brought halfway between their own variance and equal ones, as in :func:`annotate_regions`. Labels count as often as they
    were given, so rare ones are assigned with care. The temperature is that of Guo et al. 2017 (`arXiv:1706.04599 <https://arxiv.org/abs/1706.04599>`__). The
    threshold is the smallest of 200 quantiles of the held-out probabilities at which the lower 95 % bound of the accuracy reaches `min_accuracy`, with
    blocks of tissue as the independent units, or slides, where these are left out and their standard error is the larger.

    The weight of the network is the one of 0, 0.25, ..., 1 at which the gain in log-likelihood on all held-out cells is surest: that of the highest lower 95 %
    bound, with the same units. Where several slides are labelled, but their labels differ too much for slides to be held out, and cells of other slides are to
    be annotated, the gain must also stand where whole slides are left out. What is gained is known only of tissue like the held-out.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()
    >>> young = adata[adata.obs["age"] == adata.obs["age"].iloc[0]].copy()
    >>> other = adata[adata.obs["age"] != adata.obs["age"].iloc[0]].copy()
    >>> sfm.tl.annotate(other, young, groupby="celltype")  # doctest: +SKIP
    >>> sfm.pl.annotation(other)  # doctest: +SKIP
    """
    check_free(adata, "tl.annotate", annotation_keys(key_added))
    if min_accuracy is not None and not 0 < min_accuracy < 1:
        msg = f"min_accuracy={min_accuracy!r} must lie between 0 and 1, or be None for no cell to be unsure"
        raise ValueError(msg)
    check_folds(n_folds)
    if key_added == groupby:
        msg = f"key_added={key_added!r} would overwrite the labels; give another name"
        raise ValueError(msg)

    check_choice("method", method, ("probe", "fine_tune"))
    if method == "fine_tune" and use_rep is not None:
        msg = f"use_rep={use_rep!r} has no part in method='fine_tune', which trains the model itself; leave it out, or take method='probe'"
        raise ValueError(msg)

    source = adata if reference is None else reference
    files = [adata] if reference is None else [adata, reference]
    names, given = given_labels(source, groupby, complete=reference is not None)
    if _UNSURE in names and min_accuracy is not None:
        msg = f"obs[{groupby!r}] holds the label {_UNSURE!r}; turn it into NaN, or pass min_accuracy=None"
        raise ValueError(msg)
    n = adata.n_obs
    if not n:
        msg = "adata holds no cells; there is nothing to annotate"
        raise ValueError(msg)
    codes = given if reference is None else np.r_[np.full(n, -1), given]
    dissociated = reference is not None and basis not in reference.obsm
    if dissociated and use_rep is None:
        msg = (
            f"reference has no coordinates in obsm[{basis!r}] (obsm holds {list(source.obsm)}): dissociated cells cannot be embedded with the tissue, by a "
            "model that hears neighbours. Name an embedding of both by expression alone with use_rep=, such as principal components of adata and reference "
            "together, each gene on the same scale in both; or basis=, if the coordinates stand under another key"
        )
        raise KeyError(msg)
    places = [get_coordinates(adata, basis)]
    if reference is not None:
        places.append(
            np.zeros((reference.n_obs, places[0].shape[1])) if dissociated else get_coordinates(reference, basis)
        )
    if len({place.shape[1] for place in places}) > 1:
        msg = f"obsm[{basis!r}] has {places[0].shape[1]} columns in adata and {places[1].shape[1]} in reference; keep the same axes in both"
        raise ValueError(msg)
    xy = np.vstack(places)
    slides = [slide_codes(get_libraries(a, library_key)) for a in files]
    slide = np.concatenate([slides[0], *(s + slides[0].max() + 1 for s in slides[1:])])

    reading = {"library_key": library_key, "layer": layer, "basis": basis, "values": values}
    tuner: Tuner | None = None
    if method == "fine_tune":
        from spatialfm.tl._tuned import Tuner

        tuner = Tuner(files, model, reading, device)
        x, reading["values"] = tuner.embedding, tuner.values
    else:
        x, reading["values"] = _embedding(files, groupby, use_rep, model, reading, device)
    # In this order, so that the order of the rows plays no part.
    order = canonical_order(np.column_stack([slide, xy, x]))
    # float32 halves the time of the fits.
    x = half_standardised(x[order], use_rep or NICHE_AND_STATE).astype(np.float32)
    xy, slide, codes = xy[order], slide[order], codes[order]
    if dissociated:
        # Cells without a place are no neighbours: those held out together may be any.
        own = slide > slides[0].max()
        xy[own] = np.random.default_rng(0).uniform(size=(int(own.sum()), xy.shape[1]))
    if tuner is not None:
        tuner.take(order, x)

    rows = np.flatnonzero(codes >= 0)
    truth = codes[rows]
    blocks = spatial_blocks(xy[rows], slide[rows])
    folds, kind, n_units = _folds(truth, slide[rows], blocks, n_folds)
    n_used = int(folds.max()) + 1
    units = [blocks, slide[rows]] if kind == "slides" else [blocks]
    elsewhere = ~np.isin(slide[codes < 0], slide[rows])
    n_slides = len(np.unique(slide[rows]))
    confirm = slide[rows] if kind == "blocks" and n_slides > 1 and elsewhere.any() else None
    held_out, probabilities, tuned = _predict(x, codes, rows, folds, len(names), units, confirm, tuner, rng)
    temperature = find_temperature(held_out, truth)
    calibrated, probabilities = (with_temperature(p, temperature) for p in (held_out, probabilities))
    probabilities[rows] = calibrated
    best = calibrated.argmax(axis=1)
    confidence, correct = calibrated.max(axis=1), best == truth
    threshold = 0.0 if min_accuracy is None else find_threshold(confidence, correct, units, min_accuracy)
    sure = confidence >= threshold
    table, before = (
        reliability(confidence, correct),
        reliability(held_out.max(axis=1), held_out.argmax(axis=1) == truth),
    )
    n_labels = len(names)
    confusion, best_guess = (
        np.bincount(truth * width + to, minlength=n_labels * width).reshape(n_labels, width)
        for to, width in ((np.where(sure, best, n_labels), n_labels + 1), (best, n_labels))
    )
    f1 = 2 * np.diag(best_guess) / np.maximum(best_guess.sum(0) + best_guess.sum(1), 1)

    # Back to the rows of adata.
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    back = back[:n]
    own, mine = codes[back], probabilities[back]
    found = np.where(own >= 0, own, mine.argmax(axis=1))
    probability = mine[np.arange(n), found]
    unsure = (own < 0) & (probability < threshold)
    params: dict[str, Any] = {
        "groupby": groupby, "use_rep": rep_name(use_rep or ("" if reference is not None or tuner is not None else NICHE_AND_STATE)), "method": method, "reference": reference is not None, "n_folds": int(n_folds),
        **{key: "" if value is None else value for key, value in reading.items()},
    }  # fmt: skip
    params |= {} if min_accuracy is None else {"min_accuracy": float(min_accuracy)}
    no_threshold = f"no probability reaches an accuracy of {min_accuracy} on held-out cells, so all are unsure"
    entry: dict[str, Any] = {
        "params": params,
        "names": names,
        "n_labelled": np.bincount(truth, minlength=n_labels),
        "n_assigned": np.bincount(found[(own < 0) & ~unsure], minlength=n_labels),
        "n_unsure": int(unsure.sum()),
        "temperature": temperature,
        **({"threshold": threshold} if np.isfinite(threshold) else {"no_threshold": no_threshold}),
        "held_out": {
            "folds": "cells" if dissociated and kind == "blocks" else kind,
            "n_folds": n_used,
            "n_units": n_units,
            "accuracy": float(correct.mean()),
            "macro_f1": float(f1.mean()),
            "coverage": float(sure.mean()),
            **({"accuracy_sure": float(correct[sure].mean())} if sure.any() else {}),
            "calibration_error": calibration_error(table),
            "calibration_error_before": calibration_error(before),
        },
        "confusion": confusion,
        "best_guess": best_guess,
        "reliability": table,
        "reliability_before": before,
    }
    if tuned:
        entry["fine_tune"] = tuned
    held = entry["held_out"]
    report = f"held out by {n_used} folds of {held['folds']}: accuracy {held['accuracy']:.3f}, macro F1 {held['macro_f1']:.3f}"
    categories, colors = list(names), given_colors(source, groupby, names)
    if min_accuracy is not None:
        found[unsure] = n_labels
        categories.append(_UNSURE)
        colors = None if colors is None else [*colors, _UNSURE_COLOR]
        if sure.any():
            report += f", {held['accuracy_sure']:.3f} in the {held['coverage']:.0%} from probability {threshold:.3f} on"
    labels = pd.Categorical.from_codes(found.tolist(), categories=categories)
    fields = annotation_fields(adata, key_added, labels, probability, mine, names, entry, colors)
    adata = write(adata, "tl.annotate", key_added, fields, copy=copy)
    if np.isinf(threshold):
        logger.warning("%s; ask for less with min_accuracy=, or label more cells", no_threshold)
    logger.info(
        "annotate: %d cells from %d labelled, %d unsure; %s -> obs[%r], obsm['%s_probabilities'], uns[%r]",
        int((own < 0).sum()), len(rows), int(unsure.sum()), report, key_added, key_added, key_added,
    )  # fmt: skip
    if tuned:
        logger.info(
            "fine_tune: weight %s of the network beside the probe, whose held-out accuracy alone is %.3f and macro F1 %.3f%s",
            tuned["weight"], tuned["accuracy_probe"], tuned["macro_f1_probe"],
            "" if tuned["weight"] else "; the network is no better on held-out tissue, so the result is the probe's",
        )  # fmt: skip
    if kind == "blocks" and elsewhere.any():
        logger.warning(
            "%d cells stand on slides without labels, and quality%s was estimated within slides, since %s: expect less than that there. Only labels of the "
            "same kinds on two slides (library_key=) tell how much; whole slides are held out then",
            int(elsewhere.sum()),
            ", and what fine-tuning gains," if tuned and confirm is None else "",
            "the labelled cells have no place"
            if dissociated
            else "all labels stand on one slide"
            if n_slides == 1
            else "too many labels stand on one slide alone",
        )
    return adata if copy else None


def _embedding(
    files: list[AnnData],
    groupby: str,
    use_rep: str | Sequence[str] | None,
    model: str | Path | HEIST | HEISTNiche | HiBio,
    reading: dict[str, Any],
    device: str | None,
) -> tuple[np.ndarray, str]:
    """Embedding of the cells of all files, below each other, in columns that mean the same in all; and what the values are, where they were read."""
    if use_rep is None and len(files) > 1:
        from spatialfm.tl._embed import embed
        from spatialfm.tl._joined import join

        joined = join(*files, **reading)
        embed(
            joined, model, library_key="slide", basis=reading["basis"], values="log", key_added="joined", device=device
        )  # fmt: skip
        both = [key for key in ("X_joined_niche", "X_joined_state") if key in joined.obsm]
        return get_embedding(joined, both or "X_joined"), str(joined.uns["values"])
    use_rep = use_rep or NICHE_AND_STATE
    parts = [get_embedding(a, use_rep) for a in files]
    for a in files:
        if groupby in a.obs:
            check_networks(a, use_rep, groupby)
        check_slides(a, use_rep, reading["library_key"])
    if len(files) > 1:
        fix = "leave use_rep out, and both are embedded together; or concatenate them, embed once with library_key=, and annotate without a reference"
        check_same_axes(files, use_rep, fix=fix)
    return np.vstack(parts), ""


def _predict(
    x: np.ndarray,
    codes: np.ndarray,
    rows: np.ndarray,
    folds: np.ndarray,
    n_labels: int,
    units: list[np.ndarray],
    confirm: np.ndarray | None,
    tuner: Tuner | None,
    rng: int,
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Probabilities of the labelled ``rows`` (labels as columns) as predicted without their fold, of all cells, and what fine-tuning gained.

    What a trained network says of all cells is the mean over the folds' ones; the probe is trained once more, on all rows. ``confirm`` are slides of the
    rows: what is gained must be gained too where these are left out.
    """
    held_out, corrected, correction = _leave_out(x, codes, rows, folds, n_labels, tuner, rng)
    probabilities = _probe(x, codes, rows, n_labels)
    if tuner is None:
        return held_out, probabilities, {}
    from sklearn.metrics import f1_score

    truth, guess = codes[rows], held_out.argmax(axis=1)
    weight = find_weight(held_out, corrected, truth, units)
    if weight and confirm is not None:
        slides = group_folds(confirm, min(int(folds.max()) + 1, len(np.unique(confirm))))
        probe, network, _ = _leave_out(x, codes, rows, slides, n_labels, tuner, rng)
        weight = min(weight, find_weight(probe, network, truth, [*units, confirm]))
    gained = {
        "weight": weight,
        "accuracy_probe": float((guess == truth).mean()),
        "macro_f1_probe": float(f1_score(truth, guess, labels=range(n_labels), average="macro", zero_division=0)),
    }
    return blended(held_out, corrected, weight), blended(probabilities, correction, weight), gained


def _leave_out(
    x: np.ndarray,
    codes: np.ndarray,
    rows: np.ndarray,
    folds: np.ndarray,
    n_labels: int,
    tuner: Tuner | None,
    rng: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities (rows, labels) by a probe without their fold, by the network that corrects it, and (n, labels) those of the networks' mean."""
    held_out = np.empty((len(rows), n_labels))
    corrected, correction = np.zeros_like(held_out), np.zeros((len(x), n_labels))
    numbers = np.unique(folds)
    for fold in progress(numbers, desc="annotating", unit="fit"):
        out = folds == fold
        probabilities = _probe(x, codes, rows[~out], n_labels)
        held_out[out] = probabilities[rows[out]]
        if tuner is not None:
            trained = tuner.fit(codes, rows[~out], probabilities, seed=rng + int(fold))
            corrected[out] = trained[rows[out]]
            correction += trained / len(numbers)
    return held_out, corrected, correction


def _probe(x: np.ndarray, codes: np.ndarray, rows: np.ndarray, n_labels: int) -> np.ndarray:
    """Probability (n, labels) of each label after training on ``rows``; zero for labels that none of them has."""
    present = np.unique(codes[rows])
    result = np.zeros((len(x), n_labels))
    # One label alone is certain; scikit-learn refuses it.
    result[:, present] = (
        fit_probe(x[rows], codes[rows], balanced=False, tol=1e-4).predict_proba(x) if len(present) > 1 else 1.0
    )
    return result


def _folds(codes: np.ndarray, slide: np.ndarray, blocks: np.ndarray, n_folds: int) -> tuple[np.ndarray, str, int]:
    """Fold of each labelled cell, whether the folds are of slides or blocks, and how many of them there are."""
    units, kind = blocks, "blocks"
    slides = np.unique(slide, return_inverse=True)[1]
    on = np.zeros((codes.max() + 1, slides.max() + 1), bool)
    on[codes, slides] = True
    common = np.bincount(codes) >= _MIN_COMMON
    if common.any() and on[common].sum(axis=1).min() >= 2:
        units, kind = slides, "slides"
    n_units = len(np.unique(units))
    if n_units < 2:
        msg = "all labelled cells stand at one place, so nothing can be held out to see how good labels are; label cells elsewhere too"
        raise ValueError(msg)
    return group_folds(units, min(n_folds, n_units)), kind, n_units
