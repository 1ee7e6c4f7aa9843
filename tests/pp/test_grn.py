from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import adjusted_rand_score, mutual_info_score

import spatialfm as sfm
from spatialfm.pp import _grn
from spatialfm.pp._grn import get_networks, mutual_information_network

DATA = Path(__file__).parent / "data"
ALL = {"n_candidates": None, "edge_fraction": 1.0}


def oracle_bins(x, n_bins):
    low, high = x.min(axis=0), x.max(axis=0)
    return np.clip(np.floor((x - low) / np.maximum(high - low, 1e-6) * n_bins), 0, n_bins - 1).astype(int)


def oracle(x, n_bins):
    """Mutual information of every pair, written out from its definition."""
    x = np.asarray(x, dtype=np.float64)
    bins = oracle_bins(x, n_bins)
    mi = np.zeros((x.shape[1], x.shape[1]))
    for i, j in np.argwhere(np.triu(np.ones_like(mi), 1)):
        p = np.zeros((n_bins, n_bins))
        np.add.at(p, (bins[:, i], bins[:, j]), 1)
        p = p / len(x) + 1e-12
        hx, hy = (-(m * np.log(m + 1e-12)).sum() for m in (p.sum(axis=1), p.sum(axis=0)))
        mi[i, j] = mi[j, i] = hx + hy + (p * np.log(p)).sum()
    return mi


def tissue(n=240, g=12, seed=0):
    """Counts with gene modules in three groups and two slides."""
    rng = np.random.default_rng(seed)
    group = rng.integers(3, size=n)
    activity = rng.gamma(1.0, 1.0, (n, 3))
    x = rng.poisson(activity[:, np.arange(g) % 3] * (0.5 + 4 * (np.arange(g)[None] % 3 == group[:, None])))
    obs = pd.DataFrame(
        {
            "type": pd.Categorical(np.array(["CTX_L2/3", "glia", "7"])[group]),
            "slide": np.array(["a", "b"])[rng.integers(2, size=n)],
        }
    )
    obs.index = [f"cell{i}" for i in range(n)]
    return AnnData(sp.csr_matrix(x.astype(np.float32)), obs=obs, var=pd.DataFrame(index=[f"gene{i}" for i in range(g)]))


def networks(adata, key="grn"):
    stored = adata.uns[key]
    return {name: stored["groups"][str(k)].toarray() for k, name in enumerate(stored["names"])}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("name", ["mi_bins32", "mi_bins16_constgene"])
def test_reference_mutual_information(name):
    ref = np.load(DATA / f"{name}.npz")
    mi = mutual_information_network(ref["X"], n_bins=int(ref["bins"]), **ALL).toarray()
    np.testing.assert_allclose(mi[ref["i"], ref["j"]], ref["mi"], atol=1e-5)


def test_reference_edges():
    ref = np.load(DATA / "grn_topk200.npz")
    network = mutual_information_network(ref["X"], n_bins=32, n_candidates=200, edge_fraction=0.25).tocoo()
    found = {(i, j) for i, j in zip(network.row, network.col, strict=True) if i < j}
    assert found == {tuple(e) for e in ref["edges"].tolist()}
    np.testing.assert_allclose(network.toarray()[tuple(ref["edges"].T)], ref["weights"], atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    arrays(np.float32, st.tuples(st.integers(1, 40), st.integers(1, 6)), elements=st.floats(-4, 4, width=16)),
    st.sampled_from([2, 3, 8, 32, 256]),
    st.booleans(),
)
def test_equals_definition(x, n_bins, whole):
    x = np.rint(x) if whole else x
    varies = np.ptp(x, axis=0) > 0
    expected = np.where(varies[:, None] & varies, oracle(x, n_bins), 0)
    network = mutual_information_network(x, n_bins=n_bins, **ALL)
    assert network.dtype == np.float32
    np.testing.assert_allclose(network.toarray(), expected, atol=1e-6)
    np.testing.assert_allclose(oracle(x, n_bins)[~varies], 0, atol=1e-5)  # so nothing is lost with the constant genes


