"""spatialfm beside its peers on labelled tissues: scores, times, tables and a figure.

    python benchmarks/peers.py DATA --out FOLDER [--banksy-python PATH] [--novae-python PATH]

DATA holds .h5ad files whose ``uns["eval"]`` names label columns: ``{"cell": [...], "niche": [...], "slide": column or
""}``. No method sees a label. Each has one setting for all files; where its authors recommend one for cell types and
another for tissue domains, or one for cells and another for spots, each is used for what it is recommended. All read
the same values on a log-like scale and the same features. `_scores.py` says what is measured.

BANKSY (``pip install pybanksy``) and novae (``pip install novae``) run in the Python environments given; without one
the method is left out. Embeddings and scores are kept in FOLDER, so that an interrupted run continues; delete what you
want to compute again. novae trains by its schedule, or until its minutes are over; the notes under the tables say how
far it came. Ends with ``peers.md`` and ``peers.png`` in FOLDER.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from _baselines import components, graph, hops, log_values, rings, scaled, smoothed
from _scores import METRICS, scores
from scipy.spatial import cKDTree
from sklearn.exceptions import ConvergenceWarning

import spatialfm as sfm

KINDS = {"cell": "cell types", "niche": "tissue domains"}
SETTINGS = {
    "banksy": {"neighbors": 15, "lambda": {"cell": 0.2, "niche": 0.8}, "components": 20},
    # Coordinates are scaled to 20 from cell to cell, so that edges are cut at five times that, as in the graph of the
    # other methods. The number of epochs gives this number of steps, and is no less than the default. For spots of
    # Visium its authors advise one hop.
    "novae": {"epochs": 20, "steps": 200, "hops of cells": 2, "hops of spots": 1, "radius": 100},
}
Embedded = dict[str, np.ndarray]


def spatialfm(model: str) -> Callable[[ad.AnnData, str | None], Embedded]:
    """Embed with a bundled model: the block of the cell's own state for types, that of its place for domains."""

    def run(adata: ad.AnnData, slide: str | None) -> Embedded:
        found = sfm.tl.embed(adata, model, library_key=slide, copy=True)
        return {"cell": found.obsm["X_state"], "niche": found.obsm["X_niche"]}

    return run


def both(run: Callable[[ad.AnnData, str | None], np.ndarray]) -> Callable[[ad.AnnData, str | None], Embedded]:
    """Use one embedding for cell types and tissue domains."""
    return lambda adata, slide: dict.fromkeys(KINDS, run(adata, slide))


# Name, and what embeds; a name alone is run by the worker.
METHODS: dict[str, Any] = {
    "PCA": both(lambda a, _: components(a)),
    "PCA + neighbour mean": both(lambda a, slide: hops(components(a), graph(a, slide), (0, 1))),
    "means, 1-3-8 steps": both(lambda a, slide: hops(components(a), graph(a, slide), (1, 3, 8))),
    "smoothed, then PCA": both(lambda a, slide: smoothed(scaled(a), graph(a, slide))),
    "CellCharter-like": both(lambda a, slide: rings(components(a), graph(a, slide))),
    "BANKSY": "banksy",
    "novae, from scratch": "novae",
    "heist (published)": spatialfm("heist"),
    "heist-niche (default)": spatialfm("heist-niche"),
}


class Refused(Exception):
    """A peer does not take a file."""


def spacing(xy: np.ndarray) -> float:
    """Median distance to the nearest cell elsewhere."""
    places = np.unique(xy, axis=0)
    return float(np.median(cKDTree(places).query(places, k=2)[0][:, 1]))


def work(method: str, python: Path, adata: ad.AnnData, slide: str | None, settings: dict[str, Any]) -> Any:
    """Embed in another environment; the answer as it is stored."""
    a = log_values(adata)
    a.obs["slide"] = adata.obs[slide].astype(str) if slide else "one"
    xy = np.asarray(adata.obsm["spatial"], np.float64)[:, :2]
    unit = np.median([spacing(xy[rows]) for rows in a.obs.groupby("slide").indices.values()]) / 20
    xy = xy / unit
    for rows in a.obs.groupby("slide").indices.values():
        xy[rows, 0] -= xy[rows, 0].min()
    if method == "banksy":
        # It has no notion of slides.
        for i, rows in enumerate(a.obs.groupby("slide").indices.values()):
            xy[rows, 0] += 2 * i * np.ptp(xy[:, 0])
    a.obsm["spatial"] = xy
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.h5ad", Path(folder) / "out.npz"
        a.write_h5ad(source)
        worker = Path(__file__).with_name("_peers_worker.py")
        command = [python, worker, method, source, target, json.dumps(settings)]
        done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Refused(done.stderr.strip().splitlines()[-1])
        with np.load(target) as found:
            about = json.loads(str(found["about"]))
            return {kind: found[kind] for kind in KINDS}, about


