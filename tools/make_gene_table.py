"""Make the gene table of the package, ``src/spatialfm/pp/data/genes.npz``, from a table of Ensembl.

The input is a TSV (may be gzipped) with a header and the columns ``organism`` (human, mouse), ``ensembl`` (gene id
without version), ``symbol``, ``ortholog_ensembl``, ``ortholog_symbol`` and ``confidence`` (orthology confidence of
Ensembl, 0 or 1). It has one row for each pair of a gene and an ortholog in the other organism; genes without ortholog
have one row with the last three empty. BioMart provides these columns.

    python tools/make_gene_table.py genes.tsv.gz src/spatialfm/pp/data/genes.npz

The same input gives the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

COLUMNS = ["organism", "ensembl", "symbol", "ortholog_ensembl", "confidence"]
PREFIXES = {"human": "ENSG", "mouse": "ENSMUSG"}


def make(source: Path, target: Path) -> dict[str, int]:
    """Write the table, and return its numbers of genes and pairs.

    Written for each organism: ``{organism}_numbers``, differences of the digits of the ids in ascending order, and
    ``{organism}_symbols``, UTF-8 text with one symbol per line, in the same order. Also ``orthologs``, (n, 2) sorted
    positions of the human and the mouse gene of each pair, and ``confidence`` of each pair. Pairs with a gene without
    symbol are left out.
    """
    rows = pd.read_csv(source, sep="\t", dtype=str, keep_default_na=False, usecols=COLUMNS)
    arrays: dict[str, np.ndarray] = {}
    positions: dict[str, dict[str, int]] = {}
    for organism, prefix in PREFIXES.items():
        genes = rows[rows["organism"] == organism].drop_duplicates("ensembl").sort_values("ensembl")
        genes = genes[genes["symbol"] != ""]
        invalid = genes[~genes["ensembl"].str.fullmatch(prefix + r"\d{11}")]
        if len(invalid) or genes.empty:
            first = invalid["ensembl"].tolist()[:3] or "none"
            msg = f"{source}: ids of {organism} must be {prefix} and 11 digits, got {first}"
            raise ValueError(msg)
        positions[organism] = {gene: k for k, gene in enumerate(genes["ensembl"])}
        numbers = genes["ensembl"].str[len(prefix) :].astype(np.int64).to_numpy()
        arrays[f"{organism}_numbers"] = np.diff(numbers, prepend=0)
        arrays[f"{organism}_symbols"] = np.frombuffer("\n".join(genes["symbol"]).encode(), np.uint8)
    pairs: dict[tuple[int, int], int] = {}
    for organism, gene, _, ortholog, confidence in rows[COLUMNS].itertuples(index=False):
        human, mouse = (gene, ortholog) if organism == "human" else (ortholog, gene)
        if human in positions["human"] and mouse in positions["mouse"]:
            pair = positions["human"][human], positions["mouse"][mouse]
            pairs[pair] = max(pairs.get(pair, 0), int(confidence))
    arrays["orthologs"] = np.array(sorted(pairs), np.int32).reshape(-1, 2)
    arrays["confidence"] = np.array([pairs[pair] for pair in sorted(pairs)], np.uint8)
    np.savez_compressed(target, **arrays)
    return {**{organism: len(found) for organism, found in positions.items()}, "orthologs": len(pairs)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="TSV of Ensembl, see above")
    parser.add_argument("target", type=Path, help="genes.npz to write")
    arguments = parser.parse_args()
    print(make(arguments.source, arguments.target), f"{arguments.target.stat().st_size:,} bytes")
