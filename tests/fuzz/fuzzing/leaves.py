"""The leaves of an AnnData: which were added, removed or changed, byte by byte, and whether two results are equal."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

if TYPE_CHECKING:
    from anndata import AnnData

SEPARATOR = " > "
SPARSE = sp.spmatrix | sp.sparray


def leaves(adata: AnnData) -> dict[str, Any]:
    """Every array, column and scalar by its path: ``"obs > domain"``, ``"uns > grn > params > n_genes"``."""
    found: dict[str, Any] = {"shape": adata.shape, "is_view": adata.is_view, "filename": str(adata.filename)}
    _take("X", _in_memory(adata.X), found)
    for axis in ("obs", "var"):
        _take(axis, getattr(adata, axis), found)
    for field in ("obsm", "varm", "obsp", "varp", "layers", "uns"):
        _take(field, {key: value for key, value in getattr(adata, field).items() if key is not None}, found)
    if adata.raw is not None:
        _take("raw.X", _in_memory(adata.raw.X), found)
        _take("raw.var", adata.raw.var, found)
    return found


def _in_memory(x: Any) -> Any:
    """Read the matrix of a backed file."""
    if type(x).__module__.startswith(("h5py", "anndata")) and not isinstance(x, np.ndarray | SPARSE):
        return x[:]
    return x


def _take(path: str, value: Any, found: dict[str, Any]) -> None:
    if hasattr(value, "to_memory") and hasattr(value, "columns"):  # a lazy table
        value = value.to_memory()
    if isinstance(value, Mapping):
        found[path] = f"{type(value).__name__} of {len(value)}"
        for key, part in value.items():
            _take(f"{path}{SEPARATOR}{key!r}" if not isinstance(key, str) else f"{path}{SEPARATOR}{key}", part, found)
    elif isinstance(value, pd.DataFrame):
        found[path] = value.columns
        found[f"{path}{SEPARATOR}index"] = value.index
        for position, key in enumerate(value.columns):
            name = f"{path}{SEPARATOR}{key}"
            found[name if name not in found else f"{name} at {position}"] = value.iloc[:, position]
    elif isinstance(value, list | tuple) and not all(isinstance(part, str | int | float | bool) for part in value):
        found[path] = f"{type(value).__name__} of {len(value)}"
        for position, part in enumerate(value):
            _take(f"{path}{SEPARATOR}[{position}]", part, found)
    else:
        found[path] = value


def fingerprints(adata: AnnData) -> dict[str, Any]:
    """Type, layout and hash of each leaf."""
    return {path: fingerprint(value) for path, value in leaves(adata).items()}


def fingerprint(value: Any) -> Any:
    """Fingerprint of a leaf; two are equal only if type, dtype, layout and every byte are."""
    if isinstance(value, SPARSE):
        parts = [getattr(value, name) for name in ("data", "indices", "indptr", "row", "col") if hasattr(value, name)]
        return (type(value).__name__, value.shape, *map(fingerprint, parts))
    if isinstance(value, np.ma.MaskedArray):
        return ("masked", fingerprint(value.data), fingerprint(np.ma.getmaskarray(value)))
    if isinstance(value, np.ndarray):
        flags = value.flags
        layout = (
            type(value).__name__,
            value.dtype.str,
            value.shape,
            flags.c_contiguous,
            flags.f_contiguous,
            flags.writeable,
        )
        return (*layout, _digest(value))
    if isinstance(value, pd.Index | pd.Series):
        name = (type(value).__name__, str(value.dtype), repr(value.name))
        if isinstance(value.dtype, pd.CategoricalDtype):
            codes = value.codes if isinstance(value, pd.Index) else value.cat.codes
            categories = value.dtype.categories
            return (*name, value.dtype.ordered, fingerprint(categories), _digest(np.asarray(codes)))
        return (*name, _digest(np.asarray(value)))
    if hasattr(value, "dask"):
        return ("dask", value.name, value.chunks)
    plain = type(value).__module__ in ("builtins", "numpy", "pathlib")
    return (type(value).__name__, repr(value) if plain else id(value))


def _digest(array: np.ndarray) -> str:
    if array.dtype.kind in "OV" or array.dtype.kind == "T":
        return repr([(type(v).__name__, repr(v)) for v in array.ravel().tolist()])
    return hashlib.blake2b(np.asarray(array).tobytes(), digest_size=16).hexdigest()


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Paths of leaves that were removed or changed, without those that were added."""
    return [path for path, value in before.items() if after.get(path, "gone") != value]


def field_of(path: str) -> str:
    """Field of a path: ``"uns > grn"`` for ``"uns > grn > params"``."""
    return SEPARATOR.join(path.split(SEPARATOR)[:2])


def differences(a: Any, b: Any, *, rtol: float = 1e-4, atol: float = 1e-5) -> str:
    """Describe how two leaves differ beyond a tolerance; empty if they do not."""
    if isinstance(a, SPARSE) or isinstance(b, SPARSE):
        a, b = (m.toarray() if isinstance(m, SPARSE) else m for m in (a, b))
    if isinstance(a, pd.Series | pd.Index) and isinstance(b, pd.Series | pd.Index):
        a, b = (np.asarray(s) if s.dtype.kind in "iufb" else np.asarray(s.astype(object)) for s in (a, b))
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        return f"shapes {a.shape} and {b.shape}"
    if a.dtype.kind in "iufcb" and b.dtype.kind in "iufcb":
        close = np.isclose(a.astype(complex), b.astype(complex), rtol=rtol, atol=atol, equal_nan=True)
        if close.all():
            return ""
        far = np.abs(a.astype(complex) - b.astype(complex))
        return f"{(~close).sum()} of {close.size} values, by up to {np.nanmax(far) if close.size else 0:.3g}"
    texts = [["missing" if pd.isna(v) is True else str(v) for v in m.ravel().tolist()] for m in (a, b)]
    n = sum(s != t for s, t in zip(*texts, strict=True))
    return (
        f"{n} of {len(texts[0])} texts, first {next((s, t) for s, t in zip(*texts, strict=True) if s != t)}"
        if n
        else ""
    )
