"""How much of each sample a niche makes up, and whether conditions differ in it."""

from __future__ import annotations

from itertools import combinations
from math import comb
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatialfm._checks import check_positive, checked
from spatialfm._data._adata import as_label, get_known_labels, get_obs_categories, get_obs_labels
from spatialfm._data._write import check_free, write
from spatialfm._settings import logger, warn

if TYPE_CHECKING:
    from anndata import AnnData

_PSEUDO_COUNT = 0.5  # cells, added to each niche of each sample
_CHUNK = 1 << 22


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

    Thousands of cells of one animal are one animal: cells never count as replicates here, and a single sample, or samples without conditions, are counted
    without any p-value. Niches must have been found in all samples together, so that a niche means the same in each.

    Parameters
    ----------
    adata
        Cells with niches, such as :func:`spatialfm.tl.domains` finds.
    niche_key
        Column of ``obs`` with the niches. Cells without one (NaN) do not count.
    sample_key
        Column of ``obs`` with the sample (slide, section) of each cell. None: all cells are one sample, ``"all"``, and there is nothing to compare.
    condition_key
        Column of ``obs`` with the condition, one for all cells of a sample. None: compositions alone.
    groupby
        Column of ``obs`` with cell types, to count them within the niches of each sample. Cells without one do not count there, with a warning.
    patient_key
        Column of ``obs`` with the patient (donor, animal) of each sample. The samples of one patient are averaged, and patients are compared.
    reference
        The condition with which each other one is compared; the first category where None.
    n_permutations
        Largest number of permutations of conditions among samples or patients. Where there are no more ways to assign them, all are gone through.
    key_added
        Where the result is written, in ``uns``.
    rng
        Seed or generator of the permutations, where they are drawn.
    copy
        Whether to return a changed copy instead of changing ``adata``.

    Returns
    -------
    None, or the copy. Written are (:func:`spatialfm.get.niche_composition_df`)

    ``uns[key_added]["composition"]``
        Table, a row for each sample and niche: ``sample``; ``patient`` and ``condition`` where there are; ``niche``; ``n_cells``; ``proportion`` of the
        sample's cells; ``clr``, the centred log-ratio.
    ``uns[key_added]["cell_types"]``
        With `groupby`, table, a row for each sample, niche and cell type: ``n_cells`` and ``proportion`` of the niche's cells with a
        type in the sample, NaN where it has none.
    ``uns[key_added]["differences"]``
        Where at least two samples or patients are in both of two conditions, table, a row for each comparison and niche: ``condition``, ``reference``, ``niche``,
        ``difference`` of the mean centred log-ratios, ``low`` and ``high`` (95 % interval of Welch's t), ``p`` (two-sided, by permutation), ``fdr``
        (Benjamini-Hochberg over all rows), ``smallest_p`` that so few can reach, ``n_condition``, ``n_reference`` (samples or patients).
    ``uns[key_added]``
        Also ``params``, and ``niches``, ``samples``, ``conditions``: lists of their names.

    Raises
    ------
    KeyError
        If a column is missing.
    ValueError
        If a sample has several conditions or patients or no cell with a niche, a patient has several conditions, ``reference`` is none of them, or there are
        conditions or patients without ``sample_key``.

    Notes
    -----
    With :math:`n_{sk}` cells of niche k in sample s, :math:`clr_{sk} = \log(n_{sk} + ½) - \frac 1 K \sum_l \log(n_{sl} + ½)`: proportions sum to one, so
    where one niche grows others shrink; the ratio to the geometric mean of all does not force that, but it is relative all the same. A difference of
    :math:`\log 2 = 0.69` is twice as much, relative to the other niches.

    The p-value is the share of assignments of the conditions to the samples (patients) with at least this absolute difference; of drawn ones
    :math:`(1 + b) / (1 + B)`. With three against three it cannot be below 2/20 = 0.1, whatever the data: then look at the interval, which assumes normal
    log-ratios instead. With one sample in a condition there is no test, and none is made up.

    Aitchison (1982), The statistical analysis of compositional data, J. R. Stat. Soc. B 44, 139-177. On samples as replicates: Squair et al. (2021),
    Confronting false discoveries in single-cell differential expression, Nat. Commun. 12, 5692.

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
    niche = get_obs_labels(adata, niche_key, name="niche_key")
    if sample_key is None and (condition_key is not None or patient_key is not None):
        msg = (
            f"condition_key={condition_key!r}, patient_key={patient_key!r}: not cells are compared, but samples; name the column of obs with the sample "
            "(slide, section) of each cell with sample_key="
        )
        raise ValueError(msg)
    sample = (
        pd.Categorical(["all"] * adata.n_obs)
        if sample_key is None
        else get_obs_categories(adata, sample_key, name="sample_key")
    )
    niches, samples = list(niche.categories), list(sample.categories)
    codes, of = np.asarray(niche.codes, np.int64), np.asarray(sample.codes, np.int64)
    known = codes >= 0
    counts = _count([of[known], codes[known]], [len(samples), len(niches)])
    empty = [samples[s] for s in np.flatnonzero(counts.sum(axis=1) == 0)]
    if empty or len(niches) < 2:
        msg = (
            f"niche_key={niche_key!r}: no cell of the samples {empty} has a niche; leave these samples out"
            if empty
            else f"niche_key={niche_key!r} holds {niches}; at least two niches are needed"
        )
        raise ValueError(msg)
    patient = None if patient_key is None else _of_samples(adata, "patient_key", patient_key, sample)
    condition = None if condition_key is None else _of_samples(adata, "condition_key", condition_key, sample)

    logs = np.log(counts + _PSEUDO_COUNT)
    clr = logs - logs.mean(axis=1, keepdims=True)
    index = pd.MultiIndex.from_product([samples, niches])
    about: dict[str, Any] = {"sample": index.get_level_values(0).to_numpy(dtype=object)}
    for name, column in (("patient", patient), ("condition", condition)):
        if column is not None:
            about[name] = np.repeat(np.asarray(column, dtype=object), len(niches))
    about["niche"] = index.get_level_values(1).to_numpy(dtype=object)
    shares = counts / counts.sum(axis=1, keepdims=True)
    entry: dict[str, Any] = {
        "niches": niches,
        "samples": samples,
        "composition": _table({**about, "n_cells": counts.ravel(), "proportion": shares.ravel(), "clr": clr.ravel()}),
    }
    if groupby is not None:
        types = get_known_labels(adata, groupby, name="groupby", effect="these cells count in no cell type of a niche")
        type_of = np.asarray(types.codes, np.int64)
        typed = known & (type_of >= 0)
        within = _count([of[typed], codes[typed], type_of[typed]], [*counts.shape, len(types.categories)])
        total = within.sum(axis=2, keepdims=True)
        share = np.divide(within, total, out=np.full(within.shape, np.nan), where=total > 0)
        columns = {name: np.repeat(values, len(types.categories)) for name, values in about.items()}
        columns["cell_type"] = np.tile(np.asarray(types.categories, dtype=object), counts.size)
        entry["cell_types"] = _table({**columns, "n_cells": within.ravel(), "proportion": share.ravel()})

    told = ""
    if condition is not None:
        values, group = _units(clr, condition, patient, condition_key, patient_key)
        what = "samples" if patient is None else "patients"
        names = list(condition.categories)
        reference = names[0] if reference is None else as_label(reference, names)
        if reference not in names:
            msg = f"reference={reference!r} is no condition of obs[{condition_key!r}]; choose from {names}"
            raise ValueError(msg)
        entry["conditions"] = names
        rows = _compare(values, group, names, niches, reference, n_permutations, np.random.default_rng(rng), what)
        if rows:
            from scipy.stats import false_discovery_control

            table = _table({column: np.concatenate([row[column] for row in rows]) for column in rows[0]})
            table.insert(table.columns.get_loc("p") + 1, "fdr", false_discovery_control(table["p"]))
            entry["differences"] = table
            told = f"; {len(rows)} comparison(s) of {len(values)} {what}, {int((table['fdr'] <= 0.05).sum())} differences at a false discovery rate of 0.05"

    params: dict[str, Any] = {
        "niche_key": niche_key,
        "pseudo_count": _PSEUDO_COUNT,
        "n_permutations": int(n_permutations),
    }
    optional = {
        "sample_key": sample_key,
        "condition_key": condition_key,
        "groupby": groupby,
        "patient_key": patient_key,
        "reference": reference,
    }
    params |= {name: value for name, value in optional.items() if value is not None}
    params |= {"rng": int(rng)} if isinstance(rng, int | np.integer) else {}
    fields = {"uns": {key_added: {"params": params, **entry}}}
    adata = write(adata, "tl.niche_composition", key_added, fields, copy=copy)
    left_out = f" ({int((~known).sum())} cells without a niche left out)" if not known.all() else ""
    logger.info(
        "niche_composition: %d niches in %d sample(s)%s%s -> uns[%r]",
        len(niches),
        len(samples),
        left_out,
        told,
        key_added,
    )
    return adata if copy else None


def _count(codes: list[np.ndarray], shape: list[int]) -> np.ndarray:
    """Cells of each combination."""
    return np.bincount(np.ravel_multi_index(codes, shape), minlength=int(np.prod(shape))).reshape(shape)


def _table(columns: dict[str, Any]) -> pd.DataFrame:
    """With an index of text: what .h5ad and .zarr give back."""
    table = pd.DataFrame(columns)
    table.index = table.index.astype(str)
    return table


def _of_samples(adata: AnnData, name: str, key: str, sample: pd.Categorical) -> pd.Categorical:
    """Read the one value of ``obs[key]`` that each sample has."""
    values = get_obs_categories(adata, key, name=name)
    has = (
        _count(
            [np.asarray(sample.codes, np.int64), np.asarray(values.codes, np.int64)],
            [len(sample.categories), len(values.categories)],
        )
        > 0
    )
    several = np.flatnonzero(has.sum(axis=1) > 1)
    if len(several):
        found = list(values.categories[has[several[0]]])
        msg = (
            f"{name}={key!r}: sample {sample.categories[several[0]]!r} has cells of {found}; each sample needs one. Name finer samples, as in "
            f"adata.obs['sample'] = adata.obs[sample_key].astype(str) + '-' + adata.obs[{key!r}].astype(str)"
        )
        raise ValueError(msg)
    return pd.Categorical.from_codes(has.argmax(axis=1), categories=values.categories)


def _units(
    clr: np.ndarray, condition: pd.Categorical, patient: pd.Categorical | None, condition_key: Any, patient_key: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Log-ratios and conditions of what is independent: patients, with the mean of their samples, or samples."""
    group = np.asarray(condition.codes, np.int64)
    if patient is None:
        return clr, group
    codes, names = np.asarray(patient.codes, np.int64), list(patient.categories)
    pairs = np.unique(np.column_stack([codes, group]), axis=0)
    if len(pairs) > len(names):
        first = names[pairs[np.flatnonzero(np.diff(pairs[:, 0]) == 0)[0], 0]]
        msg = (
            f"patient_key={patient_key!r}: patient {first!r} has samples in several conditions of obs[{condition_key!r}]; paired designs are not compared "
            "here. Test the difference of each patient's log-ratios, from sfm.get.niche_composition_df(adata), against zero"
        )
        raise ValueError(msg)
    return np.stack([clr[codes == k].mean(axis=0) for k in range(len(names))]), pairs[:, 1]


def _compare(
    values: np.ndarray,
    group: np.ndarray,
    names: list[str],
    niches: list[str],
    reference: str,
    n_permutations: int,
    generator: np.random.Generator,
    what: str,
) -> list[dict[str, np.ndarray]]:
    """Compare each condition with the reference, as far as both have two units."""
    size = np.bincount(group, minlength=len(names))
    few = [f"{name!r} ({n})" for name, n in zip(names, size, strict=True) if n < 2]
    if few:
        warn(
            "niche_composition: no test is possible for conditions with fewer than two %s, %s: how %s of one condition differ among themselves is unknown, "
            "and more cells do not tell. Compositions are written all the same",
            what,
            ", ".join(few),
            what,
        )
    rows = []
    k = names.index(reference)
    for j, name in enumerate(names):
        if j == k or min(size[j], size[k]) < 2:
            continue
        a, b = values[group == j], values[group == k]
        low, high = welch_interval(a, b)
        p, smallest = permutation_test(a, b, n_permutations, generator)
        if smallest > 0.05:
            warn(
                "niche_composition: with %d and %d %s no permutation p-value can be below %.2g, whatever the data",
                size[j],
                size[k],
                what,
                smallest,
            )
        n = len(niches)
        rows.append(
            {
                "condition": np.array([name] * n, dtype=object),
                "reference": np.array([reference] * n, dtype=object),
                "niche": np.array(niches, dtype=object),
                "difference": a.mean(axis=0) - b.mean(axis=0),
                "low": low,
                "high": high,
                "p": p,
                "smallest_p": np.full(n, smallest),
                "n_condition": np.full(n, size[j]),
                "n_reference": np.full(n, size[k]),
            }
        )
    return rows


def welch_interval(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of the difference of the columns' means, variances not taken as equal; at least two rows each."""
    from scipy.stats import t

    parts = [x.var(axis=0, ddof=1) / len(x) for x in (a, b)]
    square = np.maximum(parts[0] + parts[1], 1e-300)
    freedom = square**2 / np.maximum(parts[0] ** 2 / (len(a) - 1) + parts[1] ** 2 / (len(b) - 1), 1e-300)
    half = t.ppf(0.975, np.maximum(freedom, 1.0)) * np.sqrt(square)
    middle = a.mean(axis=0) - b.mean(axis=0)
    return middle - half, middle + half


def permutation_test(
    a: np.ndarray, b: np.ndarray, n_permutations: int, generator: np.random.Generator
) -> tuple[np.ndarray, float]:
    """Two-sided p-value of the difference of each column's means, and the smallest that so many rows can reach."""
    both, n, m = np.vstack([a, b]), len(a) + len(b), len(a)
    # In an order that the values alone decide, so that what is drawn does not depend on that of the rows.
    order = np.lexsort(both.T)
    ways = comb(n, m)
    exact = ways <= n_permutations
    total = ways if exact else n_permutations
    centred = (both - both.mean(axis=0))[order]
    observed = np.abs(a.mean(axis=0) - b.mean(axis=0))
    # The sum over the first condition fixes the difference of the means, as all sums to zero.
    scale = 1 / m + 1 / (n - m)
    extreme = np.zeros(both.shape[1], np.int64)
    every = combinations(range(n), m) if exact else None
    step = max(1, _CHUNK // n)
    for start in range(0, total, step):
        size = min(step, total - start)
        chosen = np.zeros((size, n))
        if every is not None:
            picked = np.array([next(every) for _ in range(size)])
        else:
            picked = np.argsort(generator.random((size, n)), axis=1)[:, :m]
        np.put_along_axis(chosen, picked, 1.0, axis=1)
        extreme += (np.abs(chosen @ centred) * scale >= observed - 1e-9).sum(axis=0)
    if not exact:
        return (1 + extreme) / (1 + total), 1 / (1 + total)
    # Where both are equally many, swapping them all gives the same absolute difference.
    return extreme / total, (2 if 2 * m == n else 1) / ways
