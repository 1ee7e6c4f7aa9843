"""What `tl.outcome` finds: a planted effect, p-values where there is none, and real tissues of few patients.

    python benchmarks/outcome.py simulate
    python benchmarks/outcome.py pooling
    python benchmarks/outcome.py age DATA_FOLDER
    python benchmarks/outcome.py organs DATA_FOLDER
    python benchmarks/outcome.py time DATA_FOLDER

DATA_FOLDER holds, also in subfolders, .h5ad files: `merfish_mouse_brain`, `codex_mouse_spleen`,
`legacy_st_human_her2_*`, `visium_human_*`.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from _baselines import components
from scipy.stats import kstest, mannwhitneyu
from sklearn.metrics import roc_auc_score

import spatialfm as sfm
from spatialfm._data._embeddings import NICHE_AND_STATE, rep_name
from spatialfm._data._splits import spatial_blocks


def cohort(n: int, effect: float, seed: int, *, kind: str = "share", cells: int = 150, columns: int = 42) -> ad.AnnData:
    """Patients, half of them cases; patients differ in the share of one niche and in level by themselves.

    By ``kind``, cases differ in the ``"share"`` of the niche, which is 15 % of the cells of controls; in its
    ``"presence"``, 5 % of the cells of cases; or, with 5 % in all, in its ``"state"``. Columns have the falling
    variances of components. ``X_mixed`` hides the niche: its mean is that of the other cells, and only its spread
    differs.
    """
    rng = np.random.default_rng(seed)
    scale = 1 / np.sqrt(1 + np.arange(columns))
    niche = rng.normal(size=columns) * scale * 1.5
    state = rng.normal(size=columns) * scale * effect if kind == "state" else np.zeros(columns)
    reps, spreads, obs = [], [], []
    for i in range(n):
        case = i % 2
        base, shift = {"share": (0.15, effect * case), "presence": (0.05 * case, 0), "state": (0.05, 0)}[kind]
        share = np.clip(base * np.exp(rng.normal(0, 0.4) + shift), 0, 0.9)
        member = rng.random(cells) < share
        own = rng.normal(size=columns) * scale * 0.3
        noise = rng.normal(size=(cells, columns)) * scale + own
        sign = rng.choice([-1, 1], cells)
        reps.append(noise + member[:, None] * (niche + (2 * case - 1) * state))
        spreads.append(noise + (member * sign)[:, None] * niche)
        about = {"sample": f"p{i:03}", "label": ("control", "case")[case], "type": np.where(member, "niche", "other")}
        obs.append(pd.DataFrame(about, index=range(cells)))
    table = pd.concat(obs, ignore_index=True)
    table.index = table.index.astype(str)
    x = np.concatenate(reps).astype(np.float32)
    return ad.AnnData(obs=table, obsm={"X_sim": x, "X_mixed": np.concatenate(spreads).astype(np.float32)})


def score(adata: ad.AnnData, use_rep: str, **how: object) -> dict[str, object]:
    """Entry of `tl.outcome`."""
    return sfm.tl.outcome(adata, condition_key="label", sample_key="sample", use_rep=use_rep, **how).uns["outcome"]


def simulate(repeats: int) -> None:
    """Print power, calibration and coverage; mixed: the niche shows in the spread alone."""
    print(
        f"{'patients':>8} {'effect':>6} {'mean':>5} {'mean_std':>8} {'composition':>11} {'mixed mean':>10} "
        f"{'mixed mean_std':>14} "
        f"{'p<=0.05':>8} {'cells p<=0.05':>14} {'covered':>8} {'width':>6}"
    )
    for n in (12, 24, 48):
        for effect in (0.0, 0.5, 1.0):
            rows = []
            for seed in range(repeats):
                adata = cohort(n, effect, seed)
                found = score(adata, "X_sim", n_permutations=99, rng=seed, groupby="type")
                others = [
                    score(adata, key, n_permutations=1, rng=seed, pooling=pooling)["auc"]
                    for key, pooling in (("X_sim", "mean_std"), ("X_mixed", "mean"), ("X_mixed", "mean_std"))
                ]
                # What is wrong: every cell a replicate.
                case = (adata.obs["label"] == "case").to_numpy()
                rep = adata.obsm["X_sim"] - adata.obsm["X_sim"].mean(axis=0)
                along = rep @ np.linalg.svd(rep, full_matrices=False)[2][0]
                cell_p = mannwhitneyu(along[case], along[~case]).pvalue
                composition = found["baselines"]["composition"]["auc"]
                rows.append([found["auc"], others[0], composition, *others[1:], found["p"], cell_p, *found["interval"]])
            a = np.array(rows, dtype=float)
            truth, low, high = a[:, 0].mean(), a[:, 7], a[:, 8]
            print(
                f"{n:8d} {effect:6.1f} {truth:5.2f} {a[:, 1].mean():8.2f} {a[:, 2].mean():11.2f} "
                f"{a[:, 3].mean():10.2f} {a[:, 4].mean():14.2f} {(a[:, 5] <= 0.05).mean():8.2f} "
                f"{(a[:, 6] <= 0.05).mean():14.2f} {((low <= truth) & (truth <= high)).mean():8.2f} "
                f"{(high - low).mean():6.2f}",
                flush=True,
            )
            if effect == 0:
                p = a[:, 5] - np.random.default_rng(0).uniform(0, 0.01, repeats)
                print(f"{'':15} p-values uniform: Kolmogorov-Smirnov p = {kstest(p, 'uniform').pvalue:.2f}")


def pooling(repeats: int) -> None:
    """Print the AUC by pooling, and how attention ranks the cells of the niche within their sample."""
    print(f"{'24 patients':24} {'mean':>11} {'mean_std':>11} {'attention':>11} {'niche ranked':>12}")
    for kind, effect in (("presence", 0.0), ("state", 0.7), ("share", 0.0), ("share", 0.6), ("share", 1.0)):
        rows = []
        for seed in range(repeats):
            adata = cohort(24, effect, seed, kind=kind)
            rows.append([])
            for how in ("mean", "mean_std", "attention"):
                found = score(adata, "X_sim", n_permutations=1, rng=seed, pooling=how, n_repeats=1)
                rows[-1].append(found["auc"])
            table = pd.DataFrame({"weight": found["attention"], "niche": (adata.obs["type"] == "niche").to_numpy()})
            ranked = [
                roc_auc_score(one["niche"], one["weight"])
                for _, one in table.groupby(adata.obs["sample"].to_numpy())
                if one["niche"].nunique() == 2
            ]
            rows[-1].append(np.mean(ranked))
        a = np.array(rows)
        spread = [
            f"{m:.2f} +-{e:.2f}" for m, e in zip(a.mean(axis=0), a.std(axis=0, ddof=1) / len(a) ** 0.5, strict=True)
        ]
        print(f"{kind + f', effect {effect}':24} " + " ".join(f"{text:>11}" for text in spread), flush=True)


def read(folder: Path, name: str) -> ad.AnnData:
    """Find and read a file."""
    return ad.read_h5ad(next(folder.rglob(f"{name}.h5ad")))


def say(what: str, adata: ad.AnnData, keys: list[str | tuple[str, str]], **how: object) -> None:
    """Print one line an embedding, or the refusal."""
    for key in keys:
        start = time.perf_counter()
        try:
            found = sfm.tl.outcome(adata, use_rep=key, **how).uns["outcome"]
        except ValueError as error:
            print(f"{what:44.44} refused: {error}")
            return
        low, high = found["interval"]
        print(
            f"{what:44.44} {rep_name(key):18} {found['auc']:5.2f} ({low:.2f} to {high:.2f})  p {found['p']:.3f}  "
            f"{time.perf_counter() - start:5.1f} s",
            flush=True,
        )


def baselines(adata: ad.AnnData, types: str | None) -> list[str | tuple[str, str]]:
    """Add 30 principal components, and the composition of cell types where there are any; give the keys."""
    adata.obsm["X_pca"] = components(adata)
    keys: list[str | tuple[str, str]] = [NICHE_AND_STATE, "X_niche", "X_state", "X_pca"]
    if types:
        adata.obsm["composition"] = pd.get_dummies(adata.obs[types]).to_numpy(np.float32)
        keys.append("composition")
    return keys


def age(folder: Path) -> None:
    """Mouse age: an error by patients; then by blocks, also within one mouse, where only location differs."""
    brain = read(folder, "merfish_mouse_brain")
    slide = brain.obs["mouse_id"].astype("category").cat.codes.to_numpy()
    sfm.tl.embed(brain, library_key="mouse_id")
    keys = baselines(brain, "celltype")
    block = spatial_blocks(brain.obsm["spatial"], slide, per_side=5)
    brain.obs["block"] = [f"b{b:03}" for b in block]
    say(
        "age, patients are mice",
        brain,
        keys,
        sample_key="block",
        condition_key="age",
        patient_key="mouse_id",
        n_folds=2,
    )
    say("age, WRONG: blocks as patients", brain, keys, sample_key="block", condition_key="age")
    # Within one mouse nothing differs in age: the halves show what location and section do.
    for mouse in brain.obs["mouse_id"].unique():
        one = brain[brain.obs["mouse_id"] == mouse].copy()
        x = one.obsm["spatial"][:, 0]
        middle = one.obs["block"].map(pd.Series(x, one.obs["block"].to_numpy()).groupby(level=0).mean())
        one.obs["half"] = np.where(middle.to_numpy() < np.median(x), "left", "right")
        say(f"half of mouse {mouse}, WRONG: blocks", one, keys, sample_key="block", condition_key="half")


def organs(folder: Path) -> None:
    """Breast against cortex, and among breast tumours the platform: what a technical difference reaches."""
    names = {
        f"legacy_st_human_her2_{s}": (f"her2 {s[0]}", "breast")
        for s in ("A1", "D1", "F1", "C2", "C3", "C4", "C5", "C6")
    }
    names |= {"visium_human_breast_0": ("breast 0", "breast"), "visium_human_breast_3": ("breast 3", "breast")}
    names |= {
        "visium_human_dlpfc_151673": ("brain donor", "cortex"),
        "visium_human_dlpfc_151674": ("brain donor", "cortex"),
    }
    parts = {}
    for name, (patient, organ) in names.items():
        part = read(folder, name)
        part.X = part.X.astype(np.float32)
        sfm.pp.resolve_genes(part)
        part = ad.AnnData(
            part.X,
            obs=pd.DataFrame(index=part.obs_names),
            var=pd.DataFrame(index=part.var_names),
            obsm={"spatial": part.obsm["spatial"]},
        )
        part.obs["organ"], part.obs["patient"] = organ, patient
        part.obs["platform"] = "Visium" if "visium" in name else "ST"
        parts[name] = part
    human = ad.concat(parts, label="section", index_unique="-", join="inner")
    sfm.tl.embed(human, library_key="section")
    keys = baselines(human, None)
    how = {"sample_key": "section", "patient_key": "patient", "n_folds": 2}
    print(human.obs.groupby(["organ", "patient"], observed=True)["section"].nunique().to_string())
    say("breast or cortex, patients", human, keys, condition_key="organ", **how)
    breast = human[human.obs["organ"] == "breast"].copy()
    say("platform of breast sections, patients", breast, keys, condition_key="platform", **how)
    say(
        "platform, WRONG: sections as patients", breast, keys, condition_key="platform", sample_key="section", n_folds=2
    )


def seconds(folder: Path) -> None:
    """Time of the call with blocks as samples, their label drawn."""
    for name, library in (("merfish_mouse_brain", "mouse_id"), ("codex_mouse_spleen", None)):
        adata = read(folder, name)
        sfm.tl.embed(adata, library_key=library)
        slide = adata.obs[library].astype("category").cat.codes.to_numpy() if library else np.zeros(adata.n_obs, int)
        block = spatial_blocks(adata.obsm["spatial"], slide, per_side=6)
        adata.obs["block"] = [f"b{b:03}" for b in block]
        drawn = np.random.default_rng(0).permutation(block.max() + 1) % 2
        adata.obs["drawn"] = np.where(drawn[block] > 0, "a", "b")
        for how in ("mean", "mean_std", "attention"):
            say(
                f"{name}, {adata.obs['block'].nunique()} blocks, {how}",
                adata,
                [NICHE_AND_STATE],
                sample_key="block",
                condition_key="drawn",
                pooling=how,
            )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["simulate", "pooling", "age", "organs", "time"])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--repeats", type=int, default=40)
    args = parser.parse_args()
    sfm.settings.verbosity, sfm.settings.progress = 0, False
    warnings.simplefilter("ignore")
    if args.what in ("simulate", "pooling"):
        {"simulate": simulate, "pooling": pooling}[args.what](args.repeats)
    elif args.folder is None:
        parser.error("DATA_FOLDER is missing")
    else:
        {"age": age, "organs": organs, "time": seconds}[args.what](args.folder)


if __name__ == "__main__":
    main()
