"""Activity of pathways: which features belong to each, and what they do in each cell."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pandas as pd
import scipy.sparse as sp

from spatialfm._checks import check_choice, check_positive, check_text, checked, field_names
from spatialfm._data._expression import ValuesKind, read_values
from spatialfm._data._genes import ORGANISMS, feature_names, gene_keys, known_organism
from spatialfm._data._write import check_free, write
from spatialfm._settings import logger

if TYPE_CHECKING:
    from collections.abc import Iterable

    from anndata import AnnData

    from spatialfm._data._genes import Organism

Method = Literal["zscore", "mean"]
# Which organisms' own names a bundled collection has; the others' come by orthologs.
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

    Names of features and of the sets' genes may be symbols in any case or Ensembl ids, and of human or mouse; where they differ, the bundled
    orthologs translate (see :func:`resolve_genes`). Names that no table knows, such as those of proteins in a panel, match if they are equal.

    Parameters
    ----------
    adata
        Cells or spots by features; dense or sparse, in memory, backed, or a view.
    gene_sets
        ``"hallmark"`` (50 sets of MSigDB, Liberzon et al. 2015), ``"reactome"`` (1,818 pathways, Gillespie et al. 2022), a ``.gmt`` file (also
        ``.gmt.gz``), or a mapping of names to genes.
    organism
        Whose features these are; told from their names by default.
    gene_column
        Column of ``var`` with the names of the features instead of ``var_names``.
    layer
        Layer to use instead of ``X``.
    values
        What the values are, as for :func:`spatialfm.tl.embed`: counts and normalised values are normalised to 10,000 and logged, intensities
        arcsinh-transformed, on a copy. Recognised by default; ``"log"`` takes them as they are, such as those of ``layer="tfidf"``.
    method
        ``"zscore"``: mean over the set's features in units of their standard deviation, from their mean, so that abundant genes do not drown the
        others. ``"mean"``: mean of the values as they are.
    min_genes
        Sets with fewer features in the panel are left out.
    key_added
        Name of what is written.
    copy
        Return a copy instead of writing to ``adata``.

    Returns
    -------
    ``None``, or the copy. Written, with p the number of sets that are left:

    ``obsm[key_added]``
        (n_obs, p) float32 DataFrame, its columns the names of the sets, with ``-`` for ``/`` and whatever else no file can hold.
    ``varm[key_added]``
        (n_vars, p) csr float32, 1 where a feature belongs to a set.
    ``uns[key_added]``
        ``names`` of the sets, ``n_genes`` of each in the panel and ``n_defined``, ``n_left_out``, ``organism`` (``""`` where names matched only
        as they are), ``params``.

    Raises
    ------
    KeyError
        ``layer`` or ``gene_column`` does not exist.
    ValueError
        No set has ``min_genes`` features in the panel, the file is no GMT, values are not finite, or an argument is out of range. ``adata`` is as it was.
    FileNotFoundError
        There is no such collection or file.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()
    >>> sfm.pp.pathways(adata, {"myelin": ["MBP", "MOG", "PLP1", "MAG", "CNP", "MOBP"]}, min_genes=2)
    >>> list(adata.obsm["pathways"].columns)
    ['myelin']
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
            f"none of the {len(sets)} gene sets has {min_genes} features in the panel; {best!r} comes nearest with {len(members[best])} "
            f"of {n_defined[best]}. Features are named like {names[:3]}, genes of the sets like {list(next(iter(sets.values())))[:3]}. "
            "Lower min_genes, or name the features with gene_column="
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
        "params": {
            "gene_sets": str(gene_sets) if isinstance(gene_sets, str | Path) else "given",
            "gene_column": gene_column or "", "layer": layer or "", "values": read.kind, "method": method, "min_genes": int(min_genes),
        },
    }  # fmt: skip
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


def find_members(
    names: list[str], own: Organism | None, gene_sets: str | Path | Mapping[str, Iterable[str]]
) -> tuple[dict[str, list[str]], dict[str, list[int]], dict[str, int]]:
    """Find the features of gene sets: for each set the genes as they are named, the rows of ``names`` in it, and of how many genes it is."""
    sets, of = _read_sets(gene_sets, own)
    row_of: dict[str, list[int]] = {}
    for row, key in enumerate(gene_keys(names, own, own)):
        row_of.setdefault(key, []).append(row)

    defined = {name: set(gene_keys(genes, of, own)) for name, genes in sets.items()}
    members = {name: sorted(row for key in keys for row in row_of.get(key, ())) for name, keys in defined.items()}
    return sets, members, {name: len(keys) for name, keys in defined.items()}


def known_sets(
    genes: list[str], organism: Organism, gene_sets: str | Path | Mapping[str, Iterable[str]]
) -> tuple[list[str], sp.csr_matrix]:
    """Gene sets with any of these genes: their names as columns, and membership (genes, sets)."""
    _, members, _ = find_members(genes, organism, gene_sets)
    members = {name: rows for name, rows in members.items() if rows}
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
        # A constant feature has nothing to say.
        scale = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 1e-9 * np.maximum(np.abs(mean), 1))
        weight = sp.diags(scale) @ weight
        shift = mean @ weight
    sizes = np.asarray(membership.sum(axis=0)).ravel()
    return ((x @ weight - shift) / sizes).astype(np.float32)


def _read_sets(
    gene_sets: str | Path | Mapping[str, Iterable[str]], own: Organism | None
) -> tuple[dict[str, list[str]], Organism | None]:
    """Gene sets by name, and whose genes they name."""
    if isinstance(gene_sets, Mapping):
        sets = {str(name): [str(gene) for gene in genes] for name, genes in gene_sets.items()}
        if len(sets) < len(gene_sets):
            msg = f"gene_sets names {sorted(sets)[:5]} in more than one way, such as 1 and '1'; give each set a name of its own"
            raise ValueError(msg)
    elif str(gene_sets) in _BUNDLED:
        named = own if own in _BUNDLED[str(gene_sets)] else "human"
        return _read_gmt(Path(str(files("spatialfm.pp") / "data" / f"{gene_sets}_{named}.gmt.gz"))), named
    else:
        path = Path(gene_sets)
        if not path.is_file():
            msg = f"gene_sets={str(gene_sets)!r}: no gene sets {str(gene_sets)!r}, neither one of {list(_BUNDLED)} nor a .gmt file"
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
