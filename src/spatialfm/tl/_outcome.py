"""Predict an outcome of patients from the pooled embeddings of their cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from spatialfm._checks import check_choice, check_positive, checked
from spatialfm._data._adata import as_labels, canonical_order, get_obs_categories
from spatialfm._data._embeddings import NICHE_AND_STATE, get_embedding, rep_keys, rep_name
from spatialfm._data._splits import check_folds
from spatialfm._data._write import record_params
from spatialfm._settings import logger, progress, warn
from spatialfm.tl._provenance import check_same_axes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

_PENALTIES = 10.0 ** np.arange(-2, 3)  # of the ridge, in units of the mean squared length of a centred patient
_COMPONENTS = 16  # of the embedding, for attention
_CHUNK = 4_000_000  # numbers of an array at a time
_EMBED_TOGETHER = (
    "embed them together: adata = anndata.concat(adatas, label='sample', index_unique='-'), then "
    "sfm.tl.embed(adata, library_key='sample') and sfm.tl.outcome(adata, ..., sample_key='sample')"
)


@checked
def outcome(
    adata: AnnData | Sequence[AnnData] | Mapping[str, AnnData],
    condition_key: str,
    *,
    sample_key: str | None = None,
    patient_key: str | None = None,
    use_rep: str | Sequence[str] = NICHE_AND_STATE,
    pooling: Literal["mean", "mean_std", "attention"] = "mean",
    groupby: str | None = None,
    n_folds: int = 5,
    n_repeats: int | None = None,
    n_permutations: int | None = None,
    rng: int | np.random.Generator | None = 0,
) -> AnnData:
    r"""Predict an outcome of held-out patients, such as response or stage, from the embeddings of their cells.

    The patient is the unit: samples of a patient are held out together, and labels are permuted among patients.
    Batch effects are not corrected: classes of different hospitals or batches are predicted by these.

    Parameters
    ----------
    adata
        Cells with an embedding; not changed. Several AnnData, in a list or by the names of samples, only if the
        columns of the embedding mean the same in each, as those of ``model="heist"``.
    condition_key
        Column of ``obs`` with the class of each cell's patient.
    sample_key
        Column of ``obs`` with the sample of each cell; may be left out if AnnData are given by name.
    patient_key
        Column of ``obs`` with the patient of each cell. Where None, each sample counts as a patient, with a warning.
    %(use_rep)s
    pooling
        ``"mean"`` over the cells of a sample; ``"mean_std"`` also takes the standard deviation, for classes that
        differ in how varied cells are; ``"attention"`` (Ilse et al. 2018) learns weights, for those that differ in few
        cells.
    groupby
        Column of ``obs`` with cell types or niches, to also predict from their composition alone, as a baseline.
    n_folds
        Parts into which the patients are cut; each is predicted from the others.
    n_repeats
        How many times they are cut anew; where None, 10, and 1 for attention.
    n_permutations
        How many times labels are permuted; where None, 1,000, and 19 for attention, which takes seconds each.
    %(rng)s

    Returns
    -------
    AnnData of samples

    ``X``, ``obs``
        Pooled embeddings; ``label``, ``patient``, ``n_cells``, ``predicted``, and ``agreement``: the fraction of
        patients of other classes that the patient outranks in its own class.
    ``obsm["probability"]``, ``obsm["fold"]``
        float64 (n_samples, n_classes), predicted while held out; int64 (n_samples, n_repeats).
    ``uns["outcome"]``
        ``auc`` of patients held out together, its 95 % ``interval`` (Newcombe 2006, method 5), ``p``, ``null``,
        ``classes``, ``n_patients``, ``params``; ``baselines``; ``attention``, float32 (n_cells,), 1 on average.

    Raises
    ------
    KeyError, ValueError
        If something named is missing, a class has too few patients, or a sample or patient has two labels.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()[::8].copy()
    >>> sfm.tl.embed(adata, library_key="mouse_id")
    >>> adata.obs["patient"] = [f"p{i % 12}" for i in range(adata.n_obs)]
    >>> adata.obs["response"] = ["yes" if i % 12 < 6 else "no" for i in range(adata.n_obs)]
    >>> samples = sfm.tl.outcome(adata, "response", sample_key="patient", patient_key="patient", n_permutations=9)
    >>> samples.uns["outcome"]["n_patients"].tolist()
    [6, 6]
    """
    check_choice("pooling", pooling, ("mean", "mean_std", "attention"))
    check_positive("n_repeats", n_repeats, optional=True)
    check_positive("n_permutations", n_permutations, optional=True)
    check_folds(n_folds)
    n_repeats = n_repeats or (1 if pooling == "attention" else 10)
    n_permutations = n_permutations or (19 if pooling == "attention" else 1000)
    rep, columns, cells = _read(adata, condition_key, sample_key, patient_key, use_rep, groupby)
    cohort = _cohort(rep, cells, condition_key, int(n_folds), spread=pooling == "mean_std")
    if patient_key is None:
        warn(
            "outcome: patient_key= is not given, so each of the %d samples counts as a patient. If some are of one "
            "patient, name the patients, or AUC and p-value are too good",
            len(cohort.samples),
        )

    generator = np.random.default_rng(rng)
    cuts = _cut(cohort.label, n_permutations, n_repeats, int(n_folds), generator)
    scores = _attend(rep, cells, cohort, cuts, generator) if pooling == "attention" else _ridge(cohort, cuts)
    result = _result(scores, cuts, n_permutations)
    if groupby is not None:
        alone = _ridge(_composition(cohort, cells), cuts.as_given())
        result["baselines"] = {"composition": {"auc": alone.auc, "interval": _limits(alone, cuts)}}
    params = record_params(
        condition_key=condition_key, sample_key=sample_key, patient_key=patient_key, use_rep=rep_name(use_rep),
        pooling=pooling, groupby=groupby, n_folds=n_folds, n_repeats=n_repeats, n_permutations=n_permutations, rng=rng,
    )  # fmt: skip
    samples = _table(cohort, scores, cuts, columns)
    if groupby is not None:
        samples.obs["composition_agreement"] = alone.agreement[cohort.patient]
    samples.uns["outcome"] = {"params": params, "classes": cohort.classes, **result}
    _report(samples.uns["outcome"])
    return samples


@dataclass
class _Cohort:
    """Samples and patients, each in the natural order of their names."""

    samples: list[str]
    patients: list[str]
    classes: list[str]
    patient: np.ndarray
    """Position of each sample's patient."""
    label: np.ndarray
    """Class of each patient."""
    n_cells: np.ndarray
    pooled: np.ndarray
    """(samples, columns), mean of the embedding, and beside it the spread where asked for."""
    scale: np.ndarray
    """(columns,), standard deviation over cells, each sample counting the same."""

    def by_patient(self, values: np.ndarray) -> np.ndarray:
        """Mean over each patient's samples."""
        total = np.zeros((len(self.patients), *values.shape[1:]))
        np.add.at(total, self.patient, values)
        return total / np.bincount(self.patient).reshape(-1, *[1] * (values.ndim - 1))


