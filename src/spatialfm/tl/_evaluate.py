"""How well embeddings tell labels, where nothing that is tested was seen."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pandas as pd

from spatialfm._checks import check_choice, check_positive, checked
from spatialfm._data._adata import (
    get_coordinates,
    get_embedding,
    get_libraries,
    get_obs_categories,
    get_obs_labels,
    slide_codes,
)
from spatialfm._data._embeddings import NICHE_AND_STATE, rep_name
from spatialfm._data._expression import ValuesKind, place_order
from spatialfm._data._splits import check_folds, group_folds, spatial_blocks
from spatialfm._data._write import check_free, write
from spatialfm._settings import logger, progress, settings
from spatialfm.tl._probe import fit_probe
from spatialfm.tl._provenance import check_networks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from scipy.sparse import csr_matrix


Split = Literal["auto", "blocks", "slides", "patients", "random"]
Baseline = Literal["pca", "neighbors", "hops", "location", "majority"]

_TOL = 1e-4  # of the probe; smaller changes 0.1 % of the predictions
_MIN_CELLS = 20
_MIN_UNITS = 5  # fewer do not tell how units vary


@checked
def evaluate(
    adata: AnnData,
    groupby: str,
    *,
    use_rep: str | Sequence[str | tuple[str, ...]] = NICHE_AND_STATE,
    split: Split = "auto",
    baselines: Sequence[Baseline] = get_args(Baseline),
    library_key: str | None = None,
    patient_key: str | None = None,
    layer: str | None = None,
    values: ValuesKind = "auto",
    n_folds: int = 4,
    n_bootstrap: int = 1000,
    max_cells: int | None = None,
    neighbors_key: str = "spatial_neighbors",
    basis: str = "spatial",
    key_added: str = "evaluation",
    rng: int | np.random.Generator | None = 0,
    copy: bool = False,
) -> AnnData | None:
    """Score how well embeddings tell known labels in tissue that was left out, beside what plain baselines reach.

    A linear probe is trained on some places, slides or patients and tested on the others. Cells next to each other share expression, neighbours
    and staining, so cells that were left out at random are no test: their neighbours were trained on. Differences to the baselines and between
    embeddings are of the same cells, and their intervals of the same resampled units; where an interval holds 0, neither has been shown to be better.

    The probe is the only thing that is left out: an embedding, like principal components, has seen the expression of all cells. Labels must not be in it:
    it is refused where its gene networks were built from ``groupby``.

    Parameters
    ----------
    adata
        Cells or spots with embeddings (:func:`spatialfm.tl.embed`), expression, coordinates and labels.
    groupby
        Column of ``obs`` with the labels. Cells without one (NaN; nothing else counts as missing) are not tested. Labels of fewer than 20
        cells, and those in one fold alone, are left out with a line in the log.
    use_rep
        Key of ``obsm`` with the embedding; a tuple of keys is one embedding, their columns side by side. A list names
        several embeddings, each of them a key or a tuple, which are compared with each other:
        ``[("X_niche", "X_state"), "X_pca"]``. In the tables, a tuple is called ``"X_niche + X_state"``.
    split
        What is left out as a whole. ``"blocks"``: 6 x 6 places a slide. ``"slides"``, of ``library_key``. ``"patients"``, of ``patient_key``: no patient
        is on both sides. ``"auto"``: patients if ``patient_key`` is given, else slides if there are several, else blocks. ``"random"``: single
        cells, which flatters whatever has heard the neighbours; the log says how many held-out cells had a neighbour with their label in training.
    baselines
        Computed here, of any of: ``"pca"``, 30 principal components of the log-normalised expression; ``"neighbors"``, those and their mean over the
        neighbours; ``"hops"``, their means over 1, 3 and 8 steps on the tissue graph; ``"location"``, the coordinates alone (a polynomial of
        degree three); ``"majority"``, the most frequent label.
    library_key
        Column of ``obs`` with the slide of each cell.
    patient_key
        Column of ``obs`` with the patient (donor, animal) of each cell.
    layer
        Layer with the expression of the baselines, instead of ``X``.
    values
        What this expression is, as for :func:`spatialfm.tl.embed`; recognised by default.
    n_folds
        Number of folds; as many as there are units where those are fewer.
    n_bootstrap
        Resamples for the intervals.
    max_cells
        Test and train on so many cells, drawn at random; all were neighbours. None: all.
    neighbors_key
        Key of ``uns`` that names the tissue graph, for ``"neighbors"``, ``"hops"`` and random splits; built where there is none.
    basis
        Key of ``obsm`` with the coordinates.
    key_added
        Where the result is written, in ``uns``.
    rng
        Seed or generator of the bootstrap, random splits and ``max_cells``.
    copy
        Whether to return a changed copy instead of changing ``adata``.

    Returns
    -------
    None, or the copy. Written are

    ``uns[key_added]["scores"]``
        Table, a row for each embedding and metric (:func:`spatialfm.get.evaluation_df`): ``embedding``; ``is_baseline``; ``metric``, ``"accuracy"``,
        ``"macro_f1"`` or ``"f1"``; ``label``, of ``"f1"``, otherwise ``""``; ``value``, from the predictions for all held-out cells together; ``low`` and
        ``high``, the 95 % interval; ``n_cells`` and ``n_units`` that it rests on.
    ``uns[key_added]["differences"]``
        Table, a row for each pair and overall metric: ``embedding``; ``reference``, an embedding that stands after it in ``use_rep``, or a baseline;
        ``metric``; ``difference`` (embedding less reference), ``low``, ``high``.
    ``uns[key_added]``
        Also ``params``; ``split``, what was left out; ``n_units``, ``n_folds``, ``n_cells``; ``labels``, those tested, a list.
    ``obsp``, ``uns["spatial_neighbors"]``
        The tissue graph, where it was missing and is needed.

    Raises
    ------
    KeyError
        If a column, an embedding, the coordinates or a tissue graph of another name are missing.
    ValueError
        If the gene networks behind an embedding were built from ``groupby``, ``split`` does not go with the keys, there are fewer than two units, or fewer than
        two labels can be tested.

    Notes
    -----
    The probe is a logistic regression with a ridge penalty (C = 0.1) on columns standardised over the training cells, in float32 (0.2 % of the
    predictions differ from float64 on 82,000 cells of 26 labels). F1 of a label is :math:`2 TP / (2 TP + FP + FN)`, macro F1 its mean over labels.

    Intervals are percentiles over resamples of the independent units: blocks (also for random splits), slides or patients, with the
    predictions as they are. In a resample without a label, the mean goes over the others. Below five units (for a label: five that have it) they are
    NaN. They say how the score varies between such units, not between trainings of the model, and with few units they are rather too narrow. Where a
    patient has several slides, split by patients: slides of one patient are not independent. Cells at the border of a block have neighbours
    in the next one; slides and patients share none.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()
    >>> sfm.tl.embed(adata, library_key="mouse_id")  # doctest: +SKIP
    >>> sfm.tl.evaluate(adata, "region", use_rep=["X_niche", "X_state"], library_key="mouse_id")  # doctest: +SKIP
    >>> sfm.get.evaluation_df(adata)  # doctest: +SKIP
    """
    from spatialfm.pp._spatial_neighbors import find_graph
    from spatialfm.tl._baselines import hop_means, location_terms, principal_components

    check_free(adata, "tl.evaluate", {"uns": [key_added]})
    compared = _compared(use_rep)
    reps = list(compared)
    for name in baselines:
        if name in reps or list(baselines).count(name) > 1:
            fault = "is both an embedding and a baseline" if name in reps else "is named twice"
            msg = f"use_rep={use_rep!r}, baselines={list(baselines)!r}: {name!r} {fault}; name each once"
            raise ValueError(msg)
    for name in baselines:
        check_choice("baselines", name, get_args(Baseline))
    check_positive("n_bootstrap", n_bootstrap)
    check_positive("max_cells", max_cells, optional=True)
    given = get_obs_labels(adata, groupby, name="groupby")
    xy = get_coordinates(adata, basis)
    libraries = get_libraries(adata, library_key)
    slide = slide_codes(libraries)
    how, units = _units(adata, split, xy, slide, library_key, patient_key)
    for keys in compared.values():
        check_networks(adata, keys, groupby)
    features = {name: get_embedding(adata, keys).astype(np.float32) for name, keys in compared.items()}

    generator = np.random.default_rng(rng)
    codes = np.asarray(given.codes, np.int64)
    rows = np.flatnonzero(codes >= 0)
    content = np.hstack([f[rows] for f in features.values()])
    rows = rows[place_order(content, np.column_stack([slide[rows], xy[rows], codes[rows]]))]
    rows = _common(rows, codes, given.categories)
    if max_cells is not None and len(rows) > max_cells:
        rows = _common(rows[np.sort(generator.choice(len(rows), max_cells, replace=False))], codes, given.categories)
    if not len(rows):
        drawn = "" if max_cells is None else f" among the {max_cells} of max_cells"
        msg = f"obs[{groupby!r}]: no label stands in at least {_MIN_CELLS} cells{drawn}, so there is nothing to test"
        raise ValueError(msg)
    # Places are those of the cells that are tested.
    unit = spatial_blocks(xy[rows], slide[rows]) if units is None else units[rows]
    fold = _folds(how, unit, n_folds, generator)
    able = _testable(codes[rows], fold, given.categories, groupby, how)
    rows, unit, fold = rows[able], unit[able], fold[able]
    present, y = np.unique(codes[rows], return_inverse=True)
    labels = [str(given.categories[k]) for k in present]

    neighbors, kind = None, None
    if {"neighbors", "hops"} & set(baselines) or how == "random":
        neighbors = find_graph(adata, neighbors_key=neighbors_key, basis=basis, library_key=library_key)
        graph = neighbors.edges
    if how == "random":
        _warn_of_neighbours(graph, rows, y, fold)
    if {"pca", "neighbors", "hops"} & set(baselines):
        pca, kind = principal_components(adata, layer, values, libraries)
    for name in baselines:
        if name == "pca":
            features[name] = pca
        elif name == "neighbors":
            features[name] = hop_means(pca, graph, (0, 1))
        elif name == "hops":
            features[name] = hop_means(pca, graph, (1, 3, 8))
        elif name == "location":
            features[name] = location_terms(xy, slide)
        else:
            features[name] = np.zeros((adata.n_obs, 1), np.float32)

    predicted = _predict({name: x[rows] for name, x in features.items()}, y, fold)
    _, unit = np.unique(unit, return_inverse=True)
    n_units = int(unit.max()) + 1
    weights = generator.multinomial(n_units, np.full(n_units, 1 / n_units), size=n_bootstrap)
    scores, differences = _tables(predicted, y, unit, labels, weights, len(reps))

    params: dict[str, Any] = {
        "groupby": groupby,
        "use_rep": reps,
        "split": split,
        "baselines": list(baselines),
        "n_bootstrap": int(n_bootstrap),
        "basis": basis,
    }
    optional = {
        "library_key": library_key, "patient_key": patient_key, "layer": layer, "values": kind, "max_cells": max_cells
    }  # fmt: skip
    params |= {name: value for name, value in optional.items() if value is not None}
    params |= {"rng": int(rng)} if isinstance(rng, int | np.integer) else {}
    entry = {
        "params": params,
        "split": how,
        "n_units": n_units,
        "n_folds": int(fold.max()) + 1,
        "n_cells": len(rows),
        "labels": labels,
        "scores": scores,
        "differences": differences,
    }
    adata = write(adata, "tl.evaluate", key_added, {"uns": {key_added: entry}}, copy=copy)
    if neighbors is not None:
        neighbors.store(adata)
    f1 = scores[scores["metric"] == "macro_f1"]
    logger.info(
        "evaluate: macro F1 of %d labels of %d cells by %s -> uns[%r]: %s",
        len(labels),
        len(rows),
        _described(how, n_units, int(fold.max()) + 1),
        key_added,
        ", ".join(f"{name} {value:.3f}" for name, value in zip(f1["embedding"], f1["value"], strict=True)),
    )
    if n_units < _MIN_UNITS:
        logger.warning("evaluate: %d %s are too few to tell how they vary: no intervals (NaN)", n_units, _UNITS[how])
    return adata if copy else None


def _compared(use_rep: str | Sequence[str | tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Keys of ``obsm`` of each embedding, by its name: a tuple is one embedding, a list several."""
    several = [use_rep] if isinstance(use_rep, str | tuple) else list(use_rep)
    if not several:
        msg = f"use_rep={use_rep!r} must name at least one embedding in obsm"
        raise ValueError(msg)
    compared: dict[str, tuple[str, ...]] = {}
    for keys in several:
        side_by_side = (keys,) if isinstance(keys, str) else tuple(keys) if isinstance(keys, tuple | list) else ()
        if not side_by_side or not all(isinstance(key, str) for key in side_by_side):
            msg = (
                f"use_rep={use_rep!r}: {keys!r} names no embedding; give a key of obsm, a tuple of keys whose columns are "
                "put side by side, or a list of these to compare"
            )
            raise ValueError(msg)
        if rep_name(side_by_side) in compared:
            msg = f"use_rep={use_rep!r} names {rep_name(side_by_side)!r} twice; name each embedding once"
            raise ValueError(msg)
        compared[rep_name(side_by_side)] = side_by_side
    return compared


