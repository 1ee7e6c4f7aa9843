"""Writing to an AnnData: all at once, and never over what the user or another function wrote.

``uns["spatialfm"]["written"][field][key]`` records which function wrote a field, under which name (``key_added``), and
what it looked like: a function may replace what it wrote itself, as long as it was not changed since. Everything else
in an AnnData belongs to the user.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatialfm._data._adata import writable
from spatialfm._data._embeddings import RECORDS

if TYPE_CHECKING:
    from anndata import AnnData

REGISTER = "spatialfm"
# Labels of a column up to which they are written down to recognise it.
_MAX_LABELS = 200

Fields = Mapping[str, Mapping[str, Any]]
"""``{"obs": {"domain": values}, "uns": {"domain": record}}``: what to write where."""


def check_free(adata: AnnData, call: str, fields: Mapping[str, Sequence[str] | Mapping[str, Any]]) -> None:
    """Raise where ``call``, such as ``"tl.domains"``, would overwrite what it did not write, or what was changed since.

    Call it before the work, with the keys of each field: ``{"obs": ["domain"], "uns": ["domain"]}``.
    """
    if not isinstance(adata.uns.get(REGISTER, {}), Mapping):
        msg = (
            f"uns[{REGISTER!r}] holds {type(adata.uns[REGISTER]).__name__}, where this package notes what it wrote; "
            "give it another name"
        )
        raise ValueError(msg)
    place(adata, RECORDS)
    for field, keys in fields.items():
        for key in keys:
            # A record without its embedding can be replaced.
            if field == RECORDS or key not in place(adata, field):
                continue
            where = f"{field}[{key!r}]"
            entry = written(adata, field).get(key)
            if entry is None:
                why = f"{where} is there already, and sfm.{call} did not write it"
            elif entry[0] != call:
                why = f"{where} was written by sfm.{entry[0]}"
            elif entry[2:] and not _alike(entry[2:], _looks(field, place(adata, field)[key])):
                why = f"{where} was changed after sfm.{call} wrote it"
            else:
                continue
            msg = (
                f"{why}; it would be overwritten. Choose another name with key_added=, or delete it first: del "
                f"adata.{where}"
            )
            raise ValueError(msg)


def write(adata: AnnData, call: str, key_added: str, fields: Fields, *, copy: bool) -> AnnData:
    """Write ``fields`` to ``adata``, or to a copy, and record in the register that ``call`` wrote them.

    Returns what was written to. Everything that an earlier ``call`` wrote under ``key_added`` is removed.
    """
    check_free(adata, call, fields)
    adata = writable(adata, copy=copy)
    register = _register(adata)
    if RECORDS in fields:
        # Copies of an AnnData may share the old mapping.
        adata.uns[RECORDS] = dict(place(adata, RECORDS))
    for field, key in _written_under(adata, call, key_added):
        del place(adata, field)[key]
        del register[field][key]
    for field, values in fields.items():
        for key, value in values.items():
            place(adata, field)[key] = value
            register.setdefault(field, {})[key] = [call, key_added, *_looks(field, value)]
    adata.uns[REGISTER] = {**adata.uns.get(REGISTER, {}), "written": register}
    return adata


def place(adata: AnnData, field: str) -> Any:
    """Return the mapping that holds a field: an attribute of ``adata``, or the records of embeddings in ``uns``."""
    if field != RECORDS:
        return getattr(adata, field)
    if not isinstance(adata.uns.get(RECORDS, {}), Mapping):
        msg = (
            f"uns[{RECORDS!r}] holds {type(adata.uns[RECORDS]).__name__}, where tl.embed notes what it did; give it "
            "another name"
        )
        raise ValueError(msg)
    return adata.uns.get(RECORDS, {})


def adopt(adata: AnnData, carrier: AnnData, keys: Mapping[str, Sequence[str]]) -> None:
    """Copy fields that a function wrote to ``carrier``, with their entries in its register."""
    register = _register(adata)
    for field, names in keys.items():
        entries = written(carrier, field)
        for key in names:
            getattr(adata, field)[key] = getattr(carrier, field)[key]
            register.setdefault(field, {})[key] = entries[key]
    adata.uns[REGISTER] = {**adata.uns.get(REGISTER, {}), "written": register}


def written(adata: AnnData, field: str) -> Mapping[str, list[str]]:
    """Read the register of a field: ``[call, key_added, *looks]`` of each key."""
    register = adata.uns.get(REGISTER)
    found = register.get("written") if isinstance(register, Mapping) else None
    found = found.get(field) if isinstance(found, Mapping) else None
    return {str(k): [str(v) for v in entry] for k, entry in found.items()} if isinstance(found, Mapping) else {}


def _written_under(adata: AnnData, call: str, key_added: str) -> list[tuple[str, str]]:
    """List fields and keys that ``call`` wrote under ``key_added``, that are there and as it wrote them."""
    return [
        (field, key)
        for field in ("obs", "var", "obsm", "varm", "obsp", "layers", "uns", RECORDS)
        for key, entry in written(adata, field).items()
        if entry[:2] == [call, key_added]
        and key in place(adata, field)
        and (not entry[2:] or _alike(entry[2:], _looks(field, place(adata, field)[key])))
    ]


def _register(adata: AnnData) -> dict[str, dict[str, list[str]]]:
    """Copy the register of all fields, as copies of an AnnData may share it."""
    found = adata.uns.get(REGISTER, {}).get("written")
    return {str(field): dict(written(adata, field)) for field in found} if isinstance(found, Mapping) else {}


def _looks(field: str, value: Any) -> list[str]:
    """Describe a field so that a replacement is recognised, but a subset of cells or a file is not one."""
    if field in ("uns", RECORDS):
        return []
    if isinstance(value, pd.DataFrame):
        return ["table", *map(str, value.columns[:_MAX_LABELS])]
    if field in ("obs", "var"):
        dtype = getattr(value, "dtype", np.asarray(value).dtype)
        if isinstance(dtype, pd.CategoricalDtype):
            labels = dtype.categories
            return ["labels", *(map(str, labels) if len(labels) <= _MAX_LABELS else ["many"])]
        return ["numbers" if getattr(dtype, "kind", "O") in "iufb" else "text"]
    return ["matrix", *(map(str, value.shape[1:]) if field in ("obsm", "varm") else [])]


def _alike(then: list[str], now: list[str]) -> bool:
    """Whether a field still looks as it did; labels may have become fewer."""
    if then[:1] != now[:1]:
        return False
    return then == now or (then[0] == "labels" and (then[1:] == ["many"] or set(now[1:]) <= set(then[1:])))


def record_params(**params: Any) -> dict[str, Any]:
    """Arguments of a call as a file can hold them, for ``uns[key_added]["params"]``.

    None becomes ``""``, a numpy number one of Python, a tuple a list, a path text, and a generator of random numbers
    ``"generator"``.
    """
    return {name: _recorded(value) for name, value in params.items()}


def _recorded(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.random.Generator):
        return "generator"
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, PurePath) else value
