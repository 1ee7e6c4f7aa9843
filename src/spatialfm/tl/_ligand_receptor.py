"""Ligands and receptors of neighbouring cells."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp

from spatialfm._checks import check_choice, check_positive, checked
from spatialfm._data._adata import get_coordinates, get_known_labels, get_libraries, slide_codes
from spatialfm._data._expression import ValuesKind, location_order
from spatialfm._data._genes import ORGANISMS, feature_names
from spatialfm._data._write import check_free, record_params, write
from spatialfm._settings import logger
from spatialfm.pp._spatial_neighbors import find_graph
from spatialfm.tl._pairs import find_pairs, read_levels

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from anndata import AnnData

    from spatialfm.engine import Encoder, Tissue
    from spatialfm.models import Model
    from spatialfm.tl._edge_sums import Edges
    from spatialfm.tl._edge_tests import NullResult
    from spatialfm.tl._pairs import Pairs


@checked
def ligand_receptor(
    adata: AnnData,
    groupby: str,
    *,
    pairs: pd.DataFrame | Iterable[tuple[str, str]] | None = None,
    organism: Literal["auto", "human", "mouse"] = "auto",
    gene_column: str | None = None,
    layer: str | None = None,
    values: ValuesKind = "auto",
    model: str | Path | Model | None = None,
    library_key: str | None = None,
    region_key: str | None = None,
    neighbors_key: str = "spatial_neighbors",
    basis: str = "spatial",
    min_fraction: float = 0.1,
    min_edges: int = 20,
    n_permutations: int = 100_000,
    key_added: str = "ligand_receptor",
    rng: int | np.random.Generator | None = 0,
    copy: bool = False,
) -> AnnData | None:
    """Score ligand-receptor pairs between neighbouring cells, and test them by permutation.

    The score of a pair between two cell types is the mean, over the edges of the tissue graph from the first type to
    the second, of the geometric mean of the ligand in the sender and the receptor in the receiver. Two tests permute
    profiles: ``specific`` among all cells of a slide (small p-values: these types express the pair), ``local`` among
    cells of the same type, slide and region (small p-values: the pair is higher where the two types touch). P-values
    hold for this tissue, not for other animals or patients, and do not show that a signal is sent.

    Parameters
    ----------
    %(adata)s
    groupby
        Column of ``obs`` with cell types. Cells without one are left out, with a warning.
    pairs
        Tuples ``(ligand, receptor)``, or a table whose first two columns they are; ``_`` joins the subunits of a
        complex. By default the consensus of LIANA (Dimitrov et al. 2022): 4,620 pairs in human, 3,989 in mouse.
    organism
        Organism of the genes; recognised from their names where ``"auto"``.
    %(gene_column)s
    %(layer)s
    %(values)s
    model
        Also write ``embedding_score``, which is not tested: by ``"heist"`` the cosine of the embeddings of ligand and
        receptor, by ``"heist-niche"`` the score of the expression that the model smoothed over neighbours.
    %(library_key)s
    region_key
        Column of ``obs`` with tissue regions, so that differences between regions give no ``local`` hits.
    %(neighbors_key)s
    %(basis)s
    min_fraction
        Least fraction of the sending cells with the ligand, and of the receiving cells with the receptor.
    min_edges
        Least number of edges between two types.
    n_permutations
        Largest number of permutations. A test ends when 20 have reached its score (Besag & Clifford 1991), and all end
        when they settle which tests have a false discovery rate of at most 0.05.
    %(key_added)s
    %(rng)s
    %(copy)s

    Returns
    -------
    ``None``, or the copy. Written are a missing tissue graph and ``uns[key_added]``: ``table``, a row for each test
    (``ligand``, ``receptor``, ``source``, ``target``, ``n_edges``, ``score``; of both nulls exact z-scores ``z_*``,
    one-sided p-values ``p_*``, Benjamini-Hochberg ``fdr_*``); ``n_permutations`` made and ``n_undecided`` tests of both
    nulls; ``n_pairs`` measured, of ``n_defined``; ``params``.

    Raises
    ------
    KeyError, ValueError
        A field is missing, no pair can be tested, values are z-scores or not finite, or an argument is out of range.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()
    >>> sfm.tl.ligand_receptor(adata, "celltype", library_key="mouse_id", n_permutations=99)
    >>> top = sfm.get.ligand_receptor_df(adata).head(3)
    """
    from spatialfm.tl._edge_tests import FDR, EdgeTests

    check_free(adata, "tl.ligand_receptor", {"uns": [key_added]})
    check_choice("organism", organism, ("auto", *ORGANISMS))
    check_positive("min_edges", min_edges)
    check_positive("n_permutations", n_permutations)
    if not 0 <= min_fraction <= 1:
        msg = f"min_fraction={min_fraction!r} must be between 0 and 1"
        raise ValueError(msg)
    encoder = None if model is None else _find_encoder(model, neighbors_key)

    labels = _read_labels(adata, groupby, region_key, library_key)
    names = [str(v) for v in feature_names(adata, gene_column)]
    found = find_pairs(names, pairs, None if organism == "auto" else organism)
    levels, kind, measured = read_levels(adata, layer, values, get_libraries(adata, library_key))
    found = found.measured_in(measured)
    neighbors = find_graph(adata, neighbors_key=neighbors_key, basis=basis, library_key=library_key)
    # Cells sorted by location and content, so that permutations do not depend on the order of the rows.
    order = location_order(levels, np.column_stack([labels.slide, get_coordinates(adata, basis)]))
    labels = labels.at(order)
    tissue = _Tissue(order, levels[order], neighbors.edges[order][:, order], labels.known)
    labels = labels.at(labels.known)

    tests = _choose_tests(found, tissue, labels, min_fraction, min_edges)
    sums = EdgeTests(tests.edges, *_counted_levels(found, tissue), tests.rows)
    columns = {"n_edges": tests.n_edges, "score": sums.observed / tests.n_edges}
    embedding = None
    if encoder is not None:
        reading = {"library_key": library_key, "layer": layer, "basis": basis, "values": values}
        embedding = _embedding_scores(adata, encoder, found, tissue, labels, tests, reading)
        columns["embedding_score"] = embedding.scores
    seeds = np.random.default_rng(rng).integers(2**63, size=(n_permutations, 2)).T
    nulls = {
        "specific": sums.against(labels.slide, seeds[0], name="specific"),
        "local": sums.against(labels.strata, seeds[1], name="local"),
    }

    entry = {
        "table": _table(found, labels, tests, columns, nulls),
        "n_pairs": len(found.ligand),
        "n_defined": found.n_defined,
        "n_permutations": {name: null.n_permutations for name, null in nulls.items()},
        "n_undecided": {name: null.n_undecided for name, null in nulls.items()},
        "params": record_params(
            groupby=groupby,
            pairs="consensus" if pairs is None else "given",
            organism=found.organism,
            gene_column=gene_column,
            layer=layer,
            values=kind,
            library_key=library_key,
            region_key=region_key,
            neighbors_key=neighbors_key,
            min_fraction=float(min_fraction),
            min_edges=int(min_edges),
            n_permutations=int(n_permutations),
            model=None if embedding is None else embedding.model,
        ),
    }
    adata = write(adata, "tl.ligand_receptor", key_added, {"uns": {key_added: entry}}, copy=copy)
    neighbors.store(adata)
    if embedding is not None and embedding.tissue is not None:
        embedding.tissue.store_built(adata)
    logger.info(
        "ligand_receptor: %d of %d pairs are measured, %d tests of pairs between types of obs[%r], fdr <= %g: %s "
        "-> uns[%r]",
        len(found.ligand), found.n_defined, len(tests.rows), groupby, FDR, _summary(nulls), key_added,
    )  # fmt: skip
    return adata if copy else None


class _Labels(NamedTuple):
    """Labels of cells as numbers, -1 where there is none."""

    type: np.ndarray
    """(n,) cell type."""
    region: np.ndarray
    """(n,) region; the type where there are no regions."""
    slide: np.ndarray
    """(n,) slide."""
    types: list[str]
    """Names of the types."""
    n_regions: int

    @property
    def known(self) -> np.ndarray:
        """Cells (n,) that have a type and a region."""
        return (self.type >= 0) & (self.region >= 0)

    @property
    def strata(self) -> np.ndarray:
        """Number (n,) of each cell's combination of slide, type and region."""
        return (self.slide * len(self.types) + self.type) * self.n_regions + self.region

    def at(self, rows: np.ndarray) -> _Labels:
        """Labels of some of the cells."""
        return self._replace(type=self.type[rows], region=self.region[rows], slide=self.slide[rows])


