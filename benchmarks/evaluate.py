"""`spatialfm.tl.evaluate` of the same embeddings by random cells, by blocks and by slides.

Takes a folder of .h5ad files with labels named in ``uns["eval"]``. One row for each file, column of labels and
embedding: macro F1 by random cells; by blocks of tissue with its 95 % interval (also where there are several slides);
by whole slides, where there are several; the differences by blocks to the best baseline and to the embeddings named
after it, paired over the blocks, with intervals; and the time of the call by blocks, with all embeddings and
baselines. Embeddings of the default model are computed first.

With ``--agreement``, macro F1 by blocks and slides beside that of scikit-learn's pipeline in float64 on the same folds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import anndata as ad
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import spatialfm as sfm
from spatialfm._data._embeddings import get_embedding, rep_name
from spatialfm._data._splits import group_folds, spatial_blocks

NOT_LABELS = ["", "nan", "NA", "unknown", "undetermined"]


def overall(adata: ad.AnnData) -> dict[str, tuple[float, float, float]]:
    """Macro F1 of each embedding with its interval."""
    table = sfm.get.evaluation_df(adata)
    table = table[table["metric"] == "macro_f1"]
    return {row.embedding: (row.value, row.low, row.high) for row in table.itertuples()}


def compare_splits(
    name: str,
    adata: ad.AnnData,
    column: str,
    slide: str | None,
    reps: list[str | tuple[str, ...]],
    max_cells: int | None,
) -> None:
    """Print the rows of one column of labels; beyond ``max_cells`` labelled cells, of a random sample."""
    labelled = np.flatnonzero(adata.obs[column].notna())
    if max_cells is not None and len(labelled) > max_cells:
        chosen = np.random.default_rng(0).choice(labelled, max_cells, replace=False)
        adata.obs[column] = adata.obs[column].where(np.isin(np.arange(adata.n_obs), chosen))
    found, names = {}, [rep_name(rep) for rep in reps]
    for split in ("random", "blocks", "slides"):
        if split == "slides" and slide is None:
            continue
        start = time.perf_counter()
        sfm.tl.evaluate(adata, column, use_rep=reps, split=split, library_key=slide)
        seconds = time.perf_counter() - start
        found[split] = overall(adata)
        if split == "blocks":
            took, labels = seconds, adata.uns["evaluation"]["labels"]
            best = max((name for name in found["blocks"] if name not in names), key=lambda name: found["blocks"][name])
            gain = dict.fromkeys(found["blocks"], "")
            for r in sfm.get.evaluation_df(adata, differences=True).query("metric == 'macro_f1'").itertuples():
                if r.reference in (best, *names):
                    gain[r.embedding] += f"{r.reference} {r.difference:+.3f} ({r.low:+.3f} to {r.high:+.3f}); "
    for rep, (value, low, high) in found["blocks"].items():
        random = found["random"][rep][0]
        slides = f"{found['slides'][rep][0]:.3f}" if "slides" in found else ""
        print(
            f"| {name} | {column} ({len(labels)}) | {rep} | {random:.3f} | {value:.3f} ({low:.3f} to {high:.3f}) "
            f"| {random - value:+.3f} | {slides} | {gain[rep].removesuffix('; ')} | {took:.0f} |",
            flush=True,
        )


def agreement(name: str, adata: ad.AnnData, column: str, slide: str | None, reps: list[str | tuple[str, ...]]) -> None:
    """Print macro F1 here and by a plain pipeline."""
    y = adata.obs[column].astype(object).to_numpy()
    counts = adata.obs[column].value_counts()
    rows = np.flatnonzero(adata.obs[column].isin(counts.index[counts >= 20]))
    codes = adata.obs[slide].astype("category").cat.codes.to_numpy() if slide else np.zeros(adata.n_obs, int)
    groups = codes[rows] if slide else spatial_blocks(np.asarray(adata.obsm["spatial"])[rows], codes[rows])
    folds = PredefinedSplit(group_folds(groups.astype(np.int64), min(4, len(np.unique(groups)))))
    sfm.tl.evaluate(adata, column, use_rep=reps, library_key=slide, baselines=[], n_bootstrap=1)
    for rep, (value, _, _) in zip(reps, overall(adata).values(), strict=True):
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=400))
        theirs = cross_val_predict(
            probe, get_embedding(adata, rep)[rows].astype(np.float64), y[rows].astype(str), cv=folds
        )
        score = f1_score(y[rows].astype(str), theirs, average="macro")
        print(f"| {name} | {column} | {rep_name(rep)} | {value:.4f} | {score:.4f} | {value - score:+.4f} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with labelled .h5ad files")
    parser.add_argument("--file", action="append", help="only files of this name, without .h5ad")
    parser.add_argument(
        "--use-rep", nargs="+", default=["X_niche+X_state"], help="keys of obsm; + puts two side by side"
    )
    parser.add_argument("--max-cells", type=int, default=20_000, help="cells to test and train on; 0 for all")
    parser.add_argument("--agreement", action="store_true")
    args = parser.parse_args()
    args.use_rep = [tuple(name.split("+")) if "+" in name else name for name in args.use_rep]
    sfm.settings.verbosity, sfm.settings.progress = 0, False
    if args.agreement:
        print("| file | labels | embedding | here | scikit-learn | difference |\n|---|---|---|---|---|---|")
    else:
        print(
            "| file | labels | embedding | random cells | blocks (95 %) | difference | slides "
            "| blocks, less the best baseline and the embeddings below (95 %) | s |\n"
            "|---|---|---|---|---|---|---|---|---|"
        )
    for path in sorted(args.folder.glob("*.h5ad")):
        if args.file and path.stem not in args.file:
            continue
        adata = ad.read_h5ad(path)
        named = adata.uns.get("eval", {})
        slide = str(named.get("slide", "")) or None
        if "X_niche" not in adata.obsm:
            sfm.tl.embed(adata, library_key=slide)
        for column in [*named.get("niche", []), *named.get("cell", [])]:
            adata.obs[column] = adata.obs[column].astype(object).where(~adata.obs[column].isin(NOT_LABELS))
            if args.agreement:
                agreement(path.stem, adata, str(column), slide, args.use_rep)
            else:
                compare_splits(path.stem, adata, str(column), slide, args.use_rep, args.max_cells or None)


if __name__ == "__main__":
    main()
