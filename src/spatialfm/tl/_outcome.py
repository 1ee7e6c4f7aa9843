"""Prediction of what a patient has from pooled embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from spatialfm._checks import check_choice, check_positive, checked
from spatialfm._data._adata import as_labels, canonical_order, get_embedding, get_obs_categories
from spatialfm._data._embeddings import NICHE_AND_STATE, rep_name
from spatialfm._data._splits import check_folds
from spatialfm._settings import logger, progress
from spatialfm.tl._provenance import check_same_axes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

_PENALTIES = 10.0 ** np.arange(-2, 3)  # of the ridge, in units of the mean squared length of a centred patient
_COMPONENTS = 16  # of the embedding that attention looks at
_CHUNK = 4_000_000  # numbers of an array at a time
_EMBED_TOGETHER = (
    "embed them together: adata = anndata.concat(adatas, label='sample', index_unique='-'), then sfm.tl.embed(adata, library_key='sample') and "
    "sfm.tl.outcome(adata, sample_key='sample', ...)"
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
    r"""Predict an outcome, such as response or stage, of patients that were left out, from the embeddings of their cells.

    The patient is the unit of everything: a patient's samples are never on both sides of a split, labels are permuted among patients, and
    the interval is that of so many patients. Cells are not replicates: ten thousand cells of two mice are two mice.

    A good AUC does not say why. Where all patients of a class come from one hospital, batch or region of the organ, it may be that which was
    predicted. Embed all samples in one AnnData, with ``library_key``: differences between slides are not corrected.

    Parameters
    ----------
    adata
        Cells with an embedding (:func:`spatialfm.tl.embed`); not changed. Several AnnData, in a list or by name, only where the columns of
        the embedding mean the same in each: those of ``"heist"``, and ``X_hibio_gene`` and ``X_hibio_image``.
    condition_key
        Column of ``obs`` with the class of each cell's patient: two or more classes, one for all cells of a patient.
    sample_key
        Column of ``obs`` with the sample of each cell. May be left out where AnnData are given by name, which then are the samples.
    patient_key
        Column of ``obs`` with the patient of each cell. Where None, each sample counts as a patient, with a warning.
    use_rep
        Key of ``obsm`` with the embedding, or several, whose columns are put side by side.
    pooling
        ``"mean"``: the mean over cells, and ridge regression on the classes. ``"mean_std"``: mean and standard deviation over the cells of a sample side by side;
        finds classes that differ in how varied the cells are (AUC 0.63 to 0.91 in simulations where the mean is at 0.50) and is about equal otherwise.
        ``"attention"``: a small network that learns which cells to look at
        (gated attention of Ilse et al. 2018, `arXiv:1802.04712 <https://arxiv.org/abs/1802.04712>`__). It is worth its time where few cells matter: with 24 simulated patients and 5 % of the cells
        different between classes, AUC 1.00 where the mean reaches 0.65 to 0.70, and the weights find these cells (AUC 0.98). Where the share of a
        common niche differs it is about as good as the mean, and its weights mean less.
    groupby
        Column of ``obs`` with the cell type or niche of each cell. Where given, the composition of each sample is put beside: its AUC by the same
        regression on the centred log-ratios of the groups (half a cell added to each), for the same patients in the same folds. What an embedding
        does not predict better than this it need not be used for; no p-value is given of the difference, for which cohorts are too small.
    n_folds
        Parts into which patients are cut, each with patients of every class; each part is predicted from the others.
    n_repeats
        How many times they are cut anew; 10 for the mean and 1 for attention where None.
    n_permutations
        How many times labels are permuted; the smallest p-value is ``1 / (1 + n_permutations)``. 1,000 for the mean and 19 for attention,
        which takes seconds each, where None.
    rng
        Seed or generator of cuts, permutations and the network.

    Returns
    -------
    AnnData of samples, in the natural order of their names (2 before 10):

    ``X``
        float32 (samples, columns of the embedding), the mean over the cells of each sample; with ``"mean_std"`` the standard deviations in as many
        columns more.
    ``obs``
        ``label``, ``patient`` and ``predicted`` (the class of highest probability), categorical; ``n_cells``, int;
        ``agreement``, float64: of the patients of other classes left out together with the sample's patient, the fraction that it outranks in the
        score of its own class. Its mean over the patients of a class is the AUC of that class, exactly so where all folds are of the same size;
        ``composition_agreement``, the same by the composition alone, where ``groupby`` is given.
    ``obsm["probability"]``
        float64 (samples, classes), predicted while the patient was left out, mean over repeats. Rows sum to 1.
    ``obsm["fold"]``
        int64 (samples, repeats), the part in which the sample was left out.
    ``uns["outcome"]``
        ``classes``, list; ``n_patients``, int array, of each class; ``auc``, see below; ``interval``, float64 array of its 95 % interval; ``p``;
        ``null``, float64 (n_permutations,), the AUC of permuted labels; ``params``. With ``groupby`` ``baselines``, dict, with ``"composition"``: its
        ``auc`` and ``interval``. With attention ``attention``, float32 (cells,): how much the
        network that had not seen the patient looked at each cell, in the order given, where 1 is as much as at the mean cell of the sample.

    Raises
    ------
    KeyError
        If a column or the embedding is missing.
    ValueError
        If ``groupby`` holds one group alone, a class has fewer patients than folds, there is one class alone, the label is a continuous number, a sample or a patient has two labels, a
        sample has two patients, or several AnnData have embeddings on axes of their own.

    Notes
    -----
    **AUC** is the probability that of two patients who were left out *together*, one of the class and one not, the former has the higher score.
    Scores of different folds are not compared: each fold's model has its own level, which makes the AUC of pooled scores fall below 0.5 where there is
    nothing to predict. More than two classes: the mean over classes, each against the rest.

    **p** is :math:`(1 + b) / (1 + n)`, with b of n permutations of the labels among patients, each with the whole cross-validation done again, at
    or above the AUC.

    **Interval**: the AUC :math:`\theta` for which :math:`|\theta - \mathrm{AUC}| = 1.96 \sqrt{V(\theta)}` with the variance V of Hanley & McNeil as modified by
    Newcombe 2006 (*Stat. Med.* 25:559, method 5), with the numbers of patients, times :math:`1 + J/(J-1)` for J folds: models that
    learnt from overlapping patients err together (Nadeau & Bengio 2003, *Mach. Learn.* 52:239). Without this factor the interval held the mean AUC of simulated
    cohorts of 12 and 24 patients in 79 to 94 %, with it in 93 to 100 %. It stays sensible where all patients are predicted
    well, where a bootstrap has no width. With more than two classes, the mean of the classes' limits, which is on the safe side.

    **Ridge regression** of the classes on patients (means of their samples), columns divided by the standard deviation over cells, each
    sample counting the same. The penalty has the smallest leave-one-out error among the patients trained on. Left-out folds and those errors have a
    closed form, from one inverse for each penalty (Cawley 2006), which is why a thousand permutations take seconds. Scores become
    probabilities by normal distributions of the leave-one-out scores of the patients trained on.

    **Attention** looks at the first 16 principal components of the columns, divided by their standard deviations. Five networks start as the mean over cells and
    each keeps the state in which it predicted best a fifth of the patients trained on that it did not learn from; logits and weights are their means.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> samples = sfm.tl.outcome(adata, "response", sample_key="section", patient_key="patient")  # doctest: +SKIP
    >>> sfm.pl.outcome(samples)  # doctest: +SKIP
    """
    check_choice("pooling", pooling, ("mean", "mean_std", "attention"))
    check_positive("n_repeats", n_repeats, optional=True)
    check_positive("n_permutations", n_permutations, optional=True)
    check_folds(n_folds)
    n_repeats = n_repeats or (1 if pooling == "attention" else 10)
    n_permutations = n_permutations or (19 if pooling == "attention" else 1000)
    rep, cells = _read(adata, condition_key, sample_key, patient_key, use_rep, groupby)
    cohort = _cohort(rep, cells, condition_key, int(n_folds), spread=pooling == "mean_std")
    if patient_key is None:
        logger.warning(
            "outcome: patient_key is not given, each of the %d samples counts as a patient. Samples of one patient are alike: "
            "name them, or AUC and p-value are too good",
            len(cohort.samples),
        )

    generator = np.random.default_rng(rng)
    y = cohort.label
    labels = np.vstack([y, generator.permuted(np.tile(y, (n_permutations, 1)), axis=1)])
    # Within each class patients in random order, dealt to the folds in turn: slot t has the same class and fold in every cut.
    cuts = np.argsort(labels[:, None, :] + generator.random((len(labels), n_repeats, len(y))), axis=-1)
    n_patients = np.bincount(y)
    attention = None
    if pooling == "attention":
        aucs, agreement, probability, attention = _attend(rep, cells, cohort, labels, cuts, int(n_folds), generator)
    else:
        aucs, agreement, probability = _ridge(cohort, labels, cuts, int(n_folds))
    found = aucs.mean(axis=1)
    auc, null = float(found[0]), found[1:]
    limits = _limits(aucs[0], n_patients, int(n_folds))
    p = (1 + int((null >= auc - 1e-9).sum())) / (1 + n_permutations)

    fold = np.empty((len(y), n_repeats), np.int64)
    np.put_along_axis(fold, cuts[0].T, np.arange(len(y))[:, None] % n_folds, axis=0)
    params: dict[str, Any] = {
        "condition_key": condition_key,
        "sample_key": sample_key or "",
        "patient_key": patient_key or "",
        "use_rep": rep_name(use_rep),
        "pooling": pooling,
        "groupby": groupby or "",
        "n_folds": int(n_folds),
        "n_repeats": int(n_repeats),
        "n_permutations": int(n_permutations),
    }
    params |= {"rng": int(rng)} if isinstance(rng, int | np.integer) else {}
    entry: dict[str, Any] = {
        "params": params,
        "classes": cohort.classes,
        "n_patients": n_patients,
        "auc": auc,
        "interval": limits,
        "p": p,
        "null": null,
    }
    entry |= {"attention": attention} if attention is not None else {}
    logger.info(
        "outcome: %s; AUC %.2f (95%% interval %.2f to %.2f) of patients left out, p = %.3g",
        ", ".join(f"{n} patients of {name!r}" for n, name in zip(n_patients, cohort.classes, strict=True)),
        auc,
        *limits,
        p,
    )
    samples = _table(cohort, agreement, probability, fold[cohort.patient], entry)
    if groupby is not None:
        aucs, agreement, _ = _ridge(_composition(cohort, cells), labels[:1], cuts[:1], int(n_folds))
        level, limits = float(aucs.mean()), _limits(aucs[0], n_patients, int(n_folds))
        entry["baselines"] = {"composition": {"auc": level, "interval": limits}}
        samples.obs["composition_agreement"] = agreement[cohort.patient]
        logger.info(
            "outcome: beside %.2f, the composition by %r alone reaches %.2f (%.2f to %.2f) for the same patients in the same folds",
            auc,
            groupby,
            level,
            *limits,
        )
    samples.uns["outcome"] = entry
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


def _read(
    adata: Any,
    condition_key: str,
    sample_key: str | None,
    patient_key: str | None,
    use_rep: str | Sequence[str],
    groupby: str | None,
) -> tuple[np.ndarray, pd.DataFrame]:
    """Embedding of all cells, and their ``sample``, ``patient``, ``label`` and perhaps ``group``, categorical."""
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
        column = part.obs[condition_key] if condition_key in part.obs else pd.Series(dtype=str)
        if pd.api.types.is_float_dtype(column) and (column.dropna() % 1 != 0).any():
            msg = (
                f"condition_key={condition_key!r} is a continuous number; outcome compares classes. Cut it first, by a limit that was known before, as in "
                f"adata.obs[{condition_key!r}].gt(limit).map({{True: 'high', False: 'low'}})"
            )
            raise ValueError(msg)
        sample = (
            [str(name)] * part.n_obs if sample_key is None else get_obs_categories(part, sample_key, name="sample_key")
        )
        table = pd.DataFrame({"sample": np.asarray(sample, dtype=object)})
        table["label"] = np.asarray(get_obs_categories(part, condition_key, name="condition_key"), dtype=object)
        table["patient"] = (
            table["sample"]
            if patient_key is None
            else np.asarray(get_obs_categories(part, patient_key, name="patient_key"), dtype=object)
        )
        if groupby is not None:
            table["group"] = np.asarray(get_obs_categories(part, groupby, name="groupby"), dtype=object)
        table["part"] = str(name)
        reps.append(get_embedding(part, use_rep))
        tables.append(table)
    if len(parts) > 1:
        check_same_axes(list(parts.values()), use_rep, fix=_EMBED_TOGETHER)
    cells = pd.concat(tables, ignore_index=True)
    if cells.empty:
        msg = "adata holds no cells, so there is no patient to learn from"
        raise ValueError(msg)
    if groupby is not None and cells["group"].nunique() < 2:
        msg = f"groupby={groupby!r} holds {cells['group'].iloc[0]!r} alone; name a column with two or more groups of cells"
        raise ValueError(msg)
    _check_nested(cells, "sample", "part", "is in several AnnData, {}; give samples different names")
    _check_nested(cells, "sample", "label", "has cells of {}; a sample has one label")
    _check_nested(cells, "sample", "patient", "has cells of the patients {}; a sample is of one patient")
    _check_nested(
        cells,
        "patient",
        "label",
        "has samples of {}; the label must be that of the patient. Keep the samples of one label (such as one time point) of each patient",
    )
    # Categories in natural order: sample 2 before sample 10.
    return np.concatenate(reps), pd.DataFrame({name: as_labels(cells[name]) for name in cells.columns.drop("part")})


def _check_nested(cells: pd.DataFrame, inner: str, outer: str, fault: str) -> None:
    pairs = cells[[inner, outer]].drop_duplicates()
    twice = pairs[inner][pairs[inner].duplicated()]
    if len(twice):
        name = min(twice)
        values = sorted(pairs[outer][pairs[inner] == name])
        msg = f"{inner} {name!r} " + fault.format(" and ".join(map(repr, values)))
        raise ValueError(msg)


def _cohort(rep: np.ndarray, cells: pd.DataFrame, condition_key: str, n_folds: int, *, spread: bool) -> _Cohort:
    first = cells.drop_duplicates("sample").sort_values("sample")
    classes = list(cells["label"].cat.categories)
    patient = first["patient"].cat.codes.to_numpy(np.int64)
    y = np.empty(patient.max() + 1, np.int64)
    y[patient] = first["label"].cat.codes
    if len(classes) < 2:
        msg = f"condition_key={condition_key!r}: all patients are of the class {classes[0]!r}; at least two classes are needed"
        raise ValueError(msg)
    count = np.bincount(y)
    if count.min() < n_folds:
        fewest = int(count.argmin())
        fix = (
            f"pass n_folds={count.min()} or less, or add patients"
            if count.min() > 1
            else "add patients: of one patient nothing can be left out and predicted, and more samples or cells of the same patient do not help"
        )
        if count.max() > 2 * n_folds and len(classes) > 5:
            fix += ". If the label is a number, cut it into classes"
        patients = "patient" if count[fewest] == 1 else "patients"
        msg = f"condition_key={condition_key!r}: the class {classes[fewest]!r} has {count[fewest]} {patients}, fewer than n_folds={n_folds}; {fix}"
        raise ValueError(msg)
    code = cells["sample"].cat.codes.to_numpy(np.int64)
    n_cells = np.bincount(code)
    mean, square = np.empty((2, len(n_cells), rep.shape[1]))
    center = rep.mean(axis=0, dtype=np.float64)
    for j in range(rep.shape[1]):
        column = rep[:, j] - center[j]
        mean[:, j] = np.bincount(code, column) / n_cells
        square[:, j] = np.bincount(code, column**2) / n_cells
    scale = np.sqrt(np.maximum(square.mean(axis=0) - mean.mean(axis=0) ** 2, 0))
    scale[scale < 1e-12] = np.inf  # a constant column says nothing
    pooled = mean + center
    if spread:
        pooled = np.hstack([pooled, np.sqrt(np.maximum(square - mean**2, 0))])
        scale = np.tile(scale, 2)
    return _Cohort(
        list(first["sample"]), list(cells["patient"].cat.categories), classes, patient, y, n_cells, pooled, scale
    )


def _composition(cohort: _Cohort, cells: pd.DataFrame) -> _Cohort:
    """Describe the same patients by the centred log-ratio of their groups of cells, half a cell added to each."""
    logs = np.log(pd.crosstab(cells["sample"], cells["group"]).to_numpy() + 0.5)
    return replace(cohort, pooled=logs - logs.mean(axis=1, keepdims=True), scale=np.ones(logs.shape[1]))


def _one_hot(labels: np.ndarray) -> np.ndarray:
    """1 where a patient is of the class: a column for each, or for the second of two alone, as the other says the same."""
    n = labels.max() + 1
    return (labels[..., None] == (np.arange(n) if n > 2 else 1)).astype(np.float64)


def _wins(score: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many patients of other classes each patient (..., patients) outranks in the score of its own class, of how many.

    From scores (..., patients, columns) of patients left out together; ``slots`` is their class.
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
    """AUC (permutations, classes), of the second alone where there are two, from what each patient won."""
    classes = np.unique(slots)
    classes = classes if len(classes) > 2 else classes[1:]
    return np.column_stack([won[:, slots == c].sum(axis=1) / total[slots == c].sum() for c in classes])


def _ridge(cohort: _Cohort, labels: np.ndarray, cuts: np.ndarray, n_folds: int) -> tuple[np.ndarray, ...]:
    """AUC (permutations, classes); by the labels as they are, agreement of each patient and probabilities (samples, classes).

    With C the upper left block of the inverse of [[K + penalty, 1], [1', 0]] and a = C y, leaving out the patients S gives the residuals
    inv(C_SS) a_S in S, and for those trained on a - C_S inv(C_SS) a_S and C - C_S inv(C_SS) C_S in the place of a and C.
    """
    x = cohort.pooled / cohort.scale
    patients = cohort.by_patient(x)
    center = patients.mean(axis=0)
    kernel = (patients - center) @ (patients - center).T
    to_samples = (x - center) @ (patients - center).T
    n, n_repeats = len(patients), cuts.shape[1]
    penalties = max(np.trace(kernel) / n, 1e-12) * _PENALTIES
    inverses = []
    for penalty in penalties:
        a = np.linalg.inv(kernel + penalty * np.eye(n))
        inverses.append(a - np.outer(a.sum(axis=1), a.sum(axis=0)) / a.sum())
    y = _one_hot(labels)
    slots = np.sort(labels[0])
    won, total, agreement = np.empty((len(labels), n)), np.empty(n), np.zeros(n)
    probability = np.zeros((len(cohort.samples), len(cohort.classes)))
    step = max(1, _CHUNK // (n_repeats * n * -(-n // n_folds)))
    for start in progress(range(0, len(labels), step), desc="permutations"):
        here = slice(start, start + step)
        own = np.repeat(y[here], n_repeats, axis=0)
        for k in range(n_folds):
            out = cuts[here, :, k::n_folds].reshape(len(own), -1)
            score, alpha, loo, penalty = _leave_out(inverses, own, out)
            right, total[k::n_folds] = _wins(score, slots[k::n_folds])
            won[here, k::n_folds] = right.reshape(-1, n_repeats, out.shape[1]).mean(axis=1)
            if start > 0:
                continue
            for r in range(n_repeats):
                agreement[out[r]] += right[r] / total[k::n_folds] / n_repeats
                trained = np.setdiff1d(np.arange(n), out[r])
                level = (own[r] - kernel @ alpha[r] - penalties[penalty[r]] * alpha[r])[trained[0]]
                mine = np.isin(cohort.patient, out[r])
                held_out = to_samples[mine] @ alpha[r] + level
                probability[mine] += _calibrate(held_out, loo[r, trained], own[r, trained]) / n_repeats
    return _auc(won, total, slots), agreement, probability


def _leave_out(inverses: list[np.ndarray], y: np.ndarray, out: np.ndarray) -> tuple[np.ndarray, ...]:
    """Scores of the patients ``out`` (n, left out, columns), coefficients and leave-one-out scores of the others, and the penalty chosen."""
    n = y.shape[1]
    left = np.zeros(y.shape[:2], bool)
    np.put_along_axis(left, out, True, axis=1)
    best: tuple[np.ndarray, ...] = ()
    found: tuple[np.ndarray, ...]
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
        found = (
            np.take_along_axis(y, out[..., None], axis=1) - residual,
            np.where(left[..., None], 0.0, alpha),
            y - error,
        )
        better = press < least
        least = np.where(better, press, least)
        chosen = np.full(len(y), k)
        if best:
            found = tuple(np.where(better[:, None, None], new, old) for new, old in zip(found, best, strict=False))
            chosen = np.where(better, k, best[3])
        best = (*found, chosen)
    return best


def _calibrate(score: np.ndarray, trained: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Probabilities (n, classes): scores of the trained patients in and out of a class are taken as normal, with one variance."""
    columns = []
    for s, t, member in zip(score.T, trained.T, y.T > 0, strict=True):
        high, low = t[member].mean(), t[~member].mean()
        variance = (np.where(member, t - high, t - low) ** 2).mean() + 1e-12
        # Where the scores of left-out patients are in the wrong order, nothing was learnt.
        slope = max(high - low, 0) / variance
        logit = slope * (s - (high + low) / 2) + np.log(member.sum() / (~member).sum())
        columns.append(1 / (1 + np.exp(-np.clip(logit, -500, 500))))
    found = np.column_stack([1 - columns[0], columns[0]] if len(columns) == 1 else columns)
    return found / found.sum(axis=1, keepdims=True)


def _attend(
    rep: np.ndarray,
    cells: pd.DataFrame,
    cohort: _Cohort,
    labels: np.ndarray,
    cuts: np.ndarray,
    n_folds: int,
    generator: np.random.Generator,
) -> tuple[np.ndarray, ...]:
    """As of :func:`_ridge`, and the attention of each cell."""
    from spatialfm.train._attention_pooling import fit_attention, predict_attention

    code = cells["sample"].cat.codes.to_numpy(np.int64)
    # The network goes through the cells of a sample in an order that only their content decides.
    order = canonical_order(np.column_stack([code, rep]))
    x = ((rep - cohort.pooled.mean(axis=0)) / cohort.scale)[order]
    # Labels are not looked at: the same components for every fold.
    axes = np.linalg.eigh(x.T @ x)[1][:, ::-1][:, :_COMPONENTS]
    bags = np.split((x @ axes).astype(np.float32), np.cumsum(cohort.n_cells)[:-1])
    slots = np.sort(labels[0])
    n, n_repeats = len(cohort.patients), cuts.shape[1]
    won, total, agreement = np.zeros((len(labels), n)), np.empty(n), np.zeros(n)
    probability = np.zeros((len(bags), len(cohort.classes)))
    weights = [np.zeros(len(bag)) for bag in bags]
    seeds = generator.integers(2**31, size=(len(labels), n_repeats, n_folds))
    for b, r, k in progress(list(np.ndindex(*seeds.shape)), desc="folds"):
        out = cuts[b, r, k::n_folds]
        mine = np.isin(cohort.patient, out)
        trained = np.flatnonzero(~mine)
        network = fit_attention(
            [bags[i] for i in trained],
            labels[b][cohort.patient[trained]],
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
    return _auc(won, total, slots), agreement, probability, attention


def _limits(aucs: np.ndarray, n_patients: np.ndarray, n_folds: int) -> np.ndarray:
    """95 % interval of the AUC of one or more classes; the second alone where there are two."""
    own = n_patients if len(n_patients) > 2 else n_patients[1:]
    rest = n_patients.sum() - own
    return np.mean([_interval(auc, n, m, n_folds) for auc, n, m in zip(aucs, own, rest, strict=True)], axis=0)


def _interval(auc: float, n: int, m: int, n_folds: int) -> tuple[float, float]:
    """95 % interval of an AUC of n against m patients: Newcombe's method 5, the variance corrected after Nadeau & Bengio."""
    from scipy.optimize import brentq

    half = (n + m) / 2 - 1
    # Of folds with the share 1 / n_folds tested: (1 / n_folds + 1 / (n_folds - 1)) in the place of 1 / n_folds.
    correction = 1 + n_folds / (n_folds - 1)

    def excess(theta: float) -> float:
        shape = (1 - theta) / (2 - theta) + theta / (1 + theta)
        variance = correction * theta * (1 - theta) * (1 + half * shape) / (n * m)
        return (theta - auc) ** 2 - 1.959964**2 * variance

    # At 0 and 1 the variance is 0: the limits in between are meant.
    low = 0.0 if auc <= 0 else brentq(excess, 0.0, min(auc, 1 - 1e-9))
    high = 1.0 if auc >= 1 else brentq(excess, max(auc, 1e-9), 1.0)
    return float(low), float(high)


def _table(
    cohort: _Cohort, agreement: np.ndarray, probability: np.ndarray, fold: np.ndarray, entry: dict[str, Any]
) -> AnnData:
    from anndata import AnnData

    obs = pd.DataFrame(
        {
            "label": pd.Categorical.from_codes(cohort.label[cohort.patient].tolist(), categories=cohort.classes),
            "patient": pd.Categorical.from_codes(cohort.patient.tolist(), categories=cohort.patients),
            "n_cells": cohort.n_cells,
            "predicted": pd.Categorical.from_codes(probability.argmax(axis=1).tolist(), categories=cohort.classes),
            "agreement": agreement[cohort.patient],
        },
        index=pd.Index(cohort.samples, name=None),
    )
    params, columns = entry["params"], cohort.pooled.shape[1]
    kinds = [""] if params["pooling"] != "mean_std" else ["", "_std"]
    names = [f"{params['use_rep']}_{j + 1}{kind}" for kind in kinds for j in range(columns // len(kinds))]
    return AnnData(
        cohort.pooled.astype(np.float32),
        obs=obs,
        var=pd.DataFrame(index=names),
        obsm={"probability": probability, "fold": fold},
    )
