"""Pretraining of HEIST in one process."""

from __future__ import annotations

import math
import subprocess
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from spatialfm._settings import logger, settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData

    from spatialfm.engine import Context
    from spatialfm.models import HEIST, HEISTConfig
    from spatialfm.pp._tissue import Tissue


@dataclass
class _Slide:
    """A slide ready for training."""

    name: str
    tissue: Tissue
    train: list[Context]
    held_out: list[Context]
    radius: float
    scale: float
    source: dict[str, str] = field(default_factory=dict)


def pretrain(
    slides: Mapping[str, AnnData | str | Path] | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    config: HEISTConfig | None = None,
    max_steps: int = 2000,
    max_minutes: float | None = None,
    context_size: int = 192,
    cells_per_step: int = 192,
    n_genes: int = 48,
    mask: float = 0.2,
    learning_rate: float = 5e-4,
    weight_decay: float = 3e-3,
    warmup: int = 50,
    held_out: float = 0.05,
    validate_every: int = 100,
    patience: int = 10,
    library_key: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    rng: int = 0,
) -> HEIST:
    """Pretrain HEIST on tissues of any panel, by its three objectives (see :mod:`spatialfm.train._objectives`).

    Each step reads neighbouring contexts of one slide, with a fresh sample of the genes of its networks; slides are drawn in proportion to
    the square root of their cells, so that a large one does not drown the others. Networks come from groups found without labels. AdamW with
    a linear warm-up and a cosine decay, gradients clipped to norm 1. Every ``validate_every`` steps the loss of the held-out contexts is
    taken, always under the same masks; training stops after ``patience`` such looks without a better one, and the best weights are kept.

    Parameters
    ----------
    slides
        Paths of ``.h5ad`` files, or a mapping of names to AnnData or paths. Coordinates in ``obsm["spatial"]``.
    out
        Folder for the weights, the config and the training record; nothing is written where None.
    config
        Shape of the model; the published one where None.
    max_steps, max_minutes
        Where training ends at the latest. The learning rate follows whichever of the two is nearer its end.
    context_size, cells_per_step
        Cells of a context, and of a step.
    n_genes
        Genes of a step, drawn from the slide's networks. HEIST has no gene vocabulary, so weights serve any number.
    mask
        Share of cells whose coordinates, and of expressed genes whose values, are hidden.
    learning_rate, weight_decay, warmup
        Of AdamW; ``warmup`` in steps. The paper's rate of 1e-3 proved too high for steps of so few cells.
    held_out
        Share of each slide's contexts kept for validation.
    validate_every, patience
        See above.
    library_key
        Column of ``obs`` naming the slide of a cell, where a file holds several.
    device, dtype
        As for :func:`spatialfm.tl.embed`. Weights and optimiser stay float32.
    rng
        Seed of everything drawn.

    Returns
    -------
    The model in evaluation mode on the CPU, its ``record`` a dictionary: data with licences, config, arguments, loss curve, cost.

    Raises
    ------
    ValueError
        An argument out of range, or a slide whose loss is not finite; the message names the slide.
    """
    import torch

    from spatialfm.engine import choose_device, choose_dtype, make_batch, network_edges
    from spatialfm.models import HEIST, HEISTConfig, save
    from spatialfm.train._objectives import losses

    for name, value, least in (("max_steps", max_steps, 1), ("context_size", context_size, 8), ("n_genes", n_genes, 2)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            msg = f"{name} must be an integer of at least {least}, got {value!r}"
            raise ValueError(msg)
    for name, share in (("mask", mask), ("held_out", held_out)):
        if not 0 < share < 1:
            msg = f"{name} must lie between 0 and 1, got {share!r}"
            raise ValueError(msg)
    place = choose_device(device)
    precision = choose_dtype(dtype, place)
    random = np.random.default_rng(rng)
    torch.manual_seed(rng)
    data = _read_slides(slides, library_key, context_size, held_out, random)
    model = HEIST(config or HEISTConfig()).to(place).train()
    with torch.no_grad():
        # The decoder sums over neighbours three times, so at torch's scale its first outputs would be thousands.
        for name, weight in model.decoder.layers.named_parameters():
            if name.endswith("linear.weight"):
                weight.mul_(0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    edges = [network_edges(s.tissue.networks, place) for s in data]
    shares = np.sqrt([len(s.tissue.rows) for s in data])
    shares /= shares.sum()

    def one_batch(k: int, contexts: list[Context], random: np.random.Generator) -> Any:
        n_panel = len(data[k].tissue.genes)
        genes = np.sort(random.permutation(n_panel)[:n_genes])
        return make_batch(data[k].tissue, contexts, _subnetworks(edges[k], genes, n_panel), place, genes)

    def objectives(k: int, batch: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
        parts = losses(
            model,
            batch,
            mask=mask,
            radius=data[k].radius,
            scale=data[k].scale,
            n_pair_genes=4,
            dtype=precision,
            generator=generator,
        )
        if not bool(parts["loss"].isfinite()):
            found = {name: float(v.detach()) for name, v in parts.items()}
            msg = f"slide {data[k].name!r} gives a loss that is not finite ({found}); look at its values, or lower learning_rate"
            raise ValueError(msg)
        return parts

    def validate() -> float:
        model.eval()
        total = []
        with torch.no_grad():
            for k, slide in enumerate(data):
                fixed = np.random.default_rng(k)
                generator = torch.Generator().manual_seed(k)
                contexts = slide.held_out[:4]
                total.append(float(objectives(k, one_batch(k, contexts, fixed), generator)["loss"]))
        model.train()
        return float(np.mean(total))

    curve: list[dict[str, float]] = []
    best, best_state, best_step, since = math.inf, None, 0, 0
    generator = torch.Generator().manual_seed(rng)
    start = time.monotonic()
    n_cells = 0
    recent: list[dict[str, float]] = []
    from tqdm.auto import tqdm

    bar = tqdm(total=max_steps, desc="pretraining", unit="step", disable=not settings.progress)
    with bar:
        for step in range(1, max_steps + 1):
            minutes = (time.monotonic() - start) / 60
            done = max(step / max_steps, 0.0 if max_minutes is None else min(1.0, minutes / max_minutes))
            rate = learning_rate * min(1.0, step / max(1, warmup)) * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
            for group in optimizer.param_groups:
                group["lr"] = rate
            k = int(random.choice(len(data), p=shares))
            contexts = _neighboring(data[k].train, cells_per_step, random)
            batch = one_batch(k, contexts, random)
            optimizer.zero_grad(set_to_none=True)
            parts = objectives(k, batch, generator)
            parts["loss"].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            n_cells += len(batch.coords)
            recent.append({name: float(v.detach()) for name, v in parts.items()})
            bar.update()
            bar.set_postfix(loss=f"{recent[-1]['loss']:.3f}", refresh=False)
            last = step == max_steps or (max_minutes is not None and minutes >= max_minutes)
            if step % validate_every == 0 or last:
                now = validate()
                curve.append(
                    {"step": step, "minutes": round((time.monotonic() - start) / 60, 2), "held_out_loss": now}
                    | {name: float(np.mean([r[name] for r in recent])) for name in recent[0]}
                )
                logger.info(
                    "step %d: held-out loss %.4f, %s",
                    step,
                    now,
                    {n: round(v, 3) for n, v in curve[-1].items() if n in parts},
                )
                recent = []
                since += 1
                if now < best:
                    best, best_step, since = now, step, 0
                    best_state = {name: v.detach().cpu().clone() for name, v in model.state_dict().items()}
                if last or since >= patience:
                    break
    if best_state is not None:
        model.load_state_dict(best_state)
    model = model.eval().cpu()
    model.record = {
        "data": [{"name": s.name, "cells": len(s.tissue.rows), "genes": len(s.tissue.genes), "groups": len(s.tissue.networks), **s.source} for s in data],
        "config": asdict(model.config),
        "arguments": {
            "max_steps": max_steps, "max_minutes": max_minutes, "context_size": context_size, "cells_per_step": cells_per_step, "n_genes": n_genes,
            "mask": mask, "learning_rate": learning_rate, "weight_decay": weight_decay, "warmup": warmup, "held_out": held_out, "rng": rng,
            "device": place.type, "dtype": precision,
        },
        "best_step": best_step,
        "held_out_loss": best,
        "cells_seen": n_cells,
        "minutes": round((time.monotonic() - start) / 60, 1),
        "version": version("spatialfm"),
        "commit": _commit(),
        "curve": curve,
    }  # fmt: skip
    if out is not None:
        save(model, out)
    return model


def _read_slides(
    slides: Any, library_key: str | None, context_size: int, held_out: float, random: np.random.Generator
) -> list[_Slide]:
    from anndata import read_h5ad

    from spatialfm.engine import cut_contexts
    from spatialfm.pp._tissue import read_tissue

    named = dict(slides) if hasattr(slides, "items") else {Path(p).stem: p for p in slides}
    if not named:
        msg = "slides is empty; give paths of .h5ad files, or a mapping of names to AnnData"
        raise ValueError(msg)
    data = []
    for name, slide in named.items():
        adata = read_h5ad(slide) if isinstance(slide, str | Path) else slide
        try:
            tissue = read_tissue(adata, library_key=library_key)
        except (KeyError, ValueError) as error:
            msg = f"slide {name!r}: {error}"
            raise ValueError(msg) from error
        contexts = cut_contexts(tissue.xy, tissue.graph, tissue.slide, context_size=context_size, halo=0)
        if len(contexts) < 2:
            msg = f"slide {name!r} has {len(tissue.rows)} cells; at least {context_size + 1} are needed (or a smaller context_size)"
            raise ValueError(msg)
        hidden = set(random.permutation(len(contexts))[: max(1, round(held_out * len(contexts)))].tolist())
        source = {
            key: str(v)
            for key, v in dict(adata.uns.get("source", {})).items()
            if key in ("citation", "license", "technology", "tissue")
        }
        data.append(
            _Slide(
                name=name,
                tissue=tissue,
                train=[c for i, c in enumerate(contexts) if i not in hidden],
                held_out=[c for i, c in enumerate(contexts) if i in hidden],
                radius=_radius(tissue),
                scale=_scale(tissue),
                source=source,
            )
        )
    return data


def _commit() -> str:
    """Commit of the source this runs from; empty where it is no checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _radius(tissue: Tissue) -> float:
    """Three median edges of the tissue graph, in standardised coordinates: a cell's neighbourhood of some 20 to 30 cells."""
    i, j = tissue.graph.nonzero()
    return 3 * float(np.median(np.linalg.norm(tissue.coords[i] - tissue.coords[j], axis=1))) if len(i) else 1.0


def _scale(tissue: Tissue) -> float:
    """Root mean square of the expressed values."""
    x = tissue.expression.data if sp.issparse(tissue.expression) else tissue.expression[tissue.expression != 0]
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64)))) if x.size else 1.0


def _neighboring(contexts: list[Context], n_cells: int, random: np.random.Generator) -> list[Context]:
    """Contexts of about ``n_cells`` in all, that follow each other in the cut and so lie side by side."""
    start = int(random.integers(len(contexts)))
    chosen: list[Context] = []
    while sum(len(c.cells) for c in chosen) < n_cells and len(chosen) < len(contexts):
        chosen.append(contexts[(start + len(chosen)) % len(contexts)])
    return chosen


def _subnetworks(edges: list[Any], genes: np.ndarray, n_panel: int) -> list[Any]:
    """Networks among the chosen genes, renumbered."""
    import torch

    position = torch.full((n_panel,), -1)
    position[torch.from_numpy(genes)] = torch.arange(len(genes))
    position = position.to(edges[0].device)
    inner = [position[e] for e in edges]
    return [e[:, (e >= 0).all(0)] for e in inner]
