"""Patches of an image and where they lie on the tissue."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from spatialfm._checks import check_positive, checked
from spatialfm.pl._style import clear_frame, place_axes

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

    from spatialfm.pp import TissuePatches

_TISSUE = 5.0  # longer side of the tissue, inches
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
    """Plot some patches, numbered from top to bottom, and where they lie on the tissue.

    Squares show the true extent of the patches. Blank patches have a grey number
    (:attr:`spatialfm.pp.TissuePatches.blank`).

    Parameters
    ----------
    adata
        The spots to choose from; not changed.
    patches
        What :func:`spatialfm.pp.patches` returned for these spots.
    n
        Number of patches shown, chosen far apart.
    slide
        Slide to show; not needed where there is only one.

    Returns
    -------
    The axes: the tissue, then one for each patch.

    Raises
    ------
    KeyError
        A spot of ``adata`` has no patch.
    ValueError
        ``n`` is not a positive integer, or ``slide`` is missing or unknown.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.her2_breast_tumour()
    >>> axes = sfm.pl.patches(adata, sfm.pp.patches(adata), n=4)
    >>> [ax.get_title(loc="left") for ax in axes[1:]]
    ['1', '2', '3', '4']
    """
    from spatialfm.pp._patches import is_blank

    check_positive("n", n)
    rows = patches.obs_names.get_indexer(adata.obs_names.astype(str))
    if (rows < 0).any():
        examples = list(adata.obs_names[rows < 0][:3])
        msg = f"{int((rows < 0).sum())} spots have no patch, such as {examples}; cut them with sfm.pp.patches"
        raise KeyError(msg)
    present = list(patches.slides[rows].remove_unused_categories().categories)
    if slide is None and len(present) == 1:
        slide = present[0]
    if slide is None or slide not in present:
        msg = f"slide={slide!r} is not a slide of these spots; choose from {present}"
        raise ValueError(msg)
    rows = rows[patches.slides[rows] == slide]
    xy = patches.coordinates[rows]
    chosen = spread(xy, n)
    chosen = rows[chosen[np.lexsort(xy[chosen].T)]]
    pixels, ratio = patches.overview(slide)
    window = patches.windows[patches.slides.categories.get_loc(slide)]
    # The part of the image that holds all spots of the slide.
    low, high = (xy.min(axis=0) - window) * ratio, (xy.max(axis=0) + window) * ratio
    low, high = np.maximum(low, 0), np.minimum(high, pixels.shape[1::-1])
    axes = _layout(_TISSUE * (high - low) / (high - low).max(), len(chosen))
    axes[0].imshow(pixels, extent=(0, pixels.shape[1], pixels.shape[0], 0))
    axes[0].set(xlim=(low[0], high[0]), ylim=(high[1], low[1]))
    axes[0].set_title(slide or "tissue", fontsize=11)
    clear_frame(axes[0])
    shown = patches[chosen]
    for i, (panel, patch, blank) in enumerate(zip(axes[1:], shown, is_blank(shown), strict=True)):
        _draw_frame(axes[0], (patches.coordinates[chosen[i]] - window / 2) * ratio, window * ratio, str(i + 1))
        panel.imshow(patch)
        title, color = (f"{i + 1} blank", "#7F7F7F") if blank else (str(i + 1), "black")
        panel.set_title(title, fontsize=9, loc="left", pad=3, color=color)
        clear_frame(panel)
    return axes


def _layout(tissue: np.ndarray, n_patches: int) -> list[Axes]:
    """Make a figure with the tissue, of this width and height in inches, and rows of patches at its right."""
    width, height = tissue
    per_row = max(1, round(np.sqrt(n_patches * height / 2.5)))
    per_row = min(per_row, n_patches, 5)
    n_rows = -(-n_patches // per_row)
    per_row = -(-n_patches // n_rows)
    side = min(1.5 * _PATCH, max(_PATCH, (max(height, 2.0) + 0.3) / n_rows - 0.3))
    boxes = [(0.1, 0.3, width, height)]
    for i in range(n_patches):
        row, column = divmod(i, per_row)
        boxes.append((width + 0.35 + column * (side + 0.1), 0.3 + row * (side + 0.3), side, side))
    return place_axes(boxes, (width + 0.35 + per_row * (side + 0.1), max(height + 0.3, n_rows * (side + 0.3)) + 0.1))


def _draw_frame(ax: Axes, corner: np.ndarray, sides: np.ndarray, label: str) -> None:
    from matplotlib.patches import Rectangle

    # White below colour, so that the frame is visible on any tissue.
    for color, line in (("white", 3.0), (_COLOR, 1.4)):
        ax.add_patch(Rectangle(tuple(corner), *sides, fill=False, edgecolor=color, linewidth=line))
    ax.annotate(
        label, (corner[0] + sides[0], corner[1]), xytext=(2, 1), textcoords="offset points", fontsize=9,
        fontweight="bold",
        bbox={"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
    )  # fmt: skip


def spread(xy: np.ndarray, n: int) -> np.ndarray:
    """Choose up to ``n`` points far apart: the one nearest to the middle, then always the farthest from those chosen.

    Ties are resolved by the coordinates.
    """
    order = np.lexsort(xy.T)
    locations = xy[order]
    chosen = [int(np.argmin(((locations - locations.mean(axis=0)) ** 2).sum(axis=1)))]
    distance = np.full(len(locations), np.inf)
    while len(chosen) < min(n, len(locations)):
        distance = np.minimum(distance, ((locations - locations[chosen[-1]]) ** 2).sum(axis=1))
        chosen.append(int(np.argmax(distance)))
    return order[np.unique(chosen)]
