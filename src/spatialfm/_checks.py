"""Checks of arguments; every message names the value and how to fix it."""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, ParamSpec, TypeVar, get_args, get_origin

import numpy as np

from spatialfm._docs import fill

P = ParamSpec("P")
R = TypeVar("R")


class ArgumentError(TypeError, ValueError):
    """An argument of a wrong type or value."""


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Check the arguments of a public function against its annotations before it runs.

    Annotations such as ``str | Sequence[str] | None`` are parsed as text, and classes are recognised by their names, so
    that no library is imported for a check. Each message names the argument, its valid types or values, and the value
    that was passed. ``key_added`` must be a name that .h5ad and .zarr files can hold. A SpatialData object with one
    table is replaced by this table. Lines ``%(name)s`` of the docstring are replaced by the descriptions in
    :mod:`spatialfm._docs`.
    """
    signature = inspect.signature(function)
    parameters = signature.parameters
    reads_image = "image" in parameters and parameters["image"].kind is not inspect.Parameter.KEYWORD_ONLY
    draws = function.__module__.startswith("spatialfm.pl.")
    reads_only = draws or function.__module__.startswith("spatialfm.get.")
    alternatives: dict[str, list[str]] = {name: _split(str(p.annotation), "|") for name, p in parameters.items()}

    @functools.wraps(function)
    def with_checks(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError as error:
            msg = f"{function.__name__}(): {error}; it takes {', '.join(parameters)}"
            raise ArgumentError(msg) from None
        if alternatives.get("adata") == ["AnnData"]:
            whole = given.arguments["adata"]
            given.arguments["adata"] = _table_of(whole)
            if given.arguments["adata"] is not whole and reads_image and given.arguments.get("image") is None:
                given.arguments["image"] = whole
        for name, value in given.arguments.items():
            if parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                continue
            kinds = [k for kind in alternatives[name] for k in _members(kind, function.__globals__)]
            _check_kind(name, value, kinds, function.__globals__)
            if name == "key_added" and value is not None:
                check_name(name, value)
            if name == "ncols":
                check_positive(name, value)
            if name == "rng":
                _check_seed(value)
        adata: Any = given.arguments.get("adata")
        if reads_only and hasattr(adata, "obs") and hasattr(adata.obs, "to_memory"):
            # Lazy tables are read first; they are small.
            given.arguments["adata"] = adata.to_memory()
        if draws:
            with _no_figures_on_failure():
                return function(*given.args, **given.kwargs)
        return function(*given.args, **given.kwargs)

    with_checks.__doc__ = fill(function.__doc__)
    return with_checks


def check_fields(instance: Any) -> None:
    """Check the fields of a dataclass, except ``model``, against their annotations, as :func:`checked` does."""
    names = vars(sys.modules[type(instance).__module__])
    for f in fields(instance):
        value = getattr(instance, f.name)
        if f.name == "model":
            continue
        kinds = [k for kind in _split(str(f.type), "|") for k in _members(kind, names)]
        _check_kind(f.name, value, kinds, names)
        if f.name == "rng":
            _check_seed(value)


def _check_seed(value: Any) -> None:
    if isinstance(value, Integral) and value < 0:
        msg = f"rng={value!r} is not a seed; pass a whole number of at least 0, a numpy.random.Generator or None"
        raise ArgumentError(msg)


@contextmanager
def _no_figures_on_failure() -> Iterator[None]:
    """If a call fails, close the figures that it opened."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    before = set(pyplot.get_fignums()) if pyplot else set()
    try:
        yield
    except BaseException:
        if (pyplot := sys.modules.get("matplotlib.pyplot")) is not None:
            for number in set(pyplot.get_fignums()) - before:
                pyplot.close(number)
        raise


def _split(annotation: str, at: str) -> list[str]:
    """Split an annotation at a character, except within brackets or quotes."""
    parts, depth, quote, start = [], 0, "", 0
    for i, c in enumerate(annotation):
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        elif c in "[(":
            depth += 1
        elif c in "])":
            depth -= 1
        elif c == at and not depth:
            parts.append(annotation[start:i].strip())
            start = i + 1
    return [*parts, annotation[start:].strip()]


