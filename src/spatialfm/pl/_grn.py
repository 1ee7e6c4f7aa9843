"""The gene network of a group of cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from spatialfm._checks import checked
from spatialfm._data._adata import as_label
from spatialfm._data._leiden import igraph_random
from spatialfm.pl._style import PALETTE, clear_frame, given_axes, place_axes

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

_SIZE = 5.5  # inches
_FONT = 8.0


@checked
def grn(
    adata: AnnData,
    group: str | None = None,
    *,
    key: str = "grn",
    n_edges: int = 100,
    n_labels: int = 30,
    rng: int | np.random.Generator | None = 0,
    ax: Axes | None = None,
) -> Axes:
    """Plot the strongest edges of a gene network.

    Genes with more of the drawn edges are larger; edges of higher mutual information are darker and wider. Genes with
    the most edges are labelled first, as long as labels do not overlap.

    Parameters
    ----------
    adata
        Cells with gene networks (:func:`spatialfm.pp.grn`); not changed.
    group
        Name of the group of cells; not needed where there is only one.
    %(result_key)s
    n_edges
        Number of edges drawn, those of highest mutual information. Genes without one are left out.
    n_labels
        Largest number of labelled genes.
    %(rng)s
    ax
        Axes to draw into; a new figure where None.

    Returns
    -------
    The axes.

    Raises
    ------
    KeyError
        There are no networks.
    ValueError
        ``group`` is unknown or its network has no edges.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()
    >>> adata = adata[adata.obs["celltype"] == "Astrocyte"].copy()
    >>> sfm.pp.grn(adata, groupby="celltype", library_key="mouse_id")
    >>> ax = sfm.pl.grn(adata, n_edges=60)
    >>> ax.get_title()
    'Astrocyte: 60 of 4,975 edges (MI ≥ 0.48 nats)'
    """
    from matplotlib.collections import LineCollection
    from scipy import sparse

    from spatialfm.pp._grn import get_networks

    genes, names, networks, _ = get_networks(adata, key)
    if group is None and len(names) == 1:
        group = names[0]
    if group is None:
        msg = f"uns[{key!r}] holds the networks of {len(names)} groups; choose one with group=, of {names}"
        raise ValueError(msg)
    label = as_label(group, names)
    if label not in names:
        msg = f"group={group!r} has no network in uns[{key!r}]; choose from {names}"
        raise ValueError(msg)
    if n_edges < 1:
        msg = f"n_edges={n_edges!r} must be at least 1"
        raise ValueError(msg)
    edges = sparse.triu(networks[names.index(label)], k=1).tocoo()
    if not edges.nnz:
        msg = f"group={group!r}: its network in uns[{key!r}] has no edges (too few cells); merge it with another group"
        raise ValueError(msg)
    top = np.lexsort((edges.col, edges.row, -edges.data))[:n_edges]
    weight = edges.data[top]
    nodes, ends = np.unique(np.stack([edges.row[top], edges.col[top]]), return_inverse=True)
    ends = ends.reshape(2, -1)
    degree = np.bincount(ends.ravel())
    xy = _layout(len(nodes), ends, np.random.default_rng(rng))

    panel = (
        place_axes([(0.1, 0.4, _SIZE, _SIZE)], (_SIZE + 0.2, _SIZE + 0.5))[0] if ax is None else given_axes(ax, 1)[0]
    )
    strength = (weight - weight.min()) / max(float(np.ptp(weight)), 1e-12)
    lines = LineCollection(
        list(xy[ends.T]),
        colors=[(0.25, 0.25, 0.25, a) for a in 0.2 + 0.7 * strength],
        linewidths=0.6 + 1.6 * strength,
        zorder=1,
    )
    panel.add_collection(lines)
    area = 20 + 180 * degree / degree.max()
    panel.scatter(xy[:, 0], xy[:, 1], s=area, color=PALETTE[1], edgecolors="white", linewidths=0.6, zorder=2)
    panel.set(xlim=(-0.08, 1.08), ylim=(-0.05, 1.05))
    title = f"{group}: {len(top):,} of {edges.nnz:,} edges (MI ≥ {weight.min():.2g} nats)"
    panel.set_title(title.removeprefix(": "), fontsize=11)
    clear_frame(panel)
    order = np.lexsort((nodes, -degree))[:n_labels]
    _label(panel, xy, np.sqrt(area) / 2, [(int(k), genes[nodes[k]]) for k in order])
    return panel


def _layout(n: int, ends: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Positions in the unit square: a Kamada-Kawai layout of each component, and the components side by side."""
    import igraph

    network = igraph.Graph(n, ends.T.tolist())
    with igraph_random(int(generator.integers(2**31))):
        parts = [list(members) for members in network.connected_components()]
        layouts = []
        for members in parts:
            part = network.induced_subgraph(members)
            xy = np.array(part.layout_kamada_kawai(seed=generator.uniform(-1, 1, (len(members), 2)).tolist()).coords)
            layouts.append(xy)
    return _pack(n, parts, layouts)


def _pack(n: int, parts: list[list[int]], layouts: list[np.ndarray]) -> np.ndarray:
    """Put the components in rows, the largest first; the side of each grows with its number of genes."""
    xy = np.empty((n, 2))
    order = sorted(range(len(parts)), key=lambda k: -len(parts[k]))
    for k in order:
        layouts[k] = (
            (layouts[k] - layouts[k].min(axis=0))
            * np.sqrt(len(parts[k]))
            / max(np.ptp(layouts[k], axis=0).max(), 1e-12)
        )
    pad = 0.8
    boxes = [np.ptp(layouts[k], axis=0) + pad for k in order]
    width = max(boxes[0][0], np.sqrt(sum(box.prod() for box in boxes)))
    x = y = row = 0.0
    for k, box in zip(order, boxes, strict=True):
        if x + box[0] > width * 1.001:
            x, y, row = 0.0, y + row, 0.0
        xy[parts[k]] = [x, y] + layouts[k]
        x, row = x + box[0], max(row, box[1])
    xy -= xy.min(axis=0)
    return xy / np.maximum(xy.max(axis=0), 1e-12) * [1, -1] + [0, 1]


def _label(ax: Axes, xy: np.ndarray, radius: np.ndarray, labels: list[tuple[int, str]]) -> None:
    """Write each label beside its node, unless it would hide a node or an earlier label."""
    from matplotlib.patheffects import withStroke
    from matplotlib.textpath import TextPath

    points_per_pixel = 72 / ax.figure.dpi
    at = ax.transData.transform(xy) * points_per_pixel
    # Left, bottom, right and top of the nodes.
    taken = np.column_stack([at - 0.6 * radius[:, None], at + 0.6 * radius[:, None]])
    for node, text in labels:
        width, height = TextPath((0, 0), text, size=_FONT, usetex=False).get_extents().width, _FONT
        r = radius[node] + 1.5
        for dx, dy in [(1, 0), (-1, 0), (0, 1), (0, -1), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7)]:
            half = np.array([width, height]) / 2
            centre = at[node] + np.array([dx, dy]) * (r + half)
            box = np.concatenate([centre - half, centre + half])
            hit = (taken[:, 0] < box[2]) & (box[0] < taken[:, 2]) & (taken[:, 1] < box[3]) & (box[1] < taken[:, 3])
            hit[node] = False
            if not hit.any():
                taken = np.vstack([taken, box])
                ax.annotate(
                    text,
                    xy[node],
                    xytext=centre - at[node],
                    textcoords="offset points",
                    ha="center",
                    va="center",
                    fontsize=_FONT,
                    path_effects=[withStroke(linewidth=2, foreground="white")],
                    zorder=3,
                )
                break
