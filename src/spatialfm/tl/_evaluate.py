"""How well embeddings predict labels in held-out tissue."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd

from spatialfm._checks import check_choice, check_positive, checked
from spatialfm._data._adata import (
    get_coordinates,
    get_libraries,
    get_obs_categories,
    get_obs_labels,
    slide_codes,
)
from spatialfm._data._embeddings import NICHE_AND_STATE, get_embedding, rep_name
from spatialfm._data._expression import ValuesKind, location_order
from spatialfm._data._splits import check_folds, group_folds, spatial_blocks
from spatialfm._data._write import check_free, record_params, write
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
_MIN_UNITS = 5  # fewer do not show how units vary
_UNITS = {"blocks": "blocks", "random": "blocks", "slides": "slides", "patients": "patients"}


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
    neighbors_key: str = "spatial_neighbors",
    basis: str = "spatial",
    key_added: str = "evaluation",
    rng: int | np.random.Generator | None = 0,
    copy: bool = False,
) -> AnnData | None:
    """Score how well embeddings predict known labels in held-out tissue, beside simple baselines.

    A linear probe (ridge logistic regression) is trained on some blocks, slides or patients and tested on the others.
    Only the probe is held out: embeddings and principal components have seen the expression of all cells.

    Parameters
    ----------
    %(adata)s
    groupby
        Column of ``obs`` with the labels. Cells without one (NaN) are not tested; labels of fewer than 20 cells
        neither.
    use_rep
        Key of ``obsm``; a tuple of keys is one embedding, their columns side by side; a list of keys or tuples is
        several embeddings, which are also compared with each other: ``[("X_niche", "X_state"), "X_pca"]``.
    split
        What is held out: ``"blocks"`` (6 x 6 a slide), ``"slides"``, ``"patients"``, the last that applies with
        ``"auto"``; or ``"random"`` cells, whose scores are too high, as their neighbours are trained on.
    baselines
        ``"pca"``: 30 principal components of the expression. ``"neighbors"``: those and their mean over the
        neighbours. ``"hops"``: their means over 1, 3 and 8 steps. ``"location"``: a polynomial of the coordinates.
        ``"majority"``.
    %(library_key)s
    patient_key
        Column of ``obs`` with the patient (donor, animal) of each cell.
    %(layer)s
    %(values)s
    n_folds
        Number of folds, at most.
    n_bootstrap
        Resamples of blocks, slides or patients for the intervals.
    %(neighbors_key)s
    %(basis)s
    %(key_added)s
    %(rng)s
    %(copy)s

    Returns
    -------
    None, or the copy. Written are two tables (:func:`spatialfm.get.evaluation_df`)

    ``uns[key_added]["scores"]``
        For each embedding (two keys are named ``"X_niche + X_state"``) the accuracy, macro F1 and F1 of each label,
        with 95 % intervals; NaN with fewer than five units.
    ``uns[key_added]["differences"]``
        Between embeddings and baselines, over the same cells and resamples.

    Raises
    ------
    KeyError, ValueError
        If something named is missing, the embedding has seen the labels, or there is nothing to hold out.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()[::4].copy()
    >>> sfm.tl.embed(adata, library_key="mouse_id")
    >>> sfm.tl.evaluate(adata, "region", use_rep=["X_niche", "X_state"], split="blocks", library_key="mouse_id")
    >>> sfm.get.evaluation_df(adata)["embedding"].unique().tolist()
    ['X_niche', 'X_state', 'pca', 'neighbors', 'hops', 'location', 'majority']
    """
    compared = _compared(use_rep)
    _check_arguments(adata, compared, baselines, n_folds, n_bootstrap, key_added)
    libraries = get_libraries(adata, library_key)
    cells = _read(adata, groupby, compared, split, slide_codes(libraries), library_key, patient_key, basis)
    generator = np.random.default_rng(rng)
    test = _hold_out(cells, n_folds, generator)

    graph, components = _inputs(baselines, test.how, adata, libraries, layer, values, neighbors_key, basis, library_key)
    if test.how == "random":
        _log_neighbours(graph.edges, test)
    features = {name: rep[test.rows] for name, rep in cells.reps.items()}
    for name in baselines:
        features[name] = _baseline(name, cells, components, graph)[test.rows]

    predicted = predict_labels(features, test.y, test.fold)
    weights = generator.multinomial(test.n_units, np.full(test.n_units, 1 / test.n_units), size=n_bootstrap)
    scores, differences = score_tables(predicted, test.y, test.unit, test.labels, weights, len(compared))

    params = record_params(
        groupby=groupby, use_rep=list(compared), split=split, baselines=list(baselines), library_key=library_key,
        patient_key=patient_key, layer=layer, values=components and components.kind, n_folds=n_folds,
        n_bootstrap=n_bootstrap, neighbors_key=neighbors_key, basis=basis, rng=rng,
    )  # fmt: skip
    entry = {
        "params": params,
        "split": test.how,
        "n_units": test.n_units,
        "n_folds": test.n_folds,
        "n_cells": len(test.rows),
        "labels": test.labels,
        "scores": scores,
        "differences": differences,
    }
    adata = write(adata, "tl.evaluate", key_added, {"uns": {key_added: entry}}, copy=copy)
    if graph is not None:
        graph.store(adata)
    _report(test, scores, key_added)
    return adata if copy else None


class _Cells(NamedTuple):
    """All cells, and what is held out of them."""

    groupby: str
    labels: pd.Categorical
    xy: np.ndarray
    slide: np.ndarray
    reps: dict[str, np.ndarray]
    """Embeddings (n_obs, columns) by their names."""
    how: str
    """What is held out: blocks, slides, patients or random (cells)."""
    units: np.ndarray | None
    """(n_obs,) slide or patient of each cell; None for blocks."""


class _Test(NamedTuple):
    """Cells that are tested, in an order that only their content decides."""

    how: str
    rows: np.ndarray
    y: np.ndarray
    """Position of each label among `labels`."""
    labels: list[str]
    unit: np.ndarray
    fold: np.ndarray

    @property
    def n_units(self) -> int:
        return int(self.unit.max()) + 1

    @property
    def n_folds(self) -> int:
        return int(self.fold.max()) + 1


def _check_arguments(
    adata: AnnData,
    compared: dict[str, tuple[str, ...]],
    baselines: Sequence[str],
    n_folds: int,
    n_bootstrap: int,
    key_added: str,
) -> None:
    check_free(adata, "tl.evaluate", {"uns": [key_added]})
    for name in baselines:
        check_choice("baselines", name, get_args(Baseline))
        if name in compared or list(baselines).count(name) > 1:
            fault = "is an embedding too" if name in compared else "is named twice"
            msg = f"baselines={list(baselines)!r}: {name!r} {fault}; name each once"
            raise ValueError(msg)
    check_folds(n_folds)
    check_positive("n_bootstrap", n_bootstrap)


def _compared(use_rep: str | Sequence[str | tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Keys of ``obsm`` of each embedding, by its name: a tuple is one embedding, a list several."""
    several = [use_rep] if isinstance(use_rep, str | tuple) else list(use_rep)
    compared: dict[str, tuple[str, ...]] = {}
    for keys in several:
        together = (keys,) if isinstance(keys, str) else tuple(keys) if isinstance(keys, tuple | list) else ()
        if not together or not all(isinstance(key, str) for key in together):
            msg = (
                f"use_rep={use_rep!r}: {keys!r} names no embedding; give a key of obsm, a tuple of keys whose columns "
                "are put side by side, or a list of these to compare"
            )
            raise ValueError(msg)
        if rep_name(together) in compared:
            msg = f"use_rep={use_rep!r} names {rep_name(together)!r} twice; name each embedding once"
            raise ValueError(msg)
        compared[rep_name(together)] = together
    if not compared:
        msg = f"use_rep={use_rep!r} must name at least one embedding in obsm"
        raise ValueError(msg)
    return compared


