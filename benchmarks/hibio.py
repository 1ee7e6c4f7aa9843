"""HiBio on slides it was not trained on, beside baselines, and without each of its parts.

    python benchmarks/hibio.py FOLDER --cache CACHE [--tasks histology domains ablation] [--write MODEL_FOLDER]

FOLDER, or its subfolder ``histology``, holds the .h5ad files, and beside them the images that are not in ``uns``.
Features of the patches are computed once and kept in CACHE. Models are trained on her2 sections and Visium breast
samples. Every figure is of a slide that the model did not see: each her2 section and each breast sample is left out in
turn; no model sees the cortex. All her2 sections here are of one patient.

Expression: mean Pearson correlation over the 50 genes that vary most within the training slides of the same study. The
ridge on ImageNet features is trained on that study or on all slides, and its strength is the best of four on the test
slide: both in its favour. The mean of the training slides is a constant, of correlation 0. Retrieval: share of spots
whose partner is among the nearest tenth. Anchors: Spearman correlation of similarity and measured activity
(``pp.pathways``), mean over 50 Hallmark pathways. Domains: adjusted Rand index of k-means (mean of five seeds) and of a
mixture with one covariance (mean of three).
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch
from _baselines import add_baselines
from _scores import kmeans, labelled, mixtures
from scipy.stats import rankdata
from sklearn.metrics import adjusted_rand_score

import spatialfm as sfm
from spatialfm._data._expression import log_normalize, value_kind
from spatialfm._data._genes import match_genes
from spatialfm.models import HiBio, HiBioConfig
from spatialfm.train import pretrain

HER2 = [f"legacy_st_human_her2_C{i}" for i in range(2, 7)]
BREAST = ["visium_human_breast_0", "visium_human_breast_3"]
CORTEX = ["visium_human_dlpfc_151673", "visium_human_dlpfc_151674"]
FULL = HiBioConfig()
ABLATIONS = {
    "all of it": FULL,
    "without TF-IDF": replace(FULL, idf=False),
    "without anchors": replace(FULL, alignment=("spots", "regions")),
    "without regions": replace(FULL, alignment=("spots", "anchors"), region_weight=0.0),
    "spots alone": replace(FULL, alignment=("spots",), region_weight=0.0),
}


def read(folder: Path, cache: Path, name: str) -> ad.AnnData:
    """Read a slide with the features of its patches."""
    kept = cache / f"{name}.h5ad"
    if not kept.exists():
        path = next(p for p in (folder / f"{name}.h5ad", folder / "histology" / f"{name}.h5ad") if p.exists())
        adata = ad.read_h5ad(path)
        image = None
        if "spatial" not in adata.uns:
            # The first arrays, 200 µm from spot to spot.
            image = sfm.pp.patches(adata, path.with_suffix(".jpg"), spot_distance_um=200)
        sfm.tl.image_features(adata, image)
        adata.write_h5ad(kept)
    return ad.read_h5ad(kept)


def train(slides: dict[str, ad.AnnData], config: HiBioConfig, steps: int) -> HiBio:
    """Train on these slides; nothing else is held out."""
    return pretrain(slides, config=config, max_steps=steps, held_out=0.05, patience=steps)


def logged(adata: ad.AnnData, genes: list[str]) -> np.ndarray:
    """Return log-normalised expression of genes, less its mean."""
    x = log_normalize(adata.X, value_kind(adata.X))
    x = x[:, adata.var_names.get_indexer(genes)]
    x = np.asarray(x.toarray() if hasattr(x, "toarray") else x, np.float64)
    return x - x.mean(0)


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlate columns, Pearson."""
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0) + 1e-12)


def variable_genes(slides: list[ad.AnnData], test: ad.AnnData) -> list[str]:
    """Find the genes that vary most within slides, of those measured on all."""
    genes = sorted(set(test.var_names).intersection(*(s.var_names for s in slides)))
    variance = np.mean([logged(s, genes).var(0) for s in slides], axis=0)
    return [genes[i] for i in np.argsort(-variance)[:50]]


def ridge(train: list[ad.AnnData], test: ad.AnnData, genes: list[str]) -> float:
    """Find the best correlation of four ridge regressions on the tower's features as they are."""
    x = [s.obsm["image_features"][:, :-10].astype(np.float64) for s in (*train, test)]
    known = np.vstack(x[:-1])
    mean, spread = known.mean(0), known.std(0) + 1e-6
    known, new = (known - mean) / spread, (x[-1] - mean) / spread
    y = np.vstack([logged(s, genes) for s in train])
    gram, cross = known.T @ known, known.T @ y
    found = []
    for strength in (1e3, 1e4, 3e4, 1e5):
        weights = np.linalg.solve(gram + strength * np.eye(len(gram)), cross)
        found.append(correlation(new @ weights, logged(test, genes)).mean())
    return max(found)


def learned(model: HiBio, adata: ad.AnnData) -> list[str]:
    """Name the features that the model has learned."""
    symbols = match_genes(list(adata.var_names), "human")["gene_symbol"]
    return [str(name) for name in symbols.index[symbols.isin(model.config.genes)]]


