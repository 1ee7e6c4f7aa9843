"""Annotate all spots from a few labelled ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from spatialfm._checks import checked
from spatialfm._data._adata import (
    canonical_order,
    check_within_slides,
    get_coordinates,
    get_graph,
    get_libraries,
    slide_codes,
)
from spatialfm._data._embeddings import NICHE, get_embedding, rep_name
from spatialfm._data._write import check_free, record_params, write
from spatialfm._settings import logger
from spatialfm.tl._probe import (
    Annotation,
    annotation_fields,
    annotation_keys,
    fit_probe,
    given_colors,
    given_labels,
    half_standardised,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from scipy.sparse import csr_matrix

_N_FOLDS = 5


@checked
def annotate_regions(
    adata: AnnData,
    groupby: str,
    *,
    use_rep: str | Sequence[str] = NICHE,
    refine: int = 0,
    library_key: str | None = None,
    neighbors_key: str = "spatial_neighbors",
    basis: str = "spatial",
    key_added: str = "region_label",
    copy: bool = False,
) -> AnnData | None:
    r"""Annotate all spots from the labels of a few, by a linear probe on an embedding.

    Label about ten spots of each region and leave the others NaN; further slides may have no label at all.
    The probe is a logistic regression on the embedding in which all labels weigh the same, however many spots have
    them. Embed all slides in one AnnData; differences between slides are not corrected.

    Parameters
    ----------
    %(adata)s
    groupby
        Column of ``obs`` with two or more labels, and NaN (no text such as ``"unknown"``) for the spots to annotate.
    %(use_rep)s
    refine
        How many times the probabilities are averaged with the mean of the neighbours. 1 or 2 help with embeddings of
        single spots, such as principal components.
    library_key
        Column of ``obs`` with the slides. Whole slides are held out if each label is found on two of them.
    %(neighbors_key)s
    %(basis)s
    %(key_added)s
    %(copy)s

    Returns
    -------
    None, or the copy. Written are

    ``obs[key_added]``, ``obs["{key_added}_probability"]``
        The label of each spot, and its probability. A labelled spot keeps its label.
    ``obsm["{key_added}_probabilities"]``
        DataFrame (n_obs, n_labels) with the probabilities of all labels; ``/`` in their names becomes ``-``.
    ``uns["{key_added}_colors"]``
        Colours of the labels, if ``uns["{groupby}_colors"]`` holds them.
    ``uns[key_added]``
        ``params``; ``names`` of the labels; ``n_labelled`` spots of each. With five labelled spots of each label, or
        each label on two slides, also ``cross_validation``: ``macro_f1`` and ``f1`` of each label on held-out labelled
        spots, ``n_folds``, and ``folds``, ``"slides"`` or ``"strips"``.

    Raises
    ------
    KeyError
        If the column, the embedding, the coordinates or, with `refine`, the tissue graph is missing.
    ValueError
        If there are fewer than two labels or no spot to annotate, or the embedding is constant.

    Notes
    -----
    Column j of the embedding, with variance :math:`v_j`, is divided by its standard deviation and multiplied by
    :math:`\sqrt{(1 + v_j / \bar v) / 2}`. Held-out spots are weighted by how often their label was given to a spot.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()[::4].copy()
    >>> few = adata.obs.groupby("region", observed=True).sample(10, random_state=0).index
    >>> adata.obs["few"] = adata.obs["region"].where(adata.obs_names.isin(few))
    >>> sfm.tl.embed(adata, library_key="mouse_id")
    >>> sfm.tl.annotate_regions(adata, "few")
    >>> bool((adata.obs["region_label"] == adata.obs["region"]).mean() > 0.7)
    True
    """
    _check_arguments(adata, groupby, refine, key_added)
    spots = _read(adata, groupby, use_rep, refine, library_key, neighbors_key, basis)

    probabilities = spots.predict(spots.labelled)
    found = probabilities.argmax(axis=1)
    found[spots.labelled] = spots.codes[spots.labelled]
    quality = _cross_validate(spots, np.bincount(found))

    annotation = Annotation(
        pd.Categorical.from_codes(found.tolist(), categories=spots.names),
        probabilities[np.arange(len(found)), found],
        probabilities,
        spots.names,
        given_colors(adata, groupby, spots.names),
    )
    n_labelled = np.bincount(spots.codes[spots.labelled])
    params = record_params(
        groupby=groupby,
        use_rep=rep_name(use_rep),
        refine=refine,
        library_key=library_key,
        neighbors_key=neighbors_key,
        basis=basis,
    )
    entry = {"params": params, "names": spots.names, "n_labelled": n_labelled}
    entry |= {"cross_validation": quality} if quality else {}
    fields = annotation_fields(adata, key_added, annotation, entry)
    adata = write(adata, "tl.annotate_regions", key_added, fields, copy=copy)
    logger.info(
        "annotate_regions: %d spots from %s by obsm[%r], %s -> obs[%r], obsm['%s_probabilities'], uns[%r]",
        adata.n_obs - len(spots.labelled),
        ", ".join(f"{n} of {name!r}" for n, name in zip(n_labelled, spots.names, strict=True)),
        rep_name(use_rep),
        _described(quality),
        key_added,
        key_added,
        key_added,
    )
    return adata if copy else None


class _Spots(NamedTuple):
    """Spots to annotate, and those with labels."""

    names: list[str]
    codes: np.ndarray
    """(n_obs,) position of each label among ``names``, -1 where there is none."""
    labelled: np.ndarray
    """Rows of the labelled spots, in an order that does not depend on that of ``adata``."""
    x: np.ndarray
    """(n_obs, columns) the embedding as the probe reads it."""
    slide: np.ndarray
    xy: np.ndarray
    means: csr_matrix | None
    """(n_obs, n_obs) mean over the neighbours, where probabilities are smoothed."""
    refine: int

    def predict(self, rows: np.ndarray) -> np.ndarray:
        """Probability (n_obs, n_labels) of each label after training on ``rows``, which hold all labels."""
        result = fit_probe(self.x[rows], self.codes[rows], balanced=True, tol=1e-8).predict_proba(self.x)
        for _ in range(self.refine):
            result[rows] = np.eye(result.shape[1])[self.codes[rows]]
            result = (result + self.means @ result) / 2
        return result


def _check_arguments(adata: AnnData, groupby: str, refine: int, key_added: str) -> None:
    check_free(adata, "tl.annotate_regions", annotation_keys(key_added))
    if refine < 0:
        msg = f"refine must be a whole number from 0 (no smoothing), got {refine!r}"
        raise ValueError(msg)
    if key_added == groupby:
        msg = f"key_added={key_added!r} would overwrite the labels; give another name"
        raise ValueError(msg)


def _read(
    adata: AnnData,
    groupby: str,
    use_rep: str | Sequence[str],
    refine: int,
    library_key: str | None,
    neighbors_key: str,
    basis: str,
) -> _Spots:
    names, codes = given_labels(adata, groupby)
    x = half_standardised(get_embedding(adata, use_rep), use_rep)
    xy = get_coordinates(adata, basis)
    slide = slide_codes(get_libraries(adata, library_key))
    means = None
    if refine:
        from spatialfm._data._components import transition_matrix

        graph, _ = get_graph(adata, neighbors_key, basis)
        check_within_slides(adata, graph, slide, library_key, neighbors_key)
        means = transition_matrix(graph)
    labelled = np.flatnonzero(codes >= 0)
    labelled = labelled[canonical_order(np.column_stack([slide[labelled], xy[labelled], x[labelled]]))]
    return _Spots(names, codes, labelled, x, slide, xy, means, int(refine))


def _cross_validate(spots: _Spots, n_given: np.ndarray) -> dict[str, Any]:
    """F1 of held-out labelled spots; empty where there are too few. ``n_given`` spots were given each label."""
    from sklearn.metrics import f1_score

    folds, kind = _folds(spots)
    if not kind:
        return {}
    rows, truth = spots.labelled, spots.codes[spots.labelled]
    held_out = np.empty(len(rows), np.int64)
    for fold in np.unique(folds):
        out = folds == fold
        held_out[out] = spots.predict(rows[~out])[rows[out]].argmax(axis=1)
    weights = (n_given / np.bincount(truth))[truth]
    f1 = f1_score(truth, held_out, average=None, sample_weight=weights)
    return {"macro_f1": float(f1.mean()), "f1": f1, "n_folds": len(np.unique(folds)), "folds": kind}


def _described(quality: dict[str, Any]) -> str:
    if not quality:
        return "too few labels to estimate its quality"
    folds = f"{quality['n_folds']} folds of {quality['folds']}"
    return f"macro F1 {quality['macro_f1']:.2f} on held-out labelled spots ({folds})"


def _folds(spots: _Spots) -> tuple[np.ndarray, str]:
    """Fold of each labelled spot, and what the folds are; an empty text where there are too few labels.

    The spots outside a fold have all labels. Without enough slides, the spots of each label are cut along the longer
    side of the tissue.
    """
    codes, slides, xy = (values[spots.labelled] for values in (spots.codes, spots.slide, spots.xy))
    on = np.zeros((slides.max() + 1, codes.max() + 1), bool)
    on[slides, codes] = True
    if on.sum(axis=0).min() >= 2:
        return slides, "slides"
    folds = np.full(len(codes), -1)
    if np.bincount(codes).min() < _N_FOLDS:
        return folds, ""
    along = xy[:, np.ptp(xy, axis=0).argmax()]
    for code in range(codes.max() + 1):
        mine = np.flatnonzero(codes == code)
        mine = mine[np.lexsort((along[mine], slides[mine]))]
        folds[mine] = np.arange(len(mine)) * _N_FOLDS // len(mine)
    return folds, "strips"
