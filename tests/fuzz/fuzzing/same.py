"""Comparison of the results of a call on the same numbers in another layout or order, or with other threads."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fuzzing.leaves import SPARSE, differences, fingerprint, leaves

if TYPE_CHECKING:
    from anndata import AnnData

    from fuzzing.calls import Call


def results(call: Call, adata: AnnData, arguments: dict[str, Any]) -> dict[str, Any]:
    """Everything that a call returns and writes, by path."""
    before = leaves(adata)
    prints = {path: fingerprint(value) for path, value in before.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        returned = call.function(adata, **arguments)
    after = leaves(adata)
    # A view is copied when it is written to; leaves with equal values are left out.
    found = {
        path: value
        for path, value in after.items()
        if path not in ("is_view", "filename")
        and prints.get(path) != fingerprint(value)
        and (path not in before or differences(before[path], value, rtol=0, atol=0))
    }
    if isinstance(returned, pd.DataFrame):
        found.update({f"returned > {column}": returned[column] for column in returned})
    elif hasattr(returned, "obsm"):
        found.update({f"returned > {path}": value for path, value in leaves(returned).items()})
    return found


def in_order(found: dict[str, Any], order: np.ndarray) -> dict[str, Any]:
    """Reorder results for ``adata[order]`` like those for ``adata``."""
    back = np.argsort(order)
    out = {}
    for path, value in found.items():
        field = path.partition(" > ")[0]
        if isinstance(value, pd.Index) and not path.endswith("> index"):
            pass  # the names of the columns of a table
        elif field in ("obs", "obsm", "layers") and getattr(value, "shape", (None,))[0] == len(order):
            value = value.iloc[back] if isinstance(value, pd.Series) else value[back]
        elif field == "obsp" and hasattr(value, "shape"):
            value = (value.tocsr() if isinstance(value, SPARSE) else value)[back][:, back]
        out[path] = value
    return out


def is_ignored(path: str) -> bool:
    """Whether a path is a time, an id that depends on every bit, or in the register, whose types may change."""
    return path.endswith((" > minutes", " > id")) or path.startswith("uns > spatialfm")


def unlike(a: dict[str, Any], b: dict[str, Any], *, rtol: float = 1e-3, atol: float = 1e-4) -> list[str]:
    """Paths at which two results differ, and how."""
    paths = [path for path in dict.fromkeys([*a, *b]) if not is_ignored(path)]
    missing = [f"{path}: only in one" for path in paths if (path in a) != (path in b)]
    pairs = [(path, differences(a[path], b[path], rtol=rtol, atol=atol)) for path in paths if path in a and path in b]
    return missing + [f"{path}: {difference}" for path, difference in pairs if difference]
