"""Checks after any call with any arguments."""

from __future__ import annotations

import io
import linecache
import tempfile
import traceback
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import spatialfm as sfm
from fuzzing.leaves import SEPARATOR, SPARSE, changes, differences, field_of, fingerprints, leaves
from fuzzing.process import TooLong, process_state, time_limit

if TYPE_CHECKING:
    from anndata import AnnData

    from fuzzing.calls import Call

PACKAGE = str(Path(sfm.__file__).parent)
ERRORS = (ValueError, KeyError, TypeError, FileNotFoundError, ImportError, NotImplementedError, ConnectionError)

# Not fields of the user: lists of columns and keys, and the register of the fields that spatialfm wrote.
WHOLE = ("obs", "var", "uns", "obsm", "obsp", "layers", "varm", "is_view", "uns > spatialfm")


@dataclass
class Examined:
    """Result of a call and its checks."""

    problems: list[str] = field(default_factory=list)
    """``"kind: description"``."""
    error: BaseException | None = None
    returned: Any = None
    added: dict[str, Any] = field(default_factory=dict)
    """Leaves that were added or replaced."""
    warned: list[str] = field(default_factory=list)


def examine(
    call: Call,
    adata: Any,
    arguments: dict[str, Any],
    *,
    named: tuple[str, ...] = (),
    ours: frozenset[str] = frozenset(),
    finite: bool = True,
    seconds: float = 20,
    round_trip: str = "",
) -> Examined:
    """Make a call and list the problems.

    Parameters
    ----------
    named
        The argument and its value; an error must name one of them.
    ours
        Fields, such as ``"uns > grn"``, that an earlier call of spatialfm wrote and that this call may replace.
    finite
        Whether the input is finite, so that results must be finite.
    round_trip
        ``"h5ad"`` or ``"zarr"``: format of a file from which results must be read back unchanged.
    """
    result = Examined()
    is_data = isinstance(adata, ad.AnnData)
    before = fingerprints(adata) if is_data else {}
    # A view is copied when it is written to; its values stay the same.
    own = fingerprints(adata.copy()) if is_data and adata.is_view else before
    plt.close("all")
    process = process_state()
    with warnings.catch_warnings(record=True) as caught, redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        try:
            with time_limit(seconds):
                result.returned = call.function(adata, **arguments)
        except TooLong:
            result.problems.append(f"hang: no answer after {seconds:.0f} s, {_where(result.error)}")
            return result
        except Exception as error:  # noqa: BLE001 (it is checked below)
            result.error = error
        if list(warnings.filters) != filters:
            result.problems.append("process: warnings.filters")
    _check_warnings(caught, result)
    _check_process(process, result, draws=call.name.startswith("pl."))
    if result.error is not None:
        _check_error(result, named)
    if is_data:
        after = fingerprints(adata)
        if result.error is not None:
            touched = [*changes(before, after), *sorted(after.keys() - before.keys())]
            kind = "changed by a call that failed"
        else:
            both = set(changes(before, after))
            touched = [path for path in changes(own, after) if path in both and field_of(path) not in (*ours, *WHOLE)]
            kind = "changed"
        if not call.writes and call.name != "tl.fine_tune" and result.error is None:
            touched += sorted(after.keys() - before.keys())
        result.problems += [f"{kind}: {field}" for field in dict.fromkeys(map(field_of, touched))]
        if result.error is None:
            now = leaves(adata)
            result.added = {path: now[path] for path in after if path not in before or after[path] != before[path]}
            if finite:
                _check_finite(result)
            if round_trip and result.added:
                _check_round_trip(adata, result, round_trip)
    plt.close("all")
    return result


def _check_warnings(caught: list[warnings.WarningMessage], result: Examined) -> None:
    for warning in caught:
        text = f"{warning.category.__name__}: {str(warning.message)[:160]}"
        if "names are not unique" in text:
            continue  # anndata warns whenever such an AnnData is copied
        if warning.category is UserWarning and "site-packages" not in warning.filename:
            result.warned.append(str(warning.message))
        elif not issubclass(
            warning.category,
            DeprecationWarning | PendingDeprecationWarning | FutureWarning | ImportWarning | ResourceWarning,
        ):
            result.problems.append(f"warning: {text} ({Path(warning.filename).name}:{warning.lineno})")


