"""Reading of the slides to train on."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from anndata import AnnData, read_h5ad, read_zarr

from spatialfm._settings import progress
from spatialfm.engine import cut_contexts, torch_threads
from spatialfm.train._recipe import Slide

if TYPE_CHECKING:
    from spatialfm.engine import Tissue
    from spatialfm.train._recipe import Recipe

_READERS = {".h5ad": read_h5ad, ".zarr": read_zarr}


def read_slides(
    slides: Mapping[str, AnnData | str | Path] | Sequence[str | Path] | str | Path,
    recipe: Recipe,
    *,
    context_size: int,
    held_out: float | str | Sequence[str],
    seed: int,
    reading: dict[str, Any],
) -> list[Slide]:
    """Read, check, prepare and cut all slides; errors name the slide. ``reading`` is passed to ``recipe.read``."""
    named = _name(slides)
    share = held_out if isinstance(held_out, int | float) else 0.0
    kept = [] if share else [held_out] if isinstance(held_out, str) else list(held_out)  # type: ignore[arg-type]
    for name in kept:
        if name not in named:
            near = difflib.get_close_matches(name, named, cutoff=0)
            msg = f"held_out has a slide {name!r} that does not exist; did you mean one of {near}?"
            raise ValueError(msg)
    if set(kept) == set(named):
        msg = f"held_out={kept} leaves no slide to train on"
        raise ValueError(msg)
    data = []
    for k, (name, slide) in enumerate(progress(named.items(), desc="reading slides", total=len(named), unit="slide")):
        # Reading files may raise any error of the libraries.
        try:
            adata = slide if isinstance(slide, AnnData) else _READERS[Path(slide).suffix](slide)
            held_out_here = share or float(name in kept)
            data.append(
                read_slide(
                    name,
                    adata,
                    recipe,
                    context_size=context_size,
                    held_out=held_out_here,
                    seed=[seed, k],
                    reading=reading,
                )
            )
        except Exception as error:
            msg = f"slide {name!r}: {error.args[0] if isinstance(error, KeyError) and error.args else error}"
            raise ValueError(msg) from error
    return data


def read_slide(
    name: str,
    adata: AnnData,
    recipe: Recipe,
    *,
    context_size: int,
    held_out: float,
    seed: Sequence[int],
    reading: dict[str, Any],
) -> Slide:
    """Read one slide; a share ``held_out`` of its contexts (0: none, 1: all) is kept for validation."""
    # numba may change the number of threads of torch, on which the rounding of sums depends.
    with torch_threads():
        tissue = recipe.read(adata, **reading)
    contexts = cut_contexts(tissue.xy, tissue.graph, tissue.slide, context_size=context_size, halo=recipe.halo)
    if 0 < held_out < 1 and len(contexts) < 2:
        msg = f"it has {len(tissue.rows)} cells; at least {context_size + 1} are needed (or a smaller context_size)"
        raise ValueError(msg)
    order = np.random.default_rng(seed).permutation(len(contexts))
    n_hidden = max(round(held_out * len(contexts)), held_out > 0)
    source = {
        key: str(v)
        for key, v in dict(adata.uns.get("source", {})).items()
        if key in ("citation", "license", "technology", "tissue")
    }
    facts = {"name": name, "cells": len(tissue.rows), "genes": len(tissue.genes), "groups": len(tissue.networks)}
    return Slide(
        name,
        # Without `built`, which holds every gene of the file.
        recipe.prepare(replace(tissue, built=AnnData())),
        [contexts[i] for i in np.sort(order[n_hidden:])],
        [contexts[i] for i in np.sort(order[:n_hidden])],
        facts | source,
        _digest(tissue),
    )


def _name(slides: Any) -> dict[str, AnnData | str | Path]:
    """List slides by name, with the files of folders."""
    if isinstance(slides, Mapping):
        named = dict(slides)
    else:
        paths: list[Path] = []
        for path in [slides] if isinstance(slides, str | Path) else slides:
            path = Path(path)
            inside = path.is_dir() and path.suffix not in _READERS
            paths += sorted(p for p in path.iterdir() if p.suffix in _READERS) if inside else [path]
            if inside and (not paths or paths[-1].parent != path):
                msg = f"the folder {str(path)!r} has no {' or '.join(_READERS)} files"
                raise ValueError(msg)
        named = {}
        for path in paths:
            if path.stem in named:
                msg = (
                    f"{str(named[path.stem])!r} and {str(path)!r} would both be called {path.stem!r}; "
                    "pass a mapping of names to paths"
                )
                raise ValueError(msg)
            named[path.stem] = path
    if not named:
        msg = "slides is empty; pass paths of .h5ad or .zarr files, folders of them, or a mapping of names to AnnData"
        raise ValueError(msg)
    for name, slide in named.items():
        if isinstance(slide, AnnData):
            continue
        if not Path(slide).exists() or Path(slide).suffix not in _READERS:
            why = "ends in neither " + " nor ".join(_READERS) if Path(slide).exists() else "does not exist"
            msg = f"slide {name!r}: {str(slide)!r} {why}"
            raise ValueError(msg)
    return named


def _digest(tissue: Tissue) -> str:
    """Hash of the cells, which does not depend on their order in the file."""
    digest = hashlib.sha256(np.ascontiguousarray(tissue.xy).tobytes())
    x = tissue.expression
    image = getattr(tissue, "image", None)
    if image is not None:
        digest.update(np.ascontiguousarray(image).tobytes())
    for part in (x.data, x.indices, x.indptr) if sp.issparse(x) else (np.ascontiguousarray(x),):
        digest.update(part.tobytes())
    return digest.hexdigest()[:16]