def _read(
    adata: AnnData,
    groupby: str,
    compared: dict[str, tuple[str, ...]],
    split: str,
    slide: np.ndarray,
    library_key: str | None,
    patient_key: str | None,
    basis: str,
) -> _Cells:
    labels = get_obs_labels(adata, groupby, name="groupby")
    xy = get_coordinates(adata, basis)
    how, units = _units(adata, split, slide, library_key, patient_key)
    for keys in compared.values():
        check_networks(adata, keys, groupby)
    reps = {name: get_embedding(adata, keys).astype(np.float32) for name, keys in compared.items()}
    return _Cells(groupby, labels, xy, slide, reps, how, units)


def _units(
    adata: AnnData, split: str, slide: np.ndarray, library_key: str | None, patient_key: str | None
) -> tuple[str, np.ndarray | None]:
    """Name what is held out, and the slide or patient (n_obs,) of each cell; None for blocks."""
    check_choice("split", split, get_args(Split))
    n_slides = int(slide.max(initial=0)) + 1
    if split == "auto":
        split = "patients" if patient_key is not None else "slides" if n_slides >= 2 else "blocks"
    if patient_key is not None and split != "patients":
        msg = (
            f"split={split!r} would train and test on the same patient of obs[{patient_key!r}]; use split='patients', "
            "or leave out patient_key="
        )
        raise ValueError(msg)
    if split == "patients":
        if patient_key is None:
            msg = "split='patients' needs patient_key=, the column of obs with the patient of each cell"
            raise ValueError(msg)
        units = np.asarray(get_obs_categories(adata, patient_key, name="patient_key").codes, np.int64)
        if units.max(initial=0) < 1:
            msg = (
                f"patient_key={patient_key!r}: all cells are of one patient, so none can be held out; leave out "
                "patient_key= to split by slides or blocks, which does not show how well other patients are predicted"
            )
            raise ValueError(msg)
        return split, units
    if split == "slides":
        if n_slides < 2:
            msg = (
                f"split='slides' needs at least two slides, but library_key={library_key!r} gives {n_slides}; name the "
                "column of obs with the slides, or use split='blocks'"
            )
            raise ValueError(msg)
        return split, slide
    return split, None


