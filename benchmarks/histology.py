"""Time and peak memory of computations on H&E.

    python benchmarks/histology.py SPOTS.h5ad IMAGE.jpg --spot-distance-um 200

Spots are repeated, moved by at most half the distance between neighbours, until there are ``--spots`` of them: as many
different patches of the tissue. Each step runs from the image file to its result in a process of its own, which
includes opening the image and loading weights, not imports. Memory is the peak of the process; how much of that it held
before the step, with its libraries and the table, stands beside it.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import torch
from scipy.spatial import cKDTree

import spatialfm as sfm
from spatialfm.models import load_tower  # noqa: F401 (imports are not timed)

if TYPE_CHECKING:
    from collections.abc import Callable


def patches(adata: ad.AnnData, image: str, um_per_px: float) -> None:
    """Cut every patch, and keep none."""
    for _ in sfm.pp.patches(adata, image, um_per_px=um_per_px).batches(16):
        pass


def image_features(adata: ad.AnnData, image: str, um_per_px: float) -> None:
    """Patches through the built-in tower, with their stain."""
    sfm.tl.image_features(adata, sfm.pp.patches(adata, image, um_per_px=um_per_px), device="cpu")


def embed(adata: ad.AnnData, image: str, um_per_px: float) -> None:
    """All of it: patches, features, and the embedding of histology and expression."""
    sfm.tl.embed(adata, "hibio", image=sfm.pp.patches(adata, image, um_per_px=um_per_px), device="cpu")


STEPS: dict[str, Callable[[ad.AnnData, str, float], None]] = {
    "patches": patches,
    "image features": image_features,
    "embedding": embed,
}


def read(path: str, n: int, spot_distance_um: float) -> tuple[ad.AnnData, float]:
    """Read `n` spots, and µm a pixel."""
    adata = ad.read_h5ad(path)
    xy = np.asarray(adata.obsm["spatial"], float)[:, :2]
    apart = float(np.median(cKDTree(xy).query(xy, k=2)[0][:, 1]))
    rows = np.arange(n) % adata.n_obs
    many = adata[rows].copy()
    many.obs_names = [f"s{i}" for i in range(n)]
    moved = np.random.default_rng(0).uniform(-apart / 2, apart / 2, (n, 2))
    moved[: adata.n_obs] = 0
    many.obsm["spatial"] = np.clip(xy[rows] + moved, xy.min(axis=0), xy.max(axis=0))
    return many, spot_distance_um / apart


def peak() -> float:
    """Largest memory of this process so far in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print medians of repeats that alternate between the steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", help=".h5ad with the coordinates of the spots in obsm['spatial']")
    parser.add_argument("image", help="the image they are pixels of")
    parser.add_argument("--spot-distance-um", type=float, default=100, help="µm between spots; default: %(default)s")
    parser.add_argument("--spots", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--step", choices=list(STEPS), help="run this one here, and print its seconds and memory alone")
    args = parser.parse_args()
    if args.step:
        torch.set_num_threads(args.threads)
        sfm.settings.progress, sfm.settings.verbosity = False, 1
        adata, um_per_px = read(args.file, args.spots, args.spot_distance_um)
        before = peak()
        start = time.perf_counter()
        STEPS[args.step](adata, args.image, um_per_px)
        print(time.perf_counter() - start, before, peak())
        return
    measured: dict[str, list[list[float]]] = {step: [] for step in STEPS}
    for _ in range(args.repeats):
        for step, rows in measured.items():
            command = [sys.executable, *sys.argv, "--step", step]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows.append([float(value) for value in output.split()])
    first = np.array(measured[next(iter(STEPS))])[:, 0]
    print(f"{args.spots} spots, {args.threads} threads, {args.repeats} repeats")
    print(f"{'':20}{'s':>9}{'s / 1,000 spots':>18}{'/ ' + next(iter(STEPS)):>12}{'MB before':>12}{'peak MB':>10}")
    for step, rows in measured.items():
        seconds, before, after = np.array(rows).T
        print(
            f"{step:20}{np.median(seconds):9.1f}{np.median(seconds) / args.spots * 1000:18.1f}"
            f"{np.median(seconds / first):12.1f}{np.median(before):12.0f}{np.median(after):10.0f}"
        )


if __name__ == "__main__":
    main()