class _Cuts(NamedTuple):
    """Labels as they are, then permuted; and how patients are cut into folds, each class alike."""

    labels: np.ndarray
    """(1 + permutations, patients)."""
    order: np.ndarray
    """(1 + permutations, repeats, patients): positions 0, n_folds, ... are the patients of fold 0, and so on."""
    n_folds: int

    @property
    def n_patients(self) -> np.ndarray:
        return np.bincount(self.labels[0])

    @property
    def slots(self) -> np.ndarray:
        """Class (patients,) at each position of the order, the same in every cut."""
        return np.sort(self.labels[0])

    def as_given(self) -> _Cuts:
        """Give the cuts of the labels as they are."""
        return _Cuts(self.labels[:1], self.order[:1], self.n_folds)

    def folds(self) -> np.ndarray:
        """Fold (patients, repeats) of each patient, with the labels as they are."""
        fold = np.empty(self.order.shape[:0:-1], np.int64)
        np.put_along_axis(fold, self.order[0].T, np.arange(len(fold))[:, None] % self.n_folds, axis=0)
        return fold


class _Scores(NamedTuple):
    """Predictions of held-out patients."""

    aucs: np.ndarray
    """(1 + permutations, classes), of the second class alone where there are two."""
    agreement: np.ndarray
    """(patients,) fraction of patients of other classes that each outranks."""
    probability: np.ndarray
    """(samples, classes)."""
    attention: np.ndarray | None = None
    """(cells,)."""

    @property
    def auc(self) -> float:
        return float(self.aucs[0].mean())


