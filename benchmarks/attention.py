"""What attention says beyond adjacency.

Type-to-type enrichment of attention beside that of plain neighbours, and gene attention beside mutual information. Two
halves of the data (two mice, or the left and the right half of a section) are treated as conditions: what is real in
one should be found in the other.
"""

from __future__ import annotations

import argparse
import time
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import scipy.sparse as sp
from scipy.stats import spearmanr

import spatialfm as sfm

if TYPE_CHECKING:
    from collections.abc import Callable

# File, column of types, column of slides.
FILES = {"merfish_mouse_brain": ("celltype", "mouse_id"), "codex_mouse_spleen": ("cell_type", "half")}
MIN_CELLS, MIN_SHARE = 50, 0.01


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, over the finite."""
    known = np.isfinite(a) & np.isfinite(b)
    return float(spearmanr(a[known], b[known]).statistic)


def types(adata: ad.AnnData) -> dict[str, float]:
    """Enrichment by attention and by plain neighbours, in each half and between them."""
    table = sfm.get.attention_df(adata)
    table["counts"] = np.log2(table["neighbors"] / table["expected"])
    frequent = (table["n_cells"] >= MIN_CELLS) & (table["neighbors"] >= MIN_SHARE)
    table = table[frequent]
    halves = table.pivot(
        index=["cell_type", "neighbor_type"],
        columns="condition",
        values=["log2_enrichment", "counts", "log2_over_neighbors"],
    )
    halves = halves.dropna()
    row: dict[str, float] = {
        "pairs": len(halves),
        "r(attention, counts)": correlation(table["log2_enrichment"].to_numpy(), table["counts"].to_numpy()),
        "sd log2 attention/expected": float(table["log2_enrichment"].std()),
        "sd log2 attention/neighbours": float(table["log2_over_neighbors"].std()),
    }
    for name in ("log2_enrichment", "counts", "log2_over_neighbors"):
        one, other = halves[name].to_numpy().T
        row[f"between halves: {name}"] = correlation(one, other)
    return row


def genes(adata: ad.AnnData) -> dict[str, float]:
    """Means over groups; each edge's attention is the mean of its two directions."""
    attention, networks = adata.uns["attention"]["genes"]["groups"], adata.uns["grn"]["groups"]
    to_mi, to_degree, spread = [], [], []
    for k, network in networks.items():
        if not network.nnz:
            continue
        degree = np.maximum(network.getnnz(axis=1), 1)
        edges = sp.triu(network, k=1).tocoo()
        i, j = edges.row, edges.col
        weights = attention[k].toarray()
        both = (weights[i, j] + weights[j, i]) / 2
        equal = (1 / degree[i] + 1 / degree[j]) / 2
        to_mi.append(correlation(both / equal, edges.data))
        to_degree.append(correlation(both, equal))
        spread.append(np.std(np.log2(np.concatenate([weights[i, j] * degree[i], weights[j, i] * degree[j]]))))
    return {
        "groups": len(to_mi),
        "r(gene attention / uniform, mutual information)": float(np.mean(to_mi)),
        "r(gene attention, uniform)": float(np.mean(to_degree)),
        "sd log2 gene attention/uniform": float(np.mean(spread)),
    }


def seconds(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Time calls by turns: medians of CPU and wall seconds, and of the ratio of the second call to the first."""
    took = np.empty((repeats, len(calls), 2))
    for turn in took:
        for row, call in zip(turn, calls.values(), strict=True):
            start = np.array([time.process_time(), time.perf_counter()])
            call()
            row[:] = np.array([time.process_time(), time.perf_counter()]) - start
    names, clocks = list(calls), ("s of all cores", "s")
    rows = {
        f"{name}, {clock}": float(np.median(took[:, i, c]))
        for i, name in enumerate(names)
        for c, clock in enumerate(clocks)
    }
    ratio = np.median(took[:, 1] / took[:, 0], axis=0)
    return rows | {f"{names[1]} / {names[0]}, {clock}": float(r) for clock, r in zip(clocks, ratio, strict=True)}


def main() -> None:
    """Print one table a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="with the .h5ad files")
    parser.add_argument("--file", nargs="*", default=list(FILES), choices=list(FILES))
    parser.add_argument("--max-cells", type=int, default=1_000_000, help="those nearest to the middle of the tissue")
    parser.add_argument("--model", default="heist")
    parser.add_argument("--repeats", type=int, default=1, help="of the times of tl.embed and tl.attention, by turns")
    args = parser.parse_args()
    sfm.settings.verbosity, sfm.settings.progress = 0, False
    warnings.simplefilter("ignore")
    for name in args.file:
        adata = ad.read_h5ad(args.folder / f"{name}.h5ad")
        groupby, slides = FILES[name]
        xy = np.asarray(adata.obsm["spatial"], dtype=np.float64)
        order = np.argsort(np.abs(xy - np.median(xy, axis=0)).max(axis=1), kind="stable")
        adata, xy = adata[order[: args.max_cells]].copy(), xy[order[: args.max_cells]]
        if slides == "half":
            x = xy[:, 0]
            adata.obs["half"] = np.where(x < np.median(x), "left", "right")
        adata = adata[adata.obs[groupby].notna().to_numpy()].copy()
        start = time.perf_counter()
        sfm.pp.spatial_neighbors(adata, library_key=slides)
        sfm.pp.grn(adata, library_key=slides)
        graphs = time.perf_counter() - start
        sfm.tl.attention(adata[:300].copy(), args.model)  # compiles
        one = {"groupby": groupby, "condition_key": slides}
        calls: dict[str, Callable[[], object]] = {
            "tl.embed": partial(sfm.tl.embed, adata, args.model, library_key=slides),
            "tl.attention": partial(sfm.tl.attention, adata, args.model, library_key=slides, **one),
        }
        rows: dict[str, float] = {"cells": adata.n_obs, "graphs, s": graphs} | seconds(calls, args.repeats)
        rows |= (
            {k.replace("_", " "): v for k, v in adata.uns["attention"]["cells"].items()} | types(adata) | genes(adata)
        )
        print(f"\n{name}\n" + "\n".join(f"{k:50} {v:10.4g}" for k, v in rows.items()), flush=True)


if __name__ == "__main__":
    main()
