"""Ligand-receptor pairs: those that a panel measures, and their levels in each cell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from spatialfm._data._adata import raw_hint
from spatialfm._data._expression import read_values
from spatialfm._data._genes import gene_keys, guess_organism, known_organism

if TYPE_CHECKING:
    from anndata import AnnData

    from spatialfm._data._expression import ValuesKind
    from spatialfm._data._genes import Organism


@dataclass
class Pairs:
    """Pairs whose every subunit is a feature."""

    ligand: list[str]
    receptor: list[str]
    subunits: dict[str, list[int]]
    """Positions of the features of each ligand and receptor."""
    n_defined: int
    """Number of pairs before those that are not measured were left out."""
    organism: Organism | None
    """Organism of the genes; None where the features are no genes."""

    @property
    def ligands(self) -> list[str]:
        """Different ligands."""
        return list(dict.fromkeys(self.ligand))

    @property
    def receptors(self) -> list[str]:
        """Different receptors."""
        return list(dict.fromkeys(self.receptor))

    def levels(self, names: list[str], values: Any) -> sp.csr_matrix:
        """Level (n, names) of each ligand or receptor in each cell, float32.

        That of a complex is the level of its scarcest subunit. Negative levels become 0.
        """
        parts = [self.subunits[name] for name in names]
        columns = values.tocsc() if sp.issparse(values) else values
        level = sp.csc_matrix(columns[:, [rows[0] for rows in parts]], dtype=np.float32)
        for k in range(1, max(map(len, parts))):
            # Of those with fewer subunits, the first once more.
            more = sp.csc_matrix(
                columns[:, [rows[k] if k < len(rows) else rows[0] for rows in parts]], dtype=np.float32
            )
            level = level.minimum(more)
        level = level.maximum(sp.csc_matrix(level.shape, dtype=np.float32)).tocsr()
        level.eliminate_zeros()
        level.sort_indices()
        return level

    def has(self, pair: tuple[str, str], features: Iterable[int]) -> bool:
        """Whether all subunits of a pair are among ``features``."""
        return {row for name in pair for row in self.subunits[name]} <= set(features)

    def measured_in(self, features: np.ndarray) -> Pairs:
        """Pairs whose every subunit is among ``features``; raises where there is none."""
        kept = [k for k, pair in enumerate(zip(self.ligand, self.receptor, strict=True)) if self.has(pair, features)]
        if not kept:
            msg = f"none of the {len(self.ligand)} ligand-receptor pairs in this panel was measured on every slide"
            raise ValueError(msg)
        ligand, receptor = ([names[k] for k in kept] for names in (self.ligand, self.receptor))
        return replace(
            self, ligand=ligand, receptor=receptor, subunits={n: self.subunits[n] for n in [*ligand, *receptor]}
        )

    def among(self, features: list[int]) -> Pairs:
        """Refer to positions in ``features`` instead; features that are not there are left out."""
        at = {row: k for k, row in enumerate(features)}
        return replace(
            self, subunits={name: [at[row] for row in rows if row in at] for name, rows in self.subunits.items()}
        )


def find_pairs(
    names: list[str], pairs: pd.DataFrame | Iterable[tuple[str, str]] | None, organism: Organism | None
) -> Pairs:
    """Find the pairs whose subunits are all in ``names``; arguments as for :func:`spatialfm.tl.ligand_receptor`."""
    if pairs is None:
        try:
            own: Organism | None = organism or guess_organism(names)
        except ValueError as error:
            msg = f"{error}. Where features are not genes, such as proteins, give the pairs: pairs=[('CD40L', 'CD40')]"
            raise ValueError(msg) from None
        table = pd.read_csv(str(files("spatialfm.pp") / "data" / "ligand_receptor.tsv.gz"), sep="\t", dtype=str)
        of = own
        given = list(table.loc[table["organism"] == own, ["ligand", "receptor"]].itertuples(index=False, name=None))
    else:
        given = _as_tuples(pairs)
        own = organism or known_organism(names)
        of = known_organism({part for pair in given for name in pair for part in name.split("_")}) or own

    feature: dict[str, int] = {}
    for row, keys in enumerate(zip(gene_keys(names, own, own), names, strict=True)):
        for key in keys:
            feature.setdefault(key, row)
    # A feature may have "_" in its name, which joins the subunits of a complex.
    parts = {name: [name] if name in feature else name.split("_") for pair in given for name in pair}
    flat = list(dict.fromkeys(part for subunits in parts.values() for part in subunits))
    row_of = {
        part: feature.get(part, feature.get(key, -1)) for part, key in zip(flat, gene_keys(flat, of, own), strict=True)
    }
    subunits = {name: [row_of[part] for part in of_name] for name, of_name in parts.items()}
    measured = [pair for pair in given if all(min(subunits[name]) >= 0 for name in pair)]
    if not measured:
        msg = (
            f"none of the {len(given)} ligand-receptor pairs is measured: features are named like {names[:3]}, pairs "
            f"like {given[:2]}. Name the features with gene_column=, or give other pairs: pairs=[(ligand, receptor)]"
        )
        raise ValueError(msg)
    return Pairs(
        ligand=[pair[0] for pair in measured],
        receptor=[pair[1] for pair in measured],
        subunits={name: subunits[name] for pair in measured for name in pair},
        n_defined=len(given),
        organism=own,
    )


def _as_tuples(pairs: pd.DataFrame | Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Pairs as given, without duplicates."""
    rows = pairs.iloc[:, :2].to_numpy(dtype=object).tolist() if isinstance(pairs, pd.DataFrame) else list(pairs)
    wrong = [row for row in rows if isinstance(row, str) or len(row) != 2 or not all(isinstance(v, str) for v in row)]
    if wrong or not rows:
        got = wrong[0] if wrong else "none"
        msg = f"each of the pairs must be a ligand and a receptor, as in [('TNF', 'TNFRSF1A')], got {got!r}"
        raise ValueError(msg)
    return list(dict.fromkeys((ligand, receptor) for ligand, receptor in rows))


def read_levels(
    adata: AnnData, layer: str | None, values: ValuesKind, slides: Sequence[tuple[str, np.ndarray]] = ()
) -> tuple[Any, str, np.ndarray]:
    """Expression on a log-like scale, what the values are, and the features that every slide measured.

    Features that a slide lacks are zero.
    """
    read = read_values(adata, layer, values, slides=slides)
    if read.kind == "scaled":
        msg = (
            f"{layer or 'X'} holds scaled values, some of them negative, which are no levels of expression; "
            "name counts or logged values with layer=" + raw_hint(adata)
        )
        raise ValueError(msg)
    level = read.logged()
    if read.unmeasured:
        back = sp.csr_matrix(
            (np.ones(len(read.features), np.float32), (np.arange(len(read.features)), read.features)),
            shape=(len(read.features), adata.n_vars),
        )
        level = level @ back
    return level, read.kind, read.features