def test_equals_scikit_learn():
    x = np.random.default_rng(0).gamma(1, 1, (500, 1)) * np.random.default_rng(1).gamma(2, 1, (500, 8))
    bins = oracle_bins(x, 32)
    expected = [[mutual_info_score(bins[:, i], bins[:, j]) if i != j else 0 for j in range(8)] for i in range(8)]
    np.testing.assert_allclose(mutual_information_network(x, **ALL).toarray(), expected, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 12), st.sampled_from([0.1, 0.25, 0.6, 1.0]))
def test_candidates_and_edges(seed, n_candidates, fraction):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(60, 4)) @ rng.normal(size=(4, 10)) + rng.normal(size=(60, 10))
    r = np.abs(np.corrcoef(x.T))
    np.fill_diagonal(r, -1)
    candidates = {tuple(sorted((i, int(j)))) for i in range(10) for j in np.argsort(-r[i])[: min(n_candidates, 9)]}
    mi = oracle(x, 16)
    ranked = sorted(candidates, key=lambda e: -mi[e])
    expected = ranked[: int(np.ceil(fraction * len(ranked) - 1e-9))]
    network = mutual_information_network(x, n_bins=16, n_candidates=n_candidates, edge_fraction=fraction)
    assert {tuple(e) for e in np.argwhere(np.triu(network.toarray()))} == set(expected)
    assert (network != network.T).nnz == 0
    assert not network.diagonal().any()


def test_constant_genes_have_no_edges():
    x = np.random.default_rng(0).normal(size=(50, 6))
    x[:, 1], x[:, 4] = 0, 0.1
    for n_candidates in (2, None):
        network = mutual_information_network(x, n_candidates=n_candidates, edge_fraction=1.0)
        assert not network[[1, 4]].nnz
        assert network.getnnz(axis=1)[[0, 2, 3, 5]].all()
    assert mutual_information_network(np.ones((50, 3))).nnz == 0
    assert mutual_information_network(x[:, :1]).shape == (1, 1)


@pytest.mark.parametrize("library_key", [None, "slide"])
def test_groups_and_slides(library_key):
    adata = tissue()
    sfm.pp.grn(adata, groupby="type", n_bins=8, library_key=library_key, **ALL)
    x, slide = adata.X.toarray(), adata.obs["slide"].to_numpy()
    stored = adata.uns["grn"]
    assert stored["names"] == list(adata.obs["type"].cat.categories)
    assert (stored["groupby"], stored["auto"], stored["genes"]) == ("type", False, list(adata.var_names))
    for name, mi in networks(adata).items():
        inside = (adata.obs["type"] == name).to_numpy()
        parts = [inside] if library_key is None else [inside & (slide == s) for s in ("a", "b")]
        expected = sum(p.sum() / inside.sum() * oracle(x[p], 8) for p in parts)
        np.testing.assert_allclose(mi, expected, atol=1e-6)


def test_slides_centre_the_correlation():
    rng = np.random.default_rng(0)
    x, slides = rng.normal(size=(400, 6)), np.arange(400) % 2
    x[:, 1] += x[:, 0]
    shifted = x + 50 * slides[:, None] * (np.arange(6) % 2)
    options = {"n_bins": 8, "n_candidates": 1, "edge_fraction": 1.0, "slides": slides}
    network = mutual_information_network(shifted, **options)
    assert (network != mutual_information_network(x, **options)).nnz == 0
    one_each = mutual_information_network(x[:2], n_bins=8, slides=slides[:2])
    assert one_each.nnz == 0  # one cell a slide says nothing
    r = _grn.correlation([shifted[slides == s] for s in (0, 1)])
    centred = np.concatenate([x[slides == s] - x[slides == s].mean(axis=0) for s in (0, 1)])
    np.testing.assert_allclose(r, np.corrcoef(centred.T), atol=1e-8)


@pytest.mark.parametrize(
    "make", [np.asarray, np.asfortranarray, sp.csr_matrix, sp.csc_matrix, sp.csr_array, sp.csc_array]
)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int32, np.uint8])
def test_array_types(make, dtype):
    expected = tissue()
    sfm.pp.grn(expected, groupby="type", n_candidates=4)
    adata = AnnData(make(expected.X.toarray().astype(dtype)), obs=expected.obs, var=expected.var)
    sfm.pp.grn(adata, groupby="type", n_candidates=4)
    assert_same(networks(adata), networks(expected))
    assert adata.X.dtype == dtype


