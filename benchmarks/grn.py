"""Time gene networks: seconds for a data set, and the ratio to scikit-learn's ``mutual_info_score`` on the same pairs.

    python benchmarks/grn.py --cells 100000 --genes 200 --groups 12

Counts are simulated: gamma-Poisson around group-specific means. ``sfm.pp.grn`` is timed as a whole (binning, all pairs
of every group, writing). scikit-learn is timed on a random sample of pairs that were binned beforehand, and
extrapolated to all of them. Both run in turn within each repeat; the ratio is the median over repeats.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from sklearn.metrics import mutual_info_score

import spatialfm as sfm


def simulate(n_cells: int, n_genes: int, n_groups: int, scale: float) -> AnnData:
    """Simulate counts in groups of unequal size, with a mean of ``scale / 2``; continuous values for 0."""
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(n_groups, 3.0))
    group = rng.choice(n_groups, n_cells, p=shares)
    means = rng.gamma(0.5, 1.0, size=(n_groups, n_genes))
    blocks: list[sp.csr_matrix | np.ndarray] = []
    for s in range(0, n_cells, 20_000):
        mean = means[group[s : s + 20_000]]
        if scale:
            blocks.append(sp.csr_matrix(rng.poisson(rng.gamma(2.0, mean * scale / 2)).astype(np.float32)))
        else:
            blocks.append(rng.normal(mean, 1).astype(np.float32))
    obs = pd.DataFrame({"group": pd.Categorical(group.astype(str))}, index=np.arange(n_cells).astype(str))
    return AnnData(sp.vstack(blocks, format="csr") if scale else np.vstack(blocks), obs=obs)


def binned(x: np.ndarray, n_bins: int) -> np.ndarray:
    """Equal-width bins of each column."""
    x = x.astype(np.float64)
    low = x.min(axis=0)
    return np.minimum((x - low) / np.maximum(x.max(axis=0) - low, 1e-6) * n_bins, n_bins - 1).astype(np.int64)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--genes", type=int, default=200)
    parser.add_argument("--groups", type=int, default=12)
    parser.add_argument("--bins", type=int, default=32)
    parser.add_argument(
        "--scale", type=float, nargs="+", default=[0.6, 6.0, 0.0], help="of the counts, a row each; 0: continuous"
    )
    parser.add_argument("--pairs", type=int, default=300, help="sample of pairs timed with scikit-learn")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--n-jobs", type=int, default=-1)
    args = parser.parse_args()
    sfm.settings.verbosity, sfm.settings.progress = 1, False
    options = {
        "groupby": "group",
        "n_genes": args.genes,
        "n_bins": args.bins,
        "n_candidates": None,
        "edge_fraction": 1.0,
    }
    sfm.pp.grn(simulate(500, 5, 1, 1.0), **options)  # compiles

    n_pairs = args.genes * (args.genes - 1) // 2
    print(
        f"{args.cells:,} cells x {args.genes} genes x {args.groups} groups: "
        f"{n_pairs * args.groups:,} pairs, {args.bins} bins"
    )
    print(
        f"sfm.pp.grn: n_jobs={args.n_jobs}; scikit-learn: one thread, "
        f"{args.pairs} random pairs timed and extrapolated to all"
    )
    print(f"{'non-zero':>10}{'sfm.pp.grn':>14}{'scikit-learn':>16}{'ratio':>9}{'largest difference of the MI':>32}")
    for scale in args.scale:
        adata = simulate(args.cells, args.genes, args.groups, scale)
        labels, genes = adata.obs["group"].cat.categories, args.genes
        dense = adata.X.toarray() if sp.issparse(adata.X) else adata.X
        bins = {g: binned(dense[(adata.obs["group"] == g).to_numpy()], args.bins) for g in labels}
        rng = np.random.default_rng(1)
        sample = [(k, *rng.choice(genes, 2, replace=False)) for k in rng.integers(len(labels), size=args.pairs)]
        rows = []
        for _ in range(args.repeats):
            start = time.perf_counter()
            with sfm.settings.override(n_jobs=args.n_jobs):
                sfm.pp.grn(adata, **options)
            ours = time.perf_counter() - start
            start = time.perf_counter()
            theirs_mi = [mutual_info_score(bins[labels[k]][:, i], bins[labels[k]][:, j]) for k, i, j in sample]
            theirs = (time.perf_counter() - start) / len(sample) * n_pairs * len(labels)
            rows.append((ours, theirs))
        stored = adata.uns["grn"]
        ours_mi = [stored["groups"][str(stored["names"].index(labels[k]))][i, j] for k, i, j in sample]
        ours, theirs = np.median(rows, axis=0)
        ratio = np.median([b / a for a, b in rows])
        share = np.count_nonzero(dense) / dense.size
        gap = np.abs(np.array(ours_mi) - theirs_mi).max()
        print(f"{share:>10.2f}{ours:>12.2f} s{theirs:>14.1f} s{ratio:>9.0f}{gap:>32.1e}")


if __name__ == "__main__":
    main()