_UNITS = {"blocks": "blocks", "random": "blocks", "slides": "slides", "patients": "patients"}


def _described(how: str, n_units: int, n_folds: int) -> str:
    if how == "random":
        return f"{n_folds} folds of random cells, whose neighbours were trained on"
    return f"{n_folds} folds of {n_units} {_UNITS[how]}"


def _units(
    adata: AnnData, split: str, xy: np.ndarray, slide: np.ndarray, library_key: str | None, patient_key: str | None
) -> tuple[str, np.ndarray | None]:
    """Name what is left out, and its number (n_obs,) for each cell; None where it goes by place."""
    check_choice("split", split, get_args(Split))
    n_slides = int(slide.max(initial=0)) + 1
    if split == "auto":
        split = "patients" if patient_key is not None else "slides" if n_slides >= 2 else "blocks"
    if patient_key is not None and split != "patients":
        msg = f"split={split!r} would train and test on the same patient of obs[{patient_key!r}]; use split='patients', or leave patient_key= away"
        raise ValueError(msg)
    if split == "patients":
        if patient_key is None:
            msg = "split='patients' needs patient_key=, the column of obs with the patient of each cell"
            raise ValueError(msg)
        units = np.asarray(get_obs_categories(adata, patient_key, name="patient_key").codes, np.int64)
        if units.max(initial=0) < 1:
            msg = f"patient_key={patient_key!r}: all cells are of one patient, so none can be left out; leave patient_key= away to split by slides or blocks, which says nothing about other patients"
            raise ValueError(msg)
        return split, units
    if split == "slides":
        if n_slides < 2:
            msg = f"split='slides' needs at least two slides, but library_key={library_key!r} gives {n_slides}; name the column of obs with the slides, or use split='blocks'"
            raise ValueError(msg)
        return split, slide
    return split, None