def histology(model: HiBio, adata: ad.AnnData, genes: list[str]) -> dict[str, float]:
    """Embed a new slide; expression, retrieval and anchors."""
    sfm.tl.embed(adata, model)
    known = [g for g in genes if g in set(learned(model, adata))]
    sfm.tl.predict_expression(adata, known, model=model)
    predicted = adata.obsm["predicted_expression"][known].to_numpy()
    # A gene without a vector counts as 0.
    row = {"expression": float(correlation(predicted, logged(adata, known)).sum() / len(genes))}
    for direction in ("image->gene", "gene->image"):
        sfm.tl.retrieve(adata, adata, direction)
        row[direction] = float(sfm.get.retrieval_recall_df(adata, at=(0.1,))["recall"].iloc[0])
    sfm.pp.pathways(adata)
    measured = adata.obsm["pathways"]
    for key, name in (("hibio_anchors", "anchors, gene"), ("hibio_anchors_image", "anchors, image")):
        both = [c for c in measured if c in adata.obsm[key]]
        ranks = [rankdata(t[both], axis=0) for t in (measured, adata.obsm[key])]
        row[name] = float(correlation(*ranks).mean())
    return row


def agreement(z: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Score k-means and Gaussian mixtures with one covariance, on at most 20 components, by adjusted Rand index."""
    k = len(np.unique(truth))
    found = [[adjusted_rand_score(truth, c) for c in how(z, k)] for how in (kmeans, mixtures)]
    return float(np.mean(found[0])), float(np.mean(found[1]))


def domains(model: HiBio, adata: ad.AnnData, *, baselines: bool = True) -> pd.DataFrame:
    """Find layers of the cortex by each embedding."""
    sfm.tl.embed(adata, model)
    keys = ["X_hibio", "X_hibio_gene", "X_hibio_image"]
    adata.obsm["X_hibio (expression alone)"] = sfm.tl.embed(adata, model, image=False, copy=True).obsm["X_hibio"]
    keys.append("X_hibio (expression alone)")
    if baselines:
        add_baselines(adata, None)
        keys += ["X_pca", "X_hop1", "X_hops", "X_smooth"]
    column = adata.uns["eval"]["niche"][0]
    known = labelled(adata.obs[column])
    truth = adata.obs[column].astype(str).to_numpy()
    rows = {key: agreement(adata.obsm[key][known].astype(np.float64), truth[known]) for key in keys}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["ARI", "ARIg"])
    if baselines:
        for key in ("X_hibio", "X_pca", "X_smooth"):
            sfm.tl.domains(adata, len(np.unique(truth[known])), use_rep=key)
            found = adata.obs["domain"].astype(str)[known]
            table.loc[key, "tl.domains"] = adjusted_rand_score(truth[known], found)
    return table


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--tasks", nargs="*", default=["histology", "domains", "ablation"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--write", type=Path, help="train on all slides but the first and write the model here")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    sfm.settings.verbosity, sfm.settings.progress = 1, False
    torch.manual_seed(0)
    args.cache.mkdir(parents=True, exist_ok=True)
    slides = {name: read(args.folder, args.cache, name) for name in HER2 + BREAST + CORTEX}

    def others(*left_out: str, of: list[str] = HER2 + BREAST) -> dict[str, ad.AnnData]:
        return {name: slides[name].copy() for name in of if name not in left_out}

    if "histology" in args.tasks:
        rows = []
        for study in (HER2, BREAST):
            for name in study:
                known = [slides[n] for n in study if n != name]
                genes = variable_genes(known, slides[name])
                row = histology(train(others(name), FULL, args.steps), slides[name].copy(), genes)
                row["ridge, study"] = ridge(known, slides[name], genes)
                row["ridge, all"] = ridge(list(others(name).values()), slides[name], genes)
                rows.append({"slide": name, **row})
                print(pd.DataFrame(rows[-1:]).round(3).to_string(index=False, header=len(rows) == 1), flush=True)
        table = pd.DataFrame(rows).set_index("slide")
        for study in (HER2, BREAST):
            print(f"\nmean of {len(study)}\n{table.loc[study].mean().round(3).to_string()}", flush=True)
    if "domains" in args.tasks:
        model = train(others(), FULL, args.steps)
        for name in CORTEX:
            print(f"\n{name}\n{domains(model, slides[name].copy()).round(3).to_string()}", flush=True)
    if "ablation" in args.tasks:
        rows = {}
        for label, config in ABLATIONS.items():
            found = []
            for name in HER2:
                genes = variable_genes([slides[n] for n in HER2 if n != name], slides[name])
                found.append(histology(train(others(name), config, args.steps), slides[name].copy(), genes))
            rows[label] = pd.DataFrame(found).mean().to_dict()
            model = train(others(), config, args.steps)
            for name in CORTEX:
                ari, arig = domains(model, slides[name].copy(), baselines=False).loc["X_hibio"]
                rows[label] |= {f"{name[-6:]} ARI": ari, f"{name[-6:]} ARIg": arig}
            print(f"\n{pd.DataFrame(rows).T.round(3).to_string()}", flush=True)
    if args.write:
        # Left out so that what comes with the package can show the model on something new.
        sfm.models.save(train(others(HER2[0]), FULL, args.steps), args.write, license="bsd-3-clause")


if __name__ == "__main__":
    main()