def test_threads_and_blocks(monkeypatch):
    x = np.random.default_rng(0).poisson(1.0, (80, 70)).astype(float)
    monkeypatch.setattr(_grn, "_PAIRS_A_JOB", 10**6)
    expected = mutual_information_network(x, n_candidates=20).toarray()
    monkeypatch.setattr(_grn, "_PAIRS_A_JOB", 7)
    for n_jobs, n_bytes in ((1, 1 << 28), (4, 1 << 28), (3, 5 * 80 * 9)):
        monkeypatch.setattr(_grn, "_BLOCK_BYTES", n_bytes)
        np.testing.assert_array_equal(mutual_information_network(x, n_candidates=20, n_jobs=n_jobs).toarray(), expected)


@pytest.mark.parametrize("groupby", ["type", "auto", None])
@pytest.mark.parametrize("library_key", [None, "slide"])
def test_row_order(groupby, library_key):
    adata = tissue(600)
    adata = ad.concat([adata, adata[:100].copy()], index_unique="-", keys=["x", "y"])  # some cells twice
    order = np.random.default_rng(5).permutation(adata.n_obs)
    other = adata[order].copy()
    for a in (adata, other):
        sfm.pp.grn(a, groupby=groupby, library_key=library_key, n_candidates=4)
    assert_same(networks(adata), networks(other))
    if groupby == "auto":
        assert (adata.obs["grn_group"].to_numpy()[order] == other.obs["grn_group"].to_numpy()).all()


@pytest.mark.parametrize("sample", [20_000, 300])
@pytest.mark.parametrize("values", ["counts", "intensity"])
def test_auto_finds_groups(monkeypatch, sample, values):
    monkeypatch.setattr(_grn, "_SAMPLE", sample)
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1, 2], [600, 300, 100])
    high = np.arange(30) % 3 == truth[:, None]
    x = rng.poisson(np.where(high, 8.0, 0.5)) if values == "counts" else rng.normal(np.where(high, 800.0, 100.0), 80)
    x = x.astype(np.float32)
    adata = AnnData(x.copy())
    assert sfm.pp.grn(adata, key_added="net") is None
    found = adata.obs["net_group"]
    assert adjusted_rand_score(truth, found) > 0.95
    sizes = found.value_counts(sort=False).tolist()
    assert sizes == sorted(sizes, reverse=True)
    assert adata.uns["net"]["names"] == list(found.cat.categories) == [str(k) for k in range(len(sizes))]
    assert (adata.uns["net"]["groupby"], adata.uns["net"]["auto"]) == ("net_group", True)
    np.testing.assert_array_equal(adata.X, x)
    again = AnnData(x)
    with sfm.settings.override(n_jobs=1):
        sfm.pp.grn(again, key_added="net", rng=np.random.default_rng(3))
    assert adjusted_rand_score(found, again.obs["net_group"]) > 0.95


@pytest.mark.filterwarnings("ignore:grn. groups of fewer than 10 cells")
def test_auto_without_structure():
    for x in (np.zeros((30, 3)), np.ones((1, 3)), np.eye(3), np.random.default_rng(0).poisson(1.0, (45, 2))):
        adata = AnnData(x.astype(np.float32))
        sfm.pp.grn(adata)
        assert adata.obs["grn_group"].notna().all()


def test_auto_on_many_genes():
    rng = np.random.default_rng(0)
    truth = np.arange(200) % 2
    x = rng.poisson(np.where((np.arange(900) < 100) & (truth[:, None] == 1), 3.0, 0.3)).astype(np.float32)
    adata = AnnData(sp.csr_matrix(x))
    sfm.pp.grn(adata, n_genes=50)
    assert adjusted_rand_score(truth, adata.obs["grn_group"]) > 0.95
    assert len(adata.uns["grn"]["genes"]) == 50


