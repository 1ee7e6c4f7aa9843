"""Spots and what was retrieved for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from spatialfm._checks import check_positive, checked
from spatialfm._data._adata import get_coordinates, get_libraries
from spatialfm._data._embeddings import get_embedding
from spatialfm._settings import warn
from spatialfm.pl._patches import spread
from spatialfm.pl._spatial import MapOptions, draw_maps, panel_size
from spatialfm.pl._style import clear_frame, number_colors, place_axes, resolve_colors, text_width

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

    from spatialfm.pp import TissuePatches

_HEIGHT = 2.6  # height of the maps of a row, inches
_TITLE = 0.42
_GAP = 0.12
_BAR = 0.75
_PATCHES = 6  # largest number of retrieved patches
_RING = "#D55E00"
_PARTNER = "#000000"


@checked
def retrieval(
    adata: AnnData,
    reference: AnnData,
    *,
    spots: Sequence[str] | None = None,
    n_spots: int = 3,
    patches: TissuePatches | None = None,
    reference_patches: TissuePatches | None = None,
    library_key: str | None = None,
    basis: str = "spatial",
    cmap: str = "viridis",
    key: str = "retrieved",
) -> list[Axes]:
    """Plot what was retrieved for some spots, one row for each.

    A row shows the spot on its tissue, its H&E patch, the similarity of all spots of the reference with the retrieved
    ones in orange rings, and the patches of the first six retrieved spots. All maps share the colour scale. Where spots
    are paired, a black cross marks the same spot in the reference, and the title gives its rank.

    Parameters
    ----------
    adata
        Spots after :func:`spatialfm.tl.retrieve`, with coordinates; not changed.
    reference
        The reference that was searched, with its embedding and coordinates; not changed.
    spots
        Names of the spots to show. Where None, ``n_spots`` spots far apart.
    n_spots
        Number of spots where ``spots`` is None.
    patches, reference_patches
        Patches (:func:`spatialfm.pp.patches`) of ``adata`` and of ``reference``. Where None, they are cut from the
        images in ``uns["spatial"]``, where there are any.
    library_key
        Column of ``obs`` with the slide of each spot, in one or both of the two. Each slide of ``reference`` has a map.
    %(basis)s
    %(cmap)s
    %(result_key)s

    Returns
    -------
    The axes, row by row: tissue with the spot, its patch, maps of the reference, retrieved patches.

    Raises
    ------
    KeyError
        Nothing was retrieved under ``key``, or a spot, its patch, an embedding or coordinates are missing.
    ValueError
        A retrieved spot is not in ``reference``, or ``n_spots`` is not a positive integer.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.her2_breast_tumour()[:50].copy()
    >>> sfm.tl.embed(adata, model="hibio")
    >>> sfm.tl.retrieve(adata, adata, "image->gene")
    >>> axes = sfm.pl.retrieval(adata, adata, n_spots=1)
    >>> len(axes)  # tissue, patch, map, six retrieved patches
    9
    """
    check_positive("n_spots", n_spots)
    _check_key(adata, key)
    xy = get_coordinates(adata, basis)[:, :2]
    own_key, reference_key = _library_keys(adata, reference, library_key)
    found = _read(adata, reference, key, _rows(adata, spots, xy, n_spots))
    rows = found.rows

    if patches is None:
        patches = _stored_patches(adata, own_key, basis)
    if reference_patches is None:
        reference_patches = patches if reference is adata else _stored_patches(reference, reference_key, basis)
    own = None if patches is None else _cut(patches, adata.obs_names[rows], "patches")
    retrieved = None
    if reference_patches is not None:
        names = reference.obs_names[found.spots[:, :_PATCHES].ravel()]
        retrieved = _cut(reference_patches, names, "reference_patches")
        retrieved = retrieved.reshape(len(rows), -1, *retrieved.shape[1:])

    slides = get_libraries(reference, reference_key)
    own_slides = get_libraries(adata, own_key)
    tissue = _coordinates_only(adata, basis, own_key)
    maps = _coordinates_only(reference, basis, reference_key)
    boxes, size = _layout(
        tissue_width=_width(tissue, own_key),
        map_width=_width(maps, reference_key),
        n_rows=len(rows),
        n_maps=len(slides),
        patch=own is not None,
        n_retrieved=0 if retrieved is None else retrieved.shape[1],
    )
    axes = place_axes(boxes, size)
    per_row = len(axes) // len(rows)
    low, high = np.percentile(found.similarity, [1, 100])
    for k, row in enumerate(rows):
        panels = iter(axes[k * per_row : (k + 1) * per_row])
        panel = next(panels)
        here = next(members for _, members in own_slides if row in members)
        draw_maps(tissue[here], [resolve_colors(tissue[here], None)], MapOptions(alpha=0.35), ax=panel)
        _mark(panel, xy[[row]], marker="o", color=_RING, size=7)
        _title(panel, str(adata.obs_names[row]))
        if own is not None:
            _show_patch(next(panels), own[k], "its H&E")
        colors = number_colors("similarity", found.similarity[k], cmap=cmap, vmin=low, vmax=high)
        panel_of_slide = [next(panels) for _ in slides]
        draw_maps(maps, [colors], MapOptions(library_key="slide"), ax=panel_of_slide)
        for panel, slide in zip(panel_of_slide, slides, strict=True):
            _mark_found(panel, maps.obsm["spatial"], slide, found, k)
        for j, panel in enumerate(panels):
            _show_patch(panel, retrieved[k, j], str(j + 1))  # type: ignore[index]
    return axes


class _Found(NamedTuple):
    rows: np.ndarray  # (n_shown,) of adata
    spots: np.ndarray  # (n_shown, n_retrieved), rows of the reference
    similarity: np.ndarray  # (n_shown, n_reference)
    partner: np.ndarray  # (n_shown,) row of the same spot in the reference, -1 where there is none
    rank: np.ndarray  # (n_shown,) of that spot
    direction: str


def _check_key(adata: AnnData, key: str) -> None:
    if key not in adata.uns or key not in adata.obsm:
        added = "" if key == "retrieved" else f", key_added={key!r}"
        msg = (
            f"key={key!r}: uns[{key!r}] and obsm[{key!r}] are missing; "
            f"run sfm.tl.retrieve(adata, reference{added}) first"
        )
        raise KeyError(msg)
    if not isinstance(adata.obsm[key], pd.DataFrame):
        msg = f"key={key!r}: obsm[{key!r}] is not a DataFrame of names; give the key_added of sfm.tl.retrieve"
        raise ValueError(msg)


def _library_keys(adata: AnnData, reference: AnnData, library_key: str | None) -> tuple[str | None, str | None]:
    """``library_key`` for each of the two that has this column."""
    own, other = (library_key if library_key in a.obs else None for a in (adata, reference))
    if library_key is not None and own is None and other is None:
        msg = f"library_key={library_key!r} is a column of neither adata.obs nor reference.obs"
        raise KeyError(msg)
    return own, other


def _read(adata: AnnData, reference: AnnData, key: str, rows: np.ndarray) -> _Found:
    spots = reference.obs_names.get_indexer(adata.obsm[key].iloc[rows].to_numpy(dtype=object).ravel())
    if (spots < 0).any():
        msg = f"{int((spots < 0).sum())} of the spots retrieved are not in reference; pass the one that was searched"
        raise ValueError(msg)
    params = adata.uns[key]["params"]
    partner, rank = np.full(len(rows), -1), np.full(len(rows), np.nan)
    if f"{key}_rank" in adata.obs:
        partner = reference.obs_names.get_indexer(adata.obs_names[rows])
        rank = adata.obs[f"{key}_rank"].to_numpy(dtype=np.float64)[rows]
    similarity = _similarity(adata, reference, rows, params)
    return _Found(rows, spots.reshape(len(rows), -1), similarity, partner, rank, str(params["direction"]))


def _rows(adata: AnnData, spots: Sequence[str] | None, xy: np.ndarray, n_spots: int) -> np.ndarray:
    if spots is None:
        chosen = spread(xy, n_spots)
        return chosen[np.lexsort(xy[chosen].T)]
    spots = [spots] if isinstance(spots, str) else list(spots)
    row_of = {str(name): i for i, name in enumerate(adata.obs_names)}
    missing = [s for s in spots if s not in row_of]
    if missing or not spots:
        msg = f"spots={missing or spots!r} are not in adata.obs_names, such as {list(adata.obs_names[:3])}"
        raise KeyError(msg)
    return np.array([row_of[s] for s in spots])


def _similarity(adata: AnnData, reference: AnnData, rows: np.ndarray, params: Any) -> np.ndarray:
    """Cosine similarity (spots shown, spots of the reference)."""
    source, target = (f"{params['use_rep']}_{modality}" for modality in params["direction"].split("->"))
    a, b = get_embedding(adata, source)[rows].astype(float), get_embedding(reference, target).astype(float)
    length = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)
    return np.divide(a @ b.T, length, out=np.zeros(length.shape), where=length > 0)


def _stored_patches(adata: AnnData, library_key: str | None, basis: str) -> TissuePatches | None:
    """Patches from the images in ``uns["spatial"]``, or None where there are none that fit."""
    from spatialfm.pp import patches

    if "spatial" not in adata.uns:
        return None
    try:
        return patches(adata, library_key=library_key, basis=basis)
    except (KeyError, ValueError) as error:
        warn("retrieval: drawn without the image in uns['spatial']: %s", error.args[0])
        return None


def _cut(patches: TissuePatches, names: pd.Index, argument: str) -> np.ndarray:
    rows = patches.obs_names.get_indexer(names.astype(str))
    if (rows < 0).any():
        msg = f"{argument}= holds no patch of {list(names[rows < 0][:3])}; cut them with sfm.pp.patches"
        raise KeyError(msg)
    return patches[rows]


def _coordinates_only(adata: AnnData, basis: str, library_key: str | None) -> AnnData:
    """Make an AnnData of the coordinates and the slides, for maps."""
    from anndata import AnnData

    slide = adata.obs[library_key].to_numpy() if library_key else np.full(adata.n_obs, "all")
    obs = pd.DataFrame({"slide": pd.Categorical(slide)}, index=adata.obs_names.astype(str))
    return AnnData(obs=obs, obsm={"spatial": get_coordinates(adata, basis)[:, :2]})


def _width(cells: AnnData, library_key: str | None) -> float:
    width, height = panel_size(cells, library_key=library_key and "slide", basis="spatial")
    return _HEIGHT * width / height


def _layout(
    *, tissue_width: float, map_width: float, n_rows: int, n_maps: int, patch: bool, n_retrieved: int
) -> tuple[list[tuple[float, float, float, float]], tuple[float, float]]:
    """Boxes of the axes, row by row, and the size of the figure."""
    side = 1.7
    columns = -(-n_retrieved // 2)
    small = (_HEIGHT - 0.25) / 2
    boxes = []
    for row in range(n_rows):
        top = _TITLE + row * (_HEIGHT + _TITLE)
        x = 0.1
        boxes.append((x, top, tissue_width, _HEIGHT))
        x += tissue_width + _GAP
        if patch:
            boxes.append((x, top + (_HEIGHT - side) / 2, side, side))
            x += side + _GAP
        for _ in range(n_maps):
            boxes.append((x, top, map_width, _HEIGHT))
            x += map_width + _GAP
        x += _BAR
        for j in range(n_retrieved):
            line, column = divmod(j, columns)
            boxes.append((x + column * (small + 0.1), top + line * (small + 0.25), small, small))
        x += columns * (small + 0.1)
    return boxes, (x + 0.1, n_rows * (_HEIGHT + _TITLE) + 0.1)


def _mark_found(ax: Axes, xy: np.ndarray, slide: tuple[str, np.ndarray], found: _Found, k: int) -> None:
    """Mark on a slide of the reference what was retrieved for the ``k``-th spot, and the spot itself."""
    name, members = slide
    _mark(ax, xy[np.intersect1d(found.spots[k], members)], marker="o", color=_RING, size=6)
    title = name or found.direction.replace("->", " → ")
    if found.partner[k] in members:
        _mark(ax, xy[[found.partner[k]]], marker="x", color=_PARTNER, size=7)
        title += f"\nown rank {found.rank[k]:.6g} of {len(xy)}"
    _title(ax, title)


def _show_patch(ax: Axes, patch: np.ndarray, title: str) -> None:
    ax.imshow(patch)
    ax.set_title(title, fontsize=9, loc="left", pad=3)
    clear_frame(ax)


def _mark(ax: Axes, xy: np.ndarray, *, marker: str, color: str, size: float) -> None:
    # White below colour, so that the mark is visible on any map.
    for line, edge in ((3.0, "white"), (1.4, color)):
        ax.plot(*xy.T, linestyle="", marker=marker, markersize=size, markerfacecolor="none", markeredgecolor=edge,
                markeredgewidth=line, zorder=5)  # fmt: skip


def _title(ax: Axes, text: str) -> None:
    """Write a title in a font size at which it fits the panel."""
    width = ax.get_position().width * ax.figure.bbox.width / ax.figure.dpi
    ax.set_title(text, fontsize=max(6.0, min(10.0, 9.0 * width / max(text_width(text), 1e-9))), pad=4)
