"""Transfer labels from annotated cells to others, with probabilities calibrated on held-out tissue."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from spatialfm._checks import check_choice, checked
from spatialfm._data._adata import canonical_order, get_coordinates, get_libraries, slide_codes
from spatialfm._data._embeddings import NICHE_AND_STATE, get_embedding, rep_name
from spatialfm._data._expression import ValuesKind
from spatialfm._data._splits import check_folds, group_folds, spatial_blocks
from spatialfm._data._write import check_free, record_params, write
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
    Annotation,
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

    from spatialfm.models import Model
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
    model: str | Path | Model = "heist-niche",
    method: Literal["probe", "fine_tune"] = "probe",
    min_accuracy: float | None = 0.9,
    n_folds: int = 5,
    library_key: str | None = None,
    layer: str | None = None,
    basis: str = "spatial",
    values: ValuesKind = "auto",
    key_added: str = "annotation",
    rng: int = 0,
    copy: bool = False,
) -> AnnData | None:
    """Transfer labels from annotated cells to the others, or from another AnnData, and mark where they are unsure.

    A logistic regression on the embedding. Held-out slides, or blocks of tissue, calibrate its probabilities and set
    the threshold below which cells are ``"unsure"``. On slides without labels, accuracy can be lower.

    Parameters
    ----------
    %(adata)s
        Without a `reference`, cells whose label is NaN are annotated from the others.
    reference
        Annotated cells, from which all of `adata` are annotated; not changed. Dissociated cells need `use_rep`.
    groupby
        Column of ``obs`` with the labels.
    use_rep
        Keys of ``obsm``; ``("X_niche", "X_state")`` where None. With a `reference`, None embeds both together by
        `model`, on the genes that they share; columns of a key must mean the same in both.
    model
        As for :func:`embed`: embeds `adata` and `reference`, or is fine-tuned.
    method
        ``"fine_tune"`` also trains a copy of ``"heist-niche"``, and uses it as far as it is better on held-out tissue.
    min_accuracy
        Accuracy on held-out tissue, with 95 % certainty, that sets the threshold; None for no ``"unsure"`` cells.
    n_folds
        Number of folds, at most.
    library_key
        Column of ``obs`` with the slides. Whole slides are held out if each common label is found on two of them.
    %(layer)s
    %(basis)s
    %(values)s
    %(key_added)s
    rng
        Seed of ``method="fine_tune"``.
    %(copy)s

    Returns
    -------
    None, or the copy. Written are

    ``obs[key_added]``, ``obs["{key_added}_probability"]``, ``obsm["{key_added}_probabilities"]``
        Label, its probability, and the probability of each label, a DataFrame (n_obs, n_labels). Labelled cells keep
        their label, with probabilities predicted without it.
    ``uns[key_added]``
        ``params``, ``names``, numbers of cells, ``temperature``, ``threshold``, and the quality on ``held_out``
        cells: see :func:`spatialfm.get.annotation_df` and :func:`spatialfm.pl.annotation`.

    Raises
    ------
    KeyError, ValueError
        If there are fewer than two labels, the embedding has seen them, or its columns differ between the files.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()[::3].copy()
    >>> sfm.tl.embed(adata, library_key="mouse_id")
    >>> adata.obs["known"] = adata.obs["celltype"].where(adata.obs["mouse_id"] == adata.obs["mouse_id"].iloc[0])
    >>> sfm.tl.annotate(adata, groupby="known", library_key="mouse_id")
    >>> sfm.get.annotation_df(adata).shape
    (14, 9)
    """
    _check_arguments(adata, groupby, use_rep, method, min_accuracy, n_folds, key_added)
    cells = _read(adata, reference, groupby, use_rep, basis, library_key)
    if _UNSURE in cells.names and min_accuracy is not None:
        msg = f"obs[{groupby!r}] holds the label {_UNSURE!r}; turn it into NaN, or pass min_accuracy=None"
        raise ValueError(msg)
    reading = {"library_key": library_key, "layer": layer, "basis": basis, "values": values}
    embedded = _embed([adata] if reference is None else [adata, reference], groupby, use_rep, model, method, reading)

    # In this order, the result does not depend on the order of the rows.
    order = canonical_order(np.column_stack([cells.slide, cells.xy, embedded.x]))
    # float32 halves the time of the fits.
    x = half_standardised(embedded.x[order], use_rep or NICHE_AND_STATE).astype(np.float32)
    cells = cells.take(order)
    if embedded.tuner is not None:
        embedded.tuner.set_cells(order, x)

    split = _split(cells, n_folds)
    predicted = predict(x, cells.codes, split, len(cells.names), embedded.tuner, rng)
    result = _calibrate(predicted, cells, split, min_accuracy)

    back = np.argsort(order)[: adata.n_obs]
    source = adata if reference is None else reference
    colors = given_colors(source, groupby, cells.names)
    found = _found(cells.codes[back], result.probabilities[back], cells.names, result.threshold, min_accuracy, colors)
    params = record_params(
        groupby=groupby,
        use_rep=embedded.name,
        method=method,
        reference=reference is not None,
        min_accuracy=min_accuracy,
        n_folds=n_folds,
        **{**reading, "values": embedded.kind},
    )
    entry = _entry(params, cells, found, result, predicted.tuned)
    fields = annotation_fields(adata, key_added, found.annotation, entry)
    adata = write(adata, "tl.annotate", key_added, fields, copy=copy)
    _report(entry, cells, split, found, key_added)
    return adata if copy else None


class _Cells(NamedTuple):
    """Cells of ``adata``, and below them those of the reference."""

    names: list[str]
    """Labels in use."""
    codes: np.ndarray
    """(n,) position of each label among ``names``, -1 where there is none."""
    slide: np.ndarray
    xy: np.ndarray
    located: np.ndarray
    """(n,) bool, whether a cell has coordinates."""

    def take(self, order: np.ndarray) -> _Cells:
        """Cells in this order; those without coordinates get random ones, so that any are held out together."""
        xy, located = self.xy[order], self.located[order]
        xy[~located] = np.random.default_rng(0).uniform(size=(int((~located).sum()), xy.shape[1]))
        return _Cells(self.names, self.codes[order], self.slide[order], xy, located)


class _Embedded(NamedTuple):
    x: np.ndarray
    """(n, columns)."""
    name: str
    """Keys of ``obsm`` that were read; empty if the cells were embedded here."""
    kind: str
    """What the values are; empty if none were read."""
    tuner: Tuner | None


class Split(NamedTuple):
    """How labelled cells are held out."""

    rows: np.ndarray
    """Rows of the labelled cells."""
    folds: np.ndarray
    """(labelled,)."""
    kind: str
    """``"slides"`` or ``"blocks"``."""
    units: list[np.ndarray]
    """Number (labelled,) of the independent unit of each cell, in one or two ways."""
    confirm: np.ndarray | None = None
    """Slides (labelled,) across which a gain of fine-tuning must be found, too."""


class Prediction(NamedTuple):
    """Probabilities before calibration."""

    held_out: np.ndarray
    """(labelled, labels), predicted without the cell's fold."""
    everywhere: np.ndarray
    """(n, labels)."""
    tuned: dict[str, float]
    """What fine-tuning gained; empty without it."""