def _cut(label: np.ndarray, n_permutations: int, n_repeats: int, n_folds: int, generator: np.random.Generator) -> _Cuts:
    labels = np.vstack([label, generator.permuted(np.tile(label, (n_permutations, 1)), axis=1)])
    # Patients of each class in random order.
    order = np.argsort(labels[:, None, :] + generator.random((len(labels), n_repeats, len(label))), axis=-1)
    return _Cuts(labels, order, n_folds)


def _result(scores: _Scores, cuts: _Cuts, n_permutations: int) -> dict[str, Any]:
    null = scores.aucs[1:].mean(axis=1)
    p = (1 + int((null >= scores.auc - 1e-9).sum())) / (1 + n_permutations)
    result = {
        "n_patients": cuts.n_patients, "auc": scores.auc, "interval": _limits(scores, cuts), "p": p, "null": null
    }  # fmt: skip
    return result if scores.attention is None else {**result, "attention": scores.attention}


def _report(entry: dict[str, Any]) -> None:
    logger.info(
        "outcome: %s; AUC %.2f (95 %% interval %.2f to %.2f) of held-out patients, p = %.3g",
        ", ".join(f"{n} patients of {c!r}" for n, c in zip(entry["n_patients"], entry["classes"], strict=True)),
        entry["auc"], *entry["interval"], entry["p"],
    )  # fmt: skip
    if "baselines" in entry:
        alone = entry["baselines"]["composition"]
        logger.info(
            "outcome: the composition by %r alone reaches %.2f (%.2f to %.2f), for the same patients in the same folds",
            entry["params"]["groupby"], alone["auc"], *alone["interval"],
        )  # fmt: skip


def _read(
    adata: Any,
    condition_key: str,
    sample_key: str | None,
    patient_key: str | None,
    use_rep: str | Sequence[str],
    groupby: str | None,
) -> tuple[np.ndarray, list[str], pd.DataFrame]:
    """Embedding of all cells, names of its columns, and ``sample``, ``patient``, ``label``, ``group`` of the cells."""
    from anndata import AnnData

    parts = (
        {"": adata} if isinstance(adata, AnnData) else dict(adata if isinstance(adata, Mapping) else enumerate(adata))
    )
    if not parts or not all(isinstance(part, AnnData) for part in parts.values()):
        msg = f"adata must be an AnnData, or a list or mapping of at least one, got {type(adata).__name__}"
        raise ValueError(msg)
    if sample_key is None and not isinstance(adata, Mapping):
        msg = "sample_key= is missing; name the column of obs with the sample of each cell"
        raise ValueError(msg)
    reps, tables = [], []
    for name, part in parts.items():
        tables.append(_describe(part, str(name), condition_key, sample_key, patient_key, groupby))
        reps.append(get_embedding(part, use_rep))
    if len(parts) > 1:
        check_same_axes(list(parts.values()), use_rep, fix=_EMBED_TOGETHER)
    cells = pd.concat(tables, ignore_index=True)
    _check_cells(cells, groupby)
    widths = {key: next(iter(parts.values())).obsm[key].shape[1] for key in rep_keys(use_rep)}
    columns = [f"{key}_{j + 1}" for key, width in widths.items() for j in range(width)]
    # Categories in natural order: sample 2 before sample 10.
    described = pd.DataFrame({name: as_labels(cells[name]) for name in cells.columns.drop("part")})
    return np.concatenate(reps), columns, described


def _describe(
    part: AnnData,
    name: str,
    condition_key: str,
    sample_key: str | None,
    patient_key: str | None,
    groupby: str | None,
) -> pd.DataFrame:
    """Sample, label, patient and group of the cells of one AnnData."""

    def column(key: str, argument: str) -> np.ndarray:
        return np.asarray(get_obs_categories(part, key, name=argument), dtype=object)

    values = part.obs[condition_key] if condition_key in part.obs else pd.Series(dtype=str)
    if pd.api.types.is_float_dtype(values) and (values.dropna() % 1 != 0).any():
        msg = (
            f"condition_key={condition_key!r} is a continuous number; outcome compares classes. Cut it first, by a "
            f"limit that was known before, as in adata.obs[{condition_key!r}].gt(limit).map("
            "{True: 'high', False: 'low'})"
        )
        raise ValueError(msg)
    sample = [name] * part.n_obs if sample_key is None else column(sample_key, "sample_key")
    table = pd.DataFrame({"sample": np.asarray(sample, dtype=object), "label": column(condition_key, "condition_key")})
    table["patient"] = table["sample"] if patient_key is None else column(patient_key, "patient_key")
    if groupby is not None:
        table["group"] = column(groupby, "groupby")
    table["part"] = name
    return table


