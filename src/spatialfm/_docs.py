"""Parameters that many functions share, described once.

A docstring names them by a line of its own, ``%(library_key)s``, and the decorator :func:`spatialfm._checks.checked`
puts the description in its place.
"""

from __future__ import annotations

import re
from textwrap import indent

_PARAMETERS = {
    "adata": """
        Cells or spots by features, with coordinates in ``obsm``.""",
    "ax": """
        Axes to draw into, one for each panel; a new figure where None.""",
    "basis": """
        Key of the coordinates in ``obsm``.""",
    "cmap": """
        Colour map of numbers.""",
    "copy": """
        Return a changed copy instead of writing to ``adata``.""",
    "device": """
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"mps"``; ``sfm.settings.device`` where None.""",
    "gene_column": """
        Column of ``var`` with the names of the genes; ``var_names`` where None.""",
    "image_background": """
        Draw the H&E image behind the spots: True, or the name of an image in ``uns["spatial"]``.""",
    "key_added": """
        Name under which the result is written.""",
    "layer": """
        Layer to read instead of ``X``.""",
    "library_key": """
        Column of ``obs`` with the slide of each cell. Cells of different slides are never neighbours.""",
    "max_fdr": """
        Largest false discovery rate at which a test counts.""",
    "ncols": """
        Panels in a row.""",
    "neighbors_key": """
        Key of ``uns`` that names the graph of neighbouring cells (:func:`spatialfm.pp.spatial_neighbors`).""",
    "palette": """
        Colours of the categories: a list, a mapping from category to colour, or the name of a colour map.""",
    "panel_per_slide": """
        Column of ``obs`` with the slide of each cell, a panel for each; one panel where None.""",
    "result_key": """
        Name under which the result was written: the ``key_added`` of the function that computed it.""",
    "rng": """
        Seed or generator of random numbers.""",
    "size": """
        Diameter of the points in the unit of the coordinates; chosen from their distances where None.""",
    "use_rep": """
        Key of ``obsm`` with the embedding, or several keys whose columns are put side by side.""",
    "values": """
        What the values are: ``"counts"``, ``"normalized"``, ``"log"``, ``"intensity"`` (proteins) or ``"scaled"``.
        ``"auto"`` recognises them, with a warning where two readings are close.""",
}
# Entries whose name is not that of the parameter.
_TITLES = {"image_background": "img", "panel_per_slide": "library_key", "result_key": "key"}
_LINE = re.compile(r"^( *)%\((\w+)\)s$", re.MULTILINE)


def fill(doc: str | None) -> str | None:
    """Put descriptions of shared parameters in the place of ``%(name)s``."""

    def described(match: re.Match[str]) -> str:
        margin, name = match.groups()
        lines = [line.strip() for line in _PARAMETERS[name].strip("\n").splitlines()]
        title = _TITLES.get(name, name)
        return f"{margin}{title}\n{indent(chr(10).join(lines), margin + '    ')}"

    return None if doc is None else _LINE.sub(described, doc)
