"""Embeddings of cells by a pretrained model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from spatialfm._checks import check_positive, checked
from spatialfm._data._adata import get_libraries
from spatialfm._data._expression import ValuesKind
from spatialfm._data._write import check_free, write
from spatialfm._settings import logger, warn
from spatialfm.tl._provenance import made_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from anndata import AnnData

    from spatialfm.models import HEIST, HEISTNiche, HiBio
    from spatialfm.pp._tissue import Tissue


@checked
def embed(
    adata: AnnData,
    model: str | Path | HEIST | HEISTNiche | HiBio = "heist-niche",
    *,
    image: Any = None,
    library_key: str | None = None,
    layer: str | None = None,
    groupby: str | None = "auto",
    basis: str = "spatial",
    values: ValuesKind = "auto",
    min_detected: float = 0.02,
    context_size: int = 256,
    gene_sets: str | Path | Mapping[str, Iterable[str]] | None = "hallmark",
    key_added: str | None = None,
    device: str | None = None,
    batch_size: int | None = None,
    dtype: str | None = None,
    rng: int | np.random.Generator | None = 0,
    copy: bool = False,
) -> AnnData | None:
    """Embed cells: the own state of each in one block of columns, its place in the tissue in the other.

    Three models are bundled:

    ``"heist-niche"``, the default
        Finds the components of expression that vary over the tissue and lets each cell hear those of its neighbours on the tissue graph, over
        several radii. It reads all slides whole and needs no gene networks: ``groupby``, ``context_size``, ``batch_size`` and ``rng`` play no
        part. Turning, mirroring or scaling a slide changes nothing.

        **Its columns are axes of this data set**, like principal components: embed slides that are to be compared in one AnnData, named by
        ``library_key``. Embeddings of separately embedded files do not share axes. Technical differences between slides are not corrected.
    ``"heist"``
        The architecture as published. It reads a gene network of each group of cells and the coordinates themselves, in compact contexts with
        a halo of neighbours, so that a cell at a context's border still sees its own. Memory is that of the data and one batch, and
        ``batch_size`` changes nothing but rounding.
    ``"hibio"``
        For spots with H&E: histology and expression in one space, with pathways as anchors in it and nested regions of the tissue. It works with
        the expression alone and with the image alone, and says in the log and in ``uns`` which it had. ``groupby``, ``context_size``, ``dtype``
        and ``rng`` play no part. The columns of ``X_hibio`` are axes of this data set, as with the default; those of ``X_hibio_gene`` and
        ``X_hibio_image`` are of the model, and comparable everywhere by their cosine.

    The tissue graph, and for ``"heist"`` the gene networks, are built where they are missing, by :func:`spatialfm.pp.spatial_neighbors` and
    :func:`spatialfm.pp.grn`, and stored. No model sees a label, unless you name labels in ``groupby``. The result does not depend on the order
    of the rows.

    Parameters
    ----------
    adata
        Cells by features, of RNA or protein and any panel; coordinates in ``obsm[basis]``. Dense or sparse, in memory, backed, or a view.
    model
        Name, folder, file (see :func:`spatialfm.models.load`), or a model.
    image
        For ``"hibio"``: the H&E image, whatever :func:`spatialfm.tl.image_features` takes: a file, an array, the name of an image in
        ``uns["spatial"]``, a SpatialData object, a mapping from the slides, or the patches of :func:`spatialfm.pp.patches`. Where None,
        ``obsm["image_features"]`` if they are there, otherwise the images in ``uns["spatial"]``, otherwise expression alone. ``False`` is
        expression alone. For the image alone, leave out the genes: ``adata[:, []].copy()``.
    library_key
        Column of ``obs`` naming each cell's slide. Cells of different slides are never neighbours. Features that a slide did not measure (all zero or
        NaN there, and found elsewhere) are left out, and a warning names them.
    layer
        Layer to use instead of ``X``.
    groupby
        For ``"heist"``: whose gene networks to build where ``uns["grn"]`` is missing. ``"auto"`` finds groups without labels, ``None`` is one
        network, a column of ``obs`` uses its groups. With cell-type labels, the embedding has seen them: do not score it against them.
    basis
        Key of the coordinates in ``obsm``.
    values
        What the values are, which decides how they are brought to the scale that the model knows, on a copy. ``"counts"`` of molecules (a background may
        have been subtracted: negative ones count as zero) and ``"normalized"`` values (counts divided by something) are normalised to 10,000 a cell and
        logged; an ``"intensity"`` (CODEX and the like) is arcsinh-transformed; ``"log"`` and ``"scaled"`` values are taken as they are. ``"auto"``
        recognises them, with a warning where two readings are close.
    min_detected
        For ``"heist-niche"``: features found in a smaller share of the cells are left out, but for the 50 found in most; what is rare is mostly noise of
        counting. The log and ``uns[key_added]["genes"]`` name them.
    context_size
        For ``"heist"``: largest number of cells of a context, without its halo.
    gene_sets
        For ``"hibio"``: whose anchors to compare spots with, as for :func:`spatialfm.pp.pathways`; None for none.
    key_added
        Name of what is written; ``"hibio"`` for that model and ``"heist"`` for the others where None.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``; ``settings.device`` where None.
    batch_size
        For ``"heist"``: contexts of a batch; for ``"hibio"``: patches of a batch; chosen by the device where None.
    dtype
        ``"float32"`` or ``"bfloat16"`` (``"heist"`` is twice as fast, cosine to float32 above 0.99); where None, bfloat16 on CUDA and float32
        elsewhere.
    rng
        For ``"heist"``: seed or generator of the groups that ``groupby="auto"`` finds.
    copy
        Return a copy instead of writing to ``adata``.

    Returns
    -------
    ``None``, or the copy. Written, the embeddings as float32 (what an earlier call with this ``key_added`` wrote goes, by whichever model):

    ``obsm["X_{key_added}_cell"]``
        The cell in its tissue: use it for niches and regions. ``"heist-niche"``: (n_obs, 42). 12 columns are components of what the
        network returns and of what is heard within the niche's radius, which grows with the square root of a slide's cells; then 10 each for a
        smaller and two larger radii, scaled down so that they hardly move a distance. ``"heist"``: (n_obs, 128), the cell-level half.
    ``obsm["X_{key_added}_gene"]``
        The cell's own state: use it for cell types. ``"heist-niche"``: (n_obs, 42). 32 columns are its components, the larger ones damped; 10,
        scaled down, the mean of its direct neighbours. ``"heist"``: (n_obs, 128), the mean of the embeddings of its genes.
    ``obsm["X_{key_added}"]``
        The two side by side, ``cell`` first: (n_obs, 84) or (n_obs, 256).
    ``uns[key_added]``
        ``model``, ``sha256`` of its weights, ``params`` (``values``: what they are or were taken for), ``blocks`` (column ranges of the two in ``X_{key_added}``),
        and ``genes``: how many the file has, how many were used, and their names; names of those ``left_out``, and for each its reason (``left_out_reasons``). ``axes``: ``"data"`` where the columns are axes of this data set, ``"model"`` where they are the
        model's; ``slides``: ``names`` and ``n_cells`` of those that were embedded together; ``id``, of this embedding: tools refuse cells that were
        embedded by themselves and put together later. For ``"heist-niche"``, ``params["radii"]`` tells what is heard, of the niche and then of each further
        block of columns: ``steps`` on the tissue graph; ``distance`` that as many steps go from a cell (root mean square), in the unit of the coordinates;
        and ``um``, the same in micrometres, where ``uns["spatial"]`` tells them.
    ``obsp["spatial_connectivities"]``, ``obsp["spatial_distances"]``, ``uns["spatial_neighbors"]``
        Where they were missing.
    ``uns["grn"]``, ``obs["grn_group"]``
        Where they were missing, for ``"heist"`` alone.

    By ``"hibio"``, float32, with ``key_added="hibio"``:

    ``obsm["X_hibio"]``
        (n_obs, 12) expression and image fused, within a niche and within nested regions: use it for domains and regions.
    ``obsm["X_hibio_gene"]``, ``obsm["X_hibio_image"]``
        (n_obs, 32) of length 1, the spot's own profile and its patches in the space that both share: use them for retrieval. Each where
        there is that modality.
    ``obsm["hibio_anchors"]``
        (n_obs, pathways) DataFrame, cosine of the spot's profile to the pathways' anchors; of its patches where there is no expression.
        ``obsm["hibio_anchors_image"]``, of its patches, where there are both.
    ``obs["hibio_region_1"]``, ``obs["hibio_region_2"]``, ``obsm["hibio_regions"]``
        The nested contiguous regions that were found, coarse first; and the cosine of each spot to its region at each level, of its patch to
        the region's profiles (``image_1``, ``image_2``) and of its profile to the region's patches (``gene_1``, ``gene_2``); to the same
        modality where there is one alone.
    ``uns["hibio"]``
        As above, and ``modalities``, ``regions`` (the columns of ``obs``).
    ``obsm["image_features"]``, ``uns["image_features"]``
        Where an image was read: later calls need not read it again.

    ``"heist-niche"`` has fewer columns where there are fewer than 33 features or cells: the components are at most one less than either.

    Raises
    ------
    KeyError
        ``layer``, ``library_key``, ``groupby`` or ``obsm[basis]`` does not exist.
    ValueError
        Coordinates or values are not finite, coordinates are not 2-D, no feature varies, stored graphs do not fit, or an argument is out of
        range; for ``"hibio"``, too few features are genes that it knows, or the image does not fit. ``adata`` is as it was.
    FileNotFoundError
        There is no such model or image.

    Notes
    -----
    ``"heist"`` is HEIST of Madhu et al. 2025 (`arXiv:2506.11152 <https://arxiv.org/abs/2506.11152>`__); ``"heist-niche"`` is this package's
    own, on the same hierarchy, see :class:`spatialfm.models.HEISTNiche`; ``"hibio"`` is our reading of HiBio-ST, see
    :class:`spatialfm.models.HiBio`.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()
    >>> sfm.tl.embed(adata, library_key="mouse_id")  # doctest: +SKIP
    >>> adata.obsm["X_heist"].shape  # doctest: +SKIP
    (4788, 84)
    """
    from spatialfm._data._expression import NOT_MEASURED
    from spatialfm.engine import choose_device, choose_dtype, cut_contexts, encode_tissue, encode_whole
    from spatialfm.models import HEIST, HEISTNiche, HiBio, fingerprint
    from spatialfm.models._registry import take_model
    from spatialfm.pp._tissue import read_tissue
    from spatialfm.tl._embed_spots import embed_spots

    check_positive("context_size", context_size)
    check_positive("batch_size", batch_size, optional=True)
    if not 0 <= min_detected <= 1:
        msg = f"min_detected={min_detected!r} is a share of the cells, from 0 to 1"
        raise ValueError(msg)
    place = choose_device(device)
    precision = choose_dtype(dtype, place)
    encoder = take_model(model, HEIST, HEISTNiche, HiBio, lacks="embeds no cells", default="heist-niche")
    if isinstance(encoder, HiBio):
        return embed_spots(
            adata,
            encoder,
            image=image,
            gene_sets=gene_sets,
            key_added=key_added or "hibio",
            device=place,
            batch_size=batch_size,
            copy=copy,
            library_key=library_key,
            layer=layer,
            basis=basis,
            values=values,
        )
    if image is not None and image is not False:
        msg = f"image= is for models of histology, and {encoder.name!r} reads none; leave it out, or take model='hibio'"
        raise ValueError(msg)
    middle = "" if key_added is None else f"_{key_added}"
    niche = isinstance(encoder, HEISTNiche)
    names = [f"X{middle}_niche", f"X{middle}_state"] if niche else [f"X_{key_added or 'heist'}"]
    check_free(adata, "tl.embed", {"obsm": names})
    tissue = read_tissue(
        adata,
        library_key=library_key,
        layer=layer,
        groupby=groupby,
        basis=basis,
        values=values,
        networks=not isinstance(encoder, HEISTNiche),
        rng=rng,
    )
    left_out = dict.fromkeys(tissue.unmeasured, NOT_MEASURED)
    if isinstance(encoder, HEISTNiche):
        if groupby != "auto":
            warn("groupby=%r plays no part: %r reads no gene networks", groupby, encoder.name)
        cell, gene, components = encode_whole(encoder, tissue, device=place, dtype=precision, min_detected=min_detected)
        genes = [tissue.genes[i] for i in components.features]
        left_out |= {tissue.genes[i]: why for why, at in components.left_out.items() for i in at}
        own_params: dict[str, Any] = {
            "min_detected": float(min_detected),
            "radii": _radii(adata, encoder, tissue, library_key),
        }
    else:
        genes = tissue.genes
        networks = tissue.built.uns["grn"] if "grn" in tissue.built.uns else adata.uns["grn"]
        contexts = cut_contexts(tissue.xy, tissue.graph, tissue.slide, context_size=context_size)
        own_params = {
            "groupby": str(networks["groupby"]), "context_size": int(context_size), "n_contexts": len(contexts)
        }  # fmt: skip
        cell, gene = encode_tissue(encoder, tissue, contexts, device=place, dtype=precision, batch_size=batch_size)

    d = cell.shape[1]
    both = np.empty((adata.n_obs, d + gene.shape[1]), np.float32)
    both[tissue.rows, :d] = cell
    both[tissue.rows, d:] = gene
    if not np.isfinite(both).all():
        n_bad = int((~np.isfinite(both).all(axis=1)).sum())
        msg = f"{encoder.name!r} gives embeddings that are not finite for {n_bad} of {adata.n_obs} cells; try dtype='float32', or another model"
        raise ValueError(msg)

    params: dict[str, Any] = {
        "library_key": library_key or "",
        "layer": layer or "",
        "basis": basis,
        "values": tissue.kind,
        "device": place.type,
        "dtype": precision,
        **own_params,
    }
    entry = {
        "model": encoder.name,
        "sha256": fingerprint(encoder),
        **made_of(adata, library_key, "data" if niche else "model", both[tissue.rows]),
        "params": params,
        "genes": {
            "n_in": adata.n_vars,
            "n_used": len(genes),
            "names": genes,
            "left_out": list(left_out),
            "left_out_reasons": list(left_out.values()),
        },
    }
    blocks = dict(zip(names, (both[:, :d].copy(), both[:, d:].copy()) if niche else (both,), strict=True))
    if not niche:
        entry["blocks"] = {"cell": [0, d], "gene": [d, both.shape[1]]}
    fields: dict[str, dict[str, Any]] = {"obsm": blocks, "embeddings": {name: dict(entry) for name in blocks}}
    adata = write(adata, "tl.embed", key_added or encoder.name, fields, copy=copy)
    tissue.store_built(adata)
    logger.info(
        "embed: %d cells x %d of %d genes by %s on %s -> %s",
        adata.n_obs, len(genes), adata.n_vars, encoder.name, place, ", ".join(f"obsm[{name!r}]" for name in names),
    )  # fmt: skip
    for why in dict.fromkeys(left_out.values()):
        names = [name for name, own in left_out.items() if own == why]
        logger.info(
            "embed: features left out: %d, %s (%s%s)",
            len(names),
            why,
            ", ".join(names[:5]),
            ", ..." if len(names) > 5 else "",
        )
    return adata if copy else None


def _radii(adata: AnnData, encoder: HEISTNiche, tissue: Tissue, library_key: str | None) -> dict[str, np.ndarray]:
    """Tell the radii of the niche's block, in steps and on the tissue."""
    from spatialfm.engine import slide_size
    from spatialfm.pp._patches import stated_micrometres

    niche, around = encoder.config.steps(slide_size(tissue))
    steps = np.array([niche, *around])
    i, j = tissue.graph.nonzero()
    edges = np.linalg.norm(tissue.xy[i] - tissue.xy[j], axis=1)
    # A lazy step goes along an edge every other time.
    reach = np.sqrt(steps / 2)
    radii = {"steps": steps, "distance": reach * float(np.median(edges) if len(edges) else 0)}
    libraries = get_libraries(adata, library_key)
    um = [
        stated_micrometres(adata, name, tissue.xy[tissue.slide == k], len(libraries))
        for k, (name, _) in enumerate(libraries)
    ]
    if len(edges) and all(factor is not None for factor in um):
        radii["um"] = reach * float(np.median(edges * np.array(um, float)[tissue.slide[i]]))
    return radii