class _Result(NamedTuple):
    probabilities: np.ndarray
    """(n, labels), calibrated; of labelled cells, those predicted without them."""
    temperature: float
    threshold: float
    quality: dict[str, Any]


class _Found(NamedTuple):
    annotation: Annotation
    given: np.ndarray
    """(n_obs,) whether a cell had a label."""
    n_assigned: np.ndarray
    """(labels,) cells that were given each label."""
    n_unsure: int


def _check_arguments(
    adata: AnnData,
    groupby: str,
    use_rep: str | Sequence[str] | None,
    method: str,
    min_accuracy: float | None,
    n_folds: int,
    key_added: str,
) -> None:
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
        msg = (
            f"use_rep={use_rep!r} cannot be used with method='fine_tune', which trains the model itself; leave it out, "
            "or take method='probe'"
        )
        raise ValueError(msg)


def _read(
    adata: AnnData,
    reference: AnnData | None,
    groupby: str,
    use_rep: str | Sequence[str] | None,
    basis: str,
    library_key: str | None,
) -> _Cells:
    source = adata if reference is None else reference
    names, codes = given_labels(source, groupby, complete=reference is not None)
    if not adata.n_obs:
        msg = "adata holds no cells, so there is nothing to annotate"
        raise ValueError(msg)
    slide = slide_codes(get_libraries(adata, library_key))
    if reference is None:
        xy = get_coordinates(adata, basis)
        return _Cells(names, codes, slide, xy, np.ones(adata.n_obs, bool))

    dissociated = basis not in reference.obsm
    if dissociated and use_rep is None:
        msg = (
            f"reference has no coordinates in obsm[{basis!r}] (obsm holds {list(source.obsm)}). Dissociated cells "
            "cannot be embedded with the tissue by a model that reads neighbours. Name an embedding of both by "
            "expression alone with use_rep=, such as principal components of adata and reference together, each gene "
            "on the same scale in both; or basis=, if the coordinates have another key"
        )
        raise KeyError(msg)
    xy = get_coordinates(adata, basis)
    other = np.zeros((reference.n_obs, xy.shape[1])) if dissociated else get_coordinates(reference, basis)
    if xy.shape[1] != other.shape[1]:
        msg = (
            f"obsm[{basis!r}] has {xy.shape[1]} columns in adata and {other.shape[1]} in reference; "
            "keep the same axes in both"
        )
        raise ValueError(msg)
    return _Cells(
        names,
        np.r_[np.full(adata.n_obs, -1), codes],
        np.r_[slide, slide_codes(get_libraries(reference, library_key)) + slide.max() + 1],
        np.vstack([xy, other]),
        np.r_[np.ones(adata.n_obs, bool), np.full(reference.n_obs, not dissociated)],
    )