def _common(rows: np.ndarray, codes: np.ndarray, categories: pd.Index) -> np.ndarray:
    """Rows of labels with at least 20 cells."""
    counts = np.bincount(codes[rows], minlength=len(categories))
    rare = np.flatnonzero((counts > 0) & (counts < _MIN_CELLS))
    if len(rare):
        logger.info(
            "evaluate: labels of fewer than %d cells are left out: %s",
            _MIN_CELLS,
            ", ".join(f"{categories[k]} ({counts[k]})" for k in rare),
        )
    return rows[counts[codes[rows]] >= _MIN_CELLS]


def _folds(how: str, unit: np.ndarray, n_folds: int, generator: np.random.Generator) -> np.ndarray:
    check_folds(n_folds)
    n_units = len(np.unique(unit))
    if n_units < 2:
        msg = f"the labelled cells stand in {n_units} of the {_UNITS[how]}; at least two are needed, to train on one and test on the other"
        raise ValueError(msg)
    if how == "random":
        return generator.permutation(len(unit)) % int(n_folds)
    return group_folds(unit, min(int(n_folds), n_units))


def _testable(codes: np.ndarray, fold: np.ndarray, categories: pd.Index, groupby: str, how: str) -> np.ndarray:
    """Cells whose label stands in two folds: otherwise it is never both trained and tested."""
    on = np.zeros((int(codes.max(initial=0)) + 1, int(fold.max(initial=0)) + 1), bool)
    on[codes, fold] = True
    once = np.flatnonzero(on.sum(axis=1) == 1)
    place = {"patients": "patient", "slides": "slide"}.get(how, "place")
    if (on.sum(axis=1) > 1).sum() < 2:
        msg = (
            f"obs[{groupby!r}]: fewer than two labels of at least {_MIN_CELLS} cells stand in two folds, so none can be trained in one {place} and tested "
            f"in another; {'use split=' + repr('blocks') if how == 'slides' else 'check the labels'}"
        )
        raise ValueError(msg)
    if len(once):
        logger.warning(
            "evaluate: labels that stand in one fold alone (one %s, or few) cannot be tested in another and are left out: %s",
            place,
            ", ".join(str(categories[k]) for k in once),
        )
    return on.sum(axis=1)[codes] > 1


