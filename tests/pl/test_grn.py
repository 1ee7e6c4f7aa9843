"""pl.grn: the strongest edges and nothing else."""

from __future__ import annotations

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection, PathCollection
from scipy import sparse

import spatialfm as sfm


def network(n=12, seed=0, density=0.5):
    a = np.triu(np.random.default_rng(seed).uniform(0.01, 1, (n, n)), 1)
    a[np.random.default_rng(seed + 1).random((n, n)) > density] = 0
    return sparse.csr_matrix((a + a.T).astype(np.float32))


@pytest.fixture
def adata():
    genes = [f"gene{i}" for i in range(12)]
    return ad.AnnData(
        np.zeros((3, 12), np.float32),
        obs=pd.DataFrame({"type": pd.Categorical(["A/x", "B", "C"])}, index=list("abc")),
        var=pd.DataFrame(index=genes),
        uns={
            "grn": {
                "params": {},
                "genes": genes,
                "groupby": "type",
                "auto": False,
                "names": ["A/x", "B", "C"],
                "groups": {"0": network(), "1": network(seed=5), "2": sparse.csr_matrix((12, 12), dtype=np.float32)},
            }
        },
    )


def parts(ax):
    (lines,) = [c for c in ax.collections if isinstance(c, LineCollection)]
    (nodes,) = [c for c in ax.collections if isinstance(c, PathCollection)]
    return lines, nodes


@pytest.mark.parametrize("n_edges", [1, 7, 1000])
def test_the_top_edges_are_drawn(adata, n_edges):
    a = adata.uns["grn"]["groups"]["0"].toarray()
    i, j = np.nonzero(np.triu(a))
    top = np.argsort(-a[i, j])[:n_edges]
    lines, nodes = parts(sfm.pl.grn(adata, "A/x", n_edges=n_edges))
    xy = np.asarray(nodes.get_offsets())
    genes = np.unique([i[top], j[top]])
    at = {tuple(p): g for p, g in zip(xy.tolist(), genes, strict=True)}
    got = {frozenset(at[tuple(p)] for p in segment.tolist()) for segment in lines.get_segments()}
    assert got == {frozenset((i[k], j[k])) for k in top}
    degree = np.array([sum(g in e for e in got) for g in genes])
    sizes = nodes.get_sizes()
    assert (np.argsort(np.argsort(sizes, kind="stable")) == np.argsort(np.argsort(degree, kind="stable"))).all()


def test_hubs_are_labelled_without_overlap(adata):
    ax = sfm.pl.grn(adata, "A/x", n_labels=6)
    a = adata.uns["grn"]["groups"]["0"]
    degree = pd.Series(np.diff(a.indptr), adata.var_names)
    labels = {t.get_text() for t in ax.texts}
    assert 1 <= len(labels) <= 6
    assert degree[list(labels)].min() >= degree.nlargest(6).min()
    ax.figure.canvas.draw()
    boxes = [t.get_window_extent() for t in ax.texts]
    for k, box in enumerate(boxes):
        assert not any(
            box.x0 < b.x1 - 2 and b.x0 < box.x1 - 2 and box.y0 < b.y1 - 4 and b.y0 < box.y1 - 4 for b in boxes[:k]
        )


def test_components_do_not_overlap():
    n = 12
    a = sparse.block_diag(
        [network(6, density=1.0), network(4, seed=3, density=1.0), network(2, seed=4, density=2.0)]
    ).tocsr()
    adata = ad.AnnData(np.zeros((1, n), np.float32), var=pd.DataFrame(index=[f"g{i}" for i in range(n)]))
    adata.uns["grn"] = {
        "params": {},
        "genes": list(adata.var_names),
        "groupby": "",
        "auto": False,
        "names": ["all"],
        "groups": {"0": a},
    }
    xy = np.asarray(parts(sfm.pl.grn(adata))[1].get_offsets())
    boxes = [(xy[s].min(axis=0), xy[s].max(axis=0)) for s in (slice(0, 6), slice(6, 10), slice(10, 12))]
    for k, (low, high) in enumerate(boxes):
        assert not any((low < h).all() and (lo < high).all() for lo, h in boxes[:k])


def test_seed_decides_the_layout(adata):
    a, b, c = (np.asarray(parts(sfm.pl.grn(adata, "B", rng=r))[1].get_offsets()) for r in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(a, c)


def test_given_axes_are_used_and_data_kept(adata):
    _, ax = plt.subplots()
    before = adata.uns["grn"]["groups"]["0"].copy()
    assert sfm.pl.grn(adata, "A/x", ax=ax) is ax
    assert len(plt.get_fignums()) == 1
    assert (adata.uns["grn"]["groups"]["0"] != before).nnz == 0
    assert set(adata.uns) == {"grn"}


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"group": "Z"}, ValueError, "choose from"),
        ({}, ValueError, "networks of 3 groups; choose one with group="),
        ({"group": "C"}, ValueError, "no edges"),
        ({"group": "B", "n_edges": 0}, ValueError, "n_edges=0"),
        ({"group": "B", "key": "nope"}, KeyError, "sfm.pp.grn"),
    ],
)
def test_refusals_make_no_figure(adata, kwargs, error, message):
    with pytest.raises(error, match=message):
        sfm.pl.grn(adata, **kwargs)
    assert not plt.get_fignums()