def _embed(
    files: list[AnnData],
    groupby: str,
    use_rep: str | Sequence[str] | None,
    model: str | Path | Model,
    method: str,
    reading: dict[str, Any],
) -> _Embedded:
    """Embedding of the cells of all files, below each other, with columns of the same meaning in all."""
    if method == "fine_tune":
        from spatialfm.tl._tuned import Tuner

        tuner = Tuner(files, model, reading, None)
        return _Embedded(tuner.embedding, "", tuner.values, tuner)
    if use_rep is None and len(files) > 1:
        from spatialfm.tl._embed import embed
        from spatialfm.tl._joined import join

        joined = join(*files, **reading)
        embed(joined, model, library_key="slide", basis=reading["basis"], values="log", key_added="joined")
        both = [key for key in ("X_joined_niche", "X_joined_state") if key in joined.obsm]
        return _Embedded(get_embedding(joined, both or "X_joined"), "", str(joined.uns["values"]), None)
    use_rep = use_rep or NICHE_AND_STATE
    parts = [get_embedding(a, use_rep) for a in files]
    for a in files:
        if groupby in a.obs:
            check_networks(a, use_rep, groupby)
        check_slides(a, use_rep, reading["library_key"])
    if len(files) > 1:
        fix = (
            "leave use_rep out, and both are embedded together; or concatenate them, embed once with library_key=, "
            "and annotate without a reference"
        )
        check_same_axes(files, use_rep, fix=fix)
    return _Embedded(np.vstack(parts), rep_name(use_rep), "", None)


def _split(cells: _Cells, n_folds: int) -> Split:
    """Hold out whole slides if each common label is found on two of them, blocks of tissue otherwise."""
    rows = np.flatnonzero(cells.codes >= 0)
    codes, slide = cells.codes[rows], cells.slide[rows]
    blocks = spatial_blocks(cells.xy[rows], slide)
    slides = np.unique(slide, return_inverse=True)[1]
    on = np.zeros((codes.max() + 1, slides.max() + 1), bool)
    on[codes, slides] = True
    common = np.bincount(codes) >= _MIN_COMMON
    by_slide = bool(common.any()) and on[common].sum(axis=1).min() >= 2
    units = slides if by_slide else blocks
    n_units = len(np.unique(units))
    if n_units < 2:
        msg = (
            "all labelled cells have the same location, so none can be held out to estimate the quality of labels; "
            "label cells elsewhere too"
        )
        raise ValueError(msg)
    folds = group_folds(units, min(n_folds, n_units))
    if by_slide:
        return Split(rows, folds, "slides", [blocks, slide])
    confirm = slides.max() > 0 and _on_other_slides(cells).any()
    return Split(rows, folds, "blocks", [blocks], slide if confirm else None)


