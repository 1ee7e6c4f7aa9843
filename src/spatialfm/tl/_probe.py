"""Labels of some cells and a linear probe on an embedding, for the others: what the annotating functions share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
        msg = f"obs[{column!r}] holds {'the label ' + repr(names[0]) + ' alone' if names else 'no label'}; at least two are needed"
        raise ValueError(msg)
    if "" in names:
        msg = f"obs[{column!r}] holds an empty text as a label; turn it into NaN if it means missing, or give it a name"
        raise ValueError(msg)
    if not complete and (values.codes >= 0).all():
        msg = (
            f"obs[{column!r}] has a label for each of the {adata.n_obs} cells or spots, nothing to annotate: the labels are {names[:10]}. Only NaN counts "
            f"as missing; turn a text that means it into NaN, as in adata.obs[{column!r}].astype(object).replace('unknown', np.nan)"
        )
        raise ValueError(msg)
    return names, values.codes.astype(np.int64)


def half_standardised(rep: np.ndarray, use_rep: str | Sequence[str]) -> np.ndarray:
    """Columns that vary, centred, float64, with a variance halfway between 1 and their own (which is 1 on average)."""
    x = rep[:, np.ptp(rep, axis=0) > 0].astype(np.float64)
    if not x.shape[1]:
        msg = f"obsm[{rep_name(use_rep)!r}] is the same for all spots; name another embedding with use_rep="
        raise ValueError(msg)
    variance = x.var(axis=0)
    return (x - x.mean(axis=0)) * np.sqrt((1 / variance + 1 / variance.mean()) / 2)


def fit_probe(x: np.ndarray, codes: np.ndarray, *, balanced: bool, tol: float) -> LogisticRegression:
    """Logistic regression; ``balanced`` takes no label as more likely than another."""
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


def annotation_fields(
    adata: AnnData,
    key_added: str,
    found: pd.Categorical,
    probability: np.ndarray,
    probabilities: np.ndarray,
    names: list[str],
    entry: dict[str, Any],
    colors: list[str] | None,
) -> dict[str, dict[str, Any]]:
    """Fields to write: labels, the probability of each cell's, the table of all, what ``uns`` tells, and the colours of the categories."""
    # Columns of a table in obsm are keys of the file.
    columns = field_names(names, besides=adata.obs_names.name)
    table = pd.DataFrame(probabilities, index=adata.obs_names, columns=columns)
    fields: dict[str, dict[str, Any]] = {
        "obs": {key_added: found, f"{key_added}_probability": probability},
        "obsm": {f"{key_added}_probabilities": table},
        "uns": {key_added: entry},
    }
    key = f"{key_added}_colors"
    if colors is not None and (key not in adata.uns or key in written(adata, "uns")):
        fields["uns"][key] = colors
    return fields