def _check_process(before: dict[str, Any], result: Examined, *, draws: bool) -> None:
    for name, value in process_state().items():
        # A figure stays open to be shown, unless the call failed.
        if value != before[name] and not (name == "open figures" and draws and result.error is None):
            result.problems.append(f"process: {name}")


def _where(error: BaseException | None) -> str:
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    return " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames[-4:]))


def _check_error(result: Examined, named: tuple[str, ...]) -> None:
    error = result.error
    assert error is not None
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    described = f"{type(error).__name__}: {text[:200]!r} at {_where(error)}"
    raised_here = frame.filename.startswith(PACKAGE) and linecache.getline(
        frame.filename, frame.lineno or 0
    ).lstrip().startswith("raise")
    called_wrongly = (
        isinstance(error, TypeError) and "argument" in text and len(traceback.extract_tb(error.__traceback__)) == 1
    )
    if not (raised_here or called_wrongly):
        result.problems.append(f"internal error: {described}")
    elif not isinstance(error, ERRORS):
        result.problems.append(f"type of error: {described}")
    elif named and not any(name in text for name in named):
        result.problems.append(f"does not name {named[0]}: {described}")
    elif len(text) < 20:
        result.problems.append(f"short message: {described}")


def _check_finite(result: Examined) -> None:
    for path, value in result.added.items():
        numbers = value.data if isinstance(value, SPARSE) else value
        if isinstance(numbers, pd.Series) and numbers.dtype.kind == "f":
            numbers = numbers.to_numpy()
        if isinstance(numbers, float | np.floating):
            numbers = np.array([numbers])
        if not isinstance(numbers, np.ndarray) or numbers.dtype.kind not in "fc":
            continue
        if np.isinf(numbers).any():
            result.problems.append(f"infinite: {path}")
        # Undefined statistics are NaN in the tables of uns.
        elif np.isnan(numbers).any() and not path.startswith("uns"):
            result.problems.append(f"NaN: {path}")


def _check_round_trip(adata: AnnData, result: Examined, kind: str) -> None:
    """Write the added fields to a file, and read them."""
    alone = only(adata, {field_of(path) for path in result.added})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file.{kind}"
        try:
            with time_limit(20), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                getattr(alone, f"write_{kind}")(path)
                back = getattr(ad, f"read_{kind}")(path)
        except TooLong:
            result.problems.append(f"hang: on a round trip through {kind}")
            return
        except Exception as error:  # noqa: BLE001 (it is reported)
            result.problems.append(f"round trip: {kind}: {type(error).__name__}: {str(error)[:300]!r}")
            return
    written, read = leaves(alone), leaves(back)
    for leaf, value in written.items():
        if leaf in ("shape", "is_view", "filename", "uns", "obs > index", "var > index"):
            continue
        if leaf not in read:
            result.problems.append(f"round trip: {kind}: {leaf} is lost")
        elif difference := differences(value, read[leaf], rtol=0, atol=0):
            result.problems.append(f"round trip: {kind}: {leaf} is changed: {difference}")


def only(adata: AnnData, fields: set[str]) -> AnnData:
    """AnnData with some of the fields, such as ``"uns > grn"``, and names that any file can hold."""
    alone = ad.AnnData(
        shape=adata.shape,
        obs=pd.DataFrame(index=[str(i) for i in range(adata.n_obs)]),
        var=pd.DataFrame(index=[str(i) for i in range(adata.n_vars)]),
    )
    for name in sorted(fields):
        attribute, _, key = name.partition(SEPARATOR)
        if attribute in ("obs", "var") and key in getattr(adata, attribute):
            column = getattr(adata, attribute)[key]
            column = column if isinstance(column, pd.Series) else column.to_series()  # of a lazy table
            labels = isinstance(column.dtype, pd.CategoricalDtype)
            getattr(alone, attribute)[key] = column.array if labels else column.to_numpy(copy=True)
        elif attribute in ("obsm", "obsp", "layers", "uns", "varm") and key in getattr(adata, attribute):
            value = getattr(adata, attribute)[key]
            if isinstance(value, pd.DataFrame) and attribute == "obsm":
                value = value.set_axis(alone.obs_names, axis=0)
            getattr(alone, attribute)[key] = value
    return alone