def _check_cells(cells: pd.DataFrame, groupby: str | None) -> None:
    if cells.empty:
        msg = "adata holds no cells, so there is no patient to learn from"
        raise ValueError(msg)
    if groupby is not None and cells["group"].nunique() < 2:
        msg = f"groupby={groupby!r} holds {cells['group'].iloc[0]!r} alone; name a column with two or more groups"
        raise ValueError(msg)
    _check_nested(cells, "sample", "part", "is in several AnnData, {}; give samples different names")
    _check_nested(cells, "sample", "label", "has cells of {}; a sample has one label")
    _check_nested(cells, "sample", "patient", "has cells of the patients {}; a sample is of one patient")
    fault = "has samples of {}; a patient has one label. Keep the samples of one label, such as one time point"
    _check_nested(cells, "patient", "label", fault)


def _check_nested(cells: pd.DataFrame, inner: str, outer: str, fault: str) -> None:
    pairs = cells[[inner, outer]].drop_duplicates()
    twice = pairs[inner][pairs[inner].duplicated()]
    if len(twice):
        name = min(twice)
        values = sorted(pairs[outer][pairs[inner] == name])
        msg = f"{inner} {name!r} " + fault.format(" and ".join(map(repr, values)))
        raise ValueError(msg)


def _cohort(rep: np.ndarray, cells: pd.DataFrame, condition_key: str, n_folds: int, *, spread: bool) -> _Cohort:
    """Pool the cells of each sample; with ``spread``, also their standard deviations."""
    first = cells.drop_duplicates("sample").sort_values("sample")
    classes = list(cells["label"].cat.categories)
    patient = first["patient"].cat.codes.to_numpy(np.int64)
    y = np.empty(patient.max() + 1, np.int64)
    y[patient] = first["label"].cat.codes
    _check_classes(classes, y, condition_key, n_folds)
    code = cells["sample"].cat.codes.to_numpy(np.int64)
    n_cells = np.bincount(code)
    mean, square = np.empty((2, len(n_cells), rep.shape[1]))
    center = rep.mean(axis=0, dtype=np.float64)
    for j in range(rep.shape[1]):
        column = rep[:, j] - center[j]
        mean[:, j] = np.bincount(code, column) / n_cells
        square[:, j] = np.bincount(code, column**2) / n_cells
    scale = np.sqrt(np.maximum(square.mean(axis=0) - mean.mean(axis=0) ** 2, 0))
    scale[scale < 1e-12] = np.inf  # ignores constant columns
    pooled = mean + center
    if spread:
        pooled = np.hstack([pooled, np.sqrt(np.maximum(square - mean**2, 0))])
        scale = np.tile(scale, 2)
    return _Cohort(
        list(first["sample"]), list(cells["patient"].cat.categories), classes, patient, y, n_cells, pooled, scale
    )


def _check_classes(classes: list[str], y: np.ndarray, condition_key: str, n_folds: int) -> None:
    if len(classes) < 2:
        msg = f"condition_key={condition_key!r}: all patients are of the class {classes[0]!r}; two classes are needed"
        raise ValueError(msg)
    count = np.bincount(y)
    fewest = int(count.argmin())
    if count[fewest] >= n_folds:
        return
    fix = (
        f"pass n_folds={count[fewest]} or less, or add patients"
        if count[fewest] > 1
        else "add patients: of one patient nothing can be held out, and more samples or cells of it do not help"
    )
    if count.max() > 2 * n_folds and len(classes) > 5:
        fix += ". If the condition is a number, cut it into classes"
    patients = "patient" if count[fewest] == 1 else "patients"
    msg = (
        f"condition_key={condition_key!r}: the class {classes[fewest]!r} has {count[fewest]} {patients}, "
        f"fewer than n_folds={n_folds}; {fix}"
    )
    raise ValueError(msg)


