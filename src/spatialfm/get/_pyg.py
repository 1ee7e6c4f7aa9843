"""Graph of cells and genes for PyTorch Geometric."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from spatialfm._checks import checked
from spatialfm._data._adata import get_coordinates, get_graph, get_matrix

if TYPE_CHECKING:
    from anndata import AnnData
    from torch_geometric.data import HeteroData


@checked
def pyg(
    adata: AnnData,
    *,
    layer: str | None = None,
    neighbors_key: str = "spatial_neighbors",
    grn_key: str = "grn",
    basis: str = "spatial",
    expand: bool = False,
) -> HeteroData:
    """Graph of cells and genes for your own models in PyTorch Geometric.

    There is a node for each cell, and a node for each gene of each group of cells: cells of a group share its gene
    network, and their expression is on the edges between cells and genes. ``expand=True`` makes a node for each gene of
    each cell instead, for models that need one; use it for a few hundred cells at a time.

    This needs PyTorch Geometric: ``pip install "spatialfm[pyg]"``.

    Parameters
    ----------
    adata
        Cells with a tissue graph (:func:`spatialfm.pp.spatial_neighbors`) and gene networks
        (:func:`spatialfm.pp.grn`); not changed.
    %(layer)s
    %(neighbors_key)s
    grn_key
        Key of ``uns`` with the gene networks.
    %(basis)s
    expand
        Make a node for each gene of each cell.

    Returns
    -------
    A ``HeteroData`` for n cells, G genes and T groups, with int64 indices and float32 values; each ``edge_index`` is
    (2, edges), with the source first.

    ``["cell"]``
        ``x`` (n, G), expression; ``pos`` (n, 2 or 3), coordinates; ``group`` (n,), position in ``groups``.
    ``["gene"]``
        Gene g of group t is node ``t * G + g``: ``x`` (T * G, 1), mean expression in the group; ``gene`` and ``group``
        (T * G,). With ``expand``, gene g of cell i is node ``i * G + g``, and there is ``cell`` (n * G,) too.
    ``["cell", "adjacent", "cell"]``
        Tissue graph, from each neighbour to the cell; ``edge_attr``, distance in the unit of the coordinates.
    ``["gene", "coexpressed", "gene"]``
        Gene networks, in both directions; ``edge_attr``, mutual information in nats.
    ``["cell", "expresses", "gene"]``, ``["gene", "expressed_by", "cell"]``
        ``edge_attr``, expression; an edge for each value that is not 0, and for every gene with ``expand``.
    ``genes``, ``groups``
        Lists of names.

    Raises
    ------
    KeyError, ValueError
        If the tissue graph, the gene networks, their genes or the coordinates are missing.
    ImportError
        If PyTorch Geometric is not installed.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> adata = sfm.datasets.merfish_mouse_brain()[:300].copy()
    >>> sfm.pp.spatial_neighbors(adata)
    >>> sfm.pp.grn(adata, groupby=None, n_genes=20)
    >>> sfm.get.pyg(adata)["cell"].x.shape
    torch.Size([300, 20])
    """
    if find_spec("torch_geometric") is None:
        msg = 'sfm.get.pyg needs PyTorch Geometric: pip install "spatialfm[pyg]"'
        raise ImportError(msg)
    from spatialfm.pp._grn import get_networks

    graph, distances = get_graph(adata, neighbors_key, basis)
    genes, groups, networks, group = get_networks(adata, grn_key)
    pos = get_coordinates(adata, basis)
    columns = adata.var_names.get_indexer(genes)
    x = get_matrix(adata, layer)[:, columns]
    x = np.asarray(x.toarray() if hasattr(x, "toarray") else x, dtype=np.float32)
    n, n_genes = x.shape

    import torch
    from torch_geometric.data import HeteroData

    def column(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32).reshape(-1, 1))

    def index(*rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    data = HeteroData(genes=genes, groups=groups)
    data["cell"].x = torch.from_numpy(x)
    data["cell"].pos = torch.from_numpy(pos.astype(np.float32))
    data["cell"].group = torch.from_numpy(group.astype(np.int64))
    near = graph.tocoo()
    data["cell", "adjacent", "cell"].edge_index = index(near.col, near.row)
    # scipy gives a matrix instead of values where there is no edge.
    lengths = np.asarray(distances[near.row, near.col]) if near.nnz else np.empty(0)
    data["cell", "adjacent", "cell"].edge_attr = column(lengths)

    # A block of G gene nodes for each owner: a cell where expanded, a group otherwise.
    owner_group = group if expand else np.arange(len(groups))
    cell, gene = np.divmod(np.arange(n * n_genes), n_genes) if expand else np.nonzero(x)
    owner = cell if expand else group[cell]
    if expand:
        level = x
    else:
        level = np.zeros((len(groups), n_genes), dtype=np.float32)
        for t in np.unique(group):
            level[t] = x[group == t].mean(axis=0)
    data["gene"].x = column(level)
    data["gene"].gene = torch.arange(n_genes).repeat(len(owner_group))
    data["gene"].group = torch.from_numpy(np.repeat(owner_group, n_genes).astype(np.int64))
    if expand:
        data["gene"].cell = torch.arange(n).repeat_interleave(n_genes)

    edges = [network.tocoo() for network in networks]
    offsets = np.arange(len(owner_group)) * n_genes
    parts = [
        (edges[t].row + start, edges[t].col + start, edges[t].data)
        for t, start in zip(owner_group, offsets, strict=True)
    ]
    source, target, weight = (np.concatenate(part) for part in zip(*parts, strict=True))
    data["gene", "coexpressed", "gene"].edge_index = index(source, target)
    data["gene", "coexpressed", "gene"].edge_attr = column(weight)

    links, expression = index(cell, owner * n_genes + gene), column(x[cell, gene])
    data["cell", "expresses", "gene"].edge_index = links
    data["cell", "expresses", "gene"].edge_attr = expression
    data["gene", "expressed_by", "cell"].edge_index = links.flip(0)
    data["gene", "expressed_by", "cell"].edge_attr = expression
    return data
