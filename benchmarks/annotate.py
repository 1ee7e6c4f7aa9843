"""Labels transferred by `spatialfm.tl.annotate`: quality on hidden cells, its own estimates, simple baselines.

    python benchmarks/annotate.py FOLDER

Each row annotates cells whose label is known but was hidden: a slide from the others (in one AnnData, and as two
AnnData with ``reference=``); of a single slide, two thirds of its blocks from the other third. ``F1`` (macro) and
``acc`` are those of the likeliest label; ``sure`` is the share of cells that are not unsure and ``acc sure`` their
accuracy, where 0.9 was asked for; ``promised`` is the estimate of it in ``uns``. ``ECE`` is the expected calibration
error on the hidden cells without and with the temperature; ``seconds`` include embedding, but not the baselines.
Labels of fewer than 20 cells are left out.
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
from spatialfm._data._splits import group_folds, spatial_blocks
from spatialfm.tl._calibration import calibration_error, reliability, with_temperature

# Several files of a name are slides.
FILES = {
    "merfish_mouse_brain": "celltype", "codex_mouse_spleen": "cell_type", "merfish_mouse_ileum": "cell_class",
    "cosmx_human_lung": "region", "visium_human_dlpfc": "layer", "legacy_st_human_her2": "pathologist",
}  # fmt: skip
KEYS = ["X_pca", "X_hop1", "X_niche", "X_state", "both"]


def read(folder: Path, name: str) -> ad.AnnData:
    """Values, coordinates, ``obs["truth"]`` (nothing where the label is rare or none) and ``obs["slide"]``."""
    parts = {}
    for path in sorted(folder.glob(f"{name}*.h5ad")):
        adata = ad.read_h5ad(path)
        slide = str(adata.uns["eval"].get("slide", ""))
        truth = adata.obs[FILES[name]].astype(str)
        obs = pd.DataFrame({"truth": truth.where(~truth.isin(NOT_LABELS))}, index=adata.obs_names)
        obs["slide"] = adata.obs[slide].astype(str) if slide else path.stem.removeprefix(f"{name}_")
        obs["truth"] = obs["truth"].where(obs["truth"].map(obs["truth"].value_counts()) >= MIN_CELLS)
        spatial = {"spatial": adata.obsm["spatial"]}
        parts[path.stem] = ad.AnnData(adata.X.astype(np.float32), obs=obs, var=adata.var[[]], obsm=spatial)
    return ad.concat(parts, index_unique="-")


def show(name: str, hidden: str, what: str, adata: ad.AnnData, truth: pd.Series, seconds: float) -> None:
    """Compare with the labels that were hidden, where they are among those that were shown."""
    entry = adata.uns["annotation"]
    truth = pd.Categorical(truth, categories=entry["names"]).codes
    p = adata.obsm["annotation_probabilities"].to_numpy()[truth >= 0]
    found = adata.obs["annotation"].cat.codes.to_numpy()[truth >= 0]
    truth = truth[truth >= 0]
    best, sure = p.argmax(axis=1), found < p.shape[1]
    before = with_temperature(p, 1 / entry["temperature"])
    errors = [calibration_error(reliability(q.max(axis=1), q.argmax(axis=1) == truth)) for q in (before, p)]
    held = entry["held_out"]
    weight = f", weight {entry['fine_tune']['weight']}" if "fine_tune" in entry else ""
    print(
        f"{name:20} {hidden:13} {what:13}{f1_score(truth, best, average='macro'):6.3f}{(best == truth).mean():7.3f}"
        f"{sure.mean():7.3f}{(best == truth)[sure].mean() if sure.any() else np.nan:10.3f}{held['accuracy_sure']:10.3f}"
        f"{errors[0]:9.3f}{errors[1]:7.3f}{seconds:8.1f}  {held['folds']}{weight}",
        flush=True,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with .h5ad files of labelled cells")
    parser.add_argument("--files", nargs="*", default=list(FILES), choices=list(FILES))
    parser.add_argument("--keys", nargs="*", default=KEYS, choices=KEYS)
    parser.add_argument(
        "--fine-tune", action="store_true", help="also method='fine_tune', and the weight of the network"
    )
    parser.add_argument("--one-file", action="store_true", help="without the rows of reference=")
    args = parser.parse_args()
    sfm.settings.verbosity, sfm.settings.progress = 0, False

    print(
        f"{'file':20} {'hidden':13} {'embedding':13}{'F1':>6}{'acc':>7}{'sure':>7}{'acc sure':>10}{'promised':>10}"
        f"{'ECE raw':>9}{'ECE':>7}{'seconds':>8}"
    )
    for name in args.files:
        raw = read(args.folder, name)
        known, slides = raw.obs["truth"], raw.obs["slide"].to_numpy()
        adata = raw.copy()
        add_baselines(adata, "slide")
        start = time.perf_counter()
        sfm.tl.embed(adata, library_key="slide")
        embedding = time.perf_counter() - start
        several = len(np.unique(slides)) > 1
        if several:
            splits = [(slide, slides != slide) for slide in np.unique(slides)]
        else:
            folds = group_folds(spatial_blocks(adata.obsm["spatial"], np.zeros(adata.n_obs, int)), 3)
            splits = [("two of three", folds == 0)]
        for hidden, shown in splits:
            adata.obs["few"] = pd.Categorical(known.where(shown))
            truth = known.where(~shown)
            methods = {key: {"use_rep": ("X_niche", "X_state") if key == "both" else key} for key in args.keys}
            if args.fine_tune:
                methods["fine_tune"] = {"method": "fine_tune"}
            for what, how in methods.items():
                start = time.perf_counter()
                sfm.tl.annotate(adata, groupby="few", library_key="slide", **how)
                seconds = time.perf_counter() - start + embedding * (what in ("X_niche", "X_state", "both"))
                show(name, hidden, what, adata, truth, seconds)
            if several and not args.one_file:
                reference, other = raw[shown].copy(), raw[~shown].copy()
                for method in ("probe", "fine_tune")[: 1 + args.fine_tune]:
                    start = time.perf_counter()
                    sfm.tl.annotate(other, reference, groupby="truth", library_key="slide", method=method)
                    seconds = time.perf_counter() - start
                    show(name, hidden, f"ref {method}", other, truth[~shown], seconds)


if __name__ == "__main__":
    main()
