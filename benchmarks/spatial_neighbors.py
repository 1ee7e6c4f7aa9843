"""Time `spatialfm.pp.spatial_neighbors` against squidpy on the same points, and compare the edges.

The two run in turn; the table shows the median of each and the median of the ratios of the pairs.
"""

from __future__ import annotations

import argparse
import time
import warnings

import anndata as ad
import numpy as np

import spatialfm as sfm

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import squidpy as sq


def seconds(call, adata, **arguments) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call(adata, **arguments)
    return time.perf_counter() - start


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
            times.append((there, seconds(sfm.pp.spatial_neighbors, adata, method=method, n_jobs=args.n_jobs, **ours)))
        there, here = np.array(times).T
        one, other = adata.obsp["spatial_connectivities"], adata.obsp["squidpy_connectivities"]
        difference = (one - other).data
        print(
            f"{method:10}{np.median(there):11.2f}{np.median(here):13.2f}{np.median(there / here):8.1f}"
            f"{one.nnz:12d}{(difference > 0).sum():11d}{(difference < 0).sum():12d}",
            flush=True,
        )


if __name__ == "__main__":
    main()
