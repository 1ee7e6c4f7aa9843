"""Activity of pathways: their features, and a score of each cell."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import scipy.sparse as sp

from spatialfm._checks import check_choice, check_positive, check_text, checked, field_names
from spatialfm._data._expression import ValuesKind, read_values
from spatialfm._data._genes import ORGANISMS, feature_names, gene_keys, known_organism
from spatialfm._data._write import check_free, record_params, write
from spatialfm._settings import logger

if TYPE_CHECKING:
    from collections.abc import Iterable

    from anndata import AnnData

    from spatialfm._data._genes import Organism

Method = Literal["zscore", "mean"]
# Organisms whose names a bundled collection has; for others, orthologs translate.
_BUNDLED: dict[str, tuple[Organism, ...]] = {"hallmark": ("human", "mouse"), "reactome": ("human",)}


@checked
def pathways(
    adata: AnnData,
    gene_sets: str | Path | Mapping[str, Iterable[str]] = "hallmark",
    *,
    organism: Literal["auto", "human", "mouse"] = "auto",
    gene_column: str | None = None,
    layer: str | None = None,
    values: ValuesKind = "auto",
    method: Method = "zscore",
    min_genes: int = 5,
    key_added: str = "pathways",
    copy: bool = False,
) -> AnnData | None:
    """Score each cell or spot by the activity of pathways.

    Features and genes of the sets may be named by symbols (in any case) or Ensembl ids, of human or mouse; the bundled
    orthologs translate between them (see :func:`spatialfm.pp.resolve_genes`). Names that are in no table, such as those
    of proteins, match if they are equal.

    Parameters
    ----------
    %(adata)s
    gene_sets
        ``"hallmark"`` (50 sets of MSigDB, Liberzon et al. 2015), ``"reactome"`` (1,818 pathways, Gillespie et al.
        2022), a ``.gmt`` or ``.gmt.gz`` file, or a mapping from names to genes.
    organism
        Organism of the features; recognised by default.
    %(gene_column)s
    %(layer)s
    values
        What the values are, see :func:`spatialfm.tl.embed`. Counts and normalised values are normalised to 10,000 and
        logged, intensities arcsinh-transformed; ``"log"`` takes them as they are, such as ``layer="tfidf"``.
    method
        ``"zscore"``: mean over the features of the set after each is standardised, so that abundant genes do not
        dominate. ``"mean"``: mean of the values.
    min_genes
        Smallest number of features in the data; other sets are left out.
    %(key_added)s
    %(copy)s

    Returns
    -------
    None, or the changed copy. Written for the p sets that are left:

    ``obsm[key_added]``
        DataFrame (n_obs, p), float32; columns are the names of the sets, with ``-`` for characters that files cannot
        hold.
    ``varm[key_added]``
        csr float32 (n_vars, p), 1 where a feature belongs to a set.
    ``uns[key_added]``
        ``names`` of the sets; ``n_genes`` of each in the data, and ``n_defined``; ``n_left_out``; ``organism``, ``""``
        where names matched only as they are; ``params``.

    Raises
    ------
    KeyError
        If the layer or ``gene_column`` is missing.
    ValueError
        If no set has ``min_genes`` features, the file is no GMT, values are not finite, or an argument is out of range.
    FileNotFoundError
        If there is no such collection or file.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()
    >>> sfm.pp.pathways(adata, {"astrocyte": ["GFAP", "ALDOC", "GJA1", "SLC1A2"]}, min_genes=3)
    >>> list(adata.obsm["pathways"].columns)
    ['astrocyte']
    """
    check_free(adata, "pp.pathways", {"obsm": [key_added], "varm": [key_added], "uns": [key_added]})
    check_choice("organism", organism, ("auto", *ORGANISMS))
    check_choice("method", method, get_args(Method))
    check_positive("min_genes", min_genes)
    names = [str(v) for v in feature_names(adata, gene_column)]
    own = known_organism(names) if organism == "auto" else organism
    sets, members, n_defined = find_members(names, own, gene_sets)
    kept = {name: rows for name, rows in members.items() if len(rows) >= min_genes}
    if not kept:
        best = max(members, key=lambda name: len(members[name]))
        msg = (
            f"none of the {len(sets)} gene sets has {min_genes} features in the data; {best!r} has most, "
            f"{len(members[best])} of {n_defined[best]}. Features are named like {names[:3]}, genes of the sets like "
            f"{list(next(iter(sets.values())))[:3]}. Lower min_genes, or name the features with gene_column="
        )
        raise ValueError(msg)
    membership = member_matrix(kept, adata.n_vars)

    read = read_values(adata, layer, values)
    scores = activity(read.logged(), membership, method)

    entry = {
        "names": list(kept),
        "n_genes": [len(rows) for rows in kept.values()],
        "n_defined": [n_defined[name] for name in kept],
        "n_left_out": len(sets) - len(kept),
        "organism": own or "",
        "params": record_params(
            gene_sets=gene_sets if isinstance(gene_sets, str | Path) else "given",
            gene_column=gene_column,
            layer=layer,
            values=read.kind,
            method=method,
            min_genes=int(min_genes),
        ),
    }
    # Columns of a table in obsm are keys of the file.
    columns = field_names(kept, besides=adata.obs_names.name)
    fields = {
        "obsm": {key_added: pd.DataFrame(scores, index=adata.obs_names, columns=columns)},
        "varm": {key_added: membership},
        "uns": {key_added: entry},
    }
    adata = write(adata, "pp.pathways", key_added, fields, copy=copy)
    logger.info(
        "pathways: %d of %d gene sets with at least %d of %d features (%s) -> obsm[%r], varm[%r], uns[%r]",
        len(kept), len(sets), min_genes, adata.n_vars, own or "names as they are", key_added, key_added, key_added,
    )  # fmt: skip
    return adata if copy else None


class Members(NamedTuple):
    """Features of each gene set."""

    sets: dict[str, list[str]]
    """Genes of each set, as they are named there."""
    rows: dict[str, list[int]]
    """Features of each set, as positions in the list of names."""
    n_defined: dict[str, int]
    """Number of different genes of each set."""


def find_members(
    names: list[str], own: Organism | None, gene_sets: str | Path | Mapping[str, Iterable[str]]
) -> Members:
    """Find the features that belong to each gene set; ``own`` is the organism of their ``names``."""
    sets, of = read_sets(gene_sets, own)
    row_of: dict[str, list[int]] = {}
    for row, key in enumerate(gene_keys(names, own, own)):
        row_of.setdefault(key, []).append(row)

    defined = {name: set(gene_keys(genes, of, own)) for name, genes in sets.items()}
    rows = {name: sorted(row for key in keys for row in row_of.get(key, ())) for name, keys in defined.items()}
    return Members(sets, rows, {name: len(keys) for name, keys in defined.items()})


def known_sets(
    genes: list[str], organism: Organism, gene_sets: str | Path | Mapping[str, Iterable[str]]
) -> tuple[list[str], sp.csr_matrix]:
    """Gene sets with any of these genes: names for columns, and membership (genes, sets)."""
    found = find_members(genes, organism, gene_sets)
    members = {name: rows for name, rows in found.rows.items() if rows}
    return field_names(members), member_matrix(members, len(genes))


def member_matrix(members: Mapping[str, list[int]], n_features: int) -> sp.csr_matrix:
    """Membership (n_features, sets), float32 ones, of the rows of each set."""
    rows = np.concatenate([np.zeros(0, np.int64), *members.values()])
    starts = np.cumsum([0, *map(len, members.values())])
    ones = np.ones(len(rows), np.float32)
    return sp.csc_matrix((ones, rows, starts), shape=(n_features, len(members))).tocsr()


def activity(x: Any, membership: sp.csr_matrix, method: Method) -> np.ndarray:
    """Mean over each set's features (n, p), without a dense copy of a sparse matrix."""
    x = x.tocsr().astype(np.float64) if sp.issparse(x) else np.asarray(x, np.float64)
    weight = membership.astype(np.float64)
    shift = np.zeros(weight.shape[1])
    if method == "zscore":
        if sp.issparse(x):
            from sklearn.utils.sparsefuncs import mean_variance_axis

            mean, variance = mean_variance_axis(x, axis=0)
        else:
            mean, variance = x.mean(axis=0), x.var(axis=0)
        spread = np.sqrt(variance)
        # A constant feature does not count.
        scale = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 1e-9 * np.maximum(np.abs(mean), 1))
        weight = sp.diags(scale) @ weight
        shift = mean @ weight
    sizes = np.asarray(membership.sum(axis=0)).ravel()
    return ((x @ weight - shift) / sizes).astype(np.float32)


