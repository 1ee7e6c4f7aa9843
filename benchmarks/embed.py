"""Embed every ``.h5ad`` of a folder with its own labels, unseen: seconds, cells a second and peak memory of each.

    python benchmarks/embed.py DATA OUT [--model heist-niche] [--fine-tune] [--pattern '*.h5ad']

With ``--fine-tune`` the model is first fine-tuned on the file (three minutes at most, no labels); the seconds are then
those of both.

Each file is embedded in a separate process, so that peak memory is that of one file, and written to OUT with the
embedding in ``obsm`` for scoring.
The column of slides is read from ``uns["eval"]["slide"]`` where a file declares one; labels are never read.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def one(path: Path, out: Path, model: Any, *, fine_tune: bool) -> None:
    """Embed one file and print its row."""
    import anndata as ad
    import numpy as np

    import spatialfm as sfm

    sfm.settings.progress = False
    sfm.settings.verbosity = 1
    adata = ad.read_h5ad(path)
    slide = str(adata.uns.get("eval", {}).get("slide", "")) or None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    start = time.perf_counter()
    sfm.pp.spatial_neighbors(adata, library_key=slide)
    graph = time.perf_counter() - start
    start = time.perf_counter()
    if fine_tune:
        model = sfm.tl.fine_tune(adata, model, library_key=slide)
    sfm.tl.embed(adata, model, library_key=slide, key_added="tuned" if fine_tune else None)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if not all(np.isfinite(adata.obsm[key]).all() for key in adata.uns["embeddings"]):
        msg = f"{path.name}: the embedding is not finite"
        raise ValueError(msg)
    adata.write_h5ad(out / path.name)
    groups = len(adata.uns["grn"]["names"]) if "grn" in adata.uns else 0
    print(
        f"{path.name:36} {adata.n_obs:7,} x {adata.n_vars:6,} {groups:6} {graph:8.1f} {seconds:8.1f} "
        f"{adata.n_obs / seconds:8.0f} {before:8.2f} {peak:8.2f}",
        flush=True,
    )


def main() -> None:
    """Embed all files, one process each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="heist-niche")
    parser.add_argument("--fine-tune", action="store_true", help="write X_tuned_niche and X_tuned_state")
    parser.add_argument("--pattern", default="*.h5ad")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.data.is_file():
        one(args.data, args.out, args.model, fine_tune=args.fine_tune)
        return
    print(
        f"{'file':36} {'cells x features':>16} {'groups':>6} {'graph s':>8} {'embed s':>8} {'cells/s':>8} "
        f"{'GiB read':>8} {'GiB peak':>8}",
        flush=True,
    )
    for path in sorted(args.data.glob(args.pattern)):
        options = ["--model", args.model, *(["--fine-tune"] if args.fine_tune else [])]
        subprocess.run([sys.executable, __file__, str(path), str(args.out), *options], check=True)


if __name__ == "__main__":
    main()
