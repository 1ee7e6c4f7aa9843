"""Which gene each feature is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import scipy.sparse as sp

from spatialfm._checks import check_choice, checked
from spatialfm._data._adata import get_matrix, in_memory
from spatialfm._data._expression import value_kind
from spatialfm._data._genes import ORGANISMS, Organism, feature_names, guess_organism, match_genes, require_matches
from spatialfm._data._write import check_free, write
from spatialfm._settings import logger

if TYPE_CHECKING:
    from anndata import AnnData

Duplicates = Literal["error", "sum"]


@checked
def resolve_genes(
    adata: AnnData,
    organism: Organism | Literal["auto"] = "auto",
    *,
    to: Organism | None = None,
    gene_column: str | None = None,
    duplicates: Duplicates = "error",
    key_added: str = "gene",
    copy: bool = False,
) -> AnnData | None:
    """Find out which gene each feature is, from a table of human and mouse genes inside the package.

    Symbols in any case and Ensembl ids, with or without a version, are recognised, also mixed. ``var_names`` stay as they are and features without a
    match stay in `adata`: their two new columns are empty. Scanpy plots by the new names with ``gene_symbols="gene_symbol"``; the example
    shows how to go over to them for good.

    Parameters
    ----------
    adata
        Annotated data; features of any kind.
    organism
        Whose genes the names are. ``"auto"``: decided by names that only one of the two has, ids among them, then by spelling (``GAPDH``
        in human, ``Gapdh`` in mouse).
    to
        Whose genes to name; None: those of `organism`. ``"human"`` for mouse data gives human orthologs, as for gene sets of human: the
        ortholog of the same symbol but for case, otherwise the only one that Ensembl is confident of, otherwise none.
    gene_column
        Column of ``var`` that holds the names, such as 10x's ``"gene_ids"``. None: ``var_names``.
    duplicates
        What to do where several features are one gene, that is one Ensembl id (ids that share a symbol are different genes). ``"error"``:
        refuse. ``"sum"``: the first feature takes the sum, in ``X`` and every layer, and the others go. Only values that may be
        added are: counts, or counts divided by something, not logarithms.
    key_added
        Beginning of the names of the columns written.
    copy
        Return a copy instead of writing to `adata`.

    Returns
    -------
    None, or the copy where `copy` is set. Written:

    ``var["{key_added}_id"]``, ``var["{key_added}_symbol"]``
        str: Ensembl id without version, and symbol; ``""`` without a match.
    ``uns["resolve_genes"]``
        ``organism`` and ``to``; ``gene_column``, ``""`` for ``var_names``; ``duplicates``; ``columns``, the two names above; ``n_in``, features
        there were, ``n_matched`` and ``n_dropped``, those with and without a match, ``n_genes``, different genes found.
    ``X``, every layer
        Only with ``duplicates="sum"``, and only where there are duplicates: `adata` then has fewer features, as after
        ``scanpy.pp.filter_genes``. Integers of fewer than 64 bits become int64. ``raw`` stays as it is.

    Raises
    ------
    KeyError
        If ``var[gene_column]`` is missing.
    ValueError
        If fewer than a third of the names match (the message says what the others look like), human and mouse cannot be told apart, a column
        to write is there and was not written by this function, or duplicates are refused or cannot be summed: logged or scaled values, matrices in ``varm`` or
        ``varp``, a file open in backed mode without `copy`.

    Notes
    -----
    The table has no earlier symbols: of names given years ago, some percent will not be found; Ensembl ids do not age like that.
    Ids of genes on alternative haplotypes (as of HLA) differ from those on the primary assembly, and a symbol may stand for either.

    References
    ----------
    Martin et al. 2023, Ensembl 2023, Nucleic Acids Research 51:D933.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()
    >>> sfm.pp.resolve_genes(adata)
    >>> adata.var.loc["Gad1", "gene_id"]
    'ENSMUSG00000070880'

    Known genes alone, under their symbols:

    >>> known = adata[:, adata.var["gene_id"] != ""].copy()
    >>> known.var_names = known.var["gene_symbol"].astype(str)
    """
    check_choice("organism", organism, ("auto", *ORGANISMS))
    check_choice("to", to, (None, *ORGANISMS))
    check_choice("duplicates", duplicates, get_args(Duplicates))
    values = feature_names(adata, gene_column)
    columns = [f"{key_added}_id", f"{key_added}_symbol"]
    taken = [c for c in columns if c in (gene_column, adata.var.index.name)]
    if taken:
        msg = f"key_added={key_added!r} would overwrite {taken[0]!r}, which is read; choose another name"
        raise ValueError(msg)
    check_free(adata, "pp.resolve_genes", {"var": columns, "uns": ["resolve_genes"]})

    source = "adata.var_names" if gene_column is None else f"adata.var[{gene_column!r}]"
    names = ["" if missing else str(v).strip() for v, missing in zip(values, values.isna(), strict=True)]
    others = [c for c in adata.var.columns if c != gene_column]
    hint = f". The names were taken from {source}" + (
        f"; gene_column= takes them from one of {others}" if others else ""
    )
    try:
        of = guess_organism(names) if organism == "auto" else organism
        genes = match_genes(names, of)
        require_matches(names, (genes["gene_id"] != "").to_numpy(), of)
    except ValueError as error:
        raise ValueError(str(error) + hint) from None
    if to is not None and to != of:
        genes = match_genes(names, of, to=to)
    ids = genes["gene_id"].to_numpy()
    n_matched = int((ids != "").sum())

    # Features without a match are no duplicates of each other.
    keys = np.where(ids == "", [f"#{k}" for k in range(len(ids))], ids)
    _, first, gene_of = np.unique(keys, return_index=True, return_inverse=True)
    kept = np.sort(first)
    merged: dict[str | None, Any] = {}
    if len(kept) < len(keys):
        if duplicates == "error":
            repeated = np.setdiff1d(np.arange(len(keys)), first)[0]
            same = np.flatnonzero(keys == keys[repeated])
            msg = (
                f"{len(keys) - len(kept)} of {len(keys)} features are genes that others are already: {_names(adata, same)} are all {keys[repeated]} "
                f"({genes['gene_symbol'].iloc[repeated]}); pass duplicates='sum' to add up their counts, or keep one feature a gene"
            )
            raise ValueError(msg)
        merged = _sums(adata, np.searchsorted(kept, first)[gene_of], copy=copy)

    report = {
        "organism": of,
        "to": to or of,
        "gene_column": gene_column or "",
        "duplicates": duplicates,
        "columns": columns,
        "n_in": len(names),
        "n_matched": n_matched,
        "n_dropped": len(names) - n_matched,
        "n_genes": n_matched - (len(keys) - len(kept)),
    }
    logger.info(
        "resolve_genes: %d features named by %s, %d matched as %s genes%s, %d dropped%s%s; written to var[%r], var[%r] and uns['resolve_genes']",
        len(names),
        source,
        n_matched,
        of,
        f" with an ortholog in {to}" if to not in (None, of) else "",
        len(names) - n_matched,
        f" (no match: {_names(adata, np.flatnonzero(ids == ''))})" if n_matched < len(names) else "",
        f", {len(keys) - len(kept)} duplicates summed" if merged else "",
        *columns,
    )
    if merged:
        small = adata[:, kept].to_memory() if adata.isbacked else adata[:, kept].copy()
        for key, matrix in merged.items():
            if key is None:
                small.X = matrix
            else:
                small.layers[key] = matrix
        if copy:
            adata = small
        else:
            adata._init_as_actual(small)
    found = dict(zip(columns, (genes[name].to_numpy()[kept] for name in ("gene_id", "gene_symbol")), strict=True))
    fields = {"var": found, "uns": {"resolve_genes": report}}
    adata = write(adata, "pp.resolve_genes", key_added, fields, copy=copy and not merged)
    return adata if copy else None


def _names(adata: AnnData, which: np.ndarray) -> str:
    """Name the first three of some features."""
    return ", ".join(repr(str(n)) for n in adata.var_names[which[:3]]) + (", ..." if len(which) > 3 else "")


def _sums(adata: AnnData, gene_of: np.ndarray, *, copy: bool) -> dict[str | None, Any]:
    """``X`` (under None) and the layers with the features of each gene added up; ``gene_of`` (n_vars,) is the new column of each."""
    if adata.isbacked and not copy:
        msg = "duplicates='sum' cannot write to a file open in backed mode; pass copy=True, or load it with adata.to_memory()"
        raise ValueError(msg)
    standing = [f"{name}[{key!r}]" for name in ("varm", "varp") for key in getattr(adata, name)]
    if standing:
        msg = f"duplicates='sum' merges features, and {', '.join(standing)} has no sum; delete it first, and compute it again"
        raise ValueError(msg)
    sums: dict[str | None, Any] = {}
    for key in [*([] if adata.X is None else [None]), *(k for k in adata.layers if k is not None)]:
        x = get_matrix(adata, key)
        kind = value_kind(x)
        if kind not in ("counts", "normalized"):
            where = "adata.X" if key is None else f"adata.layers[{key!r}]"
            msg = f"duplicates='sum' adds values, and those of {where} look {kind!r}, not like counts; resolve the genes of the counts, before logarithms"
            raise ValueError(msg)
        dtype = (
            np.promote_types(x.dtype, np.float32)
            if x.dtype.kind == "f"
            else x.dtype
            if x.dtype.itemsize == 8
            else np.int64
        )
        shape = len(gene_of), gene_of.max() + 1
        adding = sp.csr_matrix((np.ones(len(gene_of), dtype), (np.arange(len(gene_of)), gene_of)), shape=shape)
        stored = in_memory(adata.X if key is None else adata.layers[key])
        sums[key] = type(stored)(x @ adding) if sp.issparse(stored) else np.asarray(x @ adding)
    return sums
