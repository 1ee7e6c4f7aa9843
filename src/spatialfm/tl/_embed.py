"""Embeddings of cells by a pretrained model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spatialfm._checks import checked
from spatialfm._data._expression import ValuesKind
from spatialfm._data._write import check_free

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

    from spatialfm.models import Model


@checked
def embed(
    adata: AnnData,
    model: str | Path | Model = "heist-niche",
    *,
    library_key: str | None = None,
    layer: str | None = None,
    basis: str = "spatial",
    values: ValuesKind = "auto",
    key_added: str | None = None,
    device: str | None = None,
    copy: bool = False,
    **options: Any,
) -> AnnData | None:
    """Embed each cell together with its neighbourhood, with a pretrained model.

    ``"heist-niche"``, the default, embeds where a cell lives (its niche) and what it is (its state). Its columns are
    axes of this dataset, like principal components: embed slides that you want to compare in one AnnData, with
    ``library_key``. ``"heist"`` is HEIST as published; its columns mean the same for all files. ``"hibio"`` is for
    spots with an H&E image. :doc:`/models` compares them. A missing tissue graph or gene networks are built and stored.

    Parameters
    ----------
    adata
        Cells or spots by features, RNA or protein, with any panel; dense or sparse, in memory, backed, or a view.
    model
        A model, or its name, folder or file (see :func:`spatialfm.models.load`).
    %(library_key)s
    %(layer)s
    %(basis)s
    %(values)s
    key_added
        Name to add to the default keys: ``"a"`` gives ``X_a_niche`` and ``X_a_state``.
    %(device)s
    %(copy)s
    options
        Options of single models; an option that the model does not read is an error. ``"heist-niche"``:
        ``min_detected`` (default 0.02), features detected in a smaller share of cells are left out. ``"heist"``:
        ``groupby``, groups of cells with their own gene networks (``"auto"`` clusters the cells, None builds one
        network, or a column of ``obs``); ``context_size`` (256), cells read at a time; ``rng``. ``"hibio"``: ``image``,
        as for :func:`spatialfm.tl.image_features`, or False for expression alone; ``gene_sets`` (``"hallmark"``), as
        for :func:`spatialfm.pp.pathways`. Also ``batch_size`` (heist, hibio), and ``dtype``, ``"float32"`` or
        ``"bfloat16"`` (heist-niche, heist).

    Returns
    -------
    ``None``, or the copy. Written as float32:

    ``obsm["X_niche"]``, ``obsm["X_state"]``
        For ``"heist-niche"``, (n_obs, 42) each, fewer for panels of less than 33 features: the niche of each cell, for
        niches and regions, and its state, for cell types.
    ``obsm["X_heist"]``
        For ``"heist"``, (n_obs, 256): the cell level, then the mean of the gene level.
    ``obsm["X_hibio"]``, ``obsm["X_hibio_gene"]``, ``obsm["X_hibio_image"]``
        For ``"hibio"``: (n_obs, 12) of both modalities, for domains; (n_obs, 32) each of expression and patch in one
        space, of length 1. Also ``obsm["hibio_anchors"]``, ``obsm["hibio_regions"]``, ``obs["hibio_region_1"]``, ...
    ``uns["embeddings"]``
        A record for each embedding: ``model``, ``sha256``, ``axes``, ``params``, ``slides``, ``genes``.

    Raises
    ------
    KeyError
        ``layer``, ``library_key``, ``groupby`` or ``obsm[basis]`` does not exist.
    ValueError
        Values or coordinates are not finite, no feature varies, graphs do not fit, or an argument is out of range.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()
    >>> sfm.tl.embed(adata, library_key="mouse_id")
    >>> adata.obsm["X_niche"].shape, adata.obsm["X_state"].shape
    ((4788, 42), (4788, 42))
    """
    from spatialfm.engine import choose_device, find_encoder

    chosen = choose_device(device)
    encoder = find_encoder(model, **options)
    check_free(adata, "tl.embed", encoder.fields(key_added))
    tissue = encoder.read(adata, library_key=library_key, layer=layer, basis=basis, values=values, device=chosen)
    _, embedding = encoder.fit_encode(tissue, device=chosen)
    adata = embedding.write(adata, key_added, copy=copy)
    return adata if copy else None
