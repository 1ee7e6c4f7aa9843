"""Niches of each sample, and differences between conditions."""

from __future__ import annotations

import warnings
from math import comb
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from spatialfm._checks import check_positive, checked
from spatialfm._data._adata import as_label, get_known_labels, get_obs_categories, get_obs_labels
from spatialfm._data._write import check_free, record_params, write
from spatialfm._settings import logger, warn

if TYPE_CHECKING:
    from anndata import AnnData

_PSEUDO_COUNT = 0.5  # cells, added to each niche of each sample
_CHUNK = 4_000_000  # numbers of an array at a time


@checked
def niche_composition(
    adata: AnnData,
    niche_key: str,
    *,
    sample_key: str | None = None,
    condition_key: str | None = None,
    groupby: str | None = None,
    patient_key: str | None = None,
    reference: str | None = None,
    n_permutations: int = 10_000,
    key_added: str = "niche_composition",
    rng: int | np.random.Generator | None = 0,
    copy: bool = False,
) -> AnnData | None:
    r"""Count niches in each sample, and test whether conditions differ in them, with samples or patients as replicates.

    Cells never count as replicates. Find the niches in all samples together, so that they mean the same in each.

    Parameters
    ----------
    %(adata)s
    niche_key
        Column of ``obs`` with the niches, such as :func:`spatialfm.tl.domains` finds. Cells without one do not count.
    sample_key
        Column of ``obs`` with the sample (slide, section) of each cell. None: all cells are one sample, ``"all"``.
    condition_key
        Column of ``obs`` with the condition, one for all cells of a sample. None: nothing is compared.
    groupby
        Column of ``obs`` with cell types, to count them within each niche of a sample.
    patient_key
        Column of ``obs`` with the patient (donor, animal) of each sample; the samples of a patient are averaged.
    reference
        Condition with which the others are compared; the first category where None.
    n_permutations
        Largest number of permutations of conditions among samples or patients; all of them where there are no more.
    %(key_added)s
    %(rng)s
    %(copy)s

    Returns
    -------
    None, or the copy. Written are three tables (:func:`spatialfm.get.niche_composition_df`)

    ``uns[key_added]["composition"]``
        For each sample and niche: ``n_cells``, ``proportion`` and ``clr``, the centred log-ratio.
    ``uns[key_added]["cell_types"]``
        With `groupby`, for each sample, niche and cell type: ``n_cells`` and ``proportion``.
    ``uns[key_added]["differences"]``
        For each comparison and niche, with two replicates or more of both conditions: ``difference`` of the mean clr,
        ``low`` and ``high`` (95 % interval of Welch's t), ``p`` (two-sided, by permutation), ``fdr``
        (Benjamini-Hochberg), ``smallest_p`` that so few can reach, ``n_condition``, ``n_reference``.

    Raises
    ------
    KeyError
        If a column is missing.
    ValueError
        If a sample has several conditions or patients, or a patient several conditions.

    Notes
    -----
    :math:`clr_{sk} = \log(n_{sk} + ½) - \frac 1 K \sum_l \log(n_{sl} + ½)` with :math:`n_{sk}` cells of niche k in
    sample s (Aitchison 1982); a difference of :math:`\log 2` is twice as much, relative to the other niches. With three
    against three, no p-value is below 2/20. On samples as replicates: Squair et al. 2021, Nat. Commun. 12, 5692.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()
    >>> sfm.tl.niche_composition(adata, "region", sample_key="mouse_id", groupby="celltype")
    >>> sfm.get.niche_composition_df(adata).shape
    (12, 5)
    """
    check_free(adata, "tl.niche_composition", {"uns": [key_added]})
    check_positive("n_permutations", n_permutations)
    samples = _read(adata, niche_key, sample_key, condition_key, patient_key)
    entry: dict[str, Any] = {
        "niches": list(samples.niche.categories),
        "samples": list(samples.sample.categories),
        "composition": _composition(samples),
    }
    if groupby is not None:
        entry["cell_types"] = _cell_types(adata, samples, groupby)
    compared = ""
    if samples.condition is not None:
        reference = _known_reference(reference, samples.condition, condition_key)
        units = _units(samples, condition_key, patient_key)
        differences = _differences(units, entry["niches"], reference, n_permutations, np.random.default_rng(rng))
        entry["conditions"] = list(samples.condition.categories)
        if differences is not None:
            entry["differences"] = differences
            n_compared = len(differences) // len(entry["niches"])
            compared = f"; {n_compared} comparison(s) of {len(units.values)} {units.what}, "
            compared += f"{(differences['fdr'] <= 0.05).sum()} differences at a false discovery rate of 0.05"

    entry["params"] = record_params(
        niche_key=niche_key, sample_key=sample_key, condition_key=condition_key, groupby=groupby,
        patient_key=patient_key, reference=reference, n_permutations=n_permutations, pseudo_count=_PSEUDO_COUNT,
        rng=rng,
    )  # fmt: skip
    adata = write(adata, "tl.niche_composition", key_added, {"uns": {key_added: entry}}, copy=copy)
    n_without = int((samples.niche.codes < 0).sum())
    logger.info(
        "niche_composition: %d niches in %d sample(s)%s%s -> uns[%r]",
        len(entry["niches"]), len(entry["samples"]),
        f" ({n_without} cells without a niche left out)" if n_without else "", compared, key_added,
    )  # fmt: skip
    return adata if copy else None