class _Tissue(NamedTuple):
    """All cells in an order that does not depend on the rows of the AnnData."""

    order: np.ndarray
    """(n,) row of each cell in the AnnData."""
    levels: Any
    """(n, features) expression on a log-like scale."""
    graph: sp.csr_matrix
    """(n, n) edges in both directions."""
    counted: np.ndarray
    """(n,) whether a cell has all labels; only the edges of these cells count."""


class _Tests(NamedTuple):
    """Tests of a pair between two types."""

    rows: np.ndarray
    """(t, 3) block (sending type times the number of types, plus receiving type), ligand and receptor."""
    pair: np.ndarray
    """(t,) position of each pair among those measured."""
    n_edges: np.ndarray
    """(t,) edges from the first type to the second."""
    edges: Edges


class _EmbeddingScores(NamedTuple):
    scores: np.ndarray
    """(t,) score of each test, NaN where the model has none."""
    model: str
    tissue: Tissue | None
    """What was built to run the model."""


def _read_labels(adata: AnnData, groupby: str, region_key: str | None, library_key: str | None) -> _Labels:
    effect = "edges of these cells do not count, and their profiles are not permuted"
    types = get_known_labels(adata, groupby, name="groupby", effect=effect)
    slide = slide_codes(get_libraries(adata, library_key))
    region = types if region_key is None else get_known_labels(adata, region_key, name="region_key", effect=effect)
    type_codes, region_codes = (labels.codes.astype(np.int64) for labels in (types, region))
    return _Labels(type_codes, region_codes, slide, list(types.categories), len(region.categories))


