"""Ligands and receptors of neighbouring cells."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp

from spatialfm._checks import check_choice, check_n_jobs, check_positive, checked
from spatialfm._data._adata import get_coordinates, get_known_labels, get_libraries, slide_codes
from spatialfm._data._expression import ValuesKind, place_order
from spatialfm._data._genes import ORGANISMS, feature_names
from spatialfm._data._write import check_free, write
from spatialfm._settings import logger, progress
from spatialfm.pp._spatial_neighbors import find_graph
from spatialfm.pp._tissue import read_tissue
from spatialfm.tl._pairs import find_pairs, read_levels

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from anndata import AnnData

    from spatialfm.models import HEIST, HEISTNiche

# Numbers of the dense matrices of ligands and receptors that stand in memory at once.
_BLOCK = 1 << 26
# A test ends when so many permutations have reached its score.
_REACHED = 20
# All tests end where the false discovery rate is settled at this level, which is asked after so many permutations and each time that they doubled.
_LEVEL = 0.05
_FIRST = 1000


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
    model: str | Path | HEIST | HEISTNiche | None = None,
    library_key: str | None = None,
    region_key: str | None = None,
    neighbors_key: str = "spatial_neighbors",
    basis: str = "spatial",
    min_fraction: float = 0.1,
    min_edges: int = 20,
    n_permutations: int = 100_000,
    n_jobs: int | None = None,
    device: str | None = None,
    key_added: str = "ligand_receptor",
    rng: int | np.random.Generator | None = 0,
    copy: bool = False,
) -> AnnData | None:
    """Score ligands and receptors of neighbouring cells, and test whether types and places explain them.

    For each pair of types and each measured pair of a ligand and its receptor, the score is the mean, over all edges of the tissue graph from a cell of
    the first type to one of the second, of the geometric mean of the ligand in the one and the receptor in the other: zero where either is zero, in the unit
    of the expression, and not carried by the abundance of one alone. Two nulls keep the tissue graph and the types where they are:

    ``specific``
        profiles are permuted among all cells of a slide. Small p-values say that these types express the pair; as in
        CellPhoneDB and ``squidpy.gr.ligrec``, but on cells that touch.
    ``local``
        profiles are permuted among the cells of the same type and slide, and region with ``region_key``. Small p-values say that, within the types,
        ligand and receptor are higher where the two types touch than the types (and regions) alone explain.

    Neither shows that a signal is sent. Cells of a type that differ between regions make small local p-values unless ``region_key`` names the regions; spots that
    mix cells and transcripts that leak to the neighbouring segment make them too; and cells count as exchangeable, so p-values hold for this tissue, not for
    other animals or patients.

    Parameters
    ----------
    adata
        Cells or spots by features of any kind, dense or sparse, in memory, backed, or a view.
    groupby
        Column of ``obs`` with the cell types. Cells without one are left out, with a warning.
    pairs
        Ligands and receptors: tuples, or a table whose first two columns they are. Subunits of a complex are joined by ``_``. By default the bundled
        consensus of LIANA (Dimitrov et al. 2022), 4,620 pairs in human and 3,989 in mouse.
    organism
        Whose genes the features are; told from their names by default. Symbols in any case and Ensembl ids are matched, see
        :func:`spatialfm.pp.resolve_genes`; of features that are one gene, the first is taken.
    gene_column
        Column of ``var`` with the names of the features instead of ``var_names``.
    layer
        Layer to use instead of ``X``.
    values
        What the values are, as for :func:`spatialfm.tl.embed`; recognised by default. Negative values count as zero.
    model
        Also score by gene-level embeddings: ``"heist"``, or what :func:`spatialfm.models.load` takes. For a HEIST, the score is the cosine of the ligand's
        embedding in the sender and the receptor's in the receiver; gene networks are built without labels where they are missing, and genes
        outside the networks have no score. For ``"heist-niche"``, it is the score above, of the expression that the components of the tissue tell after one
        step to the neighbours. Neither is tested, and neither is a better score by itself: see the notes.
    library_key
        Column of ``obs`` with the slide of each cell.
    region_key
        Column of ``obs`` with the region of each cell, such as an annotation or what :func:`spatialfm.tl.domains` wrote: what differs between regions is then no
        local hit. Cells without one are left out, with a warning. The smaller the regions, the more of what there is to find they explain, and cells alone in their type and region stay where they are.
    neighbors_key
        Key of ``uns`` that names the tissue graph; the default one is built where it is missing. An edge counts in both directions.
    basis
        Key of the coordinates in ``obsm``.
    min_fraction
        Pairs are tested where so large a fraction of the sending type has the ligand, all subunits of it, and of the receiving type the receptor.
    min_edges
        Types are tested where so many edges lead from one to the other.
    n_permutations
        Of each null, at most. A test ends when 20 permutations have reached its score; all end when they settle which tests have a false discovery rate of at most
        0.05, which is asked after 1,000 permutations and each time their number has doubled: where p-values of ten permutations are small enough. Many hits take 1,000
        permutations, few among many tests up to all of them. With t tests and n permutations, fewer than ``20 * t / n`` hits cannot reach 0.05, so tests that n permutations
        leave open are counted, and not told to be none.
    n_jobs
        Threads; ``settings.n_jobs`` where None, -1 for all cores. The result does not depend on it.
    device
        Where ``model`` runs; ``settings.device`` where None.
    key_added
        Key of ``uns`` to write.
    rng
        Seed or generator of the permutations.
    copy
        Return a copy instead of writing to ``adata``.

    Returns
    -------
    ``None``, or the copy. Written:

    ``uns[key_added]["table"]``
        A row for each test, from the largest ``z_local`` down; :func:`spatialfm.get.ligand_receptor_df` filters it. ``ligand``, ``receptor`` as they are named in
        ``pairs``; ``source``, ``target``, the types of the sender and the receiver; ``n_edges``; ``score``; ``embedding_score`` with ``model``; and for either null
        ``z_specific``, ``z_local`` (score less its mean over all permutations, in standard deviations of it, both exact; 0 where there is none), ``p_specific``,
        ``p_local`` (one-sided, ``(1 + b) / (1 + n)`` where b < 20 of all n permutations made score at least as high, otherwise ``20 / n`` where the n-th is the 20th
        that does; Besag and Clifford 1991), ``fdr_specific``, ``fdr_local`` (Benjamini-Hochberg over all rows).
    ``uns[key_added]["n_permutations"]``, ``["n_undecided"]``
        For ``"specific"`` and ``"local"``: permutations made, and tests that may have a false discovery rate of at most 0.05 and do not with these: where that
        of the lower ends of their p-values' 95 % intervals is.
    ``uns[key_added]["n_pairs"]``, ``["n_defined"]``
        Pairs that the features measure, and pairs there were.
    ``uns[key_added]["params"]``
        The arguments, ``organism`` (``""`` where the features are no known genes) and ``values`` (what the expression was taken for).
    ``obsp``, ``uns["spatial_neighbors"]``
        The tissue graph, where it was missing; with a HEIST, the gene networks too.

    Raises
    ------
    KeyError
        A column, the layer, the coordinates or the tissue graph is missing.
    ValueError
        No pair is measured or can be tested, values are not finite or z-scores, ``pairs`` holds something else than names, or an argument is out of range.
        ``adata`` is as it was.

    Notes
    -----
    Scores of edges rest on fewer cells than means of whole types: between the two mice of ``merfish_mouse_brain`` the rank correlation of ``score`` is 0.75, that
    of the means of ``squidpy.gr.ligrec`` 0.95, of ``z_local`` 0.27, and 0.09 with ``region_key``: there, regions explain 26 of 28 local hits. With ``"heist-niche"`` that of ``embedding_score`` is 0.85; smooth values repeat themselves
    better, which is no evidence for signals (``benchmarks/ligand_receptor.py``).

    References
    ----------
    Besag and Clifford 1991, *Sequential Monte Carlo p-values*, Biometrika 78:301; Dimitrov et al. 2022, *Comparison of methods and resources for cell-cell communication inference from single-cell RNA-Seq data*, Nature Communications
    13:3224; Efremova et al. 2020, *CellPhoneDB*, Nature Protocols 15:1484; Mantel 1967, *The detection of disease clustering and a generalized regression
    approach*, Cancer Research 27:209 (moments under permutation).

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()
    >>> sfm.tl.ligand_receptor(adata, "celltype", library_key="mouse_id", n_permutations=99)
    >>> int(adata.uns["ligand_receptor"]["n_pairs"])
    27
    """
    from spatialfm.engine import choose_device
    from spatialfm.models import HEIST, HEISTNiche
    from spatialfm.models._registry import take_model
    from spatialfm.tl._gene_level import heard_expression, mean_cosines

    check_free(adata, "tl.ligand_receptor", {"uns": [key_added]})
    check_choice("organism", organism, ("auto", *ORGANISMS))
    check_positive("min_edges", min_edges)
    check_positive("n_permutations", n_permutations)
    if not 0 <= min_fraction <= 1:
        msg = f"min_fraction={min_fraction!r} must be between 0 and 1"
        raise ValueError(msg)
    n_jobs = check_n_jobs(n_jobs)
    effect = "edges of these cells do not count, and their profiles are not permuted"
    types = get_known_labels(adata, groupby, name="groupby", effect=effect)
    xy = get_coordinates(adata, basis)
    libraries = get_libraries(adata, library_key)
    slide = slide_codes(libraries)
    region = types if region_key is None else get_known_labels(adata, region_key, name="region_key", effect=effect)
    counted = np.asarray((types.codes >= 0) & (region.codes >= 0))
    place = choose_device(device)
    encoder = (
        None
        if model is None
        else take_model(model, HEISTNiche, HEIST, lacks="knows no single cells", default="heist-niche")
    )
    if isinstance(encoder, HEIST) and neighbors_key != "spatial_neighbors":
        msg = f"neighbors_key={neighbors_key!r}: a HEIST reads the graph under 'spatial_neighbors'; leave out model=, or take 'heist-niche'"
        raise ValueError(msg)
    names = [str(v) for v in feature_names(adata, gene_column)]
    found = find_pairs(names, pairs, None if organism == "auto" else organism)
    levels, kind, measured = read_levels(adata, layer, values, libraries)
    found = found.measured_in(measured)
    neighbors = find_graph(adata, neighbors_key=neighbors_key, basis=basis, library_key=library_key)
    graph = neighbors.edges

    # An order that place and content decide, so that permutations do not depend on the rows.
    everyone = place_order(levels, np.column_stack([slide, xy]))
    order = everyone[counted[everyone]]
    slide, type_of, region_of = (np.asarray(codes, np.int64)[order] for codes in (slide, types.codes, region.codes))
    n_types = len(types.categories)
    ligands, receptors = list(dict.fromkeys(found.ligand)), list(dict.fromkeys(found.receptor))
    sent, heard = (found.levels(own, levels)[order] for own in (ligands, receptors))

    i, j = graph[order][:, order].nonzero()
    joined = type_of[i] * n_types + type_of[j]
    n_edges = np.bincount(joined, minlength=n_types**2)
    share = [_shares(own, type_of, n_types) for own in (sent, heard)]
    pair = np.array([[ligands.index(a), receptors.index(b)] for a, b in zip(found.ligand, found.receptor, strict=True)])
    source, target = np.divmod(np.arange(n_types**2), n_types)
    expressed = (share[0][source][:, pair[:, 0]] >= min_fraction) & (share[1][target][:, pair[:, 1]] >= min_fraction)
    block, which = np.nonzero(expressed & (n_edges >= min_edges)[:, None])
    if not len(block):
        msg = (
            f"none of the {len(pair)} measured pairs can be tested: no two types of obs[{groupby!r}] with {min_edges} edges between them have the "
            f"ligand and the receptor in {min_fraction:.0%} of their cells; lower min_edges or min_fraction"
        )
        raise ValueError(msg)
    tests = np.column_stack([block, pair[which]])
    rank = np.lexsort(tests.T[::-1])
    tests, which = tests[rank], which[rank]
    edges = np.column_stack([i, j]), joined, source == target
    sums = _EdgeSums(*edges, sent, heard, tests)
    size = n_edges[tests[:, 0]]
    columns: dict[str, np.ndarray] = {"n_edges": size, "score": sums.observed / size}
    tissue = None
    if isinstance(encoder, HEISTNiche):
        features = sorted({row for rows in found.subunits.values() for row in rows})
        levels = heard_expression(
            levels[everyone], graph[everyone][:, everyone], features, encoder.config.n_components
        )[counted[everyone]]
        found = found.among(features)
        columns["embedding_score"] = (
            _EdgeSums(*edges, found.levels(ligands, levels), found.levels(receptors, levels), tests).observed / size
        )
    elif encoder is not None:
        tissue = read_tissue(adata, library_key=library_key, layer=layer, basis=basis, values=values)
        features = list(adata.var_names.get_indexer(tissue.genes))
        known = [k for k, own in enumerate(zip(found.ligand, found.receptor, strict=True)) if found.has(own, features)]
        found = found.among(features)
        subunits = [(found.subunits[found.ligand[k]], found.subunits[found.receptor[k]]) for k in known]
        own_types = np.where(counted, types.codes, -1).astype(np.int64)[tissue.rows]
        cosines = np.full((n_types**2, len(pair)), np.nan)
        cosines[:, known] = mean_cosines(encoder, tissue, own_types, n_types, subunits, device=place)
        columns["embedding_score"] = cosines[tests[:, 0], which]
    seeds = np.random.default_rng(rng).integers(2**63, size=(n_permutations, 2)).T
    alike = (slide * n_types + type_of) * len(region.categories) + region_of
    made, undecided = {}, {}
    for null, groups, own_seeds in zip(("specific", "local"), (slide, alike), seeds, strict=True):
        found_here, made[null], undecided[null] = sums.test(groups, own_seeds, null, n_jobs)
        columns |= {f"{name}_{null}": column for name, column in found_here.items()}

    coded = {"ligand": (tests[:, 1], ligands), "receptor": (tests[:, 2], receptors)}
    coded |= {
        name: (ends[tests[:, 0]], list(types.categories)) for name, ends in (("source", source), ("target", target))
    }
    table = pd.DataFrame(
        {name: pd.Categorical.from_codes(codes, categories=known) for name, (codes, known) in coded.items()} | columns
    )
    table = table.iloc[np.lexsort((np.arange(len(table)), -table["z_local"].to_numpy()))].reset_index(drop=True)
    table.index = table.index.astype(str)

    entry = {
        "table": table,
        "n_pairs": len(pair),
        "n_defined": found.n_defined,
        "n_permutations": made,
        "n_undecided": undecided,
        "params": {
            "groupby": groupby, "pairs": "consensus" if pairs is None else "given", "organism": found.organism or "", "gene_column": gene_column or "",
            "layer": layer or "", "values": kind, "library_key": library_key or "", "region_key": region_key or "", "neighbors_key": neighbors_key,
            "min_fraction": float(min_fraction), "min_edges": int(min_edges), "n_permutations": int(n_permutations), "model": "" if encoder is None else encoder.name,
        },
    }  # fmt: skip
    adata = write(adata, "tl.ligand_receptor", key_added, {"uns": {key_added: entry}}, copy=copy)
    neighbors.store(adata)
    if tissue is not None:
        tissue.store_built(adata)
    hits = [
        f"{(table[f'fdr_{null}'] <= _LEVEL).sum()} {what}"
        + f" and {undecided[null]} that {made[null]:,} permutations do not decide (raise n_permutations=)"
        * (undecided[null] > 0)
        for null, what in (("specific", "by type"), ("local", "by place within types"))
    ]
    logger.info(
        "ligand_receptor: %d of %d pairs are measured, %d tests of pairs between types of obs[%r], fdr <= %g: %s -> uns[%r]",
        len(pair), found.n_defined, len(table), groupby, _LEVEL, ", ".join(hits), key_added,
    )  # fmt: skip
    return adata if copy else None


def _shares(levels: sp.csr_matrix, type_of: np.ndarray, n_types: int) -> np.ndarray:
    """Share (types, columns) of a type's cells with a positive level; 0 of a type of which no cell counts."""
    n = len(type_of)
    member = sp.csr_matrix((np.ones(n), (type_of, np.arange(n))), shape=(n_types, n))
    return (member @ (levels > 0)).toarray() / np.maximum(np.bincount(type_of, minlength=n_types), 1)[:, None]


