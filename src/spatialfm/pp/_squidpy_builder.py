"""The graph of neighbouring cells as a builder of squidpy."""

from __future__ import annotations

import warnings
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from spatialfm._checks import checked
from spatialfm._settings import settings
from spatialfm.pp._spatial_neighbors import Method, neighbor_graph

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scipy.sparse import csr_matrix
    from squidpy.gr.neighbors import GraphBuilderCSR


@checked
def squidpy_builder(
    *,
    method: Method = "delaunay",
    n_neighbors: int = 6,
    radius: float | None = None,
    max_edge: float | None = None,
) -> GraphBuilderCSR:
    """Make a graph builder for :func:`squidpy.gr.spatial_neighbors_from_builder`.

    With it, squidpy builds the graph of :func:`spatialfm.pp.spatial_neighbors`, also of a SpatialData object. Slides
    that overlap are not detected: pass ``library_key`` to squidpy. This needs squidpy 1.8.2 or later: ``pip install
    "spatialfm[squidpy]"``.

    Parameters
    ----------
    method
        ``"delaunay"``, ``"knn"``, ``"radius"`` or ``"grid"``, see :func:`spatialfm.pp.spatial_neighbors`.
    n_neighbors
        Number of neighbours for ``"knn"``; 4, 6 or 8 neighbours on the lattice for ``"grid"``.
    radius
        Largest distance of neighbours for ``"radius"``, in the unit of the coordinates.
    max_edge
        Length above which edges are cut, in the unit of the coordinates. None: five times the median edge of the slide
        for ``"delaunay"``, no limit otherwise.

    Returns
    -------
    A :class:`squidpy.gr.neighbors.GraphBuilderCSR`.

    Raises
    ------
    ImportError
        If squidpy is not installed, or has no graph builders yet.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()
    >>> builder = sfm.pp.squidpy_builder()

    ``sq.gr.spatial_neighbors_from_builder(adata, builder, library_key="mouse_id")`` then calls, for each slide:

    >>> connectivities, distances = builder.build(adata.obsm["spatial"])
    >>> connectivities.shape
    (4788, 4788)
    """
    how = {"method": method, "n_neighbors": n_neighbors, "radius": radius, "max_edge": max_edge}
    return builder_class()(how)


@cache
def builder_class() -> type[Any]:
    try:
        # While squidpy is imported, libraries that it uses give warnings that are not for our users.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from squidpy.gr.neighbors import GraphBuilderCSR
    except ImportError as error:
        msg = 'squidpy_builder needs squidpy 1.8.2 or later: pip install "spatialfm[squidpy]"'
        raise ImportError(msg) from error

    class Builder(GraphBuilderCSR):
        """Graph of :func:`spatialfm.pp.spatial_neighbors`."""

        def __init__(self, how: dict[str, Any]) -> None:
            super().__init__()
            self.how = how

        def build_graph(self, coords: np.ndarray) -> tuple[csr_matrix, csr_matrix]:
            return neighbor_graph(_finite(coords), n_jobs=settings.n_jobs, **self.how)

        def combine(
            self, mats: Sequence[tuple[csr_matrix, csr_matrix]], ixs: Sequence[int]
        ) -> tuple[csr_matrix, csr_matrix]:
            connectivities, distances = super().combine(mats, ixs)
            for graph in (connectivities, distances):
                graph.sort_indices()
            return connectivities, distances

        def uns_params(self) -> dict[str, Any]:
            # No "method", which spatial_neighbors writes after it has checked that slides do not overlap.
            used = {name: value for name, value in self.how.items() if name != "method" and value is not None}
            if self.how["method"] not in ("knn", "grid"):
                del used["n_neighbors"]
            coord_type = "grid" if self.how["method"] == "grid" else "generic"
            return {"coord_type": coord_type, "builder": f"spatialfm {self.how['method']}", **used}

    return Builder


def _finite(coords: Any) -> np.ndarray:
    xy = np.asarray(coords, dtype=np.float64)
    if not np.isfinite(xy).all():
        msg = (
            f"{(~np.isfinite(xy).all(axis=1)).sum()} of {len(xy)} cells have NaN or infinite coordinates; drop them "
            "first"
        )
        raise ValueError(msg)
    return xy
