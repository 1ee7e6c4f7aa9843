"""Runs another method in the environment it is installed in, for `peers.py`.

``python _peers_worker.py METHOD IN.h5ad OUT.npz SETTINGS``

The file has log-scale values, ``var["highly_variable"]``, coordinates and ``obs["slide"]``; spatialfm
need not be installed here.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import warnings
from importlib.metadata import version
from typing import Any

import anndata as ad
import numpy as np


def banksy(adata: ad.AnnData, settings: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Principal components of BANKSY's matrix, one for each lambda; slides stand apart."""
    import matplotlib as mpl

    mpl.use("Agg")
    from banksy.embed_banksy import generate_banksy_matrix
    from banksy.initialize_banksy import initialize_banksy
    from sklearn.decomposition import PCA

    start = time.perf_counter()
    adata = adata[:, adata.var["highly_variable"]].copy()
    decay = "scaled_gaussian"
    plots = dict.fromkeys(("plt_edge_hist", "plt_nbr_weights", "plt_agf_angles", "plt_theta"), False)
    found = initialize_banksy(
        adata, ("x", "y", "spatial"), settings["neighbors"], nbr_weight_decay=decay, max_m=1, **plots
    )
    lambdas = settings["lambda"]
    found, _ = generate_banksy_matrix(adata, found, list(lambdas.values()), max_m=1, verbose=False)
    result = {}
    for kind, weight in lambdas.items():
        x = np.nan_to_num(np.asarray(found[decay][weight]["adata"].X))
        n = min(settings["components"], *np.subtract(x.shape, 1))
        result[kind] = PCA(n, random_state=0).fit_transform(x)
    # Two embeddings were made; the time is of one.
    seconds = (time.perf_counter() - start) / len(lambdas)
    return result, {"seconds": seconds, "versions": {"pybanksy": version("pybanksy")}}


def novae(adata: ad.AnnData, settings: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Novae trained on this file alone, by its own schedule, without early stopping, for so many minutes at most."""
    # numba code of novae resets torch's number of threads to numba's; two threads on busy cores take 5 times as long.
    os.environ["NUMBA_NUM_THREADS"] = "1"
    import lightning
    import novae
    import torch

    class Record(lightning.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            losses.append(float(trainer.callback_metrics["train/loss_epoch"]))

    lightning.seed_everything(0)
    torch.set_num_threads(1)
    losses: list[float] = []
    start = time.perf_counter()
    slide = "slide" if adata.obs["slide"].nunique() > 1 else None
    novae.spatial_neighbors(adata, slide_key=slide, radius=settings["radius"])
    hops = settings["hops of spots" if settings["spots"] else "hops of cells"]
    # It starts from principal components where there are fewer of them than features.
    size = min(100, int(adata.var["highly_variable"].sum()) - 1)
    model = novae.Novae(adata, embedding_size=size, n_hops_local=hops, n_hops_view=hops)
    per_epoch = max(1, adata.n_obs // model.hparams.batch_size)
    epochs = max(settings["epochs"], -(-settings["steps"] // per_epoch))
    model.fit(
        max_epochs=epochs,
        patience=epochs,
        max_time={"minutes": settings["minutes"]},
        callbacks=[Record()],
        enable_progress_bar=False,
    )
    steps, trained = model.trainer.global_step, time.perf_counter() - start
    model.compute_representations()
    about = {
        "seconds": time.perf_counter() - start,
        "training_seconds": trained,
        "versions": {p: version(p) for p in ("novae", "torch", "lightning")},
        "epochs": len(losses),
        "steps": steps,
        "schedule": epochs * len(model.datamodule.train_dataloader()),
        "loss": [losses[0], losses[-1]],
        "domains": int(adata.obs["novae_leaves"].nunique()),
        "without neighborhood": int(adata.obs["novae_leaves"].isna().sum()),
    }
    z = np.asarray(adata.obsm["novae_latent"], np.float32)
    return {"cell": z, "niche": z}, about


def main() -> None:
    """Run it; what the peers print goes to stderr."""
    warnings.simplefilter("ignore")
    method, source, target, settings = sys.argv[1:]
    with contextlib.redirect_stdout(sys.stderr):
        found, about = {"banksy": banksy, "novae": novae}[method](ad.read_h5ad(source), json.loads(settings))
    np.savez(target, about=json.dumps(about), **found)


if __name__ == "__main__":
    main()
