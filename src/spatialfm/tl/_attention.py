"""What cells and genes attend to."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from spatialfm._checks import check_positive, checked
from spatialfm._data._adata import get_known_labels, get_obs_categories
from spatialfm._data._expression import ValuesKind
from spatialfm._data._write import check_free, write
from spatialfm._settings import logger, progress, warn

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

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
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int | None = None,
    rng: int | np.random.Generator | None = 0,
    copy: bool = False,
) -> AnnData | None:
    """Read from a HEIST model which neighbours each cell attends to, and which genes each gene attends to.

    Weights are those of the softmax, averaged over layers and heads (their sum, divided by how many there are). A cell attends to all cells of
    its context; what falls on its neighbours in the tissue graph is kept. A gene attends to its neighbours in the network of its cell's group;
    these weights are averaged over the cells of the group.

    With ``groupby``, attention from type to type: each cell's weights on its neighbours are divided by their sum, so that a cell that attends to all
    neighbours alike gives each type its share of the neighbours, and averaged over the cells of a type. That is compared with permuted types: types
    are permuted among all cells of a slide that have a neighbour, the graph and the attention stay.

    **What not to conclude.** An attention weight is what a network used, not an effect of one cell on another. The enrichment holds that of plain
    neighbourhood, which is mostly its larger part: look at ``log2_over_neighbors``, what attention adds to it, and at ``uns[key_added]["cells"]``,
    how far the attention is from uniform. That of the bundled ``"heist"`` is nearly uniform on MERFISH of brain and CODEX of spleen: it moves the share
    of a type by 2 %, the neighbourhood by a factor of 2 to 3 (standard deviations over pairs of types). The permutation takes cells as exchangeable, so small p-values say that types are not mixed, and are no
    evidence from independent samples. Conditions are compared by slides alone, never by cells.

    Parameters
    ----------
    adata
        Cells by features with coordinates in ``obsm[basis]``, as for :func:`spatialfm.tl.embed`. Tissue graph and gene networks are built (without
        labels) and stored where they are missing.
    model
        ``"heist"``, or another model of that architecture: a name, folder, file or model. The default model of ``tl.embed``, ``"heist-niche"``, has no
        attention.
    groupby
        Column of ``obs`` with the cell types; cells without one neither attend nor are neighbours there, with a warning. None: no attention from type to type. Networks that were built from this column
        have shown the model the types; a warning says so.
    condition_key
        Column of ``obs`` with the condition (stage, treatment, age) of each cell's slide; needs ``groupby`` and ``library_key``. Types are tested in each
        condition, and conditions compared.
    library_key
        Column of ``obs`` naming each cell's slide. Permutations stay within slides.
    layer, basis, values, context_size, device, dtype, batch_size
        As for :func:`spatialfm.tl.embed`. ``batch_size`` changes rounding alone.
    n_permutations
        Number of permutations; the smallest p-value is ``1 / (1 + n_permutations)``.
    key_added
        Name of what is written.
    rng
        Seed or generator of the groups, where gene networks are built, and of the permutations.
    copy
        Return a copy instead of writing to ``adata``.

    Returns
    -------
    ``None``, or the copy. Written:

    ``obsp[key_added]``
        csr of float32 (n_obs, n_obs) on the edges of the tissue graph: the weight that a cell (row) gives to its neighbour, of the 1 that it gives to all
        cells of its context. Not symmetric. A row's sum is the share of its attention that lies on neighbours.
    ``uns[key_added]["cells"]``
        Means over cells: ``on_neighbors`` and ``on_itself``, the shares of attention on neighbours and on the cell itself; ``on_neighbors_uniform`` and
        ``on_itself_uniform``, what equal weights for all cells of the context would give.
    ``uns[key_added]["genes"]``
        As in ``uns["grn"]``: ``genes``, ``names`` of the groups, ``groupby``, and ``groups``, for the k-th name under the key ``str(k)`` a csr of float32
        (g, g): the weight that a gene (row) gives to its neighbour, averaged over the cells of the group. A row with a neighbour sums to 1.
    ``uns[key_added]["types"]``
        With ``groupby``. Table, one row for each condition (``"all"`` without ``condition_key``), ``cell_type`` that attends and ``neighbor_type``: ``n_cells`` that
        attend; ``attention``, the mean share of the attention to neighbours that falls on the neighbour type; ``expected``, its exact mean under
        permutations; ``log2_enrichment`` of the two (NaN where nothing falls on it); ``neighbors``, the mean share of the neighbours that are of the
        type; ``log2_over_neighbors``, of ``attention`` to ``neighbors`` (NaN where there are none, or nothing falls on them); ``z``, the difference from expected in standard deviations
        of the permutations (0 where they do not vary); ``p``, two-sided; ``fdr`` (Benjamini-Hochberg over all rows). Pairs that a slide's types cannot make are left out.
    ``uns[key_added]["differences"]``
        With ``condition_key``. Table, one row for each pair of conditions and of types: ``difference``, the mean over slides of ``attention - expected`` in
        ``condition`` less that in ``reference``; ``n_slides``, ``n_slides_reference``, those that have both types; ``p`` of Welch's t-test over slides, NaN unless there are at
        least two of each that differ among themselves; ``fdr`` over the rows that have a p.
    ``uns[key_added]["params"]``, ``["model"]``, ``["sha256"]``
        The arguments, name and fingerprint of the model.
    ``obsp["spatial_connectivities"]``, ``obsp["spatial_distances"]``, ``uns["spatial_neighbors"]``, ``uns["grn"]``, ``obs["grn_group"]``
        Where they were missing.

    Raises
    ------
    KeyError
        A column, ``layer`` or ``obsm[basis]`` does not exist.
    ValueError
        The model has no attention, ``condition_key`` lacks ``groupby`` or ``library_key`` or differs within a slide, weights are not finite, or for the reasons of
        :func:`spatialfm.tl.embed`. ``adata`` is as it was.

    Notes
    -----
    HEIST: Madhu et al. 2025 (`arXiv:2506.11152 <https://arxiv.org/abs/2506.11152>`__), whose figures sum gene attention over layers and heads.
    """
    from spatialfm.engine import attend_tissue, choose_device, choose_dtype, cut_contexts
    from spatialfm.models import HEIST, fingerprint
    from spatialfm.models._registry import take_model
    from spatialfm.pp._grn import get_networks
    from spatialfm.pp._tissue import read_tissue

    check_free(adata, "tl.attention", {"obsp": [key_added], "uns": [key_added]})
    check_positive("context_size", context_size)
    check_positive("batch_size", batch_size, optional=True)
    check_positive("n_permutations", n_permutations)
    place = choose_device(device)
    precision = choose_dtype(dtype, place)
    encoder = take_model(model, HEIST, lacks="has no attention", default="heist")
    if condition_key is not None and (groupby is None or library_key is None):
        msg = (
            f"condition_key={condition_key!r} compares attention between types, with slides as samples; give groupby= (groupby={groupby!r}) and "
            f"library_key= (library_key={library_key!r}) too"
        )
        raise ValueError(msg)
    types = None
    if groupby is not None:
        effect = "these cells neither attend nor are neighbours in what is told of types"
        types = get_known_labels(adata, groupby, name="groupby", effect=effect)
    condition, conditions = np.zeros(adata.n_obs, np.int64), ["all"]
    if condition_key is not None:
        given = get_obs_categories(adata, condition_key, name="condition_key")
        condition, conditions = given.codes.astype(np.int64), list(given.categories)
    tissue = read_tissue(adata, library_key=library_key, layer=layer, basis=basis, values=values, rng=rng)
    condition = condition[tissue.rows]
    of_slide = np.array([np.ptp(condition[tissue.slide == s]) for s in np.unique(tissue.slide)])
    if of_slide.any():
        msg = (
            f"condition_key={condition_key!r}: {np.count_nonzero(of_slide)} slides of obs[{library_key!r}] hold cells of several conditions; slides are the "
            "samples, so each has one condition"
        )
        raise ValueError(msg)
    networks = tissue.built.uns["grn"] if "grn" in tissue.built.uns else adata.uns["grn"]
    _, names, _, _ = get_networks(tissue.built if "grn" in tissue.built.uns else adata)
    if groupby is not None and str(networks["groupby"]) == groupby:
        warn(
            "attention: gene networks were built from the groups of obs[%r], so the model has seen these types; sfm.pp.grn(adata, groupby='auto') "
            "builds networks without labels",
            groupby,
        )
    contexts = cut_contexts(tissue.xy, tissue.graph, tissue.slide, context_size=context_size)
    found = attend_tissue(encoder, tissue, contexts, device=place, dtype=precision, batch_size=batch_size)
    if not all(np.isfinite(m.data).all() for m in (found.cells, *found.genes)):
        msg = f"{encoder.name!r} gives attention that is not finite; try dtype='float32', or another model"
        raise ValueError(msg)
    own_row = np.argsort(tissue.rows)
    entry: dict[str, Any] = {
        "model": encoder.name,
        "sha256": fingerprint(encoder),
        "params": {
            "groupby": groupby or "",
            "condition_key": condition_key or "",
            "library_key": library_key or "",
            "layer": layer or "",
            "basis": basis,
            "values": tissue.kind,
            "device": place.type,
            "dtype": precision,
            "context_size": int(context_size),
            "n_contexts": len(contexts),
            "n_permutations": int(n_permutations),
        },
        "cells": {
            "on_neighbors": float(found.cells.sum(axis=1).mean()),
            "on_neighbors_uniform": float((np.diff(tissue.graph.indptr) / found.seen).mean()),
            "on_itself": float(found.itself.mean()),
            "on_itself_uniform": float((1 / found.seen).mean()),
        },
        "genes": {
            "genes": tissue.genes,
            "names": names,
            "groupby": str(networks["groupby"]),
            "groups": {str(k): m for k, m in enumerate(found.genes)},
        },
    }
    if types is not None:
        labels = [str(c) for c in types.categories]
        codes = types.codes.astype(np.int64)[tissue.rows]
        tests = _TypeTests(found.cells, codes, tissue.slide, condition, (len(labels), len(conditions)))
        entry["types"] = tests.types(
            labels, conditions, n_permutations=n_permutations, generator=np.random.default_rng(rng)
        )
        if condition_key is not None:
            table = entry["differences"] = tests.differences(labels, conditions)
            if (table[["n_slides", "n_slides_reference"]].min(axis=1) < 2).all():
                warn(
                    "attention: no two conditions have two slides each, so uns[%r]['differences'] has no p-values: a difference between single slides "
                    "cannot be told from a difference between any two slides",
                    key_added,
                )

    fields = {"obsp": {key_added: found.cells[own_row][:, own_row].tocsr()}, "uns": {key_added: entry}}
    adata = write(adata, "tl.attention", key_added, fields, copy=copy)
    tissue.store_built(adata)
    cells = entry["cells"]
    logger.info(
        "attention: %.3g of a cell's attention lies on neighbours (uniform: %.3g), %.3g on itself (uniform: %.3g) -> obsp[%r], uns[%r]",
        cells["on_neighbors"], cells["on_neighbors_uniform"], cells["on_itself"], cells["on_itself_uniform"], key_added, key_added,
    )  # fmt: skip
    return adata if copy else None


class _TypeTests:
    """Attention from type to type, over cells in canonical order, slide by slide."""

    def __init__(
        self,
        weights: sp.csr_matrix,
        codes: np.ndarray,
        slide: np.ndarray,
        condition: np.ndarray,
        shape: tuple[int, int],
    ) -> None:
        """``codes``: types, -1 where there is none; ``shape``: numbers of types and of conditions."""
        edges = weights.tocoo()
        real = (edges.row != edges.col) & (edges.data > 0) & (codes[edges.row] >= 0) & (codes[edges.col] >= 0)
        degree = np.bincount(edges.row[real], minlength=len(codes))
        # Cells without a type or a neighbour take no part, neither attending nor in the permutations.
        known = np.flatnonzero(degree)
        position = np.cumsum(degree > 0) - 1
        self.row, self.column = position[edges.row[real]], position[edges.col[real]]
        mass = edges.data[real].astype(np.float64)
        self.share = mass / np.bincount(self.row, mass)[self.row]
        self.plain = 1 / degree[known][self.row]
        self.codes, self.slide, self.condition = codes[known], slide[known], condition[known]
        self.n_types, self.n_conditions = shape
        self.n_slides = int(slide.max()) + 1

    def types(
        self, labels: list[str], conditions: list[str], *, n_permutations: int, generator: np.random.Generator
    ) -> pd.DataFrame:
        """Test each pair of types in each condition."""
        from scipy.stats import false_discovery_control

        n_cells, expected = self._expected(self.condition, self.n_conditions)
        attention, neighbors = (
            self._mean(self.codes, self.condition, n_cells, values) for values in (self.share, self.plain)
        )
        slides = [np.flatnonzero(self.slide == s) for s in np.unique(self.slide)]
        deviation = np.abs(attention - expected) - 1e-9  # ties count, whatever the rounding of the sums
        extreme, square = np.zeros(expected.shape, np.int64), np.zeros(expected.shape)
        permuted = np.empty_like(self.codes)
        for _ in progress(range(n_permutations), desc="permutations"):
            for members in slides:
                permuted[members] = generator.permutation(self.codes[members])
            change = self._mean(permuted, self.condition, n_cells, self.share) - expected
            extreme += ~(np.abs(change) < deviation)
            square += change**2
        sd = np.sqrt(square / n_permutations)
        c, a, b = np.nonzero(expected > 0)
        here = c, a, b
        more, sd = (attention - expected)[here], sd[here]
        table = {
            "condition": pd.Categorical.from_codes(c, categories=conditions),
            "cell_type": pd.Categorical.from_codes(a, categories=labels),
            "neighbor_type": pd.Categorical.from_codes(b, categories=labels),
            "n_cells": n_cells[c, a],
            "attention": attention[here],
            "expected": expected[here],
            "log2_enrichment": _log2(attention[here], expected[here]),
            "neighbors": neighbors[here],
            "log2_over_neighbors": _log2(attention[here], neighbors[here]),
            "z": np.divide(more, sd, out=np.zeros_like(sd), where=sd > 1e-12),
            "p": (1 + extreme[here]) / (1 + n_permutations),
        }
        return _named(pd.DataFrame(table).assign(fdr=lambda t: false_discovery_control(t["p"]) if len(t) else t["p"]))

    def differences(self, labels: list[str], conditions: list[str]) -> pd.DataFrame:
        """Compare each pair of conditions, slides being the samples."""
        from scipy.stats import false_discovery_control, ttest_ind

        n_cells, expected = self._expected(self.slide, self.n_slides)
        excess = self._mean(self.codes, self.slide, n_cells, self.share) - expected
        excess[~(expected > 0)] = np.nan
        of_slide = np.full(self.n_slides, -1)
        of_slide[self.slide] = self.condition
        rows = []
        for reference, other in combinations(range(len(conditions)), 2):
            for a, b in np.ndindex(len(labels), len(labels)):
                x, y = (v[np.isfinite(v)] for v in (excess[of_slide == k, a, b] for k in (other, reference)))
                if not len(x) or not len(y):
                    continue
                # What is left by rounding where slides do not differ is no spread to compare with.
                tested = min(len(x), len(y)) > 1 and max(np.ptp(x), np.ptp(y)) > 1e-9
                p = float(ttest_ind(x, y, equal_var=False).pvalue) if tested else np.nan
                rows.append((other, reference, a, b, x.mean() - y.mean(), len(x), len(y), p))
        columns = ["condition", "reference", "cell_type", "neighbor_type", "difference", "n_slides", "n_slides_reference", "p"]  # fmt: skip
        table = pd.DataFrame(rows, columns=columns)
        for name, categories in zip(columns, (conditions, conditions, labels, labels), strict=False):
            table[name] = pd.Categorical.from_codes(table[name].to_numpy(dtype=np.int64), categories=categories)
        p = table["p"].to_numpy(dtype=np.float64)
        fdr = np.full(len(p), np.nan)
        if np.isfinite(p).any():
            fdr[np.isfinite(p)] = false_discovery_control(p[np.isfinite(p)])
        return _named(table.assign(p=p, fdr=fdr))

    def _mean(self, codes: np.ndarray, part: np.ndarray, n_cells: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Mean over the cells of each part and type of the edges' values on each type: (parts, types, types), NaN where there is no such cell."""
        n_parts, t = n_cells.shape
        index = ((part * t + codes)[self.row]) * t + codes[self.column]
        sums = np.bincount(index, values, minlength=n_parts * t * t).reshape(n_parts, t, t)
        return np.divide(sums, n_cells[..., None], out=np.full(sums.shape, np.nan), where=n_cells[..., None] > 0)

    def _expected(self, part: np.ndarray, n_parts: int) -> tuple[np.ndarray, np.ndarray]:
        """Cells of each part and type (parts, types), and the exact mean of :meth:`_mean` under permutations within slides; parts hold whole slides."""
        t = self.n_types
        n_cells = np.bincount(part * t + self.codes, minlength=n_parts * t).reshape(n_parts, t)
        sums = np.zeros((n_parts, t, t))
        for s in np.unique(self.slide):
            here = self.slide == s
            count = np.bincount(self.codes[here], minlength=t)
            # Each row sums to 1; the neighbour is any of the other cells.
            sums[part[here][0]] += count[:, None] * (count - np.eye(t)) / (count.sum() - 1)
        return n_cells, np.divide(sums, n_cells[..., None], out=np.zeros_like(sums), where=n_cells[..., None] > 0)


def _log2(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Logarithm of the ratio, NaN where one of them is 0."""
    return np.log2(np.divide(a, b, out=np.full(a.shape, np.nan), where=(a > 0) & (b > 0)))


def _named(table: pd.DataFrame) -> pd.DataFrame:
    table.index = table.index.astype(str)
    return table