def _check_kind(name: str, value: Any, kinds: list[str], names: Mapping[str, Any]) -> None:
    choices: list[Any] = []
    words: list[str] = []
    for kind in kinds:
        literal = _literal(kind, names)
        if literal is not None:
            # The types are compared first, because == of an array is not a truth value.
            if any(type(value) is type(c) and value == c for c in literal):
                return
            choices += literal
            continue
        fits, word = _KINDS.get(kind.partition("[")[0].rpartition(".")[2], (None, ""))
        if kind == "Any":
            return
        if fits is None:
            cls = kind.rpartition(".")[2].partition("[")[0]
            classes = {c.__name__ for c in type(value).__mro__}
            # Models of unsuitable classes are refused by `find_encoder`, with a better message.
            if cls in classes or (name == "model" and classes & {"Module", "type"}):
                return
            words.append(_CLASSES.get(cls, f"a {cls}"))
            continue
        if fits(value):
            _, _, inner = kind.partition("[")
            _check_items(name, value, kind, inner.removesuffix("]"), names)
            return
        words.append(word)
    if choices and not words and isinstance(value, str):
        msg = f"{name}={value!r} is not known; choose from {choices + [None] * ('None' in kinds)}"
        raise ArgumentError(msg)
    if choices and words == ["None"]:
        msg = f"{name}={_short(value)} is not known; choose from {[*choices, None]}"
        raise ArgumentError(msg)
    expected = _listed([*map(repr, choices), *words])
    hint = " (nan is not a number)" if isinstance(value, float) and value != value else ""
    msg = f"{name} must be {expected}, got {_short(value)} of type {type(value).__name__}{hint}"
    raise ArgumentError(msg)


def _check_items(name: str, value: Any, kind: str, inner: str, names: Mapping[str, Any]) -> None:
    """Check the items of a sequence of text or numbers. Iterators and nested sequences are left to the function."""
    if not inner or not kind.startswith("Sequence["):
        return
    kinds = _split(inner, "|")
    if "str" in kinds:
        # Labels may be numbers or booleans in their table.
        kinds += ["float", "bool"]
    if set(kinds) <= {"str", "int", "float", "bool"} or _literal(inner, names) is not None:
        for i, item in enumerate(value):
            _check_kind(f"{name}[{i}]", item, kinds, names)


def _members(kind: str, names: Mapping[str, Any]) -> list[str]:
    """Alternatives of an annotation, if it is a name for a union in the module of the function."""
    named = names.get(kind)
    if not isinstance(named, UnionType):
        return [kind]
    return ["None" if a is type(None) else a.__name__ if isinstance(a, type) else str(a) for a in get_args(named)]


def _literal(kind: str, names: Mapping[str, Any]) -> list[Any] | None:
    """Values of a ``Literal``, which is written out or named in the module of the function."""
    if kind.startswith("Literal["):
        return list(ast.literal_eval(f"({kind.removeprefix('Literal[').removesuffix(']')},)"))
    named = names.get(kind)
    return list(get_args(named)) if get_origin(named) is Literal else None


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool | np.bool_)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not _is_bool(value) and bool(value == value)


def _is_sequence(value: Any) -> bool:
    if isinstance(value, str | bytes):
        return False
    return isinstance(value, Sequence) or (type(value).__name__ in ("ndarray", "Index", "Series") and value.ndim > 0)


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "None": (lambda v: v is None, "None"),
    "str": (lambda v: isinstance(v, str), "text"),
    "bool": (_is_bool, "True or False"),
    "int": (lambda v: isinstance(v, Integral) and not _is_bool(v), "a whole number"),
    "float": (_is_number, "a number"),
    "Path": (lambda v: hasattr(v, "__fspath__"), "a path"),
    "Sequence": (_is_sequence, "a list"),
    "Iterable": (lambda v: isinstance(v, Iterable) and not isinstance(v, str | bytes), "a list"),
    "Mapping": (lambda v: isinstance(v, Mapping), "a mapping"),
    "tuple": (lambda v: isinstance(v, tuple | list), "a tuple"),
    "type": (lambda v: isinstance(v, type), "a class"),
}
# Names of files of zarr, and of the index of a table.
_RESERVED = ("_index", ".zarray", ".zattrs", ".zgroup", ".zmetadata", "zarr.json")
_CLASSES = {
    "AnnData": "an AnnData",
    "Axes": "Axes of matplotlib",
    "Generator": "a numpy.random.Generator",
    "Model": "a model",
    "ndarray": "an array",
}


