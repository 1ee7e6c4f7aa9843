"""TF-IDF weights of genes: spots are the documents, genes the terms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import scipy.sparse as sp

from spatialfm._checks import check_choice, checked
from spatialfm._data._adata import get_libraries, raw_hint
from spatialfm._data._expression import ValuesKind, log_normalize, read_values
from spatialfm._data._write import check_free, record_params, write
from spatialfm._settings import logger

if TYPE_CHECKING:
    from anndata import AnnData

    from spatialfm._data._expression import Kind

_BLOCK_BYTES = 1 << 26


@checked
def tfidf(
    adata: AnnData,
    *,
    tf: Literal["log", "linear"] = "log",
    layer: str | None = None,
    values: ValuesKind = "auto",
    library_key: str | None = None,
    key_added: str = "tfidf",
    copy: bool = False,
) -> AnnData | None:
    """Weight genes by TF-IDF, so that genes present everywhere count less.

    Spots are documents and genes are terms. The term frequency is multiplied by ``idf = ln((1 + n) / (1 + df)) + 1``
    (scikit-learn's smooth inverse document frequency, where df of n spots have the gene), and each spot is scaled to
    length 1: the product of two spots is their cosine similarity, and sequencing depth cancels.

    Parameters
    ----------
    %(adata)s
    tf
        Term frequency. ``"log"``: ``ln(1 + 10,000 * share)``, where share is the gene's part of the total of the spot.
        ``"linear"``: the share itself, with which the few most abundant genes keep most of the weight.
    %(layer)s
    %(values)s
    library_key
        Column of ``obs`` with the slide of each spot. The idf of a gene is the same on all slides, with df the mean
        over slides, so that large slides do not count more. Genes that a slide lacks get no weight, with a warning.
    key_added
        Key of ``layers`` and ``uns``, and prefix of the column of ``var``.
    %(copy)s

    Returns
    -------
    None, or the changed copy. Written:

    ``layers[key_added]``
        csr float32 (n_obs, n_vars), weights of at least 0; spots with counts have length 1.
    ``var["{key_added}_idf"]``
        float64, inverse document frequency of each gene, at least 1; 0 for genes that a slide lacks.
    ``uns[key_added]``
        ``params``; ``values``, what the values were taken for: ``"counts"``, ``"normalized"`` or ``"log"``.

    Raises
    ------
    KeyError
        If the layer or the column is missing.
    ValueError
        If values are scaled, intensities, NaN or infinite, there are no spots or genes, or ``tf`` is unknown.

    See Also
    --------
    spatialfm.pl.keywords : the genes that stand out in each group of spots.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.visium_human_dlpfc()
    >>> sfm.pp.tfidf(adata)
    >>> adata.layers["tfidf"].shape
    (2929, 8916)
    """
    check_free(adata, "pp.tfidf", {"layers": [key_added], "var": [f"{key_added}_idf"], "uns": [key_added]})
    check_choice("tf", tf, ("log", "linear"))
    if layer == key_added:
        msg = f"layer={layer!r} would be overwritten by the result; choose another key_added="
        raise ValueError(msg)
    if 0 in adata.shape:
        msg = f"adata has {adata.n_obs} spots and {adata.n_vars} genes; TF-IDF needs both"
        raise ValueError(msg)
    libraries = get_libraries(adata, library_key)
    read = read_values(adata, layer, values, slides=libraries)
    kind = read.kind
    where = "adata.X" if layer is None else f"layers[{layer!r}]"
    if kind in ("scaled", "intensity"):
        why = (
            "scaled values, negative where a gene is below its mean"
            if kind == "scaled"
            else "intensities, in which every feature is present in every cell"
        )
        msg = (
            f"{where} holds {why}: no term frequencies. Pass counts, normalised or logged counts with layer=, or say "
            "with "
            "values= what they are" + raw_hint(adata)
        )
        raise ValueError(msg)

    weights = term_frequencies(read.x, kind, tf)
    idf = np.zeros(adata.n_vars)
    idf[read.features] = inverse_document_frequencies(weights, [rows for _, rows in libraries])
    weigh(weights, idf[read.features])
    if read.unmeasured:
        weights = sp.csr_matrix((weights.data, read.features[weights.indices], weights.indptr), shape=adata.shape)

    entry = {
        "params": record_params(tf=tf, layer=layer, library_key=library_key),
        "values": kind,
    }
    fields = {"layers": {key_added: weights}, "var": {f"{key_added}_idf": idf}, "uns": {key_added: entry}}
    target = write(adata, "pp.tfidf", key_added, fields, copy=copy)
    n_empty = int((np.diff(weights.indptr) == 0).sum())
    logger.info(
        "tfidf: %s taken as %s%s -> layers[%r], var[%r], uns[%r]%s",
        where,
        kind,
        " (natural logarithm assumed, undone by expm1)" if kind == "log" else "",
        key_added,
        f"{key_added}_idf",
        key_added,
        f"; {n_empty} of {adata.n_obs} spots are empty" if n_empty else "",
    )
    return target if copy else None


def term_frequencies(x: Any, kind: Kind, tf: str) -> sp.csr_matrix:
    """Term frequencies of counts, normalised or logged values, up to a factor for each spot.

    A new csr float32 without stored zeros.
    """
    if sp.issparse(x):
        y = sp.csr_matrix(x, dtype=np.float32, copy=True)
    else:
        step = max(1, _BLOCK_BYTES // (4 * x.shape[1]))
        blocks = [sp.csr_matrix(np.asarray(x[s : s + step], dtype=np.float32)) for s in range(0, x.shape[0], step)]
        y = sp.vstack(blocks, format="csr")
    np.maximum(y.data, 0, out=y.data)
    y.eliminate_zeros()
    if kind == "log":
        np.expm1(y.data, out=y.data)
    return log_normalize(y, "counts") if tf == "log" else y


def inverse_document_frequencies(x: sp.csr_matrix, slides: list[np.ndarray]) -> np.ndarray:
    """Smooth inverse document frequency (n_genes,) of a csr without stored zeros, see :func:`tfidf`.

    ``slides`` are the rows of each slide.
    """
    n = x.shape[0]
    shares = np.stack([(x[rows] if len(slides) > 1 else x).getnnz(axis=0) / len(rows) for rows in slides])
    df = n * shares.sum(axis=0) / np.maximum((shares > 0).sum(axis=0), 1)
    return np.log((1 + n) / (1 + df)) + 1


def weigh(x: sp.csr_matrix, idf: np.ndarray) -> None:
    """Multiply term frequencies (csr) by ``idf`` and bring rows to length 1, in place."""
    from sklearn.preprocessing import normalize

    x.data *= idf.astype(np.float32)[x.indices]
    normalize(x, copy=False)