class _Samples(NamedTuple):
    niche: pd.Categorical
    """Of each cell; may be missing."""
    sample: pd.Categorical
    """Of each cell."""
    condition: pd.Categorical | None
    """Of each sample."""
    patient: pd.Categorical | None
    """Of each sample."""
    counts: np.ndarray
    """(samples, niches) cells."""

    @property
    def clr(self) -> np.ndarray:
        """Centred log-ratios (samples, niches)."""
        logs = np.log(self.counts + _PSEUDO_COUNT)
        return logs - logs.mean(axis=1, keepdims=True)

    def rows(self) -> dict[str, Any]:
        """Columns that say which sample and niche a row of a table is about."""
        niches = list(self.niche.categories)
        index = pd.MultiIndex.from_product([self.sample.categories, niches])
        about = {"sample": index.get_level_values(0).to_numpy(dtype=object)}
        for name, column in (("patient", self.patient), ("condition", self.condition)):
            if column is not None:
                about[name] = np.repeat(np.asarray(column, dtype=object), len(niches))
        return {**about, "niche": index.get_level_values(1).to_numpy(dtype=object)}


class _Units(NamedTuple):
    """What is independent: samples, or patients."""

    values: np.ndarray
    """(units, niches) centred log-ratios."""
    condition: pd.Categorical
    """(units,)."""
    what: str
    """``"samples"`` or ``"patients"``."""


def _read(
    adata: AnnData, niche_key: str, sample_key: str | None, condition_key: str | None, patient_key: str | None
) -> _Samples:
    niche = get_obs_labels(adata, niche_key, name="niche_key")
    if sample_key is None and (condition_key is not None or patient_key is not None):
        msg = (
            f"condition_key={condition_key!r}, patient_key={patient_key!r}: samples are compared, not cells; name the "
            "column of obs with the sample (slide, section) of each cell with sample_key="
        )
        raise ValueError(msg)
    sample = (
        pd.Categorical(["all"] * adata.n_obs)
        if sample_key is None
        else get_obs_categories(adata, sample_key, name="sample_key")
    )
    known = niche.codes >= 0
    shape = [len(sample.categories), len(niche.categories)]
    counts = _count([sample.codes[known], niche.codes[known]], shape)
    empty = [sample.categories[s] for s in np.flatnonzero(counts.sum(axis=1) == 0)]
    if empty:
        msg = f"niche_key={niche_key!r}: no cell of the samples {empty} has a niche; leave these samples out"
        raise ValueError(msg)
    if shape[1] < 2:
        msg = f"niche_key={niche_key!r} holds {list(niche.categories)}; at least two niches are needed"
        raise ValueError(msg)
    patient = None if patient_key is None else _of_samples(adata, "patient_key", patient_key, sample)
    condition = None if condition_key is None else _of_samples(adata, "condition_key", condition_key, sample)
    return _Samples(niche, sample, condition, patient, counts)


