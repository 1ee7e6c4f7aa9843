"""What must not change an embedding, and what must change it little.

    python benchmarks/invariance.py DATA [--model heist-niche] [--pattern '*.h5ad']

Mean cosine of the cells' rows with the tissue turned by 37 degrees, mirrored, shifted and three times as large; with
shuffled rows; and, for models that read contexts, with contexts of 128 and 512 cells instead of 256. With half of the
features removed at random (three times), the k-means NMI of the niche (or of the only embedding) with the niche labels
of ``uns["eval"]``, beside that of the whole panel.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from _scores import kmeans, labelled

if TYPE_CHECKING:
    from anndata import AnnData


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over rows."""
    return float(((a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)).mean())


def niche_nmi(adata: AnnData, column: str) -> float:
    """Agreement of k-means with the labels, mean over five seeds."""
    from sklearn.metrics import normalized_mutual_info_score

    rows = labelled(adata.obs[column])
    y = adata.obs[column].astype(str).iloc[rows]
    key = "X_niche" if "X_niche" in adata.obsm else next(iter(adata.uns["embeddings"]))
    found = kmeans(adata.obsm[key][rows].astype(np.float64), y.nunique())
    return float(np.mean([normalized_mutual_info_score(y, c) for c in found]))


def one(path: Path, model: Any) -> dict[str, float]:
    """All comparisons of one file."""
    import anndata as ad

    import spatialfm as sfm

    adata = ad.read_h5ad(path)
    declared = adata.uns.get("eval", {})
    slide = str(declared.get("slide", "")) or None
    random = np.random.default_rng(0)

    def embed(a: AnnData, **how: Any) -> AnnData:
        a = a.copy()
        sfm.tl.embed(a, model, library_key=slide, **how)
        return a

    def rows(a: AnnData) -> np.ndarray:
        return np.hstack([a.obsm[key] for key in a.uns["embeddings"]])

    base = embed(adata)
    angle = np.deg2rad(37)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ np.diag([-3.0, 3.0])
    moved = adata.copy()
    moved.obsm["spatial"] = np.asarray(adata.obsm["spatial"], float)[:, :2] @ turn.T + 1000.0
    order = random.permutation(adata.n_obs)
    row = {
        "moved": cosine(rows(base), rows(embed(moved))),
        "shuffled": cosine(rows(base)[order], rows(embed(adata[order]))),
    }
    if "X_heist" in base.obsm:
        row |= {f"context {n}": cosine(rows(base), rows(embed(adata, context_size=n))) for n in (128, 512)}
    for column in declared.get("niche", []):
        whole = niche_nmi(base, str(column))
        kept = []
        for _ in range(3):
            half = np.sort(random.permutation(adata.n_vars)[: -(-adata.n_vars // 2)])
            kept.append(niche_nmi(embed(adata[:, half]), str(column)))
        row |= {"NMI": whole, "NMI of half": float(np.mean(kept)), "kept": float(np.mean(kept)) / whole}
    return row


def main() -> None:
    """Print a row a file, and the mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="heist-niche")
    parser.add_argument("--pattern", default="*.h5ad")
    args = parser.parse_args()

    import pandas as pd

    import spatialfm as sfm

    sfm.settings.progress = False
    sfm.settings.verbosity = 0
    rows = {}
    for path in sorted(args.data.glob(args.pattern)):
        rows[path.stem] = one(path, args.model)
        print(path.stem, {k: round(v, 4) for k, v in rows[path.stem].items()}, flush=True)
    table = pd.DataFrame(rows).T
    print(pd.concat([table, table.mean().to_frame("mean").T]).round(4).to_string())


if __name__ == "__main__":
    main()
