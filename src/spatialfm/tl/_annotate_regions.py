"""A few labelled spots annotate all others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatialfm._checks import checked
from spatialfm._data._adata import (
    canonical_order,
    check_within_slides,
    get_coordinates,
    get_embedding,
    get_graph,
    get_libraries,
    slide_codes,
)
from spatialfm._data._embeddings import NICHE, rep_name
from spatialfm._data._write import check_free, write
from spatialfm._settings import logger
from spatialfm.tl._probe import (
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

    Label about ten spots a region and leave the others empty (NaN); spots of further slides may all be empty. The probe is a logistic
    regression on the embedding, which stays as it is. No label of a region is taken as more likely than another, however many spots carry it:
    what was labelled says little about how common a region is.

    The embeddings of the slides must share axes: embed them in one AnnData. Differences between slides are not corrected.

    Parameters
    ----------
    adata
        Spots or cells with an embedding (:func:`spatialfm.tl.embed`) and coordinates.
    groupby
        Column of ``obs`` with at least two different labels, and NaN for the spots to annotate. Nothing else counts as missing: a text
        such as ``"unknown"`` is a label.
    use_rep
        Key of ``obsm`` with the embedding, or several, whose columns are put side by side.
    refine
        How many times to average the probabilities of each spot with the mean of its neighbours in the tissue graph; labelled spots count as
        certain. For embeddings of single spots (principal components, image features) 1 or 2 help; those that include
        the neighbours gain nothing.
    library_key
        Column of ``obs`` with the slide of each spot. Where each label stands on at least two slides, the estimate of quality leaves out
        whole slides.
    neighbors_key
        Key of ``uns`` that names the tissue graph, for `refine`.
    basis
        Key of ``obsm`` with the coordinates, which make the folds of the estimate of quality.
    key_added
        Where the result is written, in ``obs``, ``obsm`` and ``uns``; not the column of the labels itself.
    copy
        Whether to return a changed copy instead of changing ``adata``.

    Returns
    -------
    None, or the copy. Written are

    ``obs[key_added]``
        Categorical, no value missing, with the categories of `groupby` that are in use. A labelled spot keeps its label.
    ``obs["{key_added}_probability"]``
        float64, the probability of that label. Low values in labelled spots are worth a second look.
    ``obsm["{key_added}_probabilities"]``
        Table (n_obs, labels) of float64 with the labels as columns, in the order of ``names`` (``-`` for ``/`` and whatever else no file can hold): probabilities, which sum to 1, for labelled spots too.
    ``uns["{key_added}_colors"]``
        Colours of the labels, where ``uns["{groupby}_colors"]`` holds them.
    ``uns[key_added]``
        ``params``; ``names``, the list of the labels; ``n_labelled``, int array, how many spots carry each. Where every label stands on two
        slides or on five spots also ``cross_validation``: ``macro_f1`` over held-out labelled spots, ``f1`` (float64 array, one a label),
        ``n_folds``, and ``folds``: ``"slides"``, or ``"places"`` where the spots of a label that are held out together lie side by side
        (cut along the longer side of the tissue).

    Raises
    ------
    KeyError
        If the column, the embedding, the coordinates or, with `refine`, the tissue graph is missing.
    ValueError
        If there are fewer than two different labels or no spot without one, `refine` is no number from 0, the graph joins slides, the
        embedding is constant or not finite, or `key_added` is `groupby`.

    Notes
    -----
    Columns of the embedding are brought halfway between their own variance and equal ones: column j is divided by its standard deviation and
    multiplied by :math:`\sqrt{(1 + v_j / \bar v) / 2}` with :math:`v` the variances over all spots. Ten spots a region cannot tell what
    standardising makes of thirty components that are mostly noise, and fully trusting the variances loses what small columns know.

    In the estimate, held-out spots are weighted so that each label counts as much as there are spots to which it was given. Ten spots a label
    make a rough estimate: on three slides it was off by 0.11 on average, and 0.13 too high on one where a region outnumbers the others tenfold.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()
    >>> few = adata.obs.groupby("region", observed=True).sample(10, random_state=0).index
    >>> adata.obs["few"] = adata.obs["region"].where(adata.obs_names.isin(few))
    >>> sfm.tl.embed(adata, library_key="mouse_id")  # doctest: +SKIP
    >>> sfm.tl.annotate_regions(adata, "few")  # doctest: +SKIP
    """
    check_free(adata, "tl.annotate_regions", annotation_keys(key_added))
    if isinstance(refine, bool) or not isinstance(refine, int | np.integer) or refine < 0:
        msg = f"refine must be a whole number from 0 (no smoothing), got {refine!r}"
        raise ValueError(msg)
    if key_added == groupby:
        msg = f"key_added={key_added!r} would overwrite the labels; give another name"
        raise ValueError(msg)
    names, codes = given_labels(adata, groupby)
    x = half_standardised(get_embedding(adata, use_rep), use_rep)
    xy = get_coordinates(adata, basis)
    slide = slide_codes(get_libraries(adata, library_key))
    step = None
    if refine:
        from spatialfm._data._components import walk

        graph, _ = get_graph(adata, neighbors_key, basis)
        check_within_slides(adata, graph, slide, library_key, neighbors_key)
        step = walk(graph)

    rows = np.flatnonzero(codes >= 0)
    rows = rows[canonical_order(np.column_stack([slide[rows], xy[rows], x[rows]]))]
    probabilities = _probabilities(x, codes, rows, step, refine)
    found = probabilities.argmax(axis=1)
    found[rows] = codes[rows]
    n_labelled = np.bincount(codes[rows])

    params: dict[str, Any] = {"groupby": groupby, "use_rep": rep_name(use_rep), "refine": int(refine), "basis": basis}
    params |= {"neighbors_key": neighbors_key} if refine else {}
    params |= {"library_key": library_key} if library_key is not None else {}
    entry: dict[str, Any] = {"params": params, "names": names, "n_labelled": n_labelled}
    folds, kind = _folds(codes[rows], slide[rows], xy[rows])
    quality = "too few labels to estimate its quality"
    if kind:
        from sklearn.metrics import f1_score

        held_out = np.empty(len(rows), np.int64)
        for fold in np.unique(folds):
            out = folds == fold
            held_out[out] = _probabilities(x, codes, rows[~out], step, refine)[rows[out]].argmax(axis=1)
        weights = (np.bincount(found) / n_labelled)[codes[rows]]
        f1 = f1_score(codes[rows], held_out, average=None, sample_weight=weights)
        n_folds = len(np.unique(folds))
        entry["cross_validation"] = {"macro_f1": float(f1.mean()), "f1": f1, "n_folds": n_folds, "folds": kind}
        quality = f"macro F1 {f1.mean():.2f} on held-out labelled spots ({n_folds} folds of {kind})"

    colors = given_colors(adata, groupby, names)
    fields = annotation_fields(
        adata,
        key_added,
        pd.Categorical.from_codes(found.tolist(), categories=names),
        probabilities[np.arange(len(found)), found],
        probabilities,
        names,
        entry,
        colors,
    )
    adata = write(adata, "tl.annotate_regions", key_added, fields, copy=copy)
    logger.info(
        "annotate_regions: %d spots from %s by obsm[%r], %s -> obs[%r], obsm['%s_probabilities'], uns[%r]",
        adata.n_obs - len(rows),
        ", ".join(f"{n} of {name!r}" for n, name in zip(n_labelled, names, strict=True)),
        rep_name(use_rep),
        quality,
        key_added,
        key_added,
        key_added,
    )
    return adata if copy else None


def _probabilities(
    x: np.ndarray, codes: np.ndarray, rows: np.ndarray, step: csr_matrix | None, refine: int
) -> np.ndarray:
    """Probability (n_obs, labels) of each label after training on ``rows``, which hold all labels."""
    result = fit_probe(x[rows], codes[rows], balanced=True, tol=1e-8).predict_proba(x)
    for _ in range(refine):
        result[rows] = np.eye(result.shape[1])[codes[rows]]
        result = (result + step @ result) / 2
    return result


def _folds(codes: np.ndarray, slides: np.ndarray, xy: np.ndarray) -> tuple[np.ndarray, str]:
    """Fold of each labelled spot and what the folds are; an empty string where there are too few labels.

    Whatever the fold, the others hold every label.
    """
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
    return folds, "places"
