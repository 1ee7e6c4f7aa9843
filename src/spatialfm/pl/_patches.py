"""Sample patches with their places on the tissue."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from spatialfm._checks import check_positive, checked
from spatialfm.pl._style import clear_frame, place_axes

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

    from spatialfm.pp import TissuePatches

_TISSUE = 5.0  # inches of the tissue's longer side
_PATCH = 1.2
_COLOR = "#D55E00"


@checked
def patches(
    adata: AnnData,
    patches: TissuePatches,
    *,
    n: int = 12,
    slide: str | None = None,
) -> list[Axes]:
    """Plot sample patches, numbered from top to bottom, and where they lie on the tissue.

    Squares show the true extent of the patches; patches that show nothing (see :attr:`spatialfm.pp.TissuePatches.blank`) have a grey number.

    Parameters
    ----------
    adata
        The spots to choose from, among those of ``patches``; not changed.
    patches
        What :func:`spatialfm.pp.patches` returned.
    n
        Patches shown, chosen as far apart as possible.
    slide
        Slide to show; needed where ``adata`` has spots of several.

    Returns
    -------
    The axes: the tissue, then one for each patch.

    Raises
    ------
    KeyError
        If a spot of ``adata`` has no patch.
    ValueError
        If ``n`` is not a positive integer, or ``slide`` is missing or unknown.
    """
    from matplotlib.patches import Rectangle

    from spatialfm.pp._patches import is_blank

    check_positive("n", n)
    rows = patches.obs_names.get_indexer(adata.obs_names.astype(str))
    if (rows < 0).any():
        msg = f"{int((rows < 0).sum())} spots have no patch, such as {list(adata.obs_names[rows < 0][:3])}; cut them with sfm.pp.patches"
        raise KeyError(msg)
    present = list(patches.slides[rows].remove_unused_categories().categories)
    if slide is None and len(present) == 1:
        slide = present[0]
    if slide is None or slide not in present:
        msg = f"slide={slide!r} is none of the slides of these spots; choose from {present}"
        raise ValueError(msg)
    rows = rows[patches.slides[rows] == slide]
    xy = patches.coordinates[rows]
    chosen = _spread(xy, n)
    chosen = rows[chosen[np.lexsort(xy[chosen].T)]]
    shown = patches[chosen]
    pixels, ratio = patches.overview(slide)
    window = patches.windows[patches.slides.categories.get_loc(slide)]

    # The part of the image that holds all spots of the slide.
    low, high = (xy.min(axis=0) - window) * ratio, (xy.max(axis=0) + window) * ratio
    low, high = np.maximum(low, 0), np.minimum(high, pixels.shape[1::-1])
    width, height = _TISSUE * (high - low) / (high - low).max()
    per_row = max(1, round(np.sqrt(len(chosen) * height / 2.5)))
    per_row = min(per_row, len(chosen), 5)
    n_rows = -(-len(chosen) // per_row)
    per_row = -(-len(chosen) // n_rows)
    side = min(1.5 * _PATCH, max(_PATCH, (max(height, 2.0) + 0.3) / n_rows - 0.3))
    boxes = [(0.1, 0.3, width, height)]
    for i in range(len(chosen)):
        row, column = divmod(i, per_row)
        boxes.append((width + 0.35 + column * (side + 0.1), 0.3 + row * (side + 0.3), side, side))
    figsize = (width + 0.35 + per_row * (side + 0.1), max(height + 0.3, n_rows * (side + 0.3)) + 0.1)
    axes = place_axes(boxes, figsize)
    axes[0].imshow(pixels, extent=(0, pixels.shape[1], pixels.shape[0], 0))
    axes[0].set(xlim=(low[0], high[0]), ylim=(high[1], low[1]))
    axes[0].set_title(slide or "tissue", fontsize=11)
    clear_frame(axes[0])
    blank = is_blank(shown)
    for i, (panel, row, patch) in enumerate(zip(axes[1:], chosen, shown, strict=True)):
        corner, sides = (patches.coordinates[row] - window / 2) * ratio, window * ratio
        # White below colour, so that the frame is seen on any tissue.
        for color, line in (("white", 3.0), (_COLOR, 1.4)):
            axes[0].add_patch(Rectangle(tuple(corner), *sides, fill=False, edgecolor=color, linewidth=line))
        axes[0].annotate(
            str(i + 1), (corner[0] + sides[0], corner[1]), xytext=(2, 1), textcoords="offset points", fontsize=9, fontweight="bold",
            bbox={"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
        )  # fmt: skip
        panel.imshow(patch)
        panel.set_title(
            f"{i + 1}{' blank' if blank[i] else ''}",
            fontsize=9,
            loc="left",
            pad=3,
            color="#7F7F7F" if blank[i] else "black",
        )
        clear_frame(panel)
    return axes


def _spread(xy: np.ndarray, n: int) -> np.ndarray:
    """Up to ``n`` points far apart: the one nearest to the middle, then always the one farthest from those chosen (ties: the first place)."""
    order = np.lexsort(xy.T)
    places = xy[order]
    chosen = [int(np.argmin(((places - places.mean(axis=0)) ** 2).sum(axis=1)))]
    distance = np.full(len(places), np.inf)
    while len(chosen) < min(n, len(places)):
        distance = np.minimum(distance, ((places - places[chosen[-1]]) ** 2).sum(axis=1))
        chosen.append(int(np.argmax(distance)))
    return order[np.unique(chosen)]
