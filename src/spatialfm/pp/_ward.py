"""Numba kernel of :func:`spatialfm.pp.regions`; imported only when regions are computed."""

from __future__ import annotations

import heapq

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def _find(parent, i):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Find the current region of ``i``."""
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


@njit(nogil=True, cache=True)
def _growth(a, b, slot, center, weight):  # type: ignore[no-untyped-def]  # pragma: no cover
    """How much the sum of squares within regions grows when a and b become one (Ward 1963)."""
    squares = 0.0
    for k in range(center.shape[1]):
        difference = center[slot[a], k] - center[slot[b], k]
        squares += difference * difference
    return squares * weight[a] * weight[b] / (weight[a] + weight[b])


@njit(nogil=True, cache=True)
def _adjacent(c, tick, parent, head, tail, following, target, seen, near):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Put the regions adjacent to c into ``near`` and return their number.

    Inner and double edges are removed from the list of c.
    """
    n_near = 0
    seen[c] = tick
    last, e = -1, head[c]
    while e != -1:
        t = _find(parent, target[e])
        target[e] = t
        if seen[t] == tick:
            if last == -1:
                head[c] = following[e]
            else:
                following[last] = following[e]
        else:
            seen[t] = tick
            near[n_near] = t
            n_near += 1
            last = e
        e = following[e]
    tail[c] = last
    return n_near


@njit(nogil=True, cache=True)
def _join(a, b, c, slot, center, weight, parent, head, tail, following):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Make a and b one region c."""
    weight[c] = weight[a] + weight[b]
    slot[c] = slot[a]
    for k in range(center.shape[1]):
        total = weight[a] * center[slot[a], k] + weight[b] * center[slot[b], k]
        center[slot[c], k] = total / weight[c]
    parent[a] = parent[b] = parent[c] = c
    if head[a] == -1:
        head[c], tail[c] = head[b], tail[b]
    else:
        head[c], tail[c] = head[a], tail[b]
        following[tail[a]] = head[b]
        if head[b] == -1:
            tail[c] = tail[a]


@njit(nogil=True, cache=True)
def agglomerate(values, weights, indptr, indices, piece, n_regions, smallest, full, largest):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Merge adjacent nodes of a graph into regions by Ward's criterion, within bounds of size.

    The pair whose union adds least to the sum of squares is merged first, until each component of the graph has its
    number of regions or every union would exceed ``full``. Then regions below ``smallest``, the smallest first, join
    the adjacent region that adds least, among those that stay within ``largest`` or, where there is none, among all.

    Parameters
    ----------
    values, weights
        (n, d) float64 means and (n,) float64 sizes of the nodes.
    indptr, indices
        Symmetric graph (csr).
    piece, n_regions
        Connected component of each node; number of regions wanted in each component.
    smallest, full, largest
        Bounds of size; unions stop at ``full`` so that small regions find room.

    Returns
    -------
    (n,) number of the region of each node.
    """
    n = len(weights)
    center = values.copy()
    weight = np.zeros(2 * n)
    weight[:n] = weights
    slot, parent = np.arange(2 * n), np.arange(2 * n)
    of_piece = np.zeros(2 * n, np.int64)
    of_piece[:n] = piece
    count = np.zeros(len(n_regions), np.int64)
    # The edges of a region as a linked list, so that joining two takes no copy.
    target = indices.astype(np.int64)
    following = np.arange(1, len(indices) + 1)
    head, tail = np.full(2 * n, -1), np.full(2 * n, -1)
    seen = np.full(2 * n, -1)
    near = np.empty(n, np.int64)
    heap = [(0.0, np.int64(0), np.int64(0)) for _ in range(0)]
    for i in range(n):
        count[piece[i]] += 1
        if indptr[i] < indptr[i + 1]:
            head[i], tail[i] = indptr[i], indptr[i + 1] - 1
            following[tail[i]] = -1
        for e in range(indptr[i], indptr[i + 1]):
            j = target[e]
            if i < j and weight[i] + weight[j] <= full:
                heap.append((_growth(i, j, slot, center, weight), np.int64(i), j))
    heapq.heapify(heap)
    c, tick = n, 0
    while len(heap):
        _, a, b = heapq.heappop(heap)
        if parent[a] != a or parent[b] != b or count[of_piece[a]] <= n_regions[of_piece[a]]:
            continue
        _join(a, b, c, slot, center, weight, parent, head, tail, following)
        of_piece[c] = of_piece[a]
        count[of_piece[c]] -= 1
        tick += 1
        for k in range(_adjacent(c, tick, parent, head, tail, following, target, seen, near)):
            if weight[c] + weight[near[k]] <= full:
                heapq.heappush(heap, (_growth(c, near[k], slot, center, weight), near[k], np.int64(c)))
        c += 1

    small = [(0.0, np.int64(0)) for _ in range(0)]
    for i in range(c):
        if parent[i] == i and weight[i] < smallest:
            small.append((weight[i], np.int64(i)))
    heapq.heapify(small)
    while len(small):
        _, a = heapq.heappop(small)
        if parent[a] != a:
            continue
        tick += 1
        n_near = _adjacent(a, tick, parent, head, tail, following, target, seen, near)
        if n_near == 0:
            continue
        best = (False, 0.0, np.int64(0))
        for k in range(n_near):
            no_room = weight[a] + weight[near[k]] > largest
            candidate = (no_room, _growth(a, near[k], slot, center, weight), near[k])
            if k == 0 or candidate < best:
                best = candidate
        _join(a, best[2], c, slot, center, weight, parent, head, tail, following)
        if weight[c] < smallest:
            heapq.heappush(small, (weight[c], np.int64(c)))
        c += 1
    regions = np.empty(n, np.int64)
    for i in range(n):
        regions[i] = _find(parent, i)
    return regions
