"""Match features to genes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

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
    """Match features to genes of human or mouse, with a table of Ensembl that is part of the package.

    Recognises gene symbols (in any case) and Ensembl ids (with or without a version), also a mixture. ``var_names``
    stay as they are, and so do features without a match, whose new columns are empty. Scanpy plots the new names with
    ``gene_symbols="gene_symbol"``.

    Parameters
    ----------
    %(adata)s
    organism
        Organism of the names. ``"auto"``: decided by names that only one of the two has, then by spelling (``GAPDH`` in
        human, ``Gapdh`` in mouse).
    to
        Organism of the genes to write; None for that of the names. ``"human"`` for mouse data gives human orthologs:
        the ortholog with the same symbol, otherwise the only ortholog with high confidence in Ensembl, otherwise none.
    %(gene_column)s
    duplicates
        What to do with several features of one gene (one Ensembl id). ``"error"``: raise. ``"sum"``: the first feature
        takes the sum, in ``X`` and in every layer, and the others are removed. Only counts, or counts divided by a
        number, can be summed, not logarithms.
    key_added
        Prefix of the new columns of ``var``.
    %(copy)s

    Returns
    -------
    None, or the changed copy. Written:

    ``var["{key_added}_id"]``, ``var["{key_added}_symbol"]``
        Ensembl id without version, and symbol; ``""`` without a match.
    ``uns["resolve_genes"]``
        The arguments; ``columns``, the names of these columns; ``n_in``, ``n_matched`` and ``n_dropped``, the numbers
        of features, with a match and without; ``n_genes``, the number of different genes.
    ``X``, every layer
        Only where ``duplicates="sum"`` finds duplicates: `adata` then has fewer features. Integers of fewer than 64
        bits become int64. ``raw`` stays as it is.

    Raises
    ------
    KeyError
        If ``var[gene_column]`` is missing.
    ValueError
        If fewer than a third of the names match, human and mouse cannot be told apart, a column of that name exists, or
        duplicates are found that may not or cannot be summed.

    Notes
    -----
    The table has current symbols only (Ensembl, Martin et al. 2023), so a few per cent of the symbols in older files
    are not found; Ensembl ids are stable. Genes on alternative haplotypes (such as HLA) have several ids for one
    symbol.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()
    >>> sfm.pp.resolve_genes(adata)
    >>> adata.var.loc["Gad1", "gene_id"]
    'ENSMUSG00000070880'
    """
    check_choice("organism", organism, ("auto", *ORGANISMS))
    check_choice("to", to, (None, *ORGANISMS))
    check_choice("duplicates", duplicates, get_args(Duplicates))
    columns = [f"{key_added}_id", f"{key_added}_symbol"]
    values = feature_names(adata, gene_column)
    _check_columns(adata, columns, key_added, gene_column)

    source = "adata.var_names" if gene_column is None else f"adata.var[{gene_column!r}]"
    names = ["" if missing else str(v).strip() for v, missing in zip(values, values.isna(), strict=True)]
    others = [c for c in adata.var.columns if c != gene_column]
    hint = f"; gene_column= takes them from one of {others}" if others else ""
    try:
        matched = _match(names, organism, to)
    except ValueError as error:
        msg = f"{error}. The names were taken from {source}{hint}"
        raise ValueError(msg) from None

    kept, gene_of = _one_feature_a_gene(matched.ids)
    n_summed = len(names) - len(kept)
    sums: dict[str | None, Any] = {}
    if n_summed:
        if duplicates == "error":
            _refuse_duplicates(adata, matched, kept)
        sums = _sums(adata, gene_of, copy=copy)

    n_matched = int((matched.ids != "").sum())
    report = {
        "organism": matched.organism,
        "to": to or matched.organism,
        "gene_column": gene_column or "",
        "duplicates": duplicates,
        "columns": columns,
        "n_in": len(names),
        "n_matched": n_matched,
        "n_dropped": len(names) - n_matched,
        "n_genes": n_matched - n_summed,
    }
    logger.info(
        "resolve_genes: %d features named by %s, %d matched as %s genes%s, %d dropped%s%s -> var[%r], var[%r], "
        "uns['resolve_genes']",
        len(names),
        source,
        n_matched,
        matched.organism,
        f" with an ortholog in {to}" if to not in (None, matched.organism) else "",
        len(names) - n_matched,
        f" (no match: {_names(adata, np.flatnonzero(matched.ids == ''))})" if n_matched < len(names) else "",
        f", {n_summed} duplicates summed" if sums else "",
        *columns,
    )
    if sums:
        small = _with_sums(adata, kept, sums)
        if copy:
            adata = small
        else:
            adata._init_as_actual(small)
    found = dict(zip(columns, (matched.ids[kept], matched.symbols[kept]), strict=True))
    fields = {"var": found, "uns": {"resolve_genes": report}}
    adata = write(adata, "pp.resolve_genes", key_added, fields, copy=copy and not sums)
    return adata if copy else None


class _Matched(NamedTuple):
    """Gene of each feature, ``""`` where there is none."""

    organism: Organism
    """Organism of the names."""
    ids: np.ndarray
    symbols: np.ndarray


def _check_columns(adata: AnnData, columns: list[str], key_added: str, gene_column: str | None) -> None:
    taken = [c for c in columns if c in (gene_column, adata.var.index.name)]
    if taken:
        msg = f"key_added={key_added!r} would overwrite {taken[0]!r}, which is read; choose another name"
        raise ValueError(msg)
    check_free(adata, "pp.resolve_genes", {"var": columns, "uns": ["resolve_genes"]})


def _match(names: list[str], organism: Organism | Literal["auto"], to: Organism | None) -> _Matched:
    of = guess_organism(names) if organism == "auto" else organism
    genes = match_genes(names, of)
    require_matches(names, (genes["gene_id"] != "").to_numpy(), of)
    if to is not None and to != of:
        genes = match_genes(names, of, to=to)
    return _Matched(of, genes["gene_id"].to_numpy(), genes["gene_symbol"].to_numpy())


def _one_feature_a_gene(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First feature of each gene, ascending, and the position among these of each feature's gene."""
    # Features without a match are no duplicates of each other.
    keys = np.where(ids == "", [f"#{k}" for k in range(len(ids))], ids)
    _, first, gene_of = np.unique(keys, return_index=True, return_inverse=True)
    kept = np.sort(first)
    return kept, np.searchsorted(kept, first)[gene_of]


