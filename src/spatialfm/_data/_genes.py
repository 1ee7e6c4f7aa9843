"""Names of genes of human and mouse, and their lookup in the bundled table of Ensembl."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pandas as pd

from spatialfm._checks import check_choice, check_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from anndata import AnnData

Organism = Literal["human", "mouse"]
ORGANISMS: tuple[Organism, ...] = get_args(Organism)

MIN_SHARE = 1 / 3
"""Share of the names that must be known: half of a panel may be control probes or unknown transcripts."""
_PREFIX = {"human": "ENSG", "mouse": "ENSMUSG"}
# The version, and the mark of GENCODE for a gene's copy on the Y chromosome.
_ENSEMBL = re.compile(r"(ENS(?:MUS)?G\d{11})(?:\.\d+)?(?:_PAR_Y)?", re.IGNORECASE)
# Votes of one side against the other's that settle the organism.
_MAJORITY = 4
# So many names that one organism alone has outweigh the spelling of all others; a few are symbols that were renamed in
# one of them.
_MIN_ONLY, _MIN_ONLY_SHARE = 10, 0.05
_LOOKS = {
    r"ENSDARG\d+": "Ensembl ids of zebrafish",
    r"ENSRNOG\d+": "Ensembl ids of rat",
    r"ENSSSCG\d+": "Ensembl ids of pig",
    r"ENSMMUG\d+": "Ensembl ids of macaque",
    r"ENSGALG\d+": "Ensembl ids of chicken",
    r"ENS(MUS)?T\d+": "Ensembl ids of transcripts, not genes",
    r"ENS(MUS)?P\d+": "Ensembl ids of proteins, not genes",
    r"ENS(MUS)?G\d+": "Ensembl ids of genes that the bundled table does not hold",
    r"ENS[A-Z]*G\d+": "Ensembl ids of another organism",
    r"FBgn\d+": "FlyBase ids of fruit fly",
    r"WBGene\d+": "WormBase ids of C. elegans",
    r"\d+": "integers (row numbers, or Entrez ids)",
    r"\d+(_[a-z])*_at|ILMN_\d+|A_\d+_P\d+|probe_?\d+": "probe ids of a microarray",
    r"[NX][MR]_\d+": "RefSeq ids of transcripts",
    r"chr[0-9XYM]+[:_-]\d+[_-]\d+": "genomic intervals, such as peaks",
    r"(GRCh|GRCm|hg|mm)\d+_.+": "names with a genome as prefix, as of two species; remove it and split the species",
    r"(neg|blank|unassigned|deprecated|antisense).*": "control probes",
}


@dataclass(frozen=True)
class GeneTable:
    """Genes of one organism; all positions count in the order of the ids."""

    ids: list[str]
    symbols: list[str]
    by_id: dict[str, int]
    by_symbol: dict[str, int]
    """For a symbol with several ids, the first id that has an ortholog, or else the first."""
    by_upper: dict[str, int]
    ortholog: np.ndarray
    """Position in the other organism's table, -1 where none is clear."""


@cache
def gene_table(organism: Organism) -> GeneTable:
    """Read the bundled genes of an organism, once."""
    with np.load(str(files("spatialfm.pp") / "data" / "genes.npz")) as stored:
        arrays = {key: stored[key] for key in stored.files}
    symbols = {o: bytes(arrays[f"{o}_symbols"]).decode().split("\n") for o in ORGANISMS}
    own = ORGANISMS.index(organism)
    here, there = symbols[organism], symbols[ORGANISMS[1 - own]]
    mine, other = arrays["orthologs"][:, own], arrays["orthologs"][:, 1 - own]

    ids = [f"{_PREFIX[organism]}{number:011d}" for number in np.cumsum(arrays[f"{organism}_numbers"]).tolist()]
    has = np.zeros(len(ids), bool)
    has[mine] = True
    by_symbol: dict[str, int] = {}
    by_upper: dict[str, int] = {}
    for k in np.argsort(~has, kind="stable").tolist():
        by_symbol.setdefault(here[k], k)
        by_upper.setdefault(here[k].upper(), k)

    same = np.array([here[i].upper() == there[j].upper() for i, j in zip(mine, other, strict=True)], bool)
    candidates: dict[int, list[int]] = {}
    named: dict[int, int] = {}
    for i, j, alike, sure in zip(
        mine.tolist(), other.tolist(), same.tolist(), arrays["confidence"].tolist(), strict=True
    ):
        if alike:
            named[i] = min(named.get(i, j), j)
        elif sure:
            candidates.setdefault(i, []).append(j)
    ortholog = np.full(len(ids), -1, np.int64)
    for i, found in candidates.items():
        if len({there[j] for j in found}) == 1:
            ortholog[i] = min(found)
    for i, j in named.items():
        ortholog[i] = j
    return GeneTable(ids, here, {gene: k for k, gene in enumerate(ids)}, by_symbol, by_upper, ortholog)


def _positions(names: Sequence[str], organism: Organism) -> np.ndarray:
    """Position (n,) of each name in the organism's table, -1 where it has none."""
    table = gene_table(organism)
    found = np.full(len(names), -1, np.int64)
    for k, name in enumerate(names):
        name = name.strip()
        if match := _ENSEMBL.fullmatch(name):
            found[k] = table.by_id.get(match[1].upper(), -1)
        else:
            found[k] = table.by_symbol.get(name, table.by_upper.get(name.upper(), -1))
    return found