def _hold_out(cells: _Cells, n_folds: int, generator: np.random.Generator) -> _Test:
    """Choose the cells that can be tested, and their folds."""
    codes, names = np.asarray(cells.labels.codes, np.int64), cells.labels.categories
    rows = np.flatnonzero(codes >= 0)
    content = np.hstack([rep[rows] for rep in cells.reps.values()])
    rows = rows[location_order(content, np.column_stack([cells.slide[rows], cells.xy[rows], codes[rows]]))]
    rows = _common(rows, codes, names)
    if not len(rows):
        msg = f"obs[{cells.groupby!r}]: no label has at least {_MIN_CELLS} cells, so there is nothing to evaluate"
        raise ValueError(msg)
    unit = spatial_blocks(cells.xy[rows], cells.slide[rows]) if cells.units is None else cells.units[rows]
    fold = _folds(cells.how, unit, n_folds, generator)
    able = _testable(codes[rows], fold, names, cells.groupby, cells.how)
    rows, unit, fold = rows[able], unit[able], fold[able]
    present, y = np.unique(codes[rows], return_inverse=True)
    return _Test(cells.how, rows, y, [str(names[k]) for k in present], np.unique(unit, return_inverse=True)[1], fold)


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
    n_units = len(np.unique(unit))
    if n_units < 2:
        msg = (
            f"the labelled cells are in {n_units} of the {_UNITS[how]}; at least two are needed, to train on one and "
            "test on the other"
        )
        raise ValueError(msg)
    if how == "random":
        return generator.permutation(len(unit)) % int(n_folds)
    return group_folds(unit, min(int(n_folds), n_units))