def embed(name: str, adata: ad.AnnData, slide: str | None, pythons: dict[str, Path], minutes: float) -> Any:
    """Embed a file: arrays by kind of label, and what was noted."""
    run = METHODS[name]
    if isinstance(run, str):
        settings = {**SETTINGS[run], "minutes": minutes, "spots": "array_row" in adata.obs}
        return work(run, pythons[run], adata, slide, settings)
    start = time.perf_counter()
    found = run(adata, slide)
    seconds = time.perf_counter() - start
    packages = ("spatialfm", "scanpy", "scikit-learn", "torch")
    return found, {"seconds": seconds, "versions": {p: version(p) for p in packages}}


def spread(z: np.ndarray) -> dict[str, float]:
    """Whether an embedding has collapsed: share of the squared lengths that differs between cells, and directions."""
    z = z.astype(np.float64)
    centred = z - z.mean(0)
    variance = np.linalg.eigvalsh(centred.T @ centred)
    return {
        "varies": float((centred**2).sum() / (z**2).sum()),
        "directions": float(variance.sum() ** 2 / (variance**2).sum()),
    }


def one(path: Path, name: str, out: Path, pythons: dict[str, Path], minutes: float) -> dict[str, Any]:
    """Embed and score, or read what was."""
    stem = f"{path.stem}.{METHODS[name] if isinstance(METHODS[name], str) else name.split(' (')[0]}".replace(" ", "_")
    kept, stored = out / f"{stem}.json", out / f"{stem}.npz"
    if kept.exists():
        return json.loads(kept.read_text())
    adata = ad.read_h5ad(path)
    declared = adata.uns["eval"]
    slide = str(declared.get("slide", "")) or None
    if not stored.exists():
        found, about = embed(name, adata, slide, pythons, minutes)
        np.savez(stored, about=json.dumps(about), **found)
    result: dict[str, Any] = {"file": path.stem, "method": name, "cells": adata.n_obs, "scores": {}}
    with np.load(stored) as found:
        result |= json.loads(str(found["about"]))
        for kind in KINDS:
            for column in map(str, declared.get(kind, [])):
                z = found[kind]
                slides = adata.obs[slide] if slide else None
                row = scores(z, adata.obs[column], adata.obsm["spatial"], slides)
                result["scores"][f"{kind}/{column}"] = row | spread(z)
    kept.write_text(json.dumps(result, indent=1))
    return result