def _choose_tests(pairs: Pairs, tissue: _Tissue, labels: _Labels, min_fraction: float, min_edges: int) -> _Tests:
    """Choose pairs and types that are expressed and touch often enough."""
    from spatialfm.tl._edge_sums import Edges

    n_types = len(labels.types)
    i, j = tissue.graph[tissue.counted][:, tissue.counted].nonzero()
    joined = labels.type[i] * n_types + labels.type[j]
    n_edges = np.bincount(joined, minlength=n_types**2)
    pair = np.column_stack(
        [pd.Index(pairs.ligands).get_indexer(pairs.ligand), pd.Index(pairs.receptors).get_indexer(pairs.receptor)]
    )
    source, target = np.divmod(np.arange(n_types**2), n_types)
    sending, receiving = (_fractions(own, labels.type, n_types) for own in _counted_levels(pairs, tissue))
    expressed = (sending[source][:, pair[:, 0]] >= min_fraction) & (receiving[target][:, pair[:, 1]] >= min_fraction)
    block, which = np.nonzero(expressed & (n_edges >= min_edges)[:, None])
    if not len(block):
        msg = (
            f"none of the {len(pair)} measured pairs can be tested: no two types with {min_edges} edges between them "
            f"have the ligand and the receptor in {min_fraction:.0%} of their cells; lower min_edges or min_fraction"
        )
        raise ValueError(msg)
    rows = np.column_stack([block, pair[which]])
    rank = np.lexsort(rows.T[::-1])
    rows, which = rows[rank], which[rank]
    return _Tests(rows, which, n_edges[rows[:, 0]], Edges.of(i, j, joined, source == target, len(labels.type)))


def _counted_levels(pairs: Pairs, tissue: _Tissue) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Levels (n, ligands) and (n, receptors) in the cells that count."""
    values = tissue.levels[tissue.counted]
    return pairs.levels(pairs.ligands, values), pairs.levels(pairs.receptors, values)


def _fractions(levels: sp.csr_matrix, types: np.ndarray, n_types: int) -> np.ndarray:
    """Fraction (types, columns) of each type's cells with a positive level; 0 for a type without cells."""
    n = len(types)
    member = sp.csr_matrix((np.ones(n), (types, np.arange(n))), shape=(n_types, n))
    return (member @ (levels > 0)).toarray() / np.maximum(np.bincount(types, minlength=n_types), 1)[:, None]


