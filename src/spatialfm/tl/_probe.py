"""A linear probe on an embedding: what the functions that annotate cells share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from spatialfm._checks import field_names
from spatialfm._data._adata import get_obs_labels, stored_colors
from spatialfm._data._embeddings import rep_name
from spatialfm._data._write import written

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from sklearn.linear_model import LogisticRegression

_C = 0.1  # inverse strength of the ridge penalty; 0.01 to 1 differ by 0.02 in macro F1


def given_labels(adata: AnnData, column: str, *, complete: bool = False) -> tuple[list[str], np.ndarray]:
    """Labels in use, and the position (n_obs,) of each cell's label among them, -1 where it has none.

    Unless ``complete``, some cells must have no label.
    """
    values = get_obs_labels(adata, column, name="groupby")
    names = list(values.categories)
    if len(names) < 2:
        found = f"the label {names[0]!r} alone" if names else "no label"
        msg = f"obs[{column!r}] holds {found}; at least two different labels are needed"
        raise ValueError(msg)
    if "" in names:
        msg = f"obs[{column!r}] holds an empty text as a label; turn it into NaN if it means missing, or give it a name"
        raise ValueError(msg)
    if not complete and (values.codes >= 0).all():
        msg = (
            f"obs[{column!r}] has a label for each of the {adata.n_obs} cells, so there is nothing to annotate. "
            f"The labels are {names[:10]}. Only NaN counts as missing; turn a text that means it into NaN, as in "
            f"adata.obs[{column!r}].astype(object).replace('unknown', np.nan)"
        )
        raise ValueError(msg)
    return names, values.codes.astype(np.int64)


def half_standardised(rep: np.ndarray, use_rep: str | Sequence[str]) -> np.ndarray:
    """Centre the columns that vary, and bring their variance halfway between 1 and their own; float64.

    Their own variance is taken relative to the mean variance of the columns.
    """
    x = rep[:, np.ptp(rep, axis=0) > 0].astype(np.float64)
    if not x.shape[1]:
        msg = f"obsm[{rep_name(use_rep)!r}] is the same for all cells or spots; name another embedding with use_rep="
        raise ValueError(msg)
    variance = x.var(axis=0)
    return (x - x.mean(axis=0)) * np.sqrt((1 / variance + 1 / variance.mean()) / 2)


def fit_probe(x: np.ndarray, codes: np.ndarray, *, balanced: bool, tol: float) -> LogisticRegression:
    """Logistic regression with a ridge penalty; with ``balanced``, all labels weigh the same."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    weight = "balanced" if balanced else None
    # On two threads of a busy machine its small products were 80 times slower.
    with threadpool_limits(1):
        return LogisticRegression(C=_C, class_weight=weight, tol=tol, max_iter=10_000).fit(x, codes)


def given_colors(adata: AnnData, column: str, names: list[str]) -> list[str] | None:
    """Colours of the labels where ``uns["{column}_colors"]`` holds one for each."""
    colors = stored_colors(adata, column)
    return [str(colors[name]) for name in names] if all(name in colors for name in names) else None


def annotation_keys(key_added: str) -> dict[str, list[str]]:
    """Keys of :func:`annotation_fields`; the colours of labels are written where there are none."""
    return {
        "obs": [key_added, f"{key_added}_probability"],
        "obsm": [f"{key_added}_probabilities"],
        "uns": [key_added],
    }


class Annotation(NamedTuple):
    """What a probe found for each cell."""

    labels: pd.Categorical
    """(n_obs,) the label that is written."""
    probability: np.ndarray
    """(n_obs,) of the label of each cell."""
    probabilities: np.ndarray
    """(n_obs, labels) of all labels."""
    names: list[str]
    """Labels, in the order of the columns of ``probabilities``."""
    colors: list[str] | None
    """Colour of each category of ``labels``, if known."""


def annotation_fields(
    adata: AnnData, key_added: str, annotation: Annotation, entry: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Fields to write: labels, probabilities, the record ``entry`` for ``uns`` and the colours of the labels."""
    # Columns of a table in obsm are keys of the file.
    columns = field_names(annotation.names, besides=adata.obs_names.name)
    table = pd.DataFrame(annotation.probabilities, index=adata.obs_names, columns=columns)
    fields: dict[str, dict[str, Any]] = {
        "obs": {key_added: annotation.labels, f"{key_added}_probability": annotation.probability},
        "obsm": {f"{key_added}_probabilities": table},
        "uns": {key_added: entry},
    }
    key = f"{key_added}_colors"
    if annotation.colors is not None and (key not in adata.uns or key in written(adata, "uns")):
        fields["uns"][key] = annotation.colors
    return fields
