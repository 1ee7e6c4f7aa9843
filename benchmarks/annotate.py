"""Labels transferred by `spatialfm.tl.annotate`: quality on truly held-out cells beside its own promises, and beside a probe on plain embeddings.

    python benchmarks/annotate.py FOLDER

Each row annotates cells whose label is known but was hidden: one mouse of the brain from the other (in one AnnData, and as two AnnData with ``reference=``), the
blocks of spleen and ileum from a third of the blocks. ``F1`` (macro) and ``acc`` are those of the likeliest label; ``sure`` is the share of cells that were not left unsure
and ``acc sure`` their accuracy, of which 0.9 was asked; ``promised`` is what ``uns`` says of that accuracy. ``ECE`` is the expected calibration error on the hidden cells
without and with the temperature. Labels of fewer than 20 cells are left out.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from _baselines import add_baselines
from _scores import MIN_CELLS, NOT_LABELS
from sklearn.metrics import f1_score

import spatialfm as sfm
from spatialfm._splits import group_folds, spatial_blocks
from spatialfm.tl._calibration import calibration_error, reliability, with_temperature

FILES = {"merfish_mouse_brain": "celltype", "codex_mouse_spleen": "cell_type", "merfish_mouse_ileum": "cell_class"}
KEYS = ["X_pca", "X_hop1", "X_heist_cell", "X_heist_gene", "X_heist"]


def score(adata: ad.AnnData, truth: pd.Series, seconds: float) -> str:
    """Compare what was written with the labels that were hidden; cells without one, or with one that nobody showed, do not count."""
    entry = adata.uns["annotation"]
    truth = pd.Categorical(truth, categories=entry["names"]).codes
    p = adata.obsm["annotation_probabilities"].to_numpy()[truth >= 0]
    found = adata.obs["annotation"].cat.codes.to_numpy()[truth >= 0]
    truth = truth[truth >= 0]
    best, sure = p.argmax(axis=1), found < p.shape[1]
    before = with_temperature(p, 1 / entry["temperature"])
    errors = [calibration_error(reliability(q.max(axis=1), q.argmax(axis=1) == truth)) for q in (before, p)]
    return (
        f"{f1_score(truth, best, average='macro'):6.3f}{(best == truth).mean():7.3f}{sure.mean():7.3f}{(best == truth)[sure].mean():10.3f}"
        f"{entry['held_out']['accuracy_sure']:10.3f}{errors[0]:9.3f}{errors[1]:7.3f}{seconds:8.1f}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with .h5ad files of labelled cells")
    parser.add_argument("--files", nargs="*", default=list(FILES), choices=list(FILES))
    parser.add_argument("--keys", nargs="*", default=KEYS, choices=KEYS)
    parser.add_argument(
        "--fine-tune",
        action="store_true",
        help="also method='fine_tune', with the weight of the network beside the probe",
    )
    parser.add_argument("--one-file", action="store_true", help="without the rows of reference=")
    args = parser.parse_args()
    sfm.settings.verbosity, sfm.settings.progress = 0, False

    print(
        f"{'file':20} {'hidden':15} {'embedding':13}{'F1':>6}{'acc':>7}{'sure':>7}{'acc sure':>10}{'promised':>10}{'ECE raw':>9}{'ECE':>7}{'seconds':>8}"
    )
    for name in args.files:
        adata = ad.read_h5ad(args.folder / f"{name}.h5ad")
        label, slide = FILES[name], str(adata.uns["eval"].get("slide", "")) or None
        known = adata.obs[label].astype(str).where(~adata.obs[label].astype(str).isin(NOT_LABELS))
        known = known.where(known.map(known.value_counts()) >= MIN_CELLS)
        names = sorted(known.dropna().unique())
        raw = ad.AnnData(adata.X, obs=pd.DataFrame({"truth": known}), var=adata.var[[]])
        raw.obsm["spatial"] = adata.obsm["spatial"]
        raw.obs["slide"] = "one" if slide is None else adata.obs[slide].astype(str)
        adata = raw.copy()
        add_baselines(adata, "slide")
        sfm.tl.embed(adata, library_key="slide")
        if slide is None:
            folds = group_folds(spatial_blocks(adata.obsm["spatial"], np.zeros(adata.n_obs, int)), 3)
            splits = [("two of three", folds == 0)]
        else:
            mice = adata.obs["slide"].to_numpy()
            splits = [(f"mouse {k + 1}", mice != mouse) for k, mouse in enumerate(np.unique(mice))]
        for hidden, shown in splits:
            adata.obs["few"] = pd.Categorical(known.where(shown), categories=names)
            truth = known.where(~shown)
            for key in args.keys:
                start = time.perf_counter()
                sfm.tl.annotate(adata, groupby="few", use_rep=key, library_key="slide")
                print(f"{name:20} {hidden:15} {key:13}{score(adata, truth, time.perf_counter() - start)}", flush=True)
            if args.fine_tune:
                start = time.perf_counter()
                sfm.tl.annotate(adata, groupby="few", method="fine_tune", library_key="slide")
                row = score(adata, truth, time.perf_counter() - start)
                tuned = adata.uns["annotation"]["fine_tune"]
                print(f"{name:20} {hidden:15} {'fine_tune':13}{row}  weight {tuned['weight']}", flush=True)
            if slide is not None and not args.one_file:
                reference, other = raw[shown].copy(), raw[~shown].copy()
                start = time.perf_counter()
                sfm.tl.annotate(other, reference, groupby="truth")
                row = score(other, truth[~shown], time.perf_counter() - start)
                print(f"{name:20} {hidden:15} {'reference=':13}{row}", flush=True)


if __name__ == "__main__":
    main()
