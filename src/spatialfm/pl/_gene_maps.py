"""What maps of measured beside predicted genes share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spatialfm.pl._style import Colors, did_you_mean, number_colors

ROW = (1.3, 2.3)  # smallest and largest height of a map, inches
MAX_WIDTH = 3.0
BAR = 0.8  # width of a colour bar with its numbers, inches


def listed_genes(genes: str | Sequence[str], known: list[str], what: str) -> list[str]:
    """Return ``genes`` as a list; all must be among the ``known`` ones."""
    genes = [genes] if isinstance(genes, str) else list(genes)
    for gene in genes:
        if gene not in known:
            msg = f"genes={gene!r} is not among the {len(known)} {what} genes{did_you_mean(gene, known)}"
            raise KeyError(msg)
    return genes


def expression_colors(values: np.ndarray, cmap: str) -> Colors:
    """Scale up to the 99th percentile, or to the maximum where nearly all values are equal, as in rare genes."""
    low, high = np.nanpercentile(values, [0, 99]) if np.isfinite(values).any() else (0, 0)
    # Without a name above the colour bar: the titles have it.
    return number_colors("", values, cmap=cmap, vmax=float(high) if high > low else None)
