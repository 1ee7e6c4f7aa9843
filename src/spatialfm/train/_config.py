"""The TOML file that describes a run."""

from __future__ import annotations

import difflib
import inspect
import tomllib
from pathlib import Path
from typing import Any

from spatialfm.train._pretrain import pretrain

# Arguments whose values may be tables; every other table only groups arguments.
_TABLES = ("slides", "config")


def read_config(path: str | Path) -> dict[str, Any]:
    """Read the arguments of :func:`~spatialfm.train.pretrain` from a TOML file.

    Keys are the names of the arguments; they may be grouped in sections of any name. ``slides`` may be a list of paths
    or a table of names and paths; ``config`` is a table. Paths are relative to the file.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file is not valid TOML, a key is unknown or occurs twice, or ``slides`` or ``out`` is missing.
    """
    from spatialfm.train._recipes import RECIPES

    known = [name for name in inspect.signature(pretrain).parameters if name != "options"]
    known += dict.fromkeys(name for recipe in RECIPES.values() for name in recipe.options())
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        msg = f"{path} is not valid TOML: {error}"
        raise ValueError(msg) from error
    arguments: dict[str, Any] = {}
    for section, value in content.items():
        grouped = isinstance(value, dict) and section not in _TABLES
        for key, entry in value.items() if grouped else [(section, value)]:
            where = f"{path}, section [{section}]" if grouped else str(path)
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0)
                msg = f"{where}: unknown key {key!r}; did you mean {near[0]!r}? Known are {known}"
                raise ValueError(msg)
            if key in arguments:
                msg = f"{where}: {key!r} occurs twice"
                raise ValueError(msg)
            arguments[key] = entry
    for key, what in (("slides", "the data to read"), ("out", "the folder to write")):
        if key not in arguments:
            msg = f"{path}: {key!r} is missing; it is {what}"
            raise ValueError(msg)
    slides = arguments["slides"]
    if isinstance(slides, dict):
        arguments["slides"] = {name: path.parent / slide for name, slide in slides.items()}
    else:
        arguments["slides"] = [path.parent / slide for slide in ([slides] if isinstance(slides, str) else slides)]
    arguments["out"] = path.parent / arguments["out"]
    return arguments