def feature_names(adata: AnnData, gene_column: str | None) -> pd.Series:
    """Names of the features: ``var[gene_column]``, or ``var_names`` where None."""
    if gene_column is None:
        names = adata.var_names.to_series()
        check_text("adata.var_names", names)
        return names
    if gene_column not in adata.var:
        msg = f"gene_column={gene_column!r} is not a column of adata.var; it holds {list(adata.var.columns)}"
        raise KeyError(msg)
    names = adata.var[gene_column]
    check_text(f"var[{gene_column!r}]", names)
    return names


def match_genes(names: Iterable[str], organism: Organism, *, to: Organism | None = None) -> pd.DataFrame:
    """Find genes by name in the bundled table.

    Parameters
    ----------
    names
        Symbols in any case (the exact spelling is preferred) and Ensembl ids, also mixed; a version
        (``ENSG00000141510.18``) and GENCODE's ``_PAR_Y`` are ignored.
    organism
        Organism of the names.
    to
        Organism of the genes to return. For the other organism, these are orthologs: the one with the same symbol (in
        any case), otherwise the only one with high confidence in Ensembl; several symbols are no match.

    Returns
    -------
    A row for each name in its order, the names as index, with the columns ``gene_id`` (Ensembl id without version) and
    ``gene_symbol``, str, both ``""`` without a match. Several ids of one symbol stay different genes; a symbol matches
    one id.
    """
    check_choice("organism", organism, ORGANISMS)
    names = list(names)
    found = _positions(names, organism)
    if to is not None and to != organism:
        check_choice("to", to, ORGANISMS)
        found = np.where(found >= 0, gene_table(organism).ortholog[found], -1)
    table = gene_table(to or organism)
    return pd.DataFrame(
        {
            "gene_id": [table.ids[k] if k >= 0 else "" for k in found],
            "gene_symbol": [table.symbols[k] if k >= 0 else "" for k in found],
        },
        index=pd.Index(names, dtype=object),
        dtype=object,
    )


def guess_organism(names: Iterable[str]) -> Organism:
    """Recognise the organism of names of genes.

    Names and ids that only one organism has decide, if they are at least 10, 5 % of the known ones and four times as
    many as of the other. Otherwise the spelling of names that both have (``GAPDH``, ``Gapdh``) decides by four to one,
    and after that the former by four to one alone.

    Raises
    ------
    ValueError
        If too few names are known in either, or neither organism prevails.
    """
    names = [str(name).strip() for name in names]
    known = np.array([_positions(names, organism) >= 0 for organism in ORGANISMS])
    require_matches(names, known[known.sum(axis=1).argmax()], "human or mouse")
    exact = np.array([[name in gene_table(organism).by_symbol for name in names] for organism in ORGANISMS])
    only = np.array([(known[k] & ~known[1 - k]).sum() for k in range(2)])
    spelled = np.array([(known.all(axis=0) & exact[k] & ~exact[1 - k]).sum() for k in range(2)])
    many = only.max() >= max(_MIN_ONLY, _MIN_ONLY_SHARE * known.any(axis=0).sum())
    for votes in ([only] if many else []) + [spelled, only]:
        if votes.max() > 0 and votes.max() >= _MAJORITY * votes.min():
            return ORGANISMS[int(votes.argmax())]
    msg = (
        f"organism='auto' cannot distinguish human and mouse by {len(names)} names such as {_first(names)}: {only[0]} "
        f"are genes of human alone and {only[1]} of mouse alone, {spelled[0]} are spelled as in human and {spelled[1]} "
        "as in mouse; pass organism='human' or 'mouse'"
    )
    raise ValueError(msg)


def known_organism(names: Iterable[str]) -> Organism | None:
    """Recognise the organism of names of genes; None where the table does not have them."""
    try:
        return guess_organism(names)
    except ValueError:
        return None


def gene_keys(names: Iterable[str], organism: Organism | None, to: Organism | None) -> list[str]:
    """Translate names to Ensembl ids of the organism ``to``; names without a match stay as they are."""
    names = list(names)
    if organism is None or to is None:
        return names
    ids = match_genes(names, organism, to=to)["gene_id"]
    return [found or name for found, name in zip(ids, names, strict=True)]


def require_matches(names: Sequence[str], matched: np.ndarray, wanted: str, hint: str = "") -> None:
    """Raise unless a third of the names (at least one) is ``matched``, saying what the others look like."""
    if matched.sum() > 0 and matched.sum() >= MIN_SHARE * len(names):
        return
    missing = [name for name, found in zip(names, matched, strict=True) if not found]
    msg = (
        f"only {int(matched.sum())} of {len(names)} names are genes of {wanted}, at least a third must be; "
        + (
            f"the others, such as {_first(missing)}, look like {_looks_like(missing)}"
            if missing
            else "there are no names"
        )
        + hint
    )
    raise ValueError(msg)


def _first(names: Sequence[str]) -> str:
    return ", ".join(repr(str(name)) for name in names[:3])


def _looks_like(names: Sequence[str]) -> str:
    """Say what at least half of the names look like."""
    for organism in ORGANISMS:
        if 2 * (_positions(names, organism) >= 0).sum() >= len(names):
            return f"genes of {organism}: pass organism={organism!r}"
    for pattern, what in _LOOKS.items():
        # With a version, as ids may have.
        if 2 * sum(bool(re.fullmatch(pattern + r"(\.\d+)?", name.strip(), re.IGNORECASE)) for name in names) >= len(
            names
        ):
            return what
    return "unknown names: neither symbols nor Ensembl ids (proteins, earlier symbols, another organism?)"
