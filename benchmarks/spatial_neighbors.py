"""Time `spatialfm.pp.spatial_neighbors` against squidpy on the same points, and compare the edges.

The two run in turn; the table shows the median of each and the median of the ratios of the pairs. Where Delaunay edges
differ, exact arithmetic says which are right: on a wide slide qhull, run on all points at once, rounds a few diagonals
the wrong way.
"""

from __future__ import annotations

import argparse
import time
import warnings
from fractions import Fraction

import anndata as ad
import numpy as np
from scipy.spatial import cKDTree

import spatialfm as sfm

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import squidpy as sq


def seconds(call, adata, **arguments) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call(adata, **arguments)
    return time.perf_counter() - start


def is_delaunay(xy: np.ndarray, tree: cKDTree, i: int, j: int) -> bool:
    """Whether a circle through i and j is empty of the points within 12 spacings, in exact arithmetic."""
    near = [k for k in tree.query_ball_point((xy[i] + xy[j]) / 2, 12) if k not in (i, j)]
    (ax, ay), (bx, by) = [[Fraction(float(v)) for v in xy[k]] for k in (i, j)]
    low, high = -np.inf, np.inf
    for x, y in ([Fraction(float(v)) for v in xy[k]] for k in near):
        # (p - a) . (p - b) is the power of p to the smallest circle; the cross product says on which side p bounds the
        # centre.
        power, side = (x - ax) * (x - bx) + (y - ay) * (y - by), (bx - ax) * (y - ay) - (by - ay) * (x - ax)
        if side > 0:
            high = min(high, power / side)
        elif side < 0:
            low = max(low, power / side)
        elif power < 0:
            return False
    return low <= high


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n-points", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--n-jobs", type=int, default=2)
    args = parser.parse_args()

    sfm.settings.verbosity = 1
    # The unit is the mean spacing, so that 1.8 takes in about ten neighbours.
    xy = np.random.default_rng(0).random((args.n_points, 2)) * args.n_points**0.5
    adata = ad.AnnData(shape=(args.n_points, 0), obsm={"spatial": xy})
    cases = {
        "knn": ({"n_neighbors": 6}, sq.gr.spatial_neighbors_knn, {"n_neighs": 6}),
        "radius": ({"radius": 1.8}, sq.gr.spatial_neighbors_radius, {"radius": 1.8}),
        "delaunay": ({"max_edge": np.inf}, sq.gr.spatial_neighbors_delaunay, {}),
    }
    print(
        f"{args.n_points} uniform points, {args.n_jobs} threads, {args.repeats} pairs of runs, squidpy {sq.__version__}"
    )
    print(
        f"{'method':10}{'squidpy s':>11}{'spatialfm s':>13}{'ratio':>8}{'edges':>12}{'only here':>11}{'only there':>12}"
    )
    for method, (ours, squidpy_call, theirs) in cases.items():
        times = []
        for _ in range(args.repeats):
            there = seconds(squidpy_call, adata, n_jobs=args.n_jobs, key_added="squidpy", **theirs)
            with sfm.settings.override(n_jobs=args.n_jobs):
                times.append((there, seconds(sfm.pp.spatial_neighbors, adata, method=method, **ours)))
        there, here = np.array(times).T
        one, other = adata.obsp["spatial_connectivities"], adata.obsp["squidpy_connectivities"]
        difference = (one - other).tocoo()
        only = {sign: np.stack([difference.row, difference.col], axis=1)[difference.data == sign] for sign in (1, -1)}
        print(
            f"{method:10}{np.median(there):11.2f}{np.median(here):13.2f}{np.median(there / here):8.1f}"
            f"{one.nnz:12d}{len(only[1]):11d}{len(only[-1]):12d}",
            flush=True,
        )
        if method == "delaunay" and len(difference.data.nonzero()[0]):
            tree = cKDTree(xy)
            right = [sum(is_delaunay(xy, tree, *pair) for pair in only[sign]) for sign in (1, -1)]
            print(
                f"{'':10}of these right in exact arithmetic: {right[0]} of {len(only[1])} here, {right[1]} of "
                f"{len(only[-1])} there"
            )


if __name__ == "__main__":
    main()