def _testable(codes: np.ndarray, fold: np.ndarray, categories: pd.Index, groupby: str, how: str) -> np.ndarray:
    """Cells whose label is found in two folds, so that it can be trained on and tested."""
    on = np.zeros((int(codes.max(initial=0)) + 1, int(fold.max(initial=0)) + 1), bool)
    on[codes, fold] = True
    once = np.flatnonzero(on.sum(axis=1) == 1)
    unit = {"patients": "patient", "slides": "slide"}.get(how, "block")
    if (on.sum(axis=1) > 1).sum() < 2:
        msg = (
            f"obs[{groupby!r}]: fewer than two labels of at least {_MIN_CELLS} cells are found in two folds, so none "
            f"can be trained in one {unit} and tested in another; "
            f"{'use split=' + repr('blocks') if how == 'slides' else 'check the labels'}"
        )
        raise ValueError(msg)
    if len(once):
        logger.warning(
            "evaluate: labels that are found in only one fold (one %s, or few) cannot be tested and are left out: %s",
            unit,
            ", ".join(str(categories[k]) for k in once),
        )
    return on.sum(axis=1)[codes] > 1


def _inputs(
    baselines: Sequence[str],
    how: str,
    adata: AnnData,
    libraries: list[tuple[str, np.ndarray]],
    layer: str | None,
    values: ValuesKind,
    neighbors_key: str,
    basis: str,
    library_key: str | None,
) -> tuple[Any, Any]:
    """Tissue graph and principal components, where they are needed; else None."""
    from spatialfm.pp._spatial_neighbors import find_graph
    from spatialfm.tl._baselines import principal_components

    graph, components = None, None
    if {"neighbors", "hops"} & set(baselines) or how == "random":
        graph = find_graph(adata, neighbors_key=neighbors_key, basis=basis, library_key=library_key)
    if {"pca", "neighbors", "hops"} & set(baselines):
        components = principal_components(adata, layer, values, libraries)
    return graph, components


def _baseline(name: str, cells: _Cells, components: Any, graph: Any) -> np.ndarray:
    """Features (n_obs, columns) of a baseline."""
    from spatialfm.tl._baselines import hop_means, location_terms

    if name == "pca":
        return components.scores
    if name == "neighbors":
        return hop_means(components.scores, graph.edges, (0, 1))
    if name == "hops":
        return hop_means(components.scores, graph.edges, (1, 3, 8))
    if name == "location":
        return location_terms(cells.xy, cells.slide)
    return np.zeros((len(cells.xy), 1), np.float32)


def _log_neighbours(graph: csr_matrix, test: _Test) -> None:
    """Log how many held-out cells have a direct neighbour of their label in training."""
    i, j = graph[test.rows][:, test.rows].nonzero()
    given_away = np.zeros(len(test.rows), bool)
    given_away[i[(test.y[i] == test.y[j]) & (test.fold[i] != test.fold[j])]] = True
    logger.warning(
        "evaluate: split='random' holds out single cells, and %.0f %% of them have a direct neighbour with their label "
        "in training. The scores of embeddings and baselines that read neighbours are too high; compare with "
        "split='auto'",
        100 * given_away.mean(),
    )


def _report(test: _Test, scores: pd.DataFrame, key_added: str) -> None:
    f1 = scores[scores["metric"] == "macro_f1"]
    units = f"{test.n_folds} folds of {test.n_units} {_UNITS[test.how]}"
    if test.how == "random":
        units = f"{test.n_folds} folds of random cells, whose neighbours were trained on"
    logger.info(
        "evaluate: macro F1 of %d labels of %d cells by %s -> uns[%r]: %s",
        len(test.labels), len(test.rows), units, key_added,
        ", ".join(f"{name} {value:.3f}" for name, value in zip(f1["embedding"], f1["value"], strict=True)),
    )  # fmt: skip
    if test.n_units < _MIN_UNITS:
        logger.warning("evaluate: %d %s are too few for intervals (NaN)", test.n_units, _UNITS[test.how])