class _EdgeSums:
    """Sums over edges of the geometric mean of the sender's ligand and the receiver's receptor, for many tests at once.

    ``ends`` (e, 2) are edges in both directions, ``block`` (e,) number the pair of types of their ends, and ``within`` says of each number whether these are one type;
    ``sent`` (n, ligands) and ``heard`` (n, receptors) are levels, ``tests`` (t, 3) a block, a ligand and a receptor.
    """

    def __init__(
        self,
        ends: np.ndarray,
        block: np.ndarray,
        within: np.ndarray,
        sent: sp.csr_matrix,
        heard: sp.csr_matrix,
        tests: np.ndarray,
    ) -> None:
        from spatialfm.tl._edge_sums import Edges, observed_sums

        self.ends, self.block, self.within, self.tests = ends, block, within, tests
        # Square roots, whose products are geometric means.
        self.levels = sent.sqrt().tocsc(), heard.sqrt().tocsc()
        self.edges = Edges.of(ends[:, 0], ends[:, 1], block, len(within), sent.shape[0])
        self.observed = np.empty(len(tests))
        for here, own, levels in self._parts(np.arange(len(tests))):
            sums = np.empty(len(here))
            observed_sums(self.edges, own, *levels, sums)
            self.observed[here] = sums

    def _parts(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]]:
        """Give those of the tests ``rows`` that stand in memory at once: which they are, they with positions in the levels, and the levels (ligands, n), (receptors, n)."""
        pairs, pair = np.unique(self.tests[rows][:, [2, 1]], axis=0, return_inverse=True)
        width = max(1, _BLOCK // (2 * self.levels[0].shape[0]))
        for first in range(0, len(pairs), width):
            here = rows[(pair.ravel() >= first) & (pair.ravel() < first + width)]
            here = here[np.lexsort(self.tests[here][:, [1, 2, 0]].T)]
            used = [np.unique(self.tests[here, k], return_inverse=True) for k in (1, 2)]
            own = np.column_stack([self.tests[here, 0], *(inverse for _, inverse in used)])
            sent, heard = (
                levels[:, columns].T.toarray() for levels, (columns, _) in zip(self.levels, used, strict=True)
            )
            yield here, own, (sent, heard)

    def test(
        self, groups: np.ndarray, seeds: np.ndarray, name: str, n_jobs: int
    ) -> tuple[dict[str, np.ndarray], int, int]:
        """Compare the sums with those after permutations of profiles within ``groups`` (n,).

        ``z``, ``p`` and ``fdr`` of each test; permutations made; and tests that these permutations leave open at ``_LEVEL``. No edge may join two groups, unless groups
        are of one type each.
        """
        from scipy.stats import beta, false_discovery_control

        from spatialfm.tl._edge_sums import null_moments

        _, stratum, size = np.unique(groups, return_inverse=True, return_counts=True)
        spread = self._spread(stratum, size)
        everything = np.arange(len(self.tests))
        z = np.zeros(len(everything))
        for here, own, levels in self._parts(everything):
            pairs, pair = np.unique(own[:, 1:], axis=0, return_inverse=True)
            mean, variance = np.empty((2, len(here)))
            null_moments(
                self.edges, own, pair.ravel(), pairs, self.within, *levels, stratum, size, *spread, mean, variance
            )
            sd = np.sqrt(np.maximum(variance, 0))
            more = self.observed[here] - mean
            z[here] = np.divide(more, sd, out=np.zeros_like(sd), where=sd > 1e-5 * self.observed[here])

        reached, p = np.zeros(len(everything), np.int64), np.empty(len(everything))
        alive, done, fdr = everything, 0, p
        while len(alive) and done < len(seeds):
            now = seeds[done : max(2 * done, _FIRST)]
            for here, own, levels in self._parts(alive):
                self._permute(here, own, levels, stratum, size, now, done, reached, p, name, n_jobs)
            done += len(now)
            alive = np.flatnonzero(reached < _REACHED)
            p[alive] = (1 + reached[alive]) / (1 + done)
            fdr = false_discovery_control(p)
            # The largest p-value of a hit: finer ones change little where so many permutations lie below it.
            if done * _LEVEL * np.mean(fdr <= _LEVEL) >= _REACHED / 2:
                break
        low = p.copy()
        low[alive] = np.where(
            reached[alive] > 0, beta.ppf(0.025, np.maximum(reached[alive], 1), done - reached[alive] + 1), 0
        )
        undecided = (fdr > _LEVEL) & (false_discovery_control(low) <= _LEVEL)
        return {"z": z, "p": p, "fdr": fdr}, done, int(undecided[alive].sum())

    def _spread(self, stratum: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Squares of the centred counts of edges between strata, for :func:`null_moments`."""
        crossing = (stratum[self.ends[:, 0]] != stratum[self.ends[:, 1]]).nonzero()[0]
        i, j = self.ends[crossing].T
        key = (self.block[crossing] * len(size) + stratum[i]) * len(size) + stratum[j]
        found, row, n_edges = np.unique(key, return_inverse=True, return_counts=True)
        block, strata = np.divmod(found, len(size) ** 2)
        strata = np.column_stack(np.divmod(strata, len(size)))
        sizes = size[strata]
        squares = n_edges + n_edges**2 / sizes.prod(axis=1)
        for cell, n_other in ((i, sizes[:, 1]), (j, sizes[:, 0])):
            one, degree = np.unique(row * len(stratum) + cell, return_counts=True)
            squares -= np.bincount(one // len(stratum), degree**2, minlength=len(found)) / n_other
        # Of a stratum of one cell, nothing is left in the squares.
        squares /= np.maximum(sizes - 1, 1).prod(axis=1)
        return np.searchsorted(block, np.arange(len(self.within) + 1)), strata, squares

    def _permute(
        self,
        rows: np.ndarray,
        tests: np.ndarray,
        levels: tuple[np.ndarray, np.ndarray],
        stratum: np.ndarray,
        size: np.ndarray,
        seeds: np.ndarray,
        before: int,
        reached: np.ndarray,
        p: np.ndarray,
        name: str,
        n_jobs: int,
    ) -> None:
        """Count in ``reached`` the permutations that reach what was observed; the ``_REACHED``-th ends a test and gives its ``p`` (Besag and Clifford 1991).

        ``tests`` with ``levels`` are the tests ``rows`` as :meth:`_parts` gives them, after ``before`` permutations.
        """
        from spatialfm.tl._edge_sums import LANES, edge_sums, shuffle

        members, starts = np.argsort(stratum, kind="stable"), np.r_[0, np.cumsum(size)]
        needed = np.zeros(len(size), bool)
        for block in np.unique(tests[:, 0]):
            needed[stratum[self.edges.ends_of(block)]] = True
        # Ties count, whatever the rounding of the sums.
        enough = (1 - 1e-6) * self.observed[rows]
        alive = np.arange(len(rows))

        def permuted(own_seeds: np.ndarray) -> np.ndarray:
            place = np.zeros((len(stratum), LANES), np.uint32)
            shuffle(members, starts, needed, own_seeds, place)
            sums = np.empty((len(alive), LANES))
            edge_sums(self.edges, tests[alive], *levels, place, sums)
            return sums[:, : len(own_seeds)]

        with ThreadPoolExecutor(n_jobs) as pool:
            width = LANES * n_jobs
            for done in progress(range(0, len(seeds), width), desc=f"{name} permutations from {before}"):
                now = [seeds[k : min(k + LANES, len(seeds))] for k in range(done, min(done + width, len(seeds)), LANES)]
                sums = np.hstack(list(pool.map(permuted, now)))
                counts = reached[rows[alive], None] + np.cumsum(sums >= enough[alive, None], axis=1)
                ended = counts[:, -1] >= _REACHED
                reached[rows[alive]] = counts[:, -1]
                p[rows[alive[ended]]] = _REACHED / (before + done + 1 + (counts[ended] >= _REACHED).argmax(axis=1))
                alive = alive[~ended]
                if not len(alive):
                    return