def _refuse_duplicates(adata: AnnData, matched: _Matched, kept: np.ndarray) -> None:
    n = len(matched.ids)
    repeated = np.setdiff1d(np.arange(n), kept)[0]
    same = np.flatnonzero(matched.ids == matched.ids[repeated])
    msg = (
        f"{n - len(kept)} of {n} features are the same gene as another: {_names(adata, same)} are all "
        f"{matched.ids[repeated]} ({matched.symbols[repeated]}); pass duplicates='sum' to add up their counts, or keep "
        "one feature for each gene"
    )
    raise ValueError(msg)


def _with_sums(adata: AnnData, kept: np.ndarray, sums: dict[str | None, Any]) -> AnnData:
    """Copy with the features ``kept`` and their sums in ``X`` (key None) and the layers."""
    small = adata[:, kept].to_memory() if adata.isbacked else adata[:, kept].copy()
    for key, matrix in sums.items():
        if key is None:
            small.X = matrix
        else:
            small.layers[key] = matrix
    return small


def _names(adata: AnnData, which: np.ndarray) -> str:
    """Name the first three of some features."""
    return ", ".join(repr(str(n)) for n in adata.var_names[which[:3]]) + (", ..." if len(which) > 3 else "")


def _sums(adata: AnnData, gene_of: np.ndarray, *, copy: bool) -> dict[str | None, Any]:
    """Sum the features of each gene in ``X`` (key None) and the layers; ``gene_of`` is the new column of each."""
    if adata.isbacked and not copy:
        msg = (
            "duplicates='sum' cannot write to a file open in backed mode; pass copy=True, or load it with "
            "adata.to_memory()"
        )
        raise ValueError(msg)
    standing = [f"{name}[{key!r}]" for name in ("varm", "varp") for key in getattr(adata, name)]
    if standing:
        msg = (
            f"duplicates='sum' merges features, but {', '.join(standing)} cannot be summed; delete it and compute it "
            "again"
        )
        raise ValueError(msg)
    sums: dict[str | None, Any] = {}
    for key in [*([] if adata.X is None else [None]), *(k for k in adata.layers if k is not None)]:
        x = get_matrix(adata, key)
        kind = value_kind(x)
        if kind not in ("counts", "normalized"):
            where = "adata.X" if key is None else f"adata.layers[{key!r}]"
            msg = (
                f"duplicates='sum' adds values, but {where} looks like {kind!r} values, not like counts; call "
                "resolve_genes on the counts, before taking logarithms"
            )
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