def _warn_of_neighbours(graph: csr_matrix, rows: np.ndarray, y: np.ndarray, fold: np.ndarray) -> None:
    """Say how many held-out cells have a direct neighbour of their label in training."""
    i, j = graph[rows][:, rows].nonzero()
    told = np.zeros(len(rows), bool)
    told[i[(y[i] == y[j]) & (fold[i] != fold[j])]] = True
    logger.warning(
        "evaluate: split='random' holds out single cells, and %.0f %% of them have a direct neighbour with their label in training; embeddings and baselines "
        "that hear neighbours score too high by that. Compare with split='auto'",
        100 * told.mean(),
    )


def _predict(features: dict[str, np.ndarray], y: np.ndarray, fold: np.ndarray) -> dict[str, np.ndarray]:
    """Out-of-fold predictions (n,) by each of the features (n, columns)."""
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    predicted = {name: np.empty_like(y) for name in features}

    def one(job: tuple[str, int]) -> None:
        name, k = job
        test = fold == k
        predicted[name][test] = _probe(features[name][~test], y[~test], features[name][test])

    jobs = [(name, k) for name in features for k in range(fold.max() + 1)]
    # Threads of folds instead of threads inside them: twice as fast on two cores, and no sum depends on their number.
    with warnings.catch_warnings(), threadpool_limits(1), ThreadPoolExecutor(settings.n_jobs) as pool:
        warnings.simplefilter("ignore", ConvergenceWarning)
        for _ in progress(pool.map(one, jobs), desc="linear probes", total=len(jobs)):
            pass
    return predicted


