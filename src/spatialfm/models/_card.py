"""Model cards: what users should know about a model before they use it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

CARD = "README.md"
_MARK = "<!-- Written by sfm.models.save. Delete this line to keep what you change: the file is then left alone. -->"
_DATA_COLUMNS = ("name", "tissue", "technology", "cells", "genes", "license", "citation")


def shape_of(config: dict[str, Any]) -> dict[str, Any]:
    """Replace long lists of a config, such as a vocabulary, by their length."""
    return {
        key: f"{len(value):,} names" if isinstance(value, list | tuple) and len(value) > 100 else value
        for key, value in config.items()
    }


def is_own_card(path: Path) -> bool:
    """Whether ``path`` may be overwritten: no file is there, or a model card that nobody has edited."""
    return not path.is_file() or _MARK in path.read_text("utf-8")


def model_card(
    *,
    name: str,
    architecture: str,
    config: dict[str, Any],
    n_parameters: int,
    record: dict[str, Any],
    source: str,
) -> str:
    """Write a model card with the front matter of the Hugging Face hub.

    Parameters
    ----------
    name, architecture, config, n_parameters, record
        What the card states; ``record`` holds ``sha256``.
    source
        Argument of :func:`spatialfm.models.load` for this model.
    """
    license = record.get("license")
    summary = trained_on(record)
    tags = [architecture, "spatial-transcriptomics", "spatial-proteomics", "single-cell", "biology", "anndata"]
    data = record.get("data", [])
    columns = [column for column in _DATA_COLUMNS if any(column in slide for slide in data)]
    facts = {
        key.replace("_", " "): value
        for key, value in record.items()
        if isinstance(value, str | int | float) and key not in ("license", "sha256")
    }
    weights = {
        "licence": license or "not stated",
        "parameters": n_parameters,
        "SHA-256, checked on loading": record["sha256"],
    }
    about = (
        f"A `{architecture}` model of spatialfm: it embeds the cells of a tissue measured by spatial transcriptomics "
        f"or proteomics.{f' Trained on {summary}.' if summary else ''}"
    )
    parts = [
        "---",
        *([f"license: {json.dumps(license)}"] if license else []),
        "library_name: spatialfm",
        f"tags: {json.dumps(tags)}",
        "---",
        _MARK,
        f"\n# {name}\n",
        about,
        "\n## Use\n",
        "```python",
        "import spatialfm as sfm\n",
        f'sfm.tl.embed(adata, {json.dumps(source)})  # counts in X, coordinates in obsm["spatial"]',
        f"model = sfm.models.load({json.dumps(source)})  # the torch module",
        "```",
        "\n## Weights\n",
        _table(("", ""), weights.items()),
    ]
    if data:
        parts += ["\n## Training data\n", _table(columns, ([slide.get(c, "") for c in columns] for slide in data))]
    for title, values in (("Training", facts), ("Arguments", record.get("arguments", {})), ("Config", config)):
        if values:
            parts += [f"\n## {title}\n", _table(("", ""), values.items())]
    return "\n".join(parts) + "\n"


def trained_on(record: dict[str, Any]) -> str:
    """Summarise the training data of a model in one line; empty if its record does not list any."""
    data = record.get("data", [])
    if not data:
        return ""
    kinds = dict.fromkeys(
        f"{slide['tissue']} ({slide['technology']})" if "technology" in slide else slide["tissue"]
        for slide in data
        if "tissue" in slide
    )
    cells = sum(slide.get("cells", 0) for slide in data)
    count = f"{cells:,} cells of {len(data)} slide{'s' * (len(data) > 1)}"
    return f"{count}: {', '.join(kinds)}" if kinds else count


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Write a table in Markdown."""

    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(" ".join(_show(cell).replace("|", "\\|").split()) for cell in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *(line(row) for row in rows)])


def _show(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