def _on_other_slides(cells: _Cells) -> np.ndarray:
    """Whether each cell without a label is on a slide without labels."""
    return ~np.isin(cells.slide[cells.codes < 0], cells.slide[cells.codes >= 0])


def predict(x: np.ndarray, codes: np.ndarray, split: Split, n_labels: int, tuner: Tuner | None, rng: int) -> Prediction:
    """Probabilities of all cells, and of the labelled ones as predicted without their fold.

    The probe is trained once more, on all labelled cells; the correction of a trained network is the mean over folds.
    """
    held_out, corrected, correction = _leave_out(x, codes, split.rows, split.folds, n_labels, tuner, rng)
    probabilities = _probe(x, codes, split.rows, n_labels)
    if tuner is None:
        return Prediction(held_out, probabilities, {})
    from sklearn.metrics import f1_score

    truth, guess = codes[split.rows], held_out.argmax(axis=1)
    weight = find_weight(held_out, corrected, truth, split.units)
    if weight and split.confirm is not None:
        slides = group_folds(split.confirm, min(int(split.folds.max()) + 1, len(np.unique(split.confirm))))
        probe, network, _ = _leave_out(x, codes, split.rows, slides, n_labels, tuner, rng)
        weight = min(weight, find_weight(probe, network, truth, [*split.units, split.confirm]))
    tuned = {
        "weight": weight,
        "accuracy_probe": float((guess == truth).mean()),
        "macro_f1_probe": float(f1_score(truth, guess, labels=range(n_labels), average="macro", zero_division=0)),
    }
    return Prediction(blended(held_out, corrected, weight), blended(probabilities, correction, weight), tuned)