def markdown(table: pd.DataFrame, digits: int, *, best: int | None = None) -> str:
    """Write a table; the best of each row (``best=1``) or column (``best=0``) in bold."""
    tops = None if best is None else table.round(digits).max(axis=best)
    lines = ["| " + " | ".join([" / ".join(map(str, table.index.names)), *map(str, table.columns)]) + " |"]
    lines.append("|---" * (len(table.columns) + 1) + "|")
    for key, row in table.iterrows():
        cells = []
        for column, value in row.items():
            text = "–" if pd.isna(value) else f"{value:.{digits}f}"
            top = None if tops is None else tops[key if best == 1 else column]
            cells.append(f"**{text}**" if top is not None and round(value, digits) == top else text)
        lines.append(f"| {key if isinstance(key, str) else ', '.join(map(str, key))} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def long_table(results: list[dict[str, Any]]) -> pd.DataFrame:
    """Make one row for each file, column of labels, method and metric."""
    rows = [
        {"kind": key.split("/")[0], "file": r["file"], "labels": key.split("/")[1], "method": r["method"]}
        | {"metric": metric, "score": row[metric]}
        for r in results
        for key, row in r["scores"].items()
        for metric in METRICS
    ]
    return pd.DataFrame(rows)


def tables(results: list[dict[str, Any]], refused: dict[tuple[str, str], str]) -> str:
    """Write all tables as markdown."""
    long = long_table(results)
    names = [m for m in METHODS if m in set(long["method"])]
    parts = []
    for kind, title in KINDS.items():
        of_kind = long[long["kind"] == kind]
        if of_kind.empty:
            continue
        by_row = of_kind.pivot_table(index=["file", "labels", "metric"], columns="method", values="score").reindex(
            columns=names
        )
        wins = (by_row.round(3).eq(by_row.round(3).max(axis=1), axis=0)).sum()
        complete = by_row.dropna()
        for label, chosen in (("", by_row), (", labels that every method was scored on", complete)):
            # A mean over the files that a method took would be of other files than the means beside it.
            means = chosen.groupby("metric").mean().where(chosen.notna().groupby("metric").all()).T[list(METRICS)]
            n = len(chosen) // len(METRICS)
            means.index.name = f"{title}, mean of {n}{label}"
            text = markdown(means, 3, best=0).splitlines()
            if not label:
                text = [f"{text[0]} best in (of {len(by_row)}) |", f"{text[1]}---|"] + [
                    f"{line} {wins[name]} |" for line, name in zip(text[2:], names, strict=True)
                ]
            parts.append("\n".join(text))
            if len(complete) in (0, len(by_row)):
                break
    for metric in METRICS:
        chosen = long[long["metric"] == metric].pivot_table(
            index=["kind", "file", "labels"], columns="method", values="score"
        )[names]
        chosen.index = pd.Index([f"{f}, {c}" for _, f, c in chosen.index], name=metric)
        parts.append(markdown(chosen, 3, best=1))
    seconds = pd.DataFrame(results).pivot_table(index="file", columns="method", values="seconds")[names]
    seconds.index.name = "seconds"
    parts.append(markdown(seconds, 1))
    notes = [
        f"* {r['file']}: {r['steps']} of {r['schedule']} steps in {r['training_seconds']:.0f} s, loss "
        f"{r['loss'][0]:.2f} to {r['loss'][1]:.2f}; {row['varies']:.0%} of the squared length differs between cells, "
        f"over about {row['directions']:.1f} directions; {r['domains']} prototypes in use"
        for r in results
        if "steps" in r
        for row in list(r["scores"].values())[:1]
    ]
    notes += [f"* {file}: {name} refused: {why}" for (name, file), why in refused.items()]
    versions: dict[str, str] = {}
    for r in results:
        versions |= r["versions"]
    notes.append("* " + ", ".join(f"{p} {v}" for p, v in sorted(versions.items())))
    return "\n\n".join([*parts, "\n".join(notes)]) + "\n"


def figure(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the scores: a panel a metric, a line a column of labels, a dot a method."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    long = long_table(results)
    names = [m for m in METHODS if m in set(long["method"])]
    greys = dict(zip(list(METHODS)[:4], ("#D0D0D0", "#A8A8A8", "#787878", "#404040"), strict=True))
    others = zip(list(METHODS)[4:], ("#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"), strict=True)
    colors = greys | dict(others)
    shapes = dict.fromkeys(names, "o") | {"heist-niche (default)": "D"}
    rows = long[["kind", "file", "labels"]].drop_duplicates().sort_values(["kind", "file"])
    places, labels, heads, y = {}, [], [], 0.0
    for kind, title in KINDS.items():
        y_first = y + 0.7
        for _, file, column in rows[rows["kind"] == kind].itertuples(index=False):
            places[file, column] = y
            labels.append(
                (y, f"{file.replace('legacy_st_human_', '').replace('_human', '').replace('_mouse', '')}\n{column}")
            )
            y -= 1
        heads.append((y_first, title))
        y -= 1
    fig, axes = plt.subplots(1, len(METRICS), figsize=(10.5, 6.2), sharey=True, layout="constrained")
    for ax, metric in zip(axes, METRICS, strict=True):
        for name in names:
            chosen = long[(long["metric"] == metric) & (long["method"] == name)]
            height = [places[f, c] for f, c in zip(chosen["file"], chosen["labels"], strict=True)]
            ax.scatter(
                chosen["score"], height, s=34, color=colors[name], marker=shapes[name],
                edgecolor="white", linewidth=0.5, label=name, zorder=3 + (shapes[name] == "D"),
            )  # fmt: skip
        ax.set_title(metric, fontsize=10)
        ax.set_yticks(*zip(*labels, strict=True), fontsize=7.5)
        ax.grid(axis="y", color="#F1F1F1", linewidth=9)
        ax.grid(axis="x", color="#E8E8E8", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.tick_params(length=0, labelsize=7.5)
        ax.spines[:].set_visible(False)
        ax.set_xlim(min(0, long["score"].min()) - 0.02, 1)
    for height, title in heads:
        axes[0].text(
            -0.02,
            height,
            title,
            fontsize=8.5,
            weight="bold",
            ha="right",
            va="center",
            transform=axes[0].get_yaxis_transform(),
        )
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    fig.savefig(path, dpi=110)


def main() -> None:
    """Run what is missing, then write the tables and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("peers"))
    parser.add_argument("--pattern", default="*.h5ad")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--banksy-python", type=Path)
    parser.add_argument("--novae-python", type=Path)
    parser.add_argument("--novae-minutes", type=float, default=60, help="how long to train it on a file at most")
    args = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    warnings.simplefilter("ignore", FutureWarning)
    sfm.settings.verbosity, sfm.settings.progress = 1, False
    args.out.mkdir(parents=True, exist_ok=True)
    pythons = {"banksy": args.banksy_python, "novae": args.novae_python}
    methods = [m for m in args.methods if pythons.get(METHODS[m], True)]
    results, refused = [], {}
    # Importing and compiling is not what is timed.
    warm = sfm.datasets.merfish_mouse_brain()[:300].copy()
    for run in METHODS.values():
        if callable(run):
            run(warm, None)
    for name in methods:
        for path in sorted(args.data.glob(args.pattern), key=lambda p: p.stat().st_size):
            try:
                results.append(one(path, name, args.out, pythons, args.novae_minutes))
            except Refused as error:
                refused[name, path.stem] = str(error)
                print(f"{path.stem}: {name}: {error}", flush=True)
                continue
            row = results[-1]
            print(f"{path.stem:26.26} {name:22} {row['seconds']:7.1f} s", flush=True)
            for key, found in row["scores"].items():
                print(f"    {key:26.26} " + "  ".join(f"{m} {found[m]:.3f}" for m in METRICS), flush=True)
    text = tables(results, refused)
    (args.out / "peers.md").write_text(text)
    figure(results, args.out / "peers.png")
    print(text)


if __name__ == "__main__":
    main()
