"""Where housekeeping genes stand among a spot's top genes, before TF-IDF (log-normalised values) and after it.

    python benchmarks/tfidf_keywords.py visium.h5ad --groupby layer

For mitochondrial, ribosomal and a list of other ubiquitous genes (human and mouse symbols, in ``var_names`` or in the
column --symbols of ``var``): their share of each spot's top genes and of its squared length, the median rank of those
present in the spot, mean over spots. The two are the same but for the factor idf; ``linear`` is the textbook's term
frequency. With --groupby also how many of the first 10 genes of each group they are: by the mean in the group, and by
its excess over the mean of other spots (the score of ``sfm.get.keywords_df``).
"""

from __future__ import annotations

import argparse
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

import spatialfm as sfm
from spatialfm._data._expression import log_normalize
from spatialfm.pp._tfidf import term_frequencies

OTHER = (
    "ACTB ACTG1 B2M CALM1 CALM2 EEF1A1 EEF1B2 EEF1G EEF2 EIF1 FAU FTH1 FTL FTL1 GAPDH HSP90AB1 HSPA8 MALAT1 PPIA "
    "PTMA TMSB10 TMSB4X TPT1 TUBA1B UBA52 UBB UBC"
)


def families(symbols: pd.Index) -> dict[str, np.ndarray]:
    """Columns of each family."""
    names = symbols.astype(str).str.upper()
    found = {
        "mitochondrial": names.str.startswith("MT-"),
        "ribosomal": names.str.match(r"RP[LS]\d+[AXYL]?\d*$|RPLP\d$|RPSA$"),
        "other ubiquitous": names.isin(OTHER.split()),
    }
    return {"all three": np.any(list(found.values()), axis=0)} | {k: np.asarray(v) for k, v in found.items()}


def standing(x: sp.csr_matrix, kinds: dict[str, np.ndarray], top: int) -> pd.DataFrame:
    """Share of the top genes, share of the squared length, and median rank of each family; means over spots."""
    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in kinds}
    for s, e in zip(x.indptr[:-1], x.indptr[1:], strict=True):
        if e - s < top:
            continue
        order = np.argsort(-x.data[s:e], kind="stable")
        genes, squared = x.indices[s:e][order], x.data[s:e][order].astype(float) ** 2
        for name, member in kinds.items():
            inside = member[genes]
            rank = float(np.median(np.flatnonzero(inside)) + 1) if inside.any() else np.nan
            rows[name].append((inside[:top].mean(), squared[inside].sum() / squared.sum(), rank))
    means = {name: np.nanmean(np.array(v), axis=0) for name, v in rows.items() if kinds[name].any()}
    return pd.DataFrame(means, index=["top", "length", "rank"]).T


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help=".h5ad with spots by genes")
    parser.add_argument("--symbols", help="column of var with gene symbols; var_names by default")
    parser.add_argument("--groupby", help="column of obs")
    parser.add_argument("--top", type=int, default=50)
    args = parser.parse_args()
    sfm.settings.verbosity = 1
    adata = ad.read_h5ad(args.file)
    if args.groupby:
        adata = adata[adata.obs[args.groupby].notna()].copy()
    kinds = families(pd.Index(adata.var[args.symbols]) if args.symbols else adata.var_names)
    sfm.pp.tfidf(adata)
    sfm.pp.tfidf(adata, tf="linear", key_added="linear")
    values: Any = term_frequencies(adata.X, adata.uns["tfidf"]["values"], "linear")
    adata.layers["log-normalised"] = log_normalize(values, "counts")
    print(f"{adata.n_obs:,} spots, {adata.n_vars:,} genes, {', '.join(f'{m.sum()} {n}' for n, m in kinds.items())}")
    print(f"\n{'':18}{f'share of the top {args.top}':>36}{'share of squared length':>36}{'median rank':>36}")
    print(f"{'':18}" + f"{'log-norm.':>12}{'TF-IDF':>12}{'linear':>12}" * 3)
    tables = [standing(adata.layers[name], kinds, args.top) for name in ("log-normalised", "tfidf", "linear")]
    for name in tables[0].index:
        cells = [f"{t.loc[name, c]:>12.{1 if c == 'rank' else 3}f}" for c in ("top", "length", "rank") for t in tables]
        print(f"{name:18}" + "".join(cells))
    if args.groupby:
        names = ["log-norm.", "TF-IDF", "linear"] * 2
        print(f"\n{'':31}{'first 10 by mean in the group':>36}{'first 10 by excess over the rest':>36}")
        print(f"{'group':24}{'spots':>7}" + "".join(f"{n:>12}" for n in names) + "  first keywords by TF-IDF")
        keys = ("log-normalised", "tfidf", "linear")
        excess = [sfm.get.keywords_df(adata, args.groupby, key=key) for key in keys]
        ours = set(adata.var_names[kinds["all three"]])
        for group in excess[0]["group"].cat.categories:
            inside = (adata.obs[args.groupby].astype(str) == group).to_numpy()
            means = [np.asarray(adata.layers[key][inside].mean(axis=0)).ravel() for key in keys]
            counts = [int(kinds["all three"][np.argsort(-m, kind="stable")[:10]].sum()) for m in means]
            genes = [list(t.loc[t["group"] == group, "gene"]) for t in excess]
            counts += [len(ours.intersection(g)) for g in genes]
            print(f"{group:24}{inside.sum():>7}" + "".join(f"{c:>12}" for c in counts) + f"  {' '.join(genes[1][:5])}")


if __name__ == "__main__":
    main()
