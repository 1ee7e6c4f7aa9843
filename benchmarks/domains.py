"""Agreement of `spatialfm.tl.domains` with annotated domains (ARI), by method, before and after refinement.

Takes a folder of .h5ad files with coordinates in ``obsm["spatial"]``, whose ``uns["eval"]`` names a column of domains
(``niche``) and of slides (``slide``). The number of domains is that of the labels with at least 20 cells; Leiden
clustering finds its own. Embeddings named with ``--key`` that a file lacks are left out, except ``X_niche``, which is
computed. Files of more than ``--max-cells`` are cut to a square with that many cells.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from _scores import labelled
from sklearn.metrics import adjusted_rand_score

import spatialfm as sfm


def cut(adata: ad.AnnData, n: int) -> ad.AnnData:
    """Keep the `n` cells nearest to the middle, by the larger of the distances in x and y."""
    xy = np.asarray(adata.obsm["spatial"], float)
    distance = np.abs(xy - np.median(xy, axis=0)).max(axis=1)
    return adata[np.sort(np.argsort(distance, kind="stable")[:n])].copy()


def rows(path: Path, keys: list[str], methods: list[str], max_cells: int) -> list[dict[str, object]]:
    """Score one file."""
    adata = ad.read_h5ad(path)
    named = adata.uns.get("eval", {})
    if not len(named.get("niche", [])):
        return []
    slide = str(named.get("slide", "")) or None
    if "X_niche" in keys and "X_niche" not in adata.obsm:
        sfm.tl.embed(adata, library_key=slide)
    if adata.n_obs > max_cells:
        adata = cut(adata, max_cells)
    sfm.pp.spatial_neighbors(adata, library_key=slide)
    known = labelled(adata.obs[named["niche"][0]], None)
    truth = adata.obs[named["niche"][0]].astype(str).iloc[known]
    k = truth.nunique()
    found = []
    for key in [k for k in keys if k in adata.obsm]:
        for method in methods:
            row: dict[str, object] = {"file": path.stem, "key": key, "method": method, "labels": k}
            for refine in (0.0, 1.0):
                n = None if method == "leiden" else k
                start = time.perf_counter()
                sfm.tl.domains(adata, n, use_rep=key, method=method, refine=refine, library_key=slide)
                row["s"] = time.perf_counter() - start
                name = "refined" if refine else "plain"
                row[name] = adjusted_rand_score(truth, adata.obs["domain"].iloc[known])
            row["domains"] = adata.obs["domain"].nunique()
            found.append(row)
            print(
                f"{path.stem:28.28} {key:14.14} {method:8} {row['labels']:6d} {row['domains']:8d} {row['plain']:7.3f} "
                f"{row['refined']:8.3f} {row['s']:6.1f}",
                flush=True,
            )
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="with .h5ad files")
    parser.add_argument("--key", nargs="*", default=["X_pca", "X_hop1", "X_hops", "X_smooth", "X_niche"])
    parser.add_argument("--method", nargs="*", default=["mixture", "kmeans", "leiden"])
    parser.add_argument("--max-cells", type=int, default=20_000)
    args = parser.parse_args()
    sfm.settings.verbosity, sfm.settings.progress = 1, False
    warnings.simplefilter("ignore")
    print(
        f"{'file':28} {'key':14} {'method':8} {'labels':>6} {'domains':>8} {'plain':>7} {'refined':>8} {'s':>6}",
        flush=True,
    )
    found = [
        row for path in sorted(args.folder.glob("*.h5ad")) for row in rows(path, args.key, args.method, args.max_cells)
    ]
    table = pd.DataFrame(found).pivot_table(index="key", columns="method", values=["plain", "refined"], aggfunc="mean")
    print("\nmean over files\n" + table.swaplevel(axis=1).sort_index(axis=1).round(3).to_string())


if __name__ == "__main__":
    main()