def read_sets(
    gene_sets: str | Path | Mapping[str, Iterable[str]], own: Organism | None
) -> tuple[dict[str, list[str]], Organism | None]:
    """Read gene sets by name, and the organism of their genes."""
    if isinstance(gene_sets, Mapping):
        sets = {str(name): [str(gene) for gene in genes] for name, genes in gene_sets.items()}
        if len(sets) < len(gene_sets):
            msg = (
                f"gene_sets names {sorted(sets)[:5]} in more than one way, such as 1 and '1'; give each set its own "
                "name"
            )
            raise ValueError(msg)
    elif str(gene_sets) in _BUNDLED:
        named = own if own in _BUNDLED[str(gene_sets)] else "human"
        return _read_gmt(Path(str(files("spatialfm.pp") / "data" / f"{gene_sets}_{named}.gmt.gz"))), named
    else:
        path = Path(gene_sets)
        if not path.is_file():
            msg = f"gene_sets={str(gene_sets)!r} is neither one of {list(_BUNDLED)} nor a .gmt file"
            raise FileNotFoundError(msg)
        sets = _read_gmt(path)
    if not sets or not any(sets.values()):
        msg = "gene_sets is empty; give names and their genes, as in {'myelin': ['MBP', 'MOG', 'PLP1']}"
        raise ValueError(msg)
    check_text("gene_sets", sets)
    of = known_organism(sorted({gene for genes in sets.values() for gene in genes})) or own
    return sets, of


def _read_gmt(path: Path) -> dict[str, list[str]]:
    """Read lines of a name, a description, and genes, separated by tabs."""
    try:
        text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{path} cannot be read as text: {error}"
        raise ValueError(msg) from error
    sets: dict[str, list[str]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        name, *rest = line.rstrip().split("\t")
        if len(rest) < 2 or name in sets:
            why = (
                f"names {name!r} again"
                if name in sets
                else "has no genes: name, description and genes have to be separated by tabs"
            )
            msg = f"{path} is no GMT file: line {number} {why}"
            raise ValueError(msg)
        # Some files weigh genes: "TP53,1.0".
        sets[name] = list(dict.fromkeys(gene.split(",")[0].strip() for gene in rest[1:] if gene.strip()))
    return sets