def _composition(cohort: _Cohort, cells: pd.DataFrame) -> _Cohort:
    """Describe the same patients by the centred log-ratio of their groups of cells, half a cell added to each."""
    logs = np.log(pd.crosstab(cells["sample"], cells["group"]).to_numpy() + 0.5)
    return replace(cohort, pooled=logs - logs.mean(axis=1, keepdims=True), scale=np.ones(logs.shape[1]))


def _one_hot(labels: np.ndarray) -> np.ndarray:
    """Columns for the classes, 1 where a patient is of the class; of two classes, for the second alone."""
    n = labels.max() + 1
    return (labels[..., None] == (np.arange(n) if n > 2 else 1)).astype(np.float64)


def _wins(score: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count the patients of other classes that each one (..., patients) outranks in its own class, and all of them.

    From scores (..., patients, columns) of patients held out together; ``slots`` is their class.
    """
    if score.shape[-1] == 1:
        score = np.concatenate([-score, score], axis=-1)
    won, total = np.empty(score.shape[:-1]), np.empty(len(slots))
    for c in np.unique(slots):
        member = slots == c
        difference = score[..., member, c][..., :, None] - score[..., ~member, c][..., None, :]
        won[..., member] = (difference > 1e-12).sum(axis=-1) + (np.abs(difference) <= 1e-12).sum(axis=-1) / 2
        total[member] = (~member).sum()
    return won, total


def _auc(won: np.ndarray, total: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """AUC (permutations, classes), of the second class where there are two, from the wins of each patient."""
    classes = np.unique(slots)
    classes = classes if len(classes) > 2 else classes[1:]
    return np.column_stack([won[:, slots == c].sum(axis=1) / total[slots == c].sum() for c in classes])


def _ridge(cohort: _Cohort, cuts: _Cuts) -> _Scores:
    """Ridge regression of the classes on the pooled cells, in closed form for every fold and leave-one-out error.

    With C the upper left block of the inverse of [[K + penalty, 1], [1', 0]] and a = C y, leaving out the patients S
    gives the residuals inv(C_SS) a_S in S, and for the others a - C_S inv(C_SS) a_S and C - C_S inv(C_SS) C_S instead
    of a and C (Cawley 2006).
    """
    x = cohort.pooled / cohort.scale
    patients = cohort.by_patient(x)
    center = patients.mean(axis=0)
    kernel = (patients - center) @ (patients - center).T
    to_samples = (x - center) @ (patients - center).T
    n, n_folds, n_repeats = len(patients), cuts.n_folds, cuts.order.shape[1]
    penalties = max(np.trace(kernel) / n, 1e-12) * _PENALTIES
    inverses = [_centred_inverse(kernel + penalty * np.eye(n)) for penalty in penalties]
    y, slots = _one_hot(cuts.labels), cuts.slots
    won, total, agreement = np.empty((len(cuts.labels), n)), np.empty(n), np.zeros(n)
    probability = np.zeros((len(cohort.samples), len(cohort.classes)))
    step = max(1, _CHUNK // (n_repeats * n * -(-n // n_folds)))
    for start in progress(range(0, len(cuts.labels), step), desc="permutations"):
        here = slice(start, start + step)
        own = np.repeat(y[here], n_repeats, axis=0)
        for k in range(n_folds):
            out = cuts.order[here, :, k::n_folds].reshape(len(own), -1)
            fit = _leave_out(inverses, own, out)
            right, total[k::n_folds] = _wins(fit.score, slots[k::n_folds])
            won[here, k::n_folds] = right.reshape(-1, n_repeats, out.shape[1]).mean(axis=1)
            for r in range(n_repeats) if start == 0 else ():
                agreement[out[r]] += right[r] / total[k::n_folds] / n_repeats
                trained = np.setdiff1d(np.arange(n), out[r])
                level = (own[r] - kernel @ fit.alpha[r] - penalties[fit.penalty[r]] * fit.alpha[r])[trained[0]]
                mine = np.isin(cohort.patient, out[r])
                held_out = to_samples[mine] @ fit.alpha[r] + level
                probability[mine] += _calibrate(held_out, fit.loo[r, trained], own[r, trained]) / n_repeats
    return _Scores(_auc(won, total, slots), agreement, probability)


def _centred_inverse(matrix: np.ndarray) -> np.ndarray:
    """Upper left block of the inverse of [[matrix, 1], [1', 0]]."""
    a = np.linalg.inv(matrix)
    return a - np.outer(a.sum(axis=1), a.sum(axis=0)) / a.sum()


class _Fit(NamedTuple):
    """Regressions (n) with the penalty of least leave-one-out error."""

    score: np.ndarray
    """(n, held out, columns) of the held-out patients."""
    alpha: np.ndarray
    """(n, patients, columns) coefficients, 0 for held-out patients."""
    loo: np.ndarray
    """(n, patients, columns) leave-one-out scores of the others."""
    penalty: np.ndarray
    """(n,) position of the penalty."""


def _leave_out(inverses: list[np.ndarray], y: np.ndarray, out: np.ndarray) -> _Fit:
    """Regress ``y`` (n, patients, columns) without the patients ``out`` (n, held out)."""
    n = y.shape[1]
    left = np.zeros(y.shape[:2], bool)
    np.put_along_axis(left, out, True, axis=1)
    best: _Fit | None = None
    least = np.full(len(y), np.inf)
    for k, inverse in enumerate(inverses):
        a = inverse @ y
        rows = inverse[out]
        block = np.take_along_axis(rows, np.broadcast_to(out[:, None, :], (*out.shape, out.shape[1])), axis=2)
        solved = np.linalg.solve(block, np.concatenate([rows, np.take_along_axis(a, out[..., None], axis=1)], axis=2))
        residual = solved[..., n:]
        alpha = a - rows.transpose(0, 2, 1) @ residual
        diagonal = np.diag(inverse) - np.einsum("bsn,bsn->bn", rows, solved[..., :n])
        error = np.where(left[..., None], 0.0, alpha / np.where(left, 1.0, diagonal)[..., None])
        press = (error**2).sum(axis=(1, 2))
        found = _Fit(
            np.take_along_axis(y, out[..., None], axis=1) - residual,
            np.where(left[..., None], 0.0, alpha),
            y - error,
            np.full(len(y), k),
        )
        if best is not None:
            better = press < least
            found = _Fit(
                *(
                    np.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)
                    for new, old in zip(found, best, strict=True)
                )
            )
        best, least = found, np.minimum(press, least)
    assert best is not None
    return best


def _calibrate(score: np.ndarray, trained: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Probabilities (n, classes), from normal distributions of the scores in and out of a class, with one variance."""
    columns = []
    for s, t, member in zip(score.T, trained.T, y.T > 0, strict=True):
        high, low = t[member].mean(), t[~member].mean()
        variance = (np.where(member, t - high, t - low) ** 2).mean() + 1e-12
        # If leave-one-out scores are in the wrong order, nothing was learnt.
        slope = max(high - low, 0) / variance
        logit = slope * (s - (high + low) / 2) + np.log(member.sum() / (~member).sum())
        columns.append(1 / (1 + np.exp(-np.clip(logit, -500, 500))))
    found = np.column_stack([1 - columns[0], columns[0]] if len(columns) == 1 else columns)
    return found / found.sum(axis=1, keepdims=True)


def _attend(
    rep: np.ndarray, cells: pd.DataFrame, cohort: _Cohort, cuts: _Cuts, generator: np.random.Generator
) -> _Scores:
    """As :func:`_ridge`, by networks that learn weights of the cells."""
    from spatialfm.tl._attention_pooling import fit_attention, predict_attention

    order, bags = _bags(rep, cells, cohort)
    slots, n_folds, n_repeats = cuts.slots, cuts.n_folds, cuts.order.shape[1]
    won, total, agreement = np.zeros(cuts.labels.shape), np.empty(len(slots)), np.zeros(len(slots))
    probability = np.zeros((len(bags), len(cohort.classes)))
    weights = [np.zeros(len(bag)) for bag in bags]
    seeds = generator.integers(2**31, size=(len(cuts.labels), n_repeats, n_folds))
    for b, r, k in progress(list(np.ndindex(*seeds.shape)), desc="folds"):
        out = cuts.order[b, r, k::n_folds]
        mine = np.isin(cohort.patient, out)
        trained = np.flatnonzero(~mine)
        network = fit_attention(
            [bags[i] for i in trained],
            cuts.labels[b][cohort.patient[trained]],
            cohort.patient[trained],
            n_classes=len(cohort.classes),
            seed=int(seeds[b, r, k]),
        )
        chance, attended = predict_attention(network, [bags[i] for i in np.flatnonzero(mine)])
        score = np.zeros(probability.shape)
        score[mine] = np.log(chance / (1 - chance))
        right, total[k::n_folds] = _wins(cohort.by_patient(score)[out], slots[k::n_folds])
        won[b, k::n_folds] += right / n_repeats
        if b == 0:
            agreement[out] += right / total[k::n_folds] / n_repeats
            probability[mine] += chance / n_repeats
            for i, a in zip(np.flatnonzero(mine), attended, strict=True):
                weights[i] += a * len(a) / n_repeats
    attention = np.empty(len(rep), np.float32)
    attention[order] = np.concatenate(weights)
    return _Scores(_auc(won, total, slots), agreement, probability, attention)


def _bags(rep: np.ndarray, cells: pd.DataFrame, cohort: _Cohort) -> tuple[np.ndarray, list[np.ndarray]]:
    """Principal components of the cells of each sample, and the order of the cells, which their content decides."""
    code = cells["sample"].cat.codes.to_numpy(np.int64)
    order = canonical_order(np.column_stack([code, rep]))
    # Each sample counts the same in the centre. No label is used, so the components are the same for every fold.
    x = ((rep - cohort.pooled.mean(axis=0)) / cohort.scale)[order]
    axes = np.linalg.eigh(x.T @ x)[1][:, ::-1][:, :_COMPONENTS]
    return order, np.split((x @ axes).astype(np.float32), np.cumsum(cohort.n_cells)[:-1])


def _limits(scores: _Scores, cuts: _Cuts) -> np.ndarray:
    """95 % interval (2,) of the AUC; the mean over classes where there are more than two."""
    own = cuts.n_patients if len(cuts.n_patients) > 2 else cuts.n_patients[1:]
    rest = cuts.n_patients.sum() - own
    each = zip(scores.aucs[0], own, rest, strict=True)
    return np.mean([auc_interval(auc, n, m, cuts.n_folds) for auc, n, m in each], axis=0)


def auc_interval(auc: float, n: int, m: int, n_folds: int) -> tuple[float, float]:
    """95 % interval of an AUC of n against m patients, by method 5 of Newcombe 2006 (Stat. Med. 25:559).

    The variance is corrected for overlapping training sets (Nadeau & Bengio 2003, Mach. Learn. 52:239).
    """
    from scipy.optimize import brentq

    half = (n + m) / 2 - 1
    # A share 1 / n_folds is tested: (1 / n_folds + 1 / (n_folds - 1)) instead of 1 / n_folds.
    correction = 1 + n_folds / (n_folds - 1)

    def excess(theta: float) -> float:
        shape = (1 - theta) / (2 - theta) + theta / (1 + theta)
        variance = correction * theta * (1 - theta) * (1 + half * shape) / (n * m)
        return (theta - auc) ** 2 - 1.959964**2 * variance

    # At 0 and 1 the variance is 0: the limits in between are meant.
    low = 0.0 if auc <= 0 else brentq(excess, 0.0, min(auc, 1 - 1e-9))
    high = 1.0 if auc >= 1 else brentq(excess, max(auc, 1e-9), 1.0)
    return float(low), float(high)


def _table(cohort: _Cohort, scores: _Scores, cuts: _Cuts, columns: list[str]) -> AnnData:
    from anndata import AnnData

    predicted = scores.probability.argmax(axis=1).tolist()
    obs = pd.DataFrame(
        {
            "label": pd.Categorical.from_codes(cohort.label[cohort.patient].tolist(), categories=cohort.classes),
            "patient": pd.Categorical.from_codes(cohort.patient.tolist(), categories=cohort.patients),
            "n_cells": cohort.n_cells,
            "predicted": pd.Categorical.from_codes(predicted, categories=cohort.classes),
            "agreement": scores.agreement[cohort.patient],
        },
        index=pd.Index(cohort.samples, name=None),
    )
    if cohort.pooled.shape[1] > len(columns):
        columns = [*columns, *(f"{name}_std" for name in columns)]
    return AnnData(
        cohort.pooled.astype(np.float32),
        obs=obs,
        var=pd.DataFrame(index=columns),
        obsm={"probability": scores.probability, "fold": cuts.folds()[cohort.patient]},
    )