def test_gene_choice():
    rng = np.random.default_rng(0)
    adata = AnnData(sp.csr_matrix(rng.poisson(rng.gamma(1, 1, 60) * rng.gamma(1, 1, (400, 60))).astype(np.float32)))
    adata = adata[np.unique(adata.X.toarray(), axis=0, return_index=True)[1]].copy()
    logged = adata.copy()
    sc.pp.normalize_total(logged, target_sum=1e4)
    sc.pp.log1p(logged)
    sc.pp.highly_variable_genes(logged, n_top_genes=20)
    sfm.pp.grn(adata, groupby=None, n_genes=20)
    assert adata.uns["grn"]["genes"] == list(adata.var_names[logged.var["highly_variable"]])
    scaled = AnnData(rng.normal(size=(100, 30)) * np.linspace(0.2, 4, 30))
    sfm.pp.grn(scaled, groupby=None, n_genes=5)
    assert scaled.uns["grn"]["genes"] == ["25", "26", "27", "28", "29"]
    assert networks(scaled)["all"].shape == (5, 5)


@pytest.mark.parametrize("groupby", ["auto", None, "type"])
def test_every_gene(groupby):
    adata, limited = tissue(g=210), tissue(g=210)
    sfm.pp.grn(adata, groupby=groupby, n_genes=None)
    assert adata.uns["grn"]["genes"] == list(adata.var_names)
    assert adata.uns["grn"]["params"]["n_genes"] == "all"
    sfm.pp.grn(limited, groupby=groupby, n_genes=210)
    assert_same(networks(adata), networks(limited))


@pytest.mark.filterwarnings("ignore:grn. groups of fewer than 10 cells")
@pytest.mark.parametrize("n_cells", [1, 2, 12])
@pytest.mark.parametrize("groupby", ["auto", None])
def test_gene_choice_on_little_data(n_cells, groupby):
    rng = np.random.default_rng(0)
    shape = (n_cells, 60)
    for x in (
        np.zeros(shape),
        np.ones(shape),
        rng.poisson(0.01, shape),
        rng.gamma(1, 1, shape),
        rng.normal(size=shape),
    ):
        adata = AnnData(sp.csr_matrix(x.astype(np.float32)))
        sfm.pp.grn(adata, groupby=groupby, n_genes=50)
        assert len(adata.uns["grn"]["genes"]) == 50


def test_layer():
    adata = tissue()
    adata.layers["log"] = adata.X.copy()
    adata.layers["log"].data = np.log1p(adata.layers["log"].data)
    sfm.pp.grn(adata, groupby=None, layer="log", n_bins=8, **ALL)
    np.testing.assert_allclose(networks(adata)["all"], oracle(adata.layers["log"].toarray(), 8), atol=1e-6)
    assert adata.uns["grn"]["params"]["layer"] == "log"


def test_small_groups():
    adata = tissue()
    adata.obs["type"] = adata.obs["type"].cat.add_categories(["rare", "unused"])
    adata.obs.loc[adata.obs_names[:9], "type"] = "rare"
    with pytest.raises(UserWarning, match="fewer than 10 cells"):
        sfm.pp.grn(adata, groupby="type")
    assert not adata.uns
    with pytest.warns(UserWarning, match=r"rare \(9\)"):
        sfm.pp.grn(adata, groupby="type")
    assert "unused" not in adata.uns["grn"]["names"]
    assert not networks(adata)["rare"].any()
    assert networks(adata)["glia"].any()


def test_copy_view_and_backed(tmp_path):
    adata = tissue()
    copied = sfm.pp.grn(adata, groupby="type", copy=True)
    assert "grn" not in adata.uns
    view = adata[:]
    sfm.pp.grn(view, groupby="type")
    assert_same(networks(view), networks(copied))
    assert "grn" not in adata.uns
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    sfm.pp.grn(backed, groupby="type")
    assert_same(networks(backed), networks(copied))
    assert_same(networks(sfm.pp.grn(backed, groupby="type", copy=True)), networks(copied))
    part = backed[backed.obs["type"] == "glia"]
    sfm.pp.grn(part, groupby="type")
    np.testing.assert_array_equal(networks(part)["glia"], networks(copied)["glia"])
    backed.file.close()


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize("groupby", ["type", "auto", None])
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_round_trip(tmp_path, suffix, groupby):
    adata = tissue()
    sfm.pp.grn(adata, groupby=groupby, n_candidates=None, library_key="slide")
    path = tmp_path / f"a.{suffix}"
    getattr(adata, f"write_{suffix}")(path)
    read = getattr(ad, f"read_{suffix}")(path)
    genes, names, mi, codes = get_networks(adata)
    genes2, names2, mi2, codes2 = get_networks(read)
    assert (genes, names) == (genes2, names2)
    np.testing.assert_array_equal(codes, codes2)
    assert codes.dtype == np.int64
    for a, b in zip(mi, mi2, strict=True):
        assert (a != b).nnz == 0
    assert read.uns["grn"]["params"] == adata.uns["grn"]["params"]


