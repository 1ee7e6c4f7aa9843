"""get.pyg: the graph holds exactly the tissue graph, the networks and the expression, and a model runs on it."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.spatial.distance import cdist

import spatialfm as sfm


def random_graph(n, rng, *, symmetric=True):
    a = np.triu(rng.uniform(0.1, 1, (n, n)), 1) * (rng.random((n, n)) < 0.3)
    if symmetric:
        a = a + a.T
    return sparse.csr_matrix(a.astype(np.float32))


@pytest.fixture
def adata():
    """9 cells of 2 groups, 5 of 7 genes in the networks (in another order), one cell without neighbour."""
    rng = np.random.default_rng(0)
    n, genes = 9, ["g5", "g1", "g6", "g0", "g3"]
    distances = random_graph(n, rng).tolil()
    distances[4], distances[:, 4] = 0, 0
    xy = rng.uniform(0, 100, (n, 2))
    distances = sparse.csr_matrix(np.where(distances.toarray() > 0, cdist(xy, xy), 0).astype(np.float32))
    return ad.AnnData(
        sparse.csr_matrix(rng.poisson(1, (n, 7))),
        obs=pd.DataFrame({"type": pd.Categorical(list("AABABBABA"))}, index=[f"c{i}" for i in range(n)]),
        var=pd.DataFrame(index=[f"g{i}" for i in range(7)]),
        obsm={"spatial": xy},
        obsp={"spatial_connectivities": (distances > 0).astype(np.float32), "spatial_distances": distances},
        layers={"log": rng.uniform(0.5, 1, (n, 7))},
        uns={
            "spatial_neighbors": {
                "connectivities_key": "spatial_connectivities",
                "distances_key": "spatial_distances",
                "params": {},
            },
            "grn": {
                "params": {},
                "genes": genes,
                "groupby": "type",
                "auto": False,
                "names": ["A", "B"],
                "groups": {"0": random_graph(5, rng), "1": random_graph(5, rng)},
            },
        },
    )


def dense(store, shape):
    a = np.zeros(shape, np.float32)
    i, j = store.edge_index.numpy()
    assert len(set(zip(i.tolist(), j.tolist(), strict=True))) == len(i)
    a[i, j] = store.edge_attr.numpy().ravel()
    return a


@pytest.mark.parametrize("layer", [None, "log"])
@pytest.mark.parametrize("expand", [False, True])
def test_graph_holds_what_the_data_hold(adata, layer, expand):
    import torch

    data = sfm.get.pyg(adata, layer=layer, expand=expand)
    assert data.validate()
    genes, n, g = adata.uns["grn"]["genes"], 9, 5
    x = adata[:, genes].layers["log"] if layer else adata[:, genes].X.toarray()
    code = adata.obs["type"].cat.codes.to_numpy()
    assert data.genes == genes
    assert data.groups == ["A", "B"]
    assert all(
        store.edge_index.dtype == torch.int64 and store.edge_attr.dtype == torch.float32 for store in data.edge_stores
    )

    np.testing.assert_allclose(data["cell"].x, x.astype(np.float32))
    np.testing.assert_allclose(data["cell"].pos, adata.obsm["spatial"], rtol=1e-6)
    np.testing.assert_array_equal(data["cell"].group, code)
    np.testing.assert_array_equal(
        dense(data["cell", "adjacent", "cell"], (n, n)), adata.obsp["spatial_distances"].toarray()
    )

    networks = [adata.uns["grn"]["groups"][str(t)].toarray() for t in range(2)]
    owners = code if expand else [0, 1]
    want = sparse.block_diag([networks[t] for t in owners]).toarray()
    np.testing.assert_array_equal(dense(data["gene", "coexpressed", "gene"], want.shape), want)
    np.testing.assert_array_equal(data["gene"].gene, np.tile(np.arange(g), len(owners)))
    np.testing.assert_array_equal(data["gene"].group, np.repeat(owners, g))

    # Expression, read back from the links alone.
    links = dense(data["cell", "expresses", "gene"], (n, len(owners) * g)).reshape(n, len(owners), g)
    own = np.arange(n) if expand else code
    np.testing.assert_allclose(links[np.arange(n), own], x.astype(np.float32))
    links[np.arange(n), own] = 0
    assert not links.any()
    if expand:
        np.testing.assert_array_equal(data["gene"].cell, np.repeat(np.arange(n), g))
        np.testing.assert_allclose(data["gene"].x.ravel(), x.ravel().astype(np.float32))
        assert data["cell", "expresses", "gene"].num_edges == n * g
    else:
        np.testing.assert_allclose(
            data["gene"].x.reshape(2, g), [x[code == t].mean(axis=0) for t in range(2)], rtol=1e-6
        )
        assert data["cell", "expresses", "gene"].num_edges == np.count_nonzero(x)
    back = data["gene", "expressed_by", "cell"]
    assert (back.edge_index == data["cell", "expresses", "gene"].edge_index.flip(0)).all()


def test_messages_flow_from_neighbours(adata):
    """In a directed graph, row i of the connectivities lists the neighbours of cell i, which are sources."""
    directed = random_graph(9, np.random.default_rng(3), symmetric=False)
    adata.obsp["spatial_connectivities"] = directed
    edge_index = sfm.get.pyg(adata)["cell", "adjacent", "cell"].edge_index.numpy()
    rows, cols = directed.nonzero()
    assert set(zip(*edge_index.tolist(), strict=True)) == set(zip(cols.tolist(), rows.tolist(), strict=True))


def test_one_group_and_views(adata):
    adata.uns["grn"] |= {"groupby": "", "names": [""], "groups": {"0": adata.uns["grn"]["groups"]["0"]}}
    view = adata[[5, 1, 2]]
    data = sfm.get.pyg(view)
    assert data.validate()
    assert data["gene"].num_nodes == 5
    np.testing.assert_allclose(data["cell"].x, view[:, data.genes].X.toarray())
    assert view.is_view


def test_group_without_cells_keeps_its_nodes(adata):
    data = sfm.get.pyg(adata[adata.obs["type"] == "B"])
    assert data["gene"].num_nodes == 10
    assert data["cell"].group.unique().tolist() == [1]
    assert not data["gene"].x[:5].any()


@pytest.mark.parametrize("expand", [False, True])
def test_a_model_runs_on_it(adata, expand):
    import torch
    from torch_geometric.loader import DataLoader
    from torch_geometric.nn import GATv2Conv, HeteroConv

    torch.manual_seed(0)
    parts = [sfm.get.pyg(adata[rows], expand=expand) for rows in (slice(0, 5), slice(5, 9))]
    types = parts[0].edge_types
    conv = HeteroConv({t: GATv2Conv((-1, -1), 4, edge_dim=1, add_self_loops=False) for t in types})
    (batch,) = DataLoader(parts, batch_size=2)
    together = conv(batch.x_dict, batch.edge_index_dict, batch.edge_attr_dict)
    apart = [conv(p.x_dict, p.edge_index_dict, p.edge_attr_dict) for p in parts]
    for kind in ("cell", "gene"):
        assert together[kind].shape == (batch[kind].num_nodes, 4)
        torch.testing.assert_close(together[kind], torch.cat([a[kind] for a in apart]))
    sum(v.sum() for v in together.values()).backward()
    assert all(p.grad is not None for p in conv.parameters())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"neighbors_key": "nope"}, r"sfm\.pp\.spatial_neighbors"),
        ({"grn_key": "nope"}, r"sfm\.pp\.grn"),
        ({"layer": "nope"}, "layer='nope'"),
        ({"basis": "nope"}, "nope"),
    ],
)
def test_refusals(adata, kwargs, message):
    with pytest.raises(KeyError, match=message):
        sfm.get.pyg(adata, **kwargs)


def test_tissue_graph_without_edges(adata):
    for key in ("spatial_connectivities", "spatial_distances"):
        adata.obsp[key] = sparse.csr_matrix(adata.obsp[key].shape, dtype=np.float32)
    edges = sfm.get.pyg(adata)["cell", "adjacent", "cell"]
    assert edges.edge_index.shape == (2, 0)
    assert edges.edge_attr.shape == (0, 1)


def test_without_pytorch_geometric(adata, monkeypatch):
    monkeypatch.setattr("spatialfm.get._pyg.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"spatialfm\[pyg\]"):
        sfm.get.pyg(adata)