def _probe(x: np.ndarray, y: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Labels of ``others`` by a logistic regression on columns standardised over ``x``."""
    mean, spread = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    varies = spread > 1e-7 * np.maximum(np.abs(mean), 1e-7)
    if not varies.any():
        return np.full(len(others), np.bincount(y).argmax())
    x, others = (((v[:, varies] - mean[varies]) / spread[varies]).astype(np.float32) for v in (x, others))
    return fit_probe(x, y, balanced=False, tol=_TOL).predict(others)


def _tables(
    predicted: dict[str, np.ndarray],
    y: np.ndarray,
    unit: np.ndarray,
    labels: list[str],
    weights: np.ndarray,
    n_reps: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores, and differences of the first ``n_reps`` embeddings to all after them, with the percentiles over the ``weights`` (resamples, units)."""
    n_units, k = weights.shape[1], len(labels)

    def count(label: np.ndarray, where: np.ndarray) -> np.ndarray:
        return np.bincount(unit[where] * k + label[where], minlength=n_units * k).reshape(n_units, k)

    everywhere = np.ones(len(y), bool)
    support = count(y, everywhere)
    with_label = (support > 0).sum(axis=0)
    all_units = np.ones((1, n_units), weights.dtype)

    def measure(found: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Accuracy, macro F1 and F1 of each label (resamples, 2 + labels), units counted ``times`` (resamples, units)."""
        right, given, true = (times @ c for c in (count(y, found == y), count(found, everywhere), support))
        f1 = np.where(true > 0, 2 * right / np.maximum(given + true, 1), np.nan)
        return np.column_stack([right.sum(axis=1) / true.sum(axis=1), np.nanmean(f1, axis=1), f1])

    def interval(samples: np.ndarray) -> np.ndarray:
        """Percentiles (2, 2 + labels); NaN where too few units tell."""
        limits = np.nanpercentile(samples, [2.5, 97.5], axis=0)
        limits[:, np.r_[n_units, n_units, with_label][: samples.shape[1]] < _MIN_UNITS] = np.nan
        return limits

    values = {name: measure(found, all_units)[0] for name, found in predicted.items()}
    samples = {name: measure(found, weights) for name, found in predicted.items()}
    metrics = ["accuracy", "macro_f1", *["f1"] * k]
    names = list(predicted)
    scores = pd.concat(
        [
            pd.DataFrame(
                {
                    "embedding": name,
                    "is_baseline": position >= n_reps,
                    "metric": metrics,
                    "label": ["", "", *labels],
                    "value": values[name],
                    **dict(zip(("low", "high"), interval(samples[name]), strict=True)),
                    "n_cells": np.r_[len(y), len(y), support.sum(axis=0)],
                    "n_units": np.r_[n_units, n_units, with_label],
                }
            )
            for position, name in enumerate(names)
        ],
        ignore_index=True,
    )
    rows = []
    for position, name in enumerate(names[:n_reps]):
        for other in names[position + 1 :]:
            low, high = interval(samples[name][:, :2] - samples[other][:, :2])
            for m in range(2):
                rows.append((name, other, metrics[m], values[name][m] - values[other][m], low[m], high[m]))
    columns = ["embedding", "reference", "metric", "difference", "low", "high"]
    differences = pd.DataFrame(rows, columns=columns)
    # Text index and columns: what .h5ad and .zarr give back.
    for table in (scores, differences):
        table.index = table.index.astype(str)
    return scores, differences
