"""Imputation of hidden genes: `spatialfm.tl.impute` by both methods, beside the nearest measured cells and the mean.

    python benchmarks/impute.py FOLDER

Cells of held-out spatial blocks lack the gene, and so do their surroundings within the block; at most a fifth of the
panel is hidden at once. Reported are means over genes of the correlation of predicted and measured, and of the skill (1
minus squared error over that of the gene's mean, whose correlation and skill are 0), and the share of genes where the
correlation is above that of smoothing. Of wider panels, the genes of largest mean are imputed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import anndata as ad
import numpy as np

import spatialfm as sfm

FILES = [
    *("merfish_mouse_brain.h5ad", "merfish_mouse_ileum.h5ad", "codex_mouse_spleen.h5ad", "cosmx_human_lung.h5ad"),
    "visium_human_dlpfc_151673.h5ad",
]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with .h5ad files")
    parser.add_argument("--files", nargs="*", default=FILES)
    parser.add_argument("--genes", type=int, default=200, help="to impute, at most")
    args = parser.parse_args()
    sfm.settings.verbosity, sfm.settings.progress = 0, False

    print("| file | cells | genes imputed | method | correlation | skill | above smoothing | wall s | CPU s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in args.files:
        adata = ad.read_h5ad(args.folder / name)
        slide = adata.uns.get("eval", {}).get("slide") or None
        top = np.argsort(-np.asarray(adata.X.mean(axis=0)).ravel(), kind="stable")[: args.genes]
        for method in ("zero_shot", "fine_tune"):
            wall, cpu = time.perf_counter(), time.process_time()
            sfm.tl.impute(adata, list(adata.var_names[top]), method=method, library_key=slide)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            table = sfm.get.imputation_df(adata).fillna({"correlation": 0, "correlation_smoothing": 0})
            mean = table.mean(numeric_only=True)
            if method == "zero_shot":
                row = f"| {name} | {adata.n_obs} | {len(table)} |"
                print(
                    row, f"nearest cells | {mean['correlation_smoothing']:.3f} | {mean['skill_smoothing']:.3f} | | | |"
                )
            share = table["better"].mean()
            print(
                row,
                f"{method} | {mean['correlation']:.3f} | {mean['skill']:.3f} | {share:.0%} | {wall:.1f} | {cpu:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