def predict_labels(features: dict[str, np.ndarray], y: np.ndarray, fold: np.ndarray) -> dict[str, np.ndarray]:
    """Out-of-fold predictions (n,) by each of the features (n, columns)."""
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    predicted = {name: np.empty_like(y) for name in features}

    def one(job: tuple[str, int]) -> None:
        name, k = job
        test = fold == k
        predicted[name][test] = _probe(features[name][~test], y[~test], features[name][test])

    jobs = [(name, k) for name in features for k in range(fold.max() + 1)]
    # One thread a fold is twice as fast as threads within folds, and no sum depends on their number.
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


class _Metrics:
    """Accuracy, macro F1 and F1 of each label, from counts of each independent unit."""

    def __init__(self, y: np.ndarray, unit: np.ndarray, n_units: int, n_labels: int) -> None:
        self.y, self.unit, self.shape = y, unit, (n_units, n_labels)
        self.support = self._count(y, np.ones(len(y), bool))
        # Units that the values rest on.
        self.n_units = np.r_[n_units, n_units, (self.support > 0).sum(axis=0)]

    def _count(self, label: np.ndarray, where: np.ndarray) -> np.ndarray:
        """Cells (units, labels) of each unit."""
        flat = self.unit[where] * self.shape[1] + label[where]
        return np.bincount(flat, minlength=self.shape[0] * self.shape[1]).reshape(self.shape)

    def values(self, found: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Values (resamples, 2 + labels) of predictions, each unit counted ``times`` (resamples, units)."""
        given = self._count(found, np.ones(len(found), bool))
        right, given, true = (times @ c for c in (self._count(self.y, found == self.y), given, self.support))
        f1 = np.where(true > 0, 2 * right / np.maximum(given + true, 1), np.nan)
        return np.column_stack([right.sum(axis=1) / true.sum(axis=1), np.nanmean(f1, axis=1), f1])

    def interval(self, samples: np.ndarray) -> np.ndarray:
        """95 % intervals (2, columns) of resampled values; NaN with too few units."""
        limits = np.nanpercentile(samples, [2.5, 97.5], axis=0)
        limits[:, self.n_units[: samples.shape[1]] < _MIN_UNITS] = np.nan
        return limits


def score_tables(
    predicted: dict[str, np.ndarray],
    y: np.ndarray,
    unit: np.ndarray,
    labels: list[str],
    weights: np.ndarray,
    n_reps: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores, and differences of the first ``n_reps`` embeddings to all after them.

    ``weights`` (resamples, units) is how often each unit counts in a resample.
    """
    metrics = _Metrics(y, unit, weights.shape[1], len(labels))
    names = ["accuracy", "macro_f1", *["f1"] * len(labels)]
    once = np.ones((1, weights.shape[1]), weights.dtype)
    values = {name: metrics.values(found, once)[0] for name, found in predicted.items()}
    samples = {name: metrics.values(found, weights) for name, found in predicted.items()}
    parts, rows = [], []
    for position, name in enumerate(predicted):
        low, high = metrics.interval(samples[name])
        columns = {
            "embedding": name, "is_baseline": position >= n_reps, "metric": names,
            "label": ["", "", *labels], "value": values[name], "low": low, "high": high,
            "n_cells": np.r_[len(y), len(y), metrics.support.sum(axis=0)], "n_units": metrics.n_units,
        }  # fmt: skip
        parts.append(pd.DataFrame(columns))
        for other in list(predicted)[position + 1 :] if position < n_reps else []:
            low, high = metrics.interval(samples[name][:, :2] - samples[other][:, :2])
            for m, metric in enumerate(names[:2]):
                rows.append((name, other, metric, values[name][m] - values[other][m], low[m], high[m]))
    scores = pd.concat(parts, ignore_index=True)
    differences = pd.DataFrame(rows, columns=["embedding", "reference", "metric", "difference", "low", "high"])
    for table in (scores, differences):
        table.index = table.index.astype(str)  # as .h5ad and .zarr give it back
    return scores, differences
