"""Regions from ten labelled spots each, by `spatialfm.tl.annotate_regions`: macro F1 over the other spots.

    python benchmarks/few_shot.py FOLDER --files a.h5ad b.h5ad

The spots to label are drawn at random, the same draws for every embedding. Labels are those of the column named in
``uns["eval"]["niche"]``; labels of fewer than 20 spots and undetermined ones are left out. Each row has the mean and
its standard error over the draws, and the difference to principal components on the same draws. ``estimate`` is that of
``annotate_regions`` from the labelled spots alone, mean and mean absolute error; ``--refine`` averages probabilities
over neighbours.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
from _baselines import add_baselines
from _scores import labelled
from sklearn.metrics import f1_score

import spatialfm as sfm

# What to run, and the keys it writes. The first key is what the others are compared with.
EMBEDDINGS: list[tuple[Callable[[ad.AnnData, str | None], object], list[str]]] = [
    (add_baselines, ["X_pca", "X_hop1", "X_hops", "X_smooth"]),
    (lambda adata, slide: sfm.tl.embed(adata, library_key=slide), ["X_niche", "X_state"]),
    (lambda adata, slide: sfm.tl.embed(adata, "hibio", library_key=slide), ["X_hibio", "X_hibio_gene"]),
]


def draws(truth: np.ndarray, scored: np.ndarray, n_spots: int, n_draws: int) -> list[np.ndarray]:
    """Labels with all but ``n_spots`` of each missing, one array a draw."""
    result = []
    for seed in range(n_draws):
        rng = np.random.default_rng(seed)
        few = np.full(len(truth), np.nan, object)
        for name in np.unique(truth[scored]):
            rows = rng.choice(np.flatnonzero(scored & (truth == name)), n_spots, replace=False)
            few[rows] = name
        result.append(few)
    return result


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with .h5ad files of labelled spots")
    parser.add_argument("--files", nargs="*", default=[f"legacy_st_human_her2_{s}.h5ad" for s in ("A1", "D1", "F1")])
    parser.add_argument("--key", action="append", default=[], help="one more key of obsm, in the file already")
    parser.add_argument("--spots", type=int, default=10, help="labelled spots of each label")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--refine", type=int, default=0)
    args = parser.parse_args()
    sfm.settings.verbosity, sfm.settings.progress = 1, False

    scores: dict[str, list[np.ndarray]] = {}
    for name in args.files:
        adata = ad.read_h5ad(args.folder / name)
        slide = str(adata.uns["eval"].get("slide", "")) or None
        for run, _ in EMBEDDINGS:
            run(adata, slide)
        column = adata.obs[adata.uns["eval"]["niche"][0]]
        truth, scored = column.astype(str).to_numpy(), np.zeros(adata.n_obs, bool)
        scored[labelled(column)] = True
        labels = draws(truth, scored, args.spots, args.draws)
        print(
            f"\n{Path(name).stem}: {', '.join(f'{n} {(truth[scored] == n).sum()}' for n in np.unique(truth[scored]))}"
        )
        print(f"{'':16}{'columns':>8}{'macro F1':>16}{'less PCA':>18}{'estimate':>16}")
        first = None
        for key in [*(key for _, keys in EMBEDDINGS for key in keys), *args.key]:
            f1, estimates = [], []
            for few in labels:
                adata.obs["few"] = few
                sfm.tl.annotate_regions(adata, "few", use_rep=key, refine=args.refine, library_key=slide)
                rest = scored & adata.obs["few"].isna().to_numpy()
                f1.append(f1_score(truth[rest], adata.obs["region_label"].astype(str)[rest], average="macro"))
                estimates.append(adata.uns["region_label"].get("cross_validation", {}).get("macro_f1", np.nan))
            f1 = np.array(f1)
            first = f1 if first is None else first
            error = np.abs(estimates - f1).mean()
            print(
                f"{key:16}{adata.obsm[key].shape[1]:8d}{mean_and_error(f1)}{mean_and_error(f1 - first, '+')}"
                f"{np.mean(estimates):8.3f} ±{error:.3f}",
                flush=True,
            )
            scores.setdefault(key, []).append(f1)
    print(f"\nmean of {len(args.files)} files\n{'':24}{'macro F1':>16}{'less PCA':>18}")
    means = {key: np.mean(values, axis=0) for key, values in scores.items()}
    pca = next(iter(means.values()))
    for key, values in means.items():
        print(f"{key:24}{mean_and_error(values)}{mean_and_error(values - pca, '+')}")


def mean_and_error(values: np.ndarray, sign: str = "") -> str:
    """Mean and standard error in a column of the table."""
    return f"{np.mean(values):{sign}9.3f} ±{np.std(values, ddof=1) / len(values) ** 0.5:.3f}"


if __name__ == "__main__":
    main()
