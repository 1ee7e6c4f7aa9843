"""TF-IDF weights of genes: spots are the documents, genes the terms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import scipy.sparse as sp

from spatialfm._checks import check_choice, checked
from spatialfm._data._adata import get_libraries, raw_hint
from spatialfm._data._expression import ValuesKind, log_normalize, read_values
from spatialfm._data._write import check_free, write
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
    """Weigh genes by TF-IDF, so that what is present everywhere fades: housekeeping genes say little about a spot.

    A spot is a document and a gene a term. Term frequency times ``idf = ln((1 + n) / (1 + df)) + 1`` (scikit-learn's smooth inverse
    document frequency: n spots, df of them with the gene, so 1 for a gene that all spots have), and then each spot's vector is brought
    to length 1: the product of two spots is their cosine similarity, and depth of sequencing does not show as length.

    Parameters
    ----------
    adata
        Spots (or cells) by genes: counts, normalised or logged values, dense or sparse; which of these they are is recognised.
    tf
        ``"log"``: ``ln(1 + 10,000 * share)``, where share is the gene's part of the spot's total. ``"linear"``: the share itself, the
        textbook's choice, with which the few genes of most counts keep most of the weight: on Visium they are mitochondrial, and
        ubiquitous. Either gives the same from counts and from counts divided by each spot's total, logged or not.
    layer
        Layer to use instead of ``X``.
    values
        What the values are, as for :func:`spatialfm.tl.embed`; recognised by default.
    library_key
        Column of ``obs`` with the slide of each spot. A gene's weight is one for all slides, so that spots remain comparable between
        slides, but df is then n times the mean over slides of the share of spots with the gene. So no slide counts for more because it
        has more spots. A gene that was not measured on every slide gets no weight, and a warning names it; a rare one that
        no spot of a slide has is left out of that gene's mean. Without ``library_key`` spots count, whichever slide they are on.
    key_added
        Key of ``layers`` and ``uns``, and beginning of the name of the ``var`` column.
    copy
        Return a copy instead of writing to ``adata``.

    Returns
    -------
    ``None``, or the copy. Written:

    ``adata.layers[key_added]`` : csr matrix of float32 (n_obs, n_vars)
        The weights, not negative; stored where the gene is present. A spot with counts has Euclidean length 1, one without is empty.
    ``adata.var[f"{key_added}_idf"]`` : float64
        Inverse document frequency of each gene, at least 1; 0 for one that was not measured on every slide.
    ``adata.uns[key_added]`` : dict
        ``"params"``: the arguments; ``"values"``: what the values were recognised as: ``"counts"``, ``"normalized"`` or ``"log"``.

    Raises
    ------
    KeyError
        If ``layer`` or ``library_key`` does not exist.
    ValueError
        If values are scaled (negative), intensities (every protein is present in every cell), NaN or infinite; if there are no spots or
        genes; if ``tf`` is unknown, or ``layer`` is the one to be written.

    See Also
    --------
    spatialfm.pl.keywords : the genes that stand out in each group of spots.
    """
    check_free(adata, "pp.tfidf", {"layers": [key_added], "var": [f"{key_added}_idf"], "uns": [key_added]})
    check_choice("tf", tf, ("log", "linear"))
    if layer == key_added:
        msg = f"layer={layer!r} would be overwritten by the result; choose another key_added="
        raise ValueError(msg)
    if 0 in adata.shape:
        msg = f"adata has {adata.n_obs} spots and {adata.n_vars} genes; there is nothing to weigh"
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
            f"{where} holds {why}: no term frequencies. Pass counts, normalised or logged counts with layer=, or say with values= what they are"
            + raw_hint(adata)
        )
        raise ValueError(msg)

    weights = term_frequencies(read.x, kind, tf)
    idf = np.zeros(adata.n_vars)
    idf[read.features] = inverse_document_frequencies(weights, [rows for _, rows in libraries])
    weigh(weights, idf[read.features])
    if read.unmeasured:
        weights = sp.csr_matrix((weights.data, read.features[weights.indices], weights.indptr), shape=adata.shape)

    entry = {
        "params": {"tf": tf, "layer": layer or "", "library_key": library_key or ""},
        "values": kind,
    }
    fields = {"layers": {key_added: weights}, "var": {f"{key_added}_idf": idf}, "uns": {key_added: entry}}
    target = write(adata, "pp.tfidf", key_added, fields, copy=copy)
    back = " (natural logarithm assumed, brought back by expm1)" if kind == "log" else ""
    n_empty = int((np.diff(weights.indptr) == 0).sum())
    logger.info(
        f"tfidf: {where} taken as {kind}{back} -> layers[{key_added!r}], var[{key_added + '_idf'!r}], uns[{key_added!r}]"
        + (f"; {n_empty} of {adata.n_obs} spots are empty" if n_empty else "")
    )
    return target if copy else None


def term_frequencies(x: Any, kind: Kind, tf: str) -> sp.csr_matrix:
    """Term frequencies of counts, normalised or logged values as a new csr float32 without stored zeros, up to a factor a spot."""
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
    """Smooth inverse document frequency (n_genes,) of a csr without stored zeros; ``slides`` are rows, see :func:`tfidf`."""
    n = x.shape[0]
    shares = np.stack([(x[rows] if len(slides) > 1 else x).getnnz(axis=0) / len(rows) for rows in slides])
    df = n * shares.sum(axis=0) / np.maximum((shares > 0).sum(axis=0), 1)
    return np.log((1 + n) / (1 + df)) + 1


def weigh(x: sp.csr_matrix, idf: np.ndarray) -> None:
    """Multiply term frequencies (csr) by ``idf`` and bring rows to length 1, in place."""
    from sklearn.preprocessing import normalize

    x.data *= idf.astype(np.float32)[x.indices]
    normalize(x, copy=False)
