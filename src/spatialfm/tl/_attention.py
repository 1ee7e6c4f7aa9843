"""Attention of cells to their neighbours, and of genes to genes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from spatialfm._checks import check_positive, checked
from spatialfm._data._adata import get_known_labels, get_obs_categories
from spatialfm._data._expression import ValuesKind
from spatialfm._data._write import check_free, record_params, write
from spatialfm._settings import logger, warn
from spatialfm.tl._type_tests import TypeTests

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

    from spatialfm.engine import Tissue
    from spatialfm.engine._heist import Attention
    from spatialfm.models import HEIST


@checked
def attention(
    adata: AnnData,
    model: str | Path | HEIST = "heist",
    *,
    groupby: str | None = None,
    condition_key: str | None = None,
    library_key: str | None = None,
    layer: str | None = None,
    basis: str = "spatial",
    values: ValuesKind = "auto",
    context_size: int = 256,
    n_permutations: int = 1000,
    key_added: str = "attention",
    rng: int | np.random.Generator | None = 0,
    copy: bool = False,
) -> AnnData | None:
    """Read from a HEIST model which neighbours each cell attends to, and which genes each gene attends to.

    Attention weights are averaged over layers and heads. Cells attend to all cells of their context; the weights on
    neighbours in the tissue graph are kept. Genes attend to their neighbours in the network of the cell's group. With
    ``groupby``, each cell's weights on its neighbours are divided by their sum, averaged over the cells of a type, and
    compared with permutations of the types within slides.

    Attention is what a network used, not an effect of one cell on another. Enrichment mostly reflects which types are
    neighbours; ``log2_over_neighbors`` is what attention adds. The permutations take cells as exchangeable, so small
    p-values are no evidence from independent samples. Conditions are compared between slides, not cells.

    Parameters
    ----------
    %(adata)s
    model
        ``"heist"``, or another model of that architecture: a name, folder, file or model.
    groupby
        Column of ``obs`` with cell types. Cells without one are left out of the results by type, with a warning.
    condition_key
        Column of ``obs`` with the condition of each slide. Needs ``groupby`` and ``library_key``.
    %(library_key)s
    %(layer)s
    %(basis)s
    %(values)s
    context_size
        Cells that are encoded together, as for :func:`spatialfm.tl.embed`.
    n_permutations
        Number of permutations; the smallest p-value is ``1 / (1 + n_permutations)``.
    %(key_added)s
    %(rng)s
    %(copy)s

    Returns
    -------
    ``None``, or the copy. Written, besides missing graphs:

    ``obsp[key_added]``
        (n_obs, n_obs) csr, weight of a cell (row) on each neighbour, of the 1 that it has for its whole context.
    ``uns[key_added]``
        ``cells``: mean weight on neighbours and on the cell itself, and what equal weights would give. ``genes``: for
        each group, a (genes, genes) csr whose rows sum to 1. ``types``: table of each type's mean share of attention on
        each other type, with ``expected`` and ``z`` under permutations, two-sided ``p``, ``fdr`` (Benjamini-Hochberg)
        and the plain share of ``neighbors``. ``differences``: table of the differences between conditions, with Welch's
        t-test over slides. ``model``, ``sha256``, ``params``. See :func:`spatialfm.get.attention_df`.

    Raises
    ------
    KeyError, ValueError
        A field is missing, the model has no attention, or ``condition_key`` differs within a slide.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()[:200].copy()
    >>> sfm.tl.attention(adata, groupby="celltype", n_permutations=99)
    >>> table = sfm.get.attention_df(adata)
    """
    check_free(adata, "tl.attention", {"obsp": [key_added], "uns": [key_added]})
    check_positive("context_size", context_size)
    check_positive("n_permutations", n_permutations)
    if condition_key is not None and (groupby is None or library_key is None):
        msg = (
            f"condition_key={condition_key!r} compares attention between types, with slides as samples; give groupby= "
            f"(groupby={groupby!r}) and library_key= (library_key={library_key!r}) too"
        )
        raise ValueError(msg)

    labels = _read_labels(adata, groupby, condition_key)
    reading = {"library_key": library_key, "layer": layer, "basis": basis, "values": values, "rng": rng}
    found, tissue, networks, run = _attend(adata, model, context_size=context_size, reading=reading)
    condition = _condition_of_slides(labels, tissue, condition_key, library_key)
    if groupby is not None and networks["groupby"] == groupby:
        warn(
            "attention: gene networks were built from the groups of obs[%r], so the model has seen these types; "
            "sfm.pp.grn(adata, groupby='auto') builds networks without labels",
            groupby,
        )

    entry: dict[str, Any] = {
        "model": run["model"],
        "sha256": run["sha256"],
        "params": record_params(
            groupby=groupby,
            condition_key=condition_key,
            library_key=library_key,
            layer=layer,
            basis=basis,
            values=tissue.kind,
            device=run["device"],
            dtype=run["dtype"],
            context_size=int(context_size),
            n_contexts=run["n_contexts"],
            n_permutations=int(n_permutations),
        ),
        "cells": _shares(found, tissue),
        "genes": networks | {"groups": {str(k): weights for k, weights in enumerate(found.genes)}},
    }
    if groupby is not None:
        type_of, names = labels.type[tissue.rows], {"types": labels.types, "conditions": labels.conditions}
        tests = TypeTests(found.cells, type_of, tissue.slide, condition, **names)
        entry["types"] = tests.types(n_permutations=n_permutations, generator=np.random.default_rng(rng))
        if condition_key is not None:
            entry["differences"] = tests.differences()
            _warn_of_single_slides(entry["differences"], key_added)

    own_row = np.argsort(tissue.rows)
    fields = {"obsp": {key_added: found.cells[own_row][:, own_row].tocsr()}, "uns": {key_added: entry}}
    adata = write(adata, "tl.attention", key_added, fields, copy=copy)
    tissue.store_built(adata)
    cells = entry["cells"]
    logger.info(
        "attention: mean attention on neighbours %.3g (uniform: %.3g), on the cell itself %.3g (uniform: %.3g) "
        "-> obsp[%r], uns[%r]",
        *(cells[name] for name in ("on_neighbors", "on_neighbors_uniform", "on_itself", "on_itself_uniform")),
        key_added,
        key_added,
    )
    return adata if copy else None


class _Labels(NamedTuple):
    type: np.ndarray
    """(n_obs,) cell type, -1 where there is none."""
    condition: np.ndarray
    """(n_obs,) condition."""
    types: list[str]
    """Names of the types."""
    conditions: list[str]
    """Names of the conditions."""


class _Attended(NamedTuple):
    weights: Attention
    tissue: Tissue
    networks: dict[str, Any]
    """Genes of the gene networks, names of their groups, and the column of these."""
    run: dict[str, Any]
    """Name and fingerprint of the model, and how it was run."""


def _read_labels(adata: AnnData, groupby: str | None, condition_key: str | None) -> _Labels:
    """Read types and conditions; one condition, ``"all"``, where none is named."""
    types, condition = np.full(adata.n_obs, -1), np.zeros(adata.n_obs, np.int64)
    names, conditions = [], ["all"]
    if groupby is not None:
        effect = "these cells neither attend nor are neighbours in the results by type"
        known = get_known_labels(adata, groupby, name="groupby", effect=effect)
        types, names = known.codes.astype(np.int64), [str(c) for c in known.categories]
    if condition_key is not None:
        given = get_obs_categories(adata, condition_key, name="condition_key")
        condition, conditions = given.codes.astype(np.int64), list(given.categories)
    return _Labels(types, condition, names, conditions)


def _condition_of_slides(
    labels: _Labels, tissue: Tissue, condition_key: str | None, library_key: str | None
) -> np.ndarray:
    """Condition (n,) of each cell of the tissue; raises where a slide has several."""
    condition = labels.condition[tissue.rows]
    mixed = [s for s in np.unique(tissue.slide) if np.ptp(condition[tissue.slide == s])]
    if mixed:
        msg = (
            f"condition_key={condition_key!r}: {len(mixed)} slides of obs[{library_key!r}] hold cells of several "
            "conditions; slides are the samples, so each must have one condition"
        )
        raise ValueError(msg)
    return condition


def _attend(
    adata: AnnData,
    model: str | Path | HEIST,
    *,
    context_size: int,
    reading: dict[str, Any],
) -> _Attended:
    """Run the model and keep its attention; ``reading`` as for ``HEISTEncoder.read``, and ``rng``."""
    from spatialfm.engine import choose_device, choose_dtype, find_encoder
    from spatialfm.models import fingerprint
    from spatialfm.pp._grn import get_networks

    on = choose_device()
    dtype = choose_dtype(None, on)
    options = {"context_size": context_size, "dtype": dtype, "rng": reading.pop("rng")}
    encoder = find_encoder(model, needs="attend", lacks="has no attention", **options)
    tissue = encoder.read(adata, **reading)
    found = encoder.attend(tissue, device=on)
    if not all(np.isfinite(weights.data).all() for weights in (found.cells, *found.genes)):
        msg = f"{encoder.model.name!r} gives attention that is not finite; try another model"
        raise ValueError(msg)
    carrier = tissue.built if "grn" in tissue.built.uns else adata
    networks = {
        "genes": tissue.genes,
        "names": get_networks(carrier)[1],
        "groupby": tissue.network_groups,
    }
    run = {
        "model": encoder.model.name,
        "sha256": fingerprint(encoder.model),
        "device": on.type,
        "dtype": dtype,
        "n_contexts": found.n_contexts,
    }
    return _Attended(found, tissue, networks, run)


def _shares(found: Attention, tissue: Tissue) -> dict[str, float]:
    """Mean share of a cell's attention on its neighbours and on itself, and what equal weights would give."""
    return {
        "on_neighbors": float(found.cells.sum(axis=1).mean()),
        "on_neighbors_uniform": float((np.diff(tissue.graph.indptr) / found.context_sizes).mean()),
        "on_itself": float(found.itself.mean()),
        "on_itself_uniform": float((1 / found.context_sizes).mean()),
    }


def _warn_of_single_slides(differences: pd.DataFrame, key_added: str) -> None:
    if (differences[["n_slides", "n_slides_reference"]].min(axis=1) < 2).all():
        warn(
            "attention: no two conditions have two slides each, so uns[%r]['differences'] has no p-values: "
            "single slides differ from each other in any case",
            key_added,
        )
