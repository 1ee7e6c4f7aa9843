"""Time and memory of `spatialfm.pp.regions`, and how far its regions agree with annotated ones.

Takes a folder of .h5ad files with coordinates in ``obsm["spatial"]``. Regions come from expression, the annotation is
never seen: the column named in ``uns["eval"]["niche"]``, where there is one. Homogeneity is the share of the
annotation's entropy that the regions explain; regions of bounded size are more and smaller than annotated ones, which
ARI and NMI count against them. Beside it, in brackets, what regions by place alone reach: k-means of the coordinates,
as many clusters.

With ``--n-cells``, one tissue is repeated side by side to so many cells, and each is timed in a process of its own,
without the graph.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, homogeneity_score, normalized_mutual_info_score

import spatialfm as sfm


def repeated(n: int) -> ad.AnnData:
    """Repeat the bundled tissue side by side, `n` cells, with its graph."""
    one = sfm.datasets.merfish_mouse_brain()
    one = one[one.obs["mouse_id"] == one.obs["mouse_id"].iloc[0]]
    times = -(-n // one.n_obs)
    side = int(np.ceil(times**0.5))
    many = ad.concat([one] * times, index_unique="-")
    tile = np.repeat(np.arange(times), one.n_obs)
    width = np.ptp(one.obsm["spatial"], axis=0) * 1.02
    many.obsm["spatial"] = many.obsm["spatial"] + np.stack([tile % side, tile // side], axis=1) * width
    many = many[:n].copy()
    sfm.pp.spatial_neighbors(many)
    return many


def one_size(n: int, repeats: int) -> None:
    """Print one row of the table of sizes."""
    sfm.pp.regions(repeated(2000), use_rep=None, key_added="r")
    adata = repeated(n)
    # Memory in use now; what the peak rises above it is the call's.
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        sfm.pp.regions(adata, use_rep=None, key_added="r")
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    counts = adata.obs["r"].value_counts()
    print(
        f"{n:8d}{np.median(seconds):9.2f}{peak - before:9.0f}{len(counts):9d}"
        f"{counts.min():6d}{counts.mean():6.0f}{counts.max():6d}"
    )


def agreement(path: Path) -> None:
    """Print the rows of one file."""
    adata = ad.read_h5ad(path)
    named = adata.uns.get("eval", {})
    slide = str(named.get("slide", "")) or None
    sfm.pp.spatial_neighbors(adata, library_key=slide)
    start = time.perf_counter()
    sfm.pp.regions(adata, use_rep=None, library_key=slide, key_added="tissue_region", n_levels=3)
    seconds = time.perf_counter() - start
    for level in adata.uns["tissue_region"]["levels"]:
        counts = adata.obs[level].value_counts()
        row = f"{path.stem:30.30}{level[-1]:>3}{len(counts):7d}{counts.min():6d}{counts.mean():7.0f}{counts.max():6d}"
        if len(named.get("niche", [])):
            known = (adata.obs[named["niche"][0]].notna() & adata.obs[level].notna()).to_numpy()
            truth = adata.obs[named["niche"][0]][known].astype(str)
            here = adata.obs[level][known].astype(str)
            k = min(here.nunique(), len(adata))
            xy = adata.obsm["spatial"][known]
            place = KMeans(k, n_init=1, random_state=0).fit_predict(xy)
            for score in (adjusted_rand_score, normalized_mutual_info_score, homogeneity_score):
                row += f"{score(truth, here):7.2f} ({score(truth, place):.2f})"
        print(row + f"{seconds:8.2f}", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="with .h5ad files")
    parser.add_argument("--n-cells", type=int, nargs="*", default=[5_000, 20_000, 80_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sfm.settings.verbosity, sfm.settings.progress = 1, False
    if args.worker:
        one_size(args.n_cells[0], args.repeats)
        return
    if args.n_cells:
        print(f"{'cells':>8}{'s':>9}{'+ MiB':>9}{'regions':>9}{'min':>6}{'mean':>6}{'max':>6}", flush=True)
    for n in args.n_cells:
        command = [sys.executable, __file__, "--worker", "--n-cells", str(n), "--repeats", str(args.repeats)]
        subprocess.run(command, check=True)
    paths = sorted(args.folder.glob("*.h5ad")) if args.folder else []
    if paths:
        scores = "".join(f"{name:>14}" for name in ("ARI", "NMI", "homogeneity"))
        print(f"{'file':30}{'lvl':>3}{'regions':>7}{'min':>6}{'mean':>7}{'max':>6}{scores}{'s':>8}", flush=True)
    for path in paths:
        agreement(path)


if __name__ == "__main__":
    main()