def _find_encoder(model: str | Path | Model, neighbors_key: str) -> Encoder:
    """Find the encoder of a model that embeds single genes in single cells."""
    from spatialfm.engine import find_encoder

    lacks = "has no embedding of single genes in single cells"
    encoder = find_encoder(model, needs=("smoothed_expression", "mean_cosines"), lacks=lacks)
    if hasattr(encoder, "mean_cosines") and neighbors_key != "spatial_neighbors":
        msg = (
            f"neighbors_key={neighbors_key!r}: model={encoder.model.name!r} reads the graph 'spatial_neighbors'; "
            "leave out model=, or take 'heist-niche'"
        )
        raise ValueError(msg)
    return encoder


def _embedding_scores(
    adata: AnnData,
    encoder: Any,
    pairs: Pairs,
    tissue: _Tissue,
    labels: _Labels,
    tests: _Tests,
    reading: Mapping[str, Any],
) -> _EmbeddingScores:
    """Score the tests by a model's gene-level embeddings; ``reading`` as for ``Encoder.read``."""
    from spatialfm.engine import choose_device
    from spatialfm.tl._edge_tests import EdgeTests

    name = encoder.model.name
    if hasattr(encoder, "smoothed_expression"):
        features = sorted({row for rows in pairs.subunits.values() for row in rows})
        smooth = encoder.smoothed_expression(tissue.levels, tissue.graph, features)
        levels = _counted_levels(pairs.among(features), tissue._replace(levels=smooth))
        scores = EdgeTests(tests.edges, *levels, tests.rows).observed / tests.n_edges
        return _EmbeddingScores(scores, name, None)
    read = encoder.read(adata, **reading)
    features = list(adata.var_names.get_indexer(read.genes))
    known = [k for k, pair in enumerate(zip(pairs.ligand, pairs.receptor, strict=True)) if pairs.has(pair, features)]
    pairs = pairs.among(features)
    subunits = [(pairs.subunits[pairs.ligand[k]], pairs.subunits[pairs.receptor[k]]) for k in known]
    types = np.full(adata.n_obs, -1)
    types[tissue.order[tissue.counted]] = labels.type
    n_types = len(labels.types)
    cosines = np.full((n_types**2, len(pairs.ligand)), np.nan)
    cosines[:, known] = encoder.mean_cosines(read, types[read.rows], n_types, subunits, device=choose_device())
    return _EmbeddingScores(cosines[tests.rows[:, 0], tests.pair], name, read)


def _table(
    pairs: Pairs, labels: _Labels, tests: _Tests, columns: Mapping[str, np.ndarray], nulls: Mapping[str, NullResult]
) -> pd.DataFrame:
    """One row for each test, from the largest ``z_local`` down."""
    block, ligand, receptor = tests.rows.T
    source, target = np.divmod(block, len(labels.types))
    named = {
        "ligand": pd.Categorical.from_codes(ligand, categories=pairs.ligands),
        "receptor": pd.Categorical.from_codes(receptor, categories=pairs.receptors),
        "source": pd.Categorical.from_codes(source, categories=labels.types),
        "target": pd.Categorical.from_codes(target, categories=labels.types),
    }
    found = {f"{name}_{null}": getattr(result, name) for null, result in nulls.items() for name in ("z", "p", "fdr")}
    table = pd.DataFrame({**named, **columns, **found})
    table = table.sort_values("z_local", ascending=False, kind="stable", ignore_index=True)
    table.index = table.index.astype(str)
    return table


def _summary(nulls: Mapping[str, NullResult]) -> str:
    """Hits under each null hypothesis, for the log."""
    from spatialfm.tl._edge_tests import FDR

    parts = []
    for name, what in (("specific", "by type"), ("local", "by location within types")):
        null = nulls[name]
        part = f"{(null.fdr <= FDR).sum()} {what}"
        if null.n_undecided:
            part += (
                f" and {null.n_undecided} that {null.n_permutations:,} permutations do not decide "
                "(raise n_permutations=)"
            )
        parts.append(part)
    return ", ".join(parts)
