"""`spatialfm.tl.ligand_receptor` beside `squidpy.gr.ligrec`: agreement, speed, repeatability, and calibration.

Repeatability is that between two animals, calibration the false positives of the local null hypothesis. Takes a folder
of .h5ad files, and reads those in its subfolder ``pretrain`` too. Types are the first column of ``uns["eval"]``,
otherwise Leiden groups of the expression; regions are the second column. Both methods get the same pairs, in the names
of the file, and the same (largest) number of permutations; squidpy gets the pairs without complexes.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy.stats import spearmanr

import spatialfm as sfm
from spatialfm._data._expression import log_normalize, value_kind

KEYS = ["ligand", "receptor", "source", "target"]


def read(path: Path, max_cells: int) -> tuple[ad.AnnData, str, str | None, str | None]:
    """Read a file with a tissue graph, logged values in ``X``, its columns of types, slides, and regions."""
    import scanpy as sc

    adata = ad.read_h5ad(path)
    named = adata.uns.get("eval", {})
    slide = str(named.get("slide", "")) or None
    if adata.n_obs > max_cells:
        xy = np.asarray(adata.obsm["spatial"], float)
        near = np.argsort(np.abs(xy - np.median(xy, axis=0)).max(axis=1), kind="stable")[:max_cells]
        adata = adata[np.sort(near)].copy()
    adata.X = log_normalize(adata.X, value_kind(adata.X))
    labels = [*named.get("cell", []), *named.get("niche", [])]
    region = str(labels[1]) if len(labels) > 1 else None
    for label in labels[:2]:
        adata.obs[label] = pd.Categorical(adata.obs[label].astype(object).fillna("none").astype(str))
    if labels:
        column = labels[0]
    else:
        column = "leiden"
        sc.pp.pca(adata)
        sc.pp.neighbors(adata)
        sc.tl.leiden(adata, flavor="igraph", n_iterations=2, directed=False)
    sfm.pp.spatial_neighbors(adata, library_key=slide)
    return adata, column, slide, region


def ours(adata: ad.AnnData, column: str, slide: str | None, n: int, **kwargs: object) -> tuple[pd.DataFrame, float]:
    """Table by test, and seconds."""
    start = time.perf_counter()
    sfm.tl.ligand_receptor(adata, column, library_key=slide, n_permutations=n, **kwargs)
    seconds = time.perf_counter() - start
    table = adata.uns["ligand_receptor"]["table"]
    return table.astype(dict.fromkeys(KEYS, str)).set_index(KEYS), seconds


def squidpys(adata: ad.AnnData, column: str, pairs: pd.DataFrame, n: int) -> tuple[pd.DataFrame, float]:
    """Means and p-values by test, and seconds."""
    import squidpy as sq

    interactions = pairs.rename(columns={"ligand": "source", "receptor": "target"})
    start = time.perf_counter()
    found = sq.gr.ligrec(
        adata, column, interactions=interactions, n_perms=n, use_raw=False, copy=True, threshold=0.1, seed=0,
        show_progress_bar=False,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    columns = {name: found[name].stack([0, 1], future_stack=True) for name in ("means", "pvalues")}
    table = pd.DataFrame(columns)
    # squidpy writes all names in capitals.
    names = {name.upper(): name for name in adata.var_names}
    table = table.rename_axis(KEYS).reset_index()
    table[KEYS[:2]] = table[KEYS[:2]].astype(str).apply(lambda column: column.map(names))
    return table.astype(dict.fromkeys(KEYS, str)).set_index(KEYS).dropna(), seconds


def shuffled(adata: ad.AnnData, column: str, slide: str | None, seed: int) -> ad.AnnData:
    """Profiles permuted within type and slide."""
    rng = np.random.default_rng(seed)
    groups = adata.obs.groupby([column, slide] if slide else column, observed=True).indices
    order = np.arange(adata.n_obs)
    for rows in groups.values():
        order[rows] = rng.permutation(rows)
    other = adata.copy()
    other.X = adata.X[order]
    return other


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="with .h5ad files")
    parser.add_argument("--files", nargs="*", help="names without .h5ad; all by default")
    parser.add_argument("--n-permutations", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3, help="of the time of each method")
    parser.add_argument("--max-cells", type=int, default=20_000)
    parser.add_argument(
        "--models", nargs="*", default=["heist-niche"], help="whose embedding scores to compare between animals"
    )
    args = parser.parse_args()
    sfm.settings.verbosity, sfm.settings.progress = 0, False
    warnings.simplefilter("ignore")
    n = args.n_permutations
    paths = sorted([*args.folder.glob("*.h5ad"), *(args.folder / "pretrain").glob("*.h5ad")])
    paths = [path for path in paths if not args.files or path.stem in args.files]
    print(
        "| file | types | cells | pairs | tests | fdr_specific | fdr_local | by region | null check | rho | jaccard "
        "| s | squidpy s | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    halves: tuple[ad.AnnData, str, str, str | None, pd.DataFrame] | None = None
    for path in paths:
        adata, column, slide, region = read(path, args.max_cells)
        try:
            ours(adata, column, slide, 2)  # compiles
        except ValueError as error:
            print(f"| {path.stem} | {column} | {adata.n_obs} | {str(error)[:60]}... |")
            continue
        table, _ = ours(adata, column, slide, n)
        single = table.reset_index()[["ligand", "receptor"]].drop_duplicates()
        names = dict(zip(adata.var_names.str.upper(), adata.var_names, strict=True))
        single = single[~single["ligand"].str.contains("_") & ~single["receptor"].str.contains("_")]
        single = single[single["ligand"].str.upper().isin(names) & single["receptor"].str.upper().isin(names)]
        squidpys(adata, column, single, 2)
        timed = [(ours(adata, column, slide, n)[1], squidpys(adata, column, single, n)) for _ in range(args.repeats)]
        theirs = timed[0][1][0]
        seconds, their_seconds = (float(np.median(v)) for v in zip(*((s, found[1]) for s, found in timed), strict=True))
        ratio = float(np.median([found[1] / s for s, found in timed]))
        both = table.join(theirs, how="inner")
        a, b = both["p_specific"] <= 0.01, both["pvalues"] <= 0.01
        rho = spearmanr(both["score"], both["means"])[0]
        null = [
            ours(shuffled(adata, column, slide, seed), column, slide, min(n, 200))[0]["p_local"] for seed in range(10)
        ]
        by_region = "no regions"
        if region is not None:
            inside, _ = ours(adata, column, slide, n, region_key=region)
            by_region = f"{(inside['fdr_local'] <= 0.05).sum()}"
        print(
            f"| {path.stem} | {table.reset_index()['source'].nunique()} {column} | {adata.n_obs} "
            f"| {adata.uns['ligand_receptor']['n_pairs']} | {len(table)} | {(table['fdr_specific'] <= 0.05).sum()} "
            f"| {(table['fdr_local'] <= 0.05).sum()} | {by_region} | {np.mean([(p <= 0.05).mean() for p in null]):.3f} "
            f"| {rho:.3f} "
            f"| {(a & b).sum() / max((a | b).sum(), 1):.2f} | {seconds:.2f} | {their_seconds:.2f} | {ratio:.2f} |",
            flush=True,
        )
        if slide is not None and adata.obs[slide].nunique() == 2:
            halves = adata, column, slide, region, single
    if halves is None:
        return
    adata, column, slide, region, single = halves
    print("\nSpearman between the two slides, over the tests that both have\n\n| what | tests | rho |\n|---|---|---|")
    parts = [adata[adata.obs[slide] == name].copy() for name in adata.obs[slide].unique()]
    for part in parts:
        sfm.pp.spatial_neighbors(part)
    tables = [ours(part, column, None, n)[0] for part in parts]
    joined = tables[0].join(tables[1], how="inner", lsuffix="_1", rsuffix="_2")
    their = [squidpys(part, column, single, n)[0] for part in parts]
    their_joined = their[0].join(their[1], how="inner", lsuffix="_1", rsuffix="_2")
    same = joined.join(their_joined, how="inner")
    for name in ("score", "z_specific", "z_local", "means", "pvalues", "p_specific"):
        rho = spearmanr(same[f"{name}_1"], same[f"{name}_2"])[0]
        print(f"| {name}, tests of both methods | {len(same)} | {rho:.3f} |", flush=True)
    for model in args.models:
        scored = [ours(part, column, None, 1, model=model)[0]["embedding_score"] for part in parts]
        pair = pd.concat(scored, axis=1, join="inner").dropna()
        plain = spearmanr(joined.loc[pair.index, "score_1"], joined.loc[pair.index, "score_2"])[0]
        rho = spearmanr(*pair.to_numpy().T)[0]
        print(
            f"| embedding_score of {model} (score on the same tests: {plain:.3f}) | {len(pair)} | {rho:.3f} |",
            flush=True,
        )
    for key in [None, region] if region else [None]:
        if key:
            tables = [ours(part, column, None, n, region_key=key)[0] for part in parts]
            joined = tables[0].join(tables[1], how="inner", lsuffix="_1", rsuffix="_2")
            rho = spearmanr(joined["z_local_1"], joined["z_local_2"])[0]
            print(f"| z_local by {key} | {len(joined)} | {rho:.3f} |\n")
        small = joined[["p_local_1", "p_local_2"]] <= 0.05
        print(
            f"p_local <= 0.05{f' by {key}' if key else ''} in either slide: {small.iloc[:, 0].mean():.3f}, "
            f"{small.iloc[:, 1].mean():.3f}; in both {small.all(axis=1).mean():.3f}, "
            f"by chance {small.mean().prod():.3f}\n"
        )


if __name__ == "__main__":
    main()
