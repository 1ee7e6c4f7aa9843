"""Make the table of ligands and receptors of the package from ``omni_resource.csv`` of liana.

The input is ``liana/resource/omni_resource.csv`` in the wheel of the Python package ``liana``. The human and the mouse
consensus resources are used, in their order.

    python tools/make_ligand_receptor.py omni_resource.csv src/spatialfm/pp/data/ligand_receptor.tsv.gz

The same input gives the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

RESOURCES = {"human": "consensus", "mouse": "mouseconsensus"}
COLUMNS = {"source_genesymbol": "ligand", "target_genesymbol": "receptor"}


def make(source: Path, target: Path) -> dict[str, int]:
    """Write the table (``organism``, ``ligand``, ``receptor``), and return the number of pairs of each organism."""
    rows = pd.read_csv(source, dtype=str, keep_default_na=False, usecols=["resource", *COLUMNS])
    parts = {
        organism: rows.loc[rows["resource"] == name, list(COLUMNS)].rename(columns=COLUMNS)
        for organism, name in RESOURCES.items()
    }
    for organism, part in parts.items():
        if part.empty or part.duplicated().any():
            msg = f"{source}: resource {RESOURCES[organism]!r} is missing or has a pair twice"
            raise ValueError(msg)
    pairs = pd.concat(parts, names=["organism", None]).reset_index("organism")
    pairs.to_csv(target, sep="\t", index=False, compression={"method": "gzip", "compresslevel": 9, "mtime": 0})
    return {organism: len(part) for organism, part in parts.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="omni_resource.csv of liana")
    parser.add_argument("target", type=Path, help="ligand_receptor.tsv.gz to write")
    args = parser.parse_args()
    print(make(args.source, args.target))
