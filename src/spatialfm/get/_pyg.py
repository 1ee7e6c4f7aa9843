"""The hierarchical graph for PyTorch Geometric."""

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
    """Give the hierarchical graph of cells and genes to a model of your own in PyTorch Geometric.

    This needs PyTorch Geometric: ``pip install "spatialfm[pyg]"``.

    HEIST sees a gene network in every cell, which cells of one group share. A node for each gene of each cell would repeat each network in
    every cell of its group, so by default there is a gene node for each gene of each *group*, and what differs between cells, the
    expression, is on the links between cells and genes. Nothing is lost, and the size stays that of the expression matrix. ``expand=True``
    writes the repeated form out, for models that need a state for each gene of each cell; take it for a few hundred cells at a time
    (``adata[rows]``), since 1,000 cells of 200 genes with 5,000 edges a network make 10 million gene edges.

    Parameters
    ----------
    adata
        Cells with a tissue graph (:func:`spatialfm.pp.spatial_neighbors`) and gene networks (:func:`spatialfm.pp.grn`); not changed.
    layer
        Layer with the expression; ``X`` by default. Values are taken as they are.
    neighbors_key
        Key of ``uns`` that names the tissue graph.
    grn_key
        Key of ``uns`` with the gene networks.
    basis
        Key of ``obsm`` with the coordinates.
    expand
        Whether gene nodes stand for genes of cells instead of genes of groups.

    Returns
    -------
    A ``HeteroData`` of n cells, G genes of the networks and T groups, with int64 indices and float32 values. Every ``edge_index`` is
    (2, edges), source above target; gene-gene edges are there in both directions.

    ``["cell"]``
        ``x`` (n, G) expression; ``pos`` (n, 2 or 3) coordinates; ``group`` (n,) position in ``groups``.
    ``["gene"]``
        One node for each gene of each group, gene g of group t at ``t * G + g``: ``x`` (T * G, 1) mean expression in the group; ``gene``,
        ``group`` (T * G,). With ``expand`` one for each gene of each cell, gene g of cell i at ``i * G + g``: ``x`` (n * G, 1)
        expression; ``gene``, ``group``, ``cell`` (n * G,).
    ``["cell", "adjacent", "cell"]``
        ``edge_index`` from each neighbour in the tissue graph to the cell it is a neighbour of; ``edge_attr`` (edges, 1) distance in
        the unit of the coordinates.
    ``["gene", "coexpressed", "gene"]``
        ``edge_index``; ``edge_attr`` (edges, 1) mutual information in nats.
    ``["cell", "expresses", "gene"]``, ``["gene", "expressed_by", "cell"]``
        ``edge_index``; ``edge_attr`` (edges, 1) expression. An edge for each value that is not 0; with ``expand`` for every gene.
    ``genes``, ``groups``
        Lists of names.

    Raises
    ------
    KeyError, ValueError
        If the tissue graph, the gene networks, their genes or the coordinates are missing.
    ImportError
        PyTorch Geometric is not installed.
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