def test_cells_without_a_group():
    """They are in no network, and have one without edges."""
    adata = tissue()
    want = sfm.pp.grn(adata[5:].copy(), groupby="type", copy=True)
    adata.obs["type"] = adata.obs["type"].astype(object).where(np.arange(adata.n_obs) > 4)
    with pytest.warns(UserWarning, match=f"has no value for 5 of {adata.n_obs} cells; these cells are in no network"):
        sfm.pp.grn(adata, groupby="type")
    assert_same(networks(adata), networks(want))
    _, names, mi, codes = get_networks(adata)
    assert set(codes[:5]) == {len(names) - 1}
    assert mi[-1].nnz == 0
    assert [names[c] for c in codes[5:]] == adata.obs["type"].tolist()[5:]


def test_few_cells_name_no_column():
    with pytest.warns(UserWarning, match="fewer than 10 cells") as given:
        sfm.pp.grn(tissue()[:9].copy())
    assert "obs['auto']" not in str(given[0].message)


def test_get_networks():
    adata = tissue()
    sfm.pp.grn(adata, groupby="type")
    sfm.pp.grn(adata, groupby=None, key_added="one")
    genes, names, mi, codes = get_networks(adata)
    assert genes == list(adata.var_names)
    assert [names[c] for c in codes] == adata.obs["type"].tolist()
    assert_same(dict(zip(names, (m.toarray() for m in mi), strict=True)), networks(adata))
    assert get_networks(adata, "one")[1] == ["all"]
    assert not get_networks(adata, "one")[3].any()
    part = adata[adata.obs["type"] == "glia"].copy()
    assert {names[c] for c in get_networks(part)[3]} == {"glia"}

    with pytest.raises(KeyError, match=r"sfm\.pp\.grn\(adata, key_added='other'\)"):
        get_networks(adata, "other")
    with pytest.raises(ValueError, match="var_names lacks"):
        get_networks(adata[:, 1:].copy())
    renamed = adata.copy()
    renamed.obs["type"] = renamed.obs["type"].cat.rename_categories({"glia": "new"})
    with pytest.raises(ValueError, match=r"without a network.*new"):
        get_networks(renamed)
    del renamed.obs["type"]
    with pytest.raises(ValueError, match="missing"):
        get_networks(renamed)
    adata.uns["grn"] = {"genes": []}
    with pytest.raises(ValueError, match="not written by"):
        get_networks(adata)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"groupby": "nope"}, KeyError, "nope"),
        ({"groupby": "nothing"}, ValueError, "no value for any"),
        ({"library_key": "nope"}, KeyError, "nope"),
        ({"layer": "nope"}, KeyError, "nope"),
        ({"n_bins": 1}, ValueError, "n_bins"),
        ({"n_bins": 257}, ValueError, "at most 256"),
        ({"n_genes": 1}, ValueError, "n_genes"),
        ({"n_genes": 2.5}, ValueError, "n_genes"),
        ({"n_candidates": 0}, ValueError, "n_candidates"),
        ({"edge_fraction": 0.0}, ValueError, "edge_fraction"),
        ({"edge_fraction": 1.1}, ValueError, "edge_fraction"),
    ],
)
def test_errors(options, error, match):
    adata = tissue()
    adata.obs["nothing"] = np.nan
    before = adata.copy()
    with pytest.raises(error, match=match):
        sfm.pp.grn(adata, **options)
    assert adata.obs.equals(before.obs)
    assert not adata.uns


def test_unusable_data():
    adata = tissue()
    with pytest.raises(ValueError, match="a gene network needs both"):
        sfm.pp.grn(adata[:0].copy())
    repeated = adata.copy()
    repeated.var_names = ["g"] * adata.n_vars
    with pytest.raises(ValueError, match="var_names_make_unique"):
        sfm.pp.grn(repeated)
    adata.X.data[3] = np.nan
    for groupby in ("auto", None):
        with pytest.raises(ValueError, match="1 NaN"):
            sfm.pp.grn(adata, groupby=groupby)
