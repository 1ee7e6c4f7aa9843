"""The main job on a bundled real tissue, without network: ``python tutorials/demo.py --out demo``.

Embeds a MERFISH mouse brain, finds niches and cell states, prints the time of each step and the agreement with the
experts' labels next to three plain baselines, and writes figures and the resulting ``.h5ad``.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import scanpy as sc
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

import spatialfm as sfm

SLIDE = "mouse_id"
NICHE_AND_STATE = ("X_niche", "X_state")
LABELS = {"celltype": "cell type", "region": "region"}
RESOLUTION = {"celltype": 1.0, "region": 0.3}  # of Leiden, the same for all embeddings: regions are few and large
MIN_CELLS = 20  # of a label, to be scored
TYPE = "Astrocyte"  # split into subpopulations, and shown with its network

seconds: dict[str, float] = {}


@contextmanager
def timed(step):
    """Note how long a step took."""
    start = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - start


def add_baselines(adata):
    """Principal components; their means over 1, 3 and 8 steps in the tissue graph; coordinates."""
    cells = sc.AnnData(adata.layers["log"].toarray())
    sc.pp.scale(cells, max_value=10)
    sc.pp.pca(cells, n_comps=30)
    adata.obsm["X_pca"] = cells.obsm["X_pca"].astype(np.float32)
    graph = adata.obsp["spatial_connectivities"]
    graph = graph.multiply(1 / np.maximum(graph.sum(axis=1), 1)).tocsr()
    means, mean = [], adata.obsm["X_pca"]
    for step in range(1, 9):
        mean = graph @ mean
        if step in (1, 3, 8):
            means.append(mean)
    adata.obsm["X_pca_tissue"] = np.hstack(means).astype(np.float32)
    xy = pd.DataFrame(adata.obsm["spatial"], index=adata.obs_names)
    by_slide = xy.groupby(adata.obs[SLIDE], observed=True)
    adata.obsm["X_location"] = ((xy - by_slide.transform("mean")) / by_slide.transform("std")).to_numpy(np.float32)


def cluster(adata, rep, label):
    """Leiden clusters by scanpy."""
    cells = sc.AnnData(obsm={rep: adata.obsm[rep]}, obs=adata.obs[[]])
    sc.pp.neighbors(cells, use_rep=rep)
    sc.tl.leiden(cells, resolution=RESOLUTION[label], flavor="igraph", n_iterations=2, random_state=0)
    return cells.obs["leiden"]


def agreement(truth, found):
    """Normalised mutual information and adjusted Rand index."""
    return np.array([normalized_mutual_info_score(truth, found), adjusted_rand_score(truth, found)])


def score(adata, rep, label):
    """NMI and ARI with a label: Leiden, and k-means with the true number of labels (mean of five seeds)."""
    labels = adata.obs[label].astype(str)
    known = labels.map(labels.value_counts()).to_numpy() >= MIN_CELLS
    truth, points = labels[known], adata.obsm[rep][known]
    kmeans = [KMeans(truth.nunique(), n_init=3, random_state=seed).fit_predict(points) for seed in range(5)]
    leiden = cluster(adata, rep, label)
    return leiden.nunique(), *agreement(truth, leiden[known]), *np.mean([agreement(truth, c) for c in kmeans], axis=0)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), help="folder for figures and the .h5ad (default: %(default)s)"
    )
    parser.add_argument(
        "--model", default="heist-niche", help="bundled model, folder or checkpoint (default: %(default)s)"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    mpl.use("Agg")
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)

    adata = sfm.datasets.merfish_mouse_brain()
    # sfm.tl.embed would build the graph by itself; here each step is timed.
    with timed("tissue graph (sfm.pp.spatial_neighbors)"):
        sfm.pp.spatial_neighbors(adata, library_key=SLIDE)
    adata.layers["log"] = adata.X.copy()
    sc.pp.normalize_total(adata, target_sum=1e4, layer="log")
    sc.pp.log1p(adata, layer="log")
    with timed("gene networks (sfm.pp.grn; not read by heist-niche)"):
        sfm.pp.grn(adata, layer="log", library_key=SLIDE)
    with timed("embedding (sfm.tl.embed)"):
        sfm.tl.embed(adata, args.model, library_key=SLIDE)
    # The published model writes one embedding for both.
    niche, state = NICHE_AND_STATE if NICHE_AND_STATE[0] in adata.obsm else ("X_heist", "X_heist")
    record = adata.uns["embeddings"][niche]
    with timed("clusters (scanpy neighbors, leiden)"):
        adata.obs["niche"] = cluster(adata, niche, "region")
        adata.obs["state"] = cluster(adata, state, "celltype")
    with timed(f"subpopulations of {TYPE} (sfm.tl.subpopulations)"):
        sfm.tl.subpopulations(adata, "celltype", TYPE, n_clusters=4, use_rep=sorted({niche, state}), library_key=SLIDE)

    scores = {}
    with timed("scores (with baselines)"):
        add_baselines(adata)
        for rep, name in {
            "X_pca": "PCA of the expression",
            "X_pca_tissue": "PCA, means over neighbours",
            "X_location": "coordinates alone",
            niche: f"{record['model']}: {niche}",
            state: f"{record['model']}: {state}",
        }.items():
            scores[name] = [score(adata, rep, label) for label in LABELS]

    with timed("figures (sfm.pl)"):
        group = adata.obs.loc[adata.obs["celltype"] == TYPE, "grn_group"].mode()[0]
        for name, axes in {
            "niches": sfm.pl.spatial(adata, ["niche", "region"], library_key=SLIDE),
            "cell_states": sfm.pl.spatial(adata, ["state", "celltype"], library_key=SLIDE),
            "embedding_blocks": sfm.pl.embedding_blocks(adata, "celltype", use_rep=sorted({niche, state})),
            "gene_network": sfm.pl.grn(adata, group),
            "subpopulations": sfm.pl.subpopulations(adata, library_key=SLIDE),
        }.items():
            figure = (axes[0] if isinstance(axes, list) else axes).figure
            figure.savefig(path := args.out / f"{name}.png", dpi=100, bbox_inches="tight")
            # A fifth of the size; this method keeps the colours of rare categories apart.
            Image.open(path).convert("RGB").quantize(method=Image.Quantize.FASTOCTREE).save(path, optimize=True)
    with timed("writing the .h5ad"):
        adata.write_h5ad(args.out / "merfish_mouse_brain.h5ad", compression="gzip")

    grn = adata.uns["grn"]
    print(f"\n{adata.uns['source']['citation']}. {adata.uns['source']['license']}")
    print(
        f"cells {adata.n_obs:,} | slides {adata.obs[SLIDE].nunique()} | genes {adata.n_vars}",
        f"groups with a gene network {len(grn['names'])}",
        sep=" | ",
    )
    print(f"model {record['model']}, weights sha256 {record['sha256'][:12]}, on {record['params']['device']}\n")
    for step, value in seconds.items():
        print(f"{step:55} {value:7.1f} s")
    print(f"\n{'Agreement with':30}" + "".join(f"{name:^37}" for name in LABELS.values()))
    print(f"{'':30}" + f"{'clusters':>9}{'Leiden':^14}{'k-means':^14}" * len(LABELS))
    print(f"{'':30}" + (f"{'':9}" + f"{'NMI':>7}{'ARI':>7}" * 2) * len(LABELS))
    for name, row in scores.items():
        print(f"{name:30}" + "".join(f"{n:>9}" + "".join(f"{v:7.3f}" for v in values) for n, *values in row))
    print(
        "1 is perfect, 0 is chance. Leiden at resolution "
        + " and ".join(f"{RESOLUTION[label]} for {name}s" for label, name in LABELS.items())
        + ";\nk-means with the true number of labels, mean of five seeds. "
        f"Labels of fewer than {MIN_CELLS} cells are left out.\n"
        "One tissue says little: see 'How good is it' in the documentation for more.\n"
    )
    print("Written:", *sorted(str(path) for path in args.out.iterdir()), sep="\n  ")


if __name__ == "__main__":
    main()