def _composition(samples: _Samples) -> pd.DataFrame:
    shares = samples.counts / samples.counts.sum(axis=1, keepdims=True)
    columns = {"n_cells": samples.counts.ravel(), "proportion": shares.ravel(), "clr": samples.clr.ravel()}
    return _table({**samples.rows(), **columns})


def _cell_types(adata: AnnData, samples: _Samples, groupby: str) -> pd.DataFrame:
    types = get_known_labels(
        adata, groupby, name="groupby", effect="these cells are left out of the cell types of the niches"
    )
    typed = (samples.niche.codes >= 0) & (types.codes >= 0)
    codes = [values.codes[typed] for values in (samples.sample, samples.niche, types)]
    within = _count(codes, [*samples.counts.shape, len(types.categories)])
    total = within.sum(axis=2, keepdims=True)
    share = np.divide(within, total, out=np.full(within.shape, np.nan), where=total > 0)
    columns = {name: np.repeat(values, len(types.categories)) for name, values in samples.rows().items()}
    columns["cell_type"] = np.tile(np.asarray(types.categories, dtype=object), samples.counts.size)
    return _table({**columns, "n_cells": within.ravel(), "proportion": share.ravel()})


def _known_reference(reference: str | None, condition: pd.Categorical, condition_key: str | None) -> str:
    names = list(condition.categories)
    name = names[0] if reference is None else as_label(reference, names)
    if name not in names:
        msg = f"reference={reference!r} is no condition of obs[{condition_key!r}]; choose from {names}"
        raise ValueError(msg)
    return name


def _count(codes: list[np.ndarray], shape: list[int]) -> np.ndarray:
    """Cells of each combination."""
    flat = np.ravel_multi_index([np.asarray(c, np.int64) for c in codes], shape)
    return np.bincount(flat, minlength=int(np.prod(shape))).reshape(shape)


def _table(columns: dict[str, Any]) -> pd.DataFrame:
    """Table with an index of text, as .h5ad and .zarr give it back."""
    table = pd.DataFrame(columns)
    table.index = table.index.astype(str)
    return table


def _of_samples(adata: AnnData, name: str, key: str, sample: pd.Categorical) -> pd.Categorical:
    """Read the one value of ``obs[key]`` that each sample has."""
    values = get_obs_categories(adata, key, name=name)
    has = _count([sample.codes, values.codes], [len(sample.categories), len(values.categories)]) > 0
    several = np.flatnonzero(has.sum(axis=1) > 1)
    if len(several):
        found = list(values.categories[has[several[0]]])
        msg = (
            f"{name}={key!r}: sample {sample.categories[several[0]]!r} has cells of {found}; each sample needs one. "
            "Name finer samples, as in adata.obs['sample'] = adata.obs[sample_key].astype(str) + '-' + "
            f"adata.obs[{key!r}].astype(str)"
        )
        raise ValueError(msg)
    return pd.Categorical.from_codes(has.argmax(axis=1), categories=values.categories)


def _units(samples: _Samples, condition_key: str | None, patient_key: str | None) -> _Units:
    """Patients, with the mean of their samples, or samples."""
    condition, patient = samples.condition, samples.patient
    assert condition is not None
    if patient is None:
        return _Units(samples.clr, condition, "samples")
    codes, names = np.asarray(patient.codes, np.int64), list(patient.categories)
    pairs = np.unique(np.column_stack([codes, condition.codes]), axis=0)
    if len(pairs) > len(names):
        first = names[pairs[np.flatnonzero(np.diff(pairs[:, 0]) == 0)[0], 0]]
        msg = (
            f"patient_key={patient_key!r}: patient {first!r} has samples in several conditions of "
            f"obs[{condition_key!r}]; paired designs are not compared here. Test the difference of each patient's "
            "log-ratios, from sfm.get.niche_composition_df(adata), against zero"
        )
        raise ValueError(msg)
    means = np.stack([samples.clr[codes == k].mean(axis=0) for k in range(len(names))])
    return _Units(means, pd.Categorical.from_codes(pairs[:, 1], categories=condition.categories), "patients")