def _listed(words: list[str]) -> str:
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _short(value: Any) -> str:
    """Represent a value in a message, on one line of at most 60 characters."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # noqa: BLE001  a repr that fails must not replace the message
        text = "a value"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _table_of(adata: Any) -> Any:
    """Return ``adata``, or the only table of a SpatialData object."""
    if not any(c.__name__ == "SpatialData" for c in type(adata).__mro__):
        return adata
    tables = list(adata.tables)
    if len(tables) == 1:
        return adata.tables[tables[0]]
    msg = (
        f"adata is a SpatialData object with the tables {tables}; pass one of them, "
        f"as in sdata.tables[{tables[0] if tables else 'name'!r}]"
    )
    raise ArgumentError(msg)


def check_name(argument: str, name: str) -> None:
    """Raise unless .h5ad and .zarr files can hold a field of this name."""
    if fault := _fault(name):
        msg = f"{argument}={name!r} {fault}"
        raise ArgumentError(msg)


def _fault(name: str) -> str:
    """Reason why .h5ad or .zarr files cannot hold a field of this name; empty if they can."""
    bad = [repr(c) for c in ("/", "\\", "\0") if c in name]
    if bad:
        return f"contains {' and '.join(bad)}, which names in .h5ad and .zarr files cannot; use '_' instead"
    if not name.strip() or name in (".", "..") or name != name.strip():
        return "is not a valid name; it must not be empty or dots, nor start or end with a space"
    if name in _RESERVED or name.startswith("__"):
        return "is a reserved name in .h5ad and .zarr files; choose another"
    if not name.isprintable() or not _is_utf8(name):
        return "contains characters that cannot be written; use letters, digits and '_'"
    return ""


def field_names(labels: Iterable[str], *, besides: Any = None) -> list[str]:
    """Make a unique field name for each of several different labels: the label itself, if .h5ad and .zarr can hold it.

    ``"T/NK"`` becomes ``"T-NK"``, or ``"T-NK-2"`` if that name is taken. ``besides`` is a further name that is taken,
    such as that of the index of a table.
    """
    labels = list(labels)
    fits = [label != besides and not _fault(label) for label in labels]
    taken = {besides, *(label for label, fit in zip(labels, fits, strict=True) if fit)}
    names = []
    for label, fit in zip(labels, fits, strict=True):
        name = label
        if not fit:
            start = "".join("-" if c in "/\\" or not c.isprintable() else c for c in label).strip()
            start = f"-{start.lstrip('._')}" if _fault(start) else start
            name, k = start, 2
            while name in taken:
                name, k = f"{start}-{k}", k + 1
            taken.add(name)
        names.append(name)
    return names


def check_text(what: str, names: Iterable[Any]) -> None:
    """Raise if one of the ``names`` in ``what`` is text that .h5ad files cannot hold."""
    for name in names:
        if isinstance(name, str) and ("\0" in name or not _is_utf8(name)):
            why = "the character NUL" if "\0" in name else "half a character (a lone surrogate)"
            msg = f"{what} contains {name!r}, with {why}, which .h5ad files cannot hold; rename it"
            raise ValueError(msg)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        msg = f"{name}={value!r} is not known; choose from {list(choices)}"
        raise ValueError(msg)


def check_positive(name: str, value: Any, *, optional: bool = False) -> None:
    """Raise unless ``value`` is an integer of at least 1, or None if it is optional."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        msg = f"{name} must be a positive integer{' or None' if optional else ''}, got {value!r}"
        raise ValueError(msg)


def option_readers(option: str, options_of: Mapping[str, Sequence[str]]) -> list[str]:
    """Names, quoted, of those that have an option; raises if none does. ``options_of`` gives the options of each."""
    readers = [repr(name) for name, options in options_of.items() if option in options]
    if readers:
        return readers
    every = list(dict.fromkeys(o for options in options_of.values() for o in options))
    near = difflib.get_close_matches(option, every, n=1)
    msg = f"there is no option {option}=; " + (f"did you mean {near[0]}=?" if near else f"the options are {every}")
    raise ArgumentError(msg)
