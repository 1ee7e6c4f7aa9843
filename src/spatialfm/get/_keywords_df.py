"""Keyword genes of groups of spots as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from spatialfm._checks import check_positive, checked
from spatialfm._data._adata import get_known_labels, get_matrix

if TYPE_CHECKING:
    from anndata import AnnData


@checked
def keywords_df(
    adata: AnnData,
    groupby: str,
    *,
    key: str = "tfidf",
    n_genes: int | None = 10,
) -> pd.DataFrame:
    """Table of the keyword genes of each group: genes with a higher TF-IDF weight there than elsewhere.

    The score of a gene is its mean weight in the group minus its mean weight in all other spots. It describes the
    groups; it is not a test of differential expression.

    Parameters
    ----------
    adata
        Spots with TF-IDF weights (:func:`spatialfm.pp.tfidf`); not changed.
    groupby
        Column of ``obs`` with the groups; spots without a label are left out, with a warning.
    key
        Key of ``layers`` with the weights.
    n_genes
        Largest number of genes for each group; None for all with a score above 0.

    Returns
    -------
    A row for each gene of each group, by falling score: ``group``; ``rank`` from 1; ``gene``; ``score``; ``mean``, the
    mean weight in the group; ``mean_rest``, that in all other spots; ``fraction`` of the group's spots with the gene.

    Raises
    ------
    KeyError
        If ``layers[key]`` or ``obs[groupby]`` is missing.
    ValueError
        If no spot has a label, or ``n_genes`` is no positive integer.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.visium_human_dlpfc()
    >>> sfm.pp.tfidf(adata)
    >>> sfm.get.keywords_df(adata, "layer", n_genes=5).shape
    (35, 7)
    """
    from scipy import sparse

    if key not in adata.layers:
        msg = (
            f"key={key!r}: layers[{key!r}] is missing; run "
            f"sfm.pp.tfidf(adata{'' if key == 'tfidf' else f', key_added={key!r}'}) first"
        )
        raise KeyError(msg)
    check_positive("n_genes", n_genes, optional=True)
    labels = get_known_labels(adata, groupby, name="groupby", effect="these spots do not count")
    known = np.flatnonzero(labels.codes >= 0)
    codes, groups = labels.codes[known], list(labels.categories)
    weights = sparse.csr_matrix(get_matrix(adata, key))[known]
    n = np.bincount(codes, minlength=len(groups)).astype(float)[:, None]
    member = sparse.csr_matrix((np.ones(len(known)), (codes, np.arange(len(known)))), shape=(len(groups), len(known)))
    total = (member @ weights).toarray()
    mean = total / n
    rest = (total.sum(axis=0) - total) / np.maximum(len(known) - n, 1)
    fraction = (member @ (weights > 0)).toarray() / n
    # Rounded, so that ties do not depend on the order in which the spots were summed.
    score = np.round(mean - rest, 12)

    tables = []
    for k in range(len(groups)):
        best = np.argsort(-score[k], kind="stable")
        best = best[score[k, best] > 0][:n_genes]
        tables.append(
            pd.DataFrame(
                {
                    "group": pd.Categorical.from_codes(np.full(len(best), k), categories=groups),
                    "rank": np.arange(1, len(best) + 1),
                    "gene": np.asarray(adata.var_names.astype(str))[best],
                    "score": score[k, best],
                    "mean": mean[k, best],
                    "mean_rest": rest[k, best],
                    "fraction": fraction[k, best],
                }
            )
        )
    return pd.concat(tables, ignore_index=True)