def _differences(
    units: _Units, niches: list[str], reference: str, n_permutations: int, generator: np.random.Generator
) -> pd.DataFrame | None:
    """Compare each condition with the reference, if both have two units; None where none has."""
    from scipy.stats import false_discovery_control

    what, names = units.what, list(units.condition.categories)
    size = dict(zip(names, np.bincount(units.condition.codes, minlength=len(names)), strict=True))
    few = [f"{name!r} ({n})" for name, n in size.items() if n < 2]
    if few:
        warn(
            "niche_composition: no test is possible for conditions with fewer than two %s, %s: how much %s of one "
            "condition differ is unknown, and more cells do not help. The compositions are written all the same",
            what,
            ", ".join(few),
            what,
        )
    tables = []
    for name in names:
        if name == reference or min(size[name], size[reference]) < 2:
            continue
        a, b = (units.values[units.condition == group] for group in (name, reference))
        low, high = welch_interval(a, b)
        p, smallest = permutation_p(a, b, n_permutations, generator)
        if smallest > 0.05:
            warn(
                "niche_composition: with %d and %d %s no permutation p-value can be below %.2g, whatever the data",
                len(a),
                len(b),
                what,
                smallest,
            )
        columns = {
            "condition": name, "reference": reference, "niche": niches,
            "difference": a.mean(axis=0) - b.mean(axis=0), "low": low, "high": high, "p": p, "smallest_p": smallest,
            "n_condition": len(a), "n_reference": len(b),
        }  # fmt: skip
        tables.append(pd.DataFrame(columns))
    if not tables:
        return None
    table = pd.concat(tables, ignore_index=True)
    table.insert(table.columns.get_loc("p") + 1, "fdr", false_discovery_control(table["p"]))
    table.index = table.index.astype(str)
    return table


def welch_interval(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of the difference of the columns' means, by Welch's t; at least two rows each."""
    from scipy.stats import ttest_ind

    difference = a.mean(axis=0) - b.mean(axis=0)
    varies = np.maximum(np.ptp(a, axis=0), np.ptp(b, axis=0)) > 1e-9
    low, high = difference.copy(), difference.copy()
    if varies.any():
        with warnings.catch_warnings():
            # scipy warns of columns that do not vary in one of the two.
            warnings.simplefilter("ignore", RuntimeWarning)
            interval = ttest_ind(a[:, varies], b[:, varies], equal_var=False).confidence_interval(0.95)
        low[varies], high[varies] = interval.low, interval.high
    return low, high


def permutation_p(
    a: np.ndarray, b: np.ndarray, n_permutations: int, generator: np.random.Generator
) -> tuple[np.ndarray, float]:
    """Two-sided p-value of the difference of each column's means, and the smallest that so many rows can reach."""
    from scipy.stats import permutation_test

    def distance(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        return np.abs(x.mean(axis=axis) - y.mean(axis=axis)).round(9)

    # Rows are sorted, so that what is drawn does not depend on their order.
    a, b = (x[np.lexsort(x.T)] for x in (a, b))
    p = permutation_test(
        (a, b), distance, vectorized=True, n_resamples=n_permutations, batch=max(1, _CHUNK // (a.size + b.size)),
        alternative="greater", axis=0, random_state=generator,
    ).pvalue  # fmt: skip
    ways = comb(len(a) + len(b), len(a))
    if ways > n_permutations:
        return p, 1 / (1 + n_permutations)
    # Where both are equally many, swapping them all gives the same absolute difference.
    return p, (2 if len(a) == len(b) else 1) / ways
