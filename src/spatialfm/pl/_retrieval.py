"""Spots and what was retrieved for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatialfm._checks import check_positive, checked
from spatialfm._data._adata import get_coordinates, get_embedding, get_libraries
from spatialfm._settings import warn
from spatialfm.pl._patches import _spread
from spatialfm.pl._spatial import panel_size, spatial
from spatialfm.pl._style import clear_frame, place_axes, text_width

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

    from spatialfm.pp import TissuePatches

_HEIGHT = 2.6  # inches of a row's maps
_TITLE = 0.42
_GAP = 0.12
_BAR = 0.75
_PATCHES = 6  # of the retrieved ones, at most
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
    """Plot what was retrieved for a few spots, a row each.

    A row shows where the spot lies, its H&E patch, how similar all spots of the reference are to it (those retrieved have an orange ring), and the
    patches of the first six retrieved. All maps share the colour scale. If spots are paired, a black cross marks the spot's own partner, whose rank
    stands above the map.

    Parameters
    ----------
    adata
        Spots after :func:`spatialfm.tl.retrieve`, with coordinates; not changed.
    reference
        The reference that was searched, with its embedding and coordinates; not changed.
    spots
        Names of the spots to show. By default ``n_spots`` of them, far apart on their slides.
    n_spots
        Number of spots where ``spots`` is None.
    patches, reference_patches
        Patches (:func:`spatialfm.pp.patches`) of the two. By default they are cut from the images in ``uns["spatial"]``, where there are any.
    library_key
        Column of ``obs`` with the slide of each spot, in whichever of the two has it. Each slide of the reference gets its own map.
    basis
        Key of ``obsm`` with the coordinates.
    cmap
        Colour map of the similarity.
    key
        The ``key_added`` of :func:`spatialfm.tl.retrieve`.

    Returns
    -------
    The axes, row by row: place of the spot, its patch, maps of the reference, retrieved patches.

    Raises
    ------
    KeyError
        If nothing was retrieved under this key, or a spot, its patch, an embedding or coordinates are missing.
    ValueError
        If a retrieved spot is not in ``reference``, or ``n_spots`` is not a positive integer.
    """
    if key not in adata.uns or key not in adata.obsm:
        msg = (
            f"key={key!r}: uns[{key!r}] and obsm[{key!r}] are not there; run sfm.tl.retrieve(adata, reference"
            f"{'' if key == 'retrieved' else f', key_added={key!r}'}) first"
        )
        raise KeyError(msg)
    check_positive("n_spots", n_spots)
    xy = get_coordinates(adata, basis)[:, :2]
    rows = _rows(adata, spots, xy, n_spots)
    own_key, reference_key = (library_key if library_key in a.obs else None for a in (adata, reference))
    if library_key is not None and own_key is None and reference_key is None:
        msg = f"library_key={library_key!r} is a column of neither adata.obs nor reference.obs"
        raise KeyError(msg)
    if not isinstance(adata.obsm[key], pd.DataFrame):
        msg = f"key={key!r}: obsm[{key!r}] is no table of names as sfm.tl.retrieve writes it; run that first, or name its key_added="
        raise ValueError(msg)
    found = reference.obs_names.get_indexer(adata.obsm[key].iloc[rows].to_numpy(dtype=object).ravel())
    if (found < 0).any():
        msg = f"{int((found < 0).sum())} of the spots retrieved are not in reference; pass the one that was searched"
        raise ValueError(msg)
    found = found.reshape(len(rows), -1)
    similarity = _similarity(adata, reference, rows, adata.uns[key]["params"])
    partner = np.full(len(rows), -1)
    if f"{key}_rank" in adata.obs:
        partner = reference.obs_names.get_indexer(adata.obs_names[rows])

    if patches is None:
        patches = _stored_patches(adata, own_key, basis)
    if reference_patches is None:
        reference_patches = patches if reference is adata else _stored_patches(reference, reference_key, basis)
    own = None if patches is None else _cut(patches, adata.obs_names[rows], "patches")
    retrieved = None
    if reference_patches is not None:
        names = reference.obs_names[found[:, :_PATCHES].ravel()]
        retrieved = _cut(reference_patches, names, "reference_patches")
        retrieved = retrieved.reshape(len(rows), -1, *retrieved.shape[1:])

    slides = get_libraries(reference, reference_key)
    own_slides = get_libraries(adata, own_key)
    place = _shell(adata, basis, own_key)
    maps = _shell(reference, basis, reference_key)
    boxes, size = _layout(
        place_width=_width(place, own_key),
        map_width=_width(maps, reference_key),
        n_rows=len(rows),
        n_maps=len(slides),
        patch=own is not None,
        n_retrieved=0 if retrieved is None else retrieved.shape[1],
    )
    axes = place_axes(boxes, size)
    per_row = len(axes) // len(rows)
    low, high = np.percentile(similarity, [1, 100])
    for k, row in enumerate(rows):
        panels = iter(axes[k * per_row : (k + 1) * per_row])
        panel = next(panels)
        here = next(members for _, members in own_slides if row in members)
        spatial(place[here], img=False, basis="spatial", alpha=0.35, ax=panel)
        _mark(panel, xy[[row]], marker="o", color=_RING, size=7)
        _title(panel, str(adata.obs_names[row]))
        if own is not None:
            panel = next(panels)
            panel.imshow(own[k])
            _title(panel, "its H&E")
            clear_frame(panel)
        maps.obs["similarity"] = similarity[k]
        panel_of_slide = [next(panels) for _ in slides]
        spatial(maps, "similarity", img=False, library_key="slide", cmap=cmap, vmin=low, vmax=high, ax=panel_of_slide)
        for panel, (name, members) in zip(panel_of_slide, slides, strict=True):
            hits = np.intersect1d(found[k], members)
            _mark(panel, maps.obsm["spatial"][hits], marker="o", color=_RING, size=6)
            title = name or adata.uns[key]["params"]["direction"].replace("->", " → ")
            if partner[k] in members:
                _mark(panel, maps.obsm["spatial"][[partner[k]]], marker="x", color=_PARTNER, size=7)
                title += f"\nown rank {adata.obs[f'{key}_rank'].iloc[row]:.6g} of {reference.n_obs}"
            _title(panel, title)
        for j, panel in enumerate(panels):
            panel.imshow(retrieved[k, j])  # type: ignore[index]
            panel.set_title(str(j + 1), fontsize=9, loc="left", pad=3)
            clear_frame(panel)
    return axes


def _rows(adata: AnnData, spots: Sequence[str] | None, xy: np.ndarray, n_spots: int) -> np.ndarray:
    if spots is None:
        chosen = _spread(xy, n_spots)
        return chosen[np.lexsort(xy[chosen].T)]
    spots = [spots] if isinstance(spots, str) else list(spots)
    places = {str(name): i for i, name in enumerate(adata.obs_names)}
    missing = [s for s in spots if s not in places]
    if missing or not spots:
        msg = f"spots={missing or spots!r} are no spots of adata, whose names are such as {list(adata.obs_names[:3])}"
        raise KeyError(msg)
    return np.array([places[s] for s in spots])


def _similarity(adata: AnnData, reference: AnnData, rows: np.ndarray, params: Any) -> np.ndarray:
    """Cosines (spots shown, spots of the reference)."""
    source, target = (f"{params['use_rep']}_{modality}" for modality in params["direction"].split("->"))
    a, b = get_embedding(adata, source)[rows].astype(float), get_embedding(reference, target).astype(float)
    length = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)
    return np.divide(a @ b.T, length, out=np.zeros(length.shape), where=length > 0)


def _stored_patches(adata: AnnData, library_key: str | None, basis: str) -> TissuePatches | None:
    """Patches from the images in ``uns``, if they can be cut."""
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
        msg = f"{argument}= has no patch of {list(names[rows < 0][:3])}; cut them with sfm.pp.patches"
        raise KeyError(msg)
    return patches[rows]


def _shell(adata: AnnData, basis: str, library_key: str | None) -> AnnData:
    """Coordinates and slides alone, for :func:`spatial`."""
    from anndata import AnnData

    slide = adata.obs[library_key].to_numpy() if library_key else np.full(adata.n_obs, "all")
    obs = pd.DataFrame({"slide": pd.Categorical(slide)}, index=adata.obs_names.astype(str))
    return AnnData(obs=obs, obsm={"spatial": get_coordinates(adata, basis)[:, :2]})


def _width(shell: AnnData, library_key: str | None) -> float:
    width, height = panel_size(shell, library_key=library_key and "slide", basis="spatial")
    return _HEIGHT * width / height


def _layout(
    *, place_width: float, map_width: float, n_rows: int, n_maps: int, patch: bool, n_retrieved: int
) -> tuple[list[tuple[float, float, float, float]], tuple[float, float]]:
    """Boxes of the axes, row by row, and the size of the figure."""
    side = 1.7
    columns = -(-n_retrieved // 2)
    small = (_HEIGHT - 0.25) / 2
    boxes = []
    for row in range(n_rows):
        top = _TITLE + row * (_HEIGHT + _TITLE)
        x = 0.1
        boxes.append((x, top, place_width, _HEIGHT))
        x += place_width + _GAP
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


def _mark(ax: Axes, xy: np.ndarray, *, marker: str, color: str, size: float) -> None:
    # White below colour, so that the mark is seen on any map.
    for line, edge in ((3.0, "white"), (1.4, color)):
        ax.plot(*xy.T, linestyle="", marker=marker, markersize=size, markerfacecolor="none", markeredgecolor=edge,
                markeredgewidth=line, zorder=5)  # fmt: skip


def _title(ax: Axes, text: str) -> None:
    """Title in a font at which it fits the panel."""
    width = ax.get_position().width * ax.figure.bbox.width / ax.figure.dpi
    ax.set_title(text, fontsize=max(6.0, min(10.0, 9.0 * width / max(text_width(text), 1e-9))), pad=4)