def _leave_out(
    x: np.ndarray,
    codes: np.ndarray,
    rows: np.ndarray,
    folds: np.ndarray,
    n_labels: int,
    tuner: Tuner | None,
    rng: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Held-out probabilities (rows, labels) of probe and network, and the mean (n, labels) of the networks."""
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
    if len(present) == 1:  # scikit-learn refuses it
        result[:, present] = 1.0
    else:
        result[:, present] = fit_probe(x[rows], codes[rows], balanced=False, tol=1e-4).predict_proba(x)
    return result


def _calibrate(predicted: Prediction, cells: _Cells, split: Split, min_accuracy: float | None) -> _Result:
    """Bring probabilities to the temperature of the held-out cells, and find the threshold."""
    truth = cells.codes[split.rows]
    temperature = find_temperature(predicted.held_out, truth)
    calibrated = with_temperature(predicted.held_out, temperature)
    probabilities = with_temperature(predicted.everywhere, temperature)
    probabilities[split.rows] = calibrated
    best = calibrated.argmax(axis=1)
    confidence, correct = calibrated.max(axis=1), best == truth
    threshold = 0.0 if min_accuracy is None else find_threshold(confidence, correct, split.units, min_accuracy)
    sure = confidence >= threshold
    after = reliability(confidence, correct)
    before = reliability(predicted.held_out.max(axis=1), predicted.held_out.argmax(axis=1) == truth)
    confusion, best_guess = (
        np.bincount(truth * width + to, minlength=len(cells.names) * width).reshape(len(cells.names), width)
        for to, width in ((np.where(sure, best, len(cells.names)), len(cells.names) + 1), (best, len(cells.names)))
    )
    f1 = 2 * np.diag(best_guess) / np.maximum(best_guess.sum(0) + best_guess.sum(1), 1)
    held_out = {
        "folds": "cells" if split.kind == "blocks" and not cells.located.all() else split.kind,
        "n_folds": int(split.folds.max()) + 1,
        "n_units": len(np.unique(split.units[-1])),
        "accuracy": float(correct.mean()),
        "macro_f1": float(f1.mean()),
        "coverage": float(sure.mean()),
        **({"accuracy_sure": float(correct[sure].mean())} if sure.any() else {}),
        "calibration_error": calibration_error(after),
        "calibration_error_before": calibration_error(before),
    }
    quality = {
        "held_out": held_out,
        "confusion": confusion,
        "best_guess": best_guess,
        "reliability": after,
        "reliability_before": before,
    }
    return _Result(probabilities, temperature, threshold, quality)


def _found(
    codes: np.ndarray,
    probabilities: np.ndarray,
    names: list[str],
    threshold: float,
    min_accuracy: float | None,
    colors: list[str] | None,
) -> _Found:
    """Labels of the cells of ``adata``; those below the threshold become unsure."""
    found = np.where(codes >= 0, codes, probabilities.argmax(axis=1))
    probability = probabilities[np.arange(len(found)), found]
    unsure = (codes < 0) & (probability < threshold)
    n_assigned = np.bincount(found[(codes < 0) & ~unsure], minlength=len(names))
    categories = names
    if min_accuracy is not None:
        found[unsure] = len(names)
        categories = [*names, _UNSURE]
        colors = None if colors is None else [*colors, _UNSURE_COLOR]
    labels = pd.Categorical.from_codes(found.tolist(), categories=categories)
    annotation = Annotation(labels, probability, probabilities, names, colors)
    return _Found(annotation, codes >= 0, n_assigned, int(unsure.sum()))


def _entry(
    params: dict[str, Any], cells: _Cells, found: _Found, result: _Result, tuned: dict[str, float]
) -> dict[str, Any]:
    """Record of the annotation, for ``uns``."""
    asked = params["min_accuracy"]
    threshold: dict[str, Any] = {"threshold": result.threshold}
    if np.isinf(result.threshold):
        threshold = {
            "no_threshold": f"no probability reaches an accuracy of {asked} on held-out cells, so all are unsure"
        }
    return {
        "params": params,
        "names": cells.names,
        "n_labelled": np.bincount(cells.codes[cells.codes >= 0], minlength=len(cells.names)),
        "n_assigned": found.n_assigned,
        "n_unsure": found.n_unsure,
        "temperature": result.temperature,
        **threshold,
        **result.quality,
        **({"fine_tune": tuned} if tuned else {}),
    }


def _report(entry: dict[str, Any], cells: _Cells, split: Split, found: _Found, key_added: str) -> None:
    """Log what was found, and where the estimate of the quality does not hold."""
    held, tuned = entry["held_out"], entry.get("fine_tune", {})
    if "no_threshold" in entry:
        logger.warning("%s; ask for less with min_accuracy=, or label more cells", entry["no_threshold"])
    sure = ""
    if entry["params"]["min_accuracy"] != "" and "accuracy_sure" in held:
        sure = (
            f", {held['accuracy_sure']:.3f} in the {held['coverage']:.0%} from probability {entry['threshold']:.3f} on"
        )
    logger.info(
        "annotate: %d cells from %d labelled, %d unsure; held out by %d folds of %s: accuracy %.3f, macro F1 %.3f%s "
        "-> obs[%r], obsm['%s_probabilities'], uns[%r]",
        int((~found.given).sum()), len(split.rows), found.n_unsure, held["n_folds"], held["folds"],
        held["accuracy"], held["macro_f1"], sure, key_added, key_added, key_added,
    )  # fmt: skip
    if tuned:
        logger.info(
            "fine_tune: weight %s of the network beside the probe, which alone has a held-out accuracy of %.3f and a "
            "macro F1 of %.3f%s",
            tuned["weight"],
            tuned["accuracy_probe"],
            tuned["macro_f1_probe"],
            "" if tuned["weight"] else "; the network is no better on held-out tissue, so the result is the probe's",
        )
    elsewhere = int(_on_other_slides(cells).sum())
    if split.kind == "slides" or not elsewhere:
        return
    if held["folds"] == "cells":
        why = "the labelled cells have no coordinates"
    elif len(np.unique(cells.slide[split.rows])) == 1:
        why = "all labels are on one slide"
    else:
        why = "too many labels are only on one slide"
    logger.warning(
        "%d cells are on slides without labels, and quality%s was estimated within slides, since %s: expect less "
        "there. If labels of the same kinds are on two slides (library_key=), whole slides are held out",
        elsewhere,
        " and the gain by fine-tuning" if tuned and split.confirm is None else "",
        why,
    )
