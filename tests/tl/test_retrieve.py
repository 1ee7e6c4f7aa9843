"""Retrieval beside all cosines: lists, ties, ranks of partners, whatever the order of the rows."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

import spatialfm as sfm
from spatialfm.tl import _retrieve


def spots(n, seed=0, *, width=8, prefix="s", noise=0.5):
    """Spots whose modalities share what they are about."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(n, width))
    obsm = {f"X_hibio_{m}": (shared + noise * rng.normal(size=(n, width))).astype("f4") for m in ("image", "gene")}
    return ad.AnnData(obs=pd.DataFrame(index=[f"{prefix}{i}" for i in range(n)]), obsm=obsm)


def cosines(adata, reference, direction):
    source, target = direction.split("->")
    a, b = adata.obsm[f"X_hibio_{source}"].astype(float), reference.obsm[f"X_hibio_{target}"].astype(float)
    return a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize("direction", ["image->gene", "gene->image", "gene->gene", "image->image"])
@pytest.mark.parametrize("n", [1, 7, 300])
def test_equals_all_cosines(direction, n, monkeypatch):
    monkeypatch.setattr(_retrieve, "_BLOCK", 5000)  # several blocks, the last one smaller
    adata, reference = spots(50, 1), spots(300, 2, prefix="r")
    assert sfm.tl.retrieve(adata, reference, direction, n=n) is None
    expected = cosines(adata, reference, direction)
    best = np.argsort(-expected, axis=1)[:, :n]
    table = adata.obsm["retrieved"]
    assert list(table.columns) == [str(k + 1) for k in range(n)]
    np.testing.assert_allclose(
        adata.obsm["retrieved_similarity"], np.take_along_axis(expected, best, axis=1), atol=1e-6
    )
    assert (table.to_numpy() == reference.obs_names.to_numpy()[best]).mean() > 0.999
    assert adata.obsm["retrieved_similarity"].dtype == np.float32
    assert "retrieved_rank" not in adata.obs
    assert adata.uns["retrieved"] == {
        "params": {"direction": direction, "n": n, "use_rep": "X_hibio", "paired": False},
        "n_reference": 300,
    }


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    n_queries=st.integers(1, 12),
    n_reference=st.integers(1, 150),
    n=st.integers(1, 150),
    n_kinds=st.integers(1, 40),
)
def test_ties_go_by_name(seed, n_queries, n_reference, n, n_kinds):
    """Few different vectors, many of them tied, in any order: by similarity, then by name."""
    rng = np.random.default_rng(seed)
    n = min(n, n_reference)
    kinds = rng.normal(size=(n_kinds, 4)).astype("f4")
    kinds[0] = 0
    of_query, of_reference = rng.integers(n_kinds, size=n_queries), rng.integers(n_kinds, size=n_reference)
    adata = ad.AnnData(obsm={"X_hibio_image": kinds[of_query]})
    reference = ad.AnnData(obsm={"X_hibio_gene": kinds[of_reference] * rng.choice([1, 2, 4], n_reference)[:, None]})
    reference.obs_names = rng.permutation([f"r{i:03}" for i in range(n_reference)])
    sfm.tl.retrieve(adata, reference, n=n)
    length = np.linalg.norm(kinds.astype(float), axis=1, keepdims=True)
    unit = np.divide(kinds, length, out=np.zeros(kinds.shape), where=length > 0).astype("f4").astype(float)
    score = (unit @ unit.T).astype("f4")[of_query][:, of_reference]
    for i in range(n_queries):
        order = sorted(range(n_reference), key=lambda j: (-score[i, j], reference.obs_names[j]))
        assert list(adata.obsm["retrieved"].iloc[i]) == list(reference.obs_names[order[:n]])


def test_row_order_blocks_and_views(monkeypatch):
    adata, reference = spots(60, 1), spots(500, 2, prefix="r")
    for field in ("X_hibio_image", "X_hibio_gene"):
        reference.obsm[field][250:] = reference.obsm[field][:250]  # every spot twice
    expected = sfm.tl.retrieve(adata, reference, n=9, copy=True).obsm
    rng = np.random.default_rng(3)
    monkeypatch.setattr(_retrieve, "_BLOCK", 2000)
    other = adata[rng.permutation(60)[:41]]
    sfm.tl.retrieve(other, reference[rng.permutation(500)], n=9)
    pd.testing.assert_frame_equal(other.obsm["retrieved"], expected["retrieved"].loc[other.obs_names])
    rows = adata.obs_names.get_indexer(other.obs_names)
    np.testing.assert_array_equal(other.obsm["retrieved_similarity"], expected["retrieved_similarity"][rows])


@pytest.mark.parametrize("noise", [0.0, 0.5, 3.0])
def test_rank_of_partner(noise):
    reference = spots(400, 5, noise=noise)
    reference.obsm["X_hibio_gene"][100:150] = reference.obsm["X_hibio_gene"][100]
    names = np.random.default_rng(0).permutation(reference.obs_names)[:60]
    adata = reference[names].copy()
    adata.obs_names = [*adata.obs_names[:-1], "stranger"]
    sfm.tl.retrieve(adata, reference, n=3, paired=True)
    score = np.round(cosines(adata, reference, "image->gene"), 6)
    for i, name in enumerate(adata.obs_names[:-1]):
        expected = rankdata(-score[i], method="average")[reference.obs_names.get_loc(name)]
        assert adata.obs["retrieved_rank"].iloc[i] == pytest.approx(expected, abs=1)
    assert np.isnan(adata.obs["retrieved_rank"].iloc[-1])
    if noise == 0:
        apart = [name for name in adata.obs_names[:-1] if not 100 <= int(name[1:]) < 150]
        assert (adata.obs.loc[apart, "retrieved_rank"] == 1).all()


def test_paired_only_where_sure():
    """Barcodes recur on every slide: the same names alone make no pairs."""
    adata = spots(30)
    sfm.tl.retrieve(adata, adata)
    assert adata.uns["retrieved"]["params"]["paired"]
    assert (adata.obs["retrieved_rank"] >= 1).all()
    sfm.tl.retrieve(adata, spots(30, 1))
    assert "retrieved_rank" not in adata.obs


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_roundtrip_subset_and_copy(suffix, tmp_path):
    adata = spots(40)
    before = adata.copy()
    result = sfm.tl.retrieve(adata, adata, n=4, paired=True, key_added="found", copy=True)
    assert list(adata.obsm) == list(before.obsm)
    assert "found" not in adata.uns
    part = result[10:30].copy()
    if suffix == "h5ad":
        part.write_h5ad(tmp_path / "a.h5ad")
        back = ad.read_h5ad(tmp_path / "a.h5ad")
    else:
        part.write_zarr(tmp_path / "a.zarr")
        back = ad.read_zarr(tmp_path / "a.zarr")
    pd.testing.assert_frame_equal(
        sfm.get.retrieved_df(back, key="found"), sfm.get.retrieved_df(result[10:30], key="found"), check_dtype=False
    )
    pd.testing.assert_frame_equal(
        sfm.get.retrieval_recall_df(back, key="found"), sfm.get.retrieval_recall_df(part, key="found")
    )
    assert back.uns["found"]["params"] == {"direction": "image->gene", "n": 4, "use_rep": "X_hibio", "paired": True}


def test_backed_table_and_other_keys(tmp_path):
    adata = spots(20)
    expected = sfm.tl.retrieve(adata, adata, n=2, copy=True).obsm["retrieved"]
    adata.obsm = {
        f"X_mine_{m}": pd.DataFrame(adata.obsm[f"X_hibio_{m}"], index=adata.obs_names) for m in ("image", "gene")
    }
    for table in adata.obsm.values():
        table.columns = table.columns.astype(str)
    adata.X = np.zeros((20, 0), np.float32)
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    found = sfm.tl.retrieve(adata, backed, n=2, use_rep="X_mine", copy=True).obsm["retrieved"]
    pd.testing.assert_frame_equal(found, expected)


def test_errors_leave_adata_alone():
    adata, reference = spots(20), spots(30, 1, prefix="r")
    fields = set(adata.obsm)
    for match, error, change in [
        ("direction='gene->protein' is not known", ValueError, {"direction": "gene->protein"}),
        ("n must be a positive integer", ValueError, {"n": 0}),
        ("n=31 spots cannot be retrieved from a reference of 30", ValueError, {"n": 31}),
        (r"obsm\['X_pca_image'\] of adata is missing.*model='hibio'.*use_rep=", KeyError, {"use_rep": "X_pca"}),
        (r"adata and reference share no name: \['s0', 's1'\]", ValueError, {"paired": True}),
    ]:
        with pytest.raises(error, match=match):
            sfm.tl.retrieve(adata, reference, **change)
    del reference.obsm["X_hibio_gene"]
    with pytest.raises(KeyError, match=r"'X_hibio_gene'\] of reference is missing"):
        sfm.tl.retrieve(adata, reference)
    sfm.tl.retrieve(adata, reference, "gene->image", copy=True)
    reference.obsm["X_hibio_gene"] = np.ones((30, 3), np.float32)
    with pytest.raises(ValueError, match=r"has 8 columns and .* of the reference 3"):
        sfm.tl.retrieve(adata, reference)
    for one, key, digest in ((adata, "X_hibio_gene", "abc"), (reference, "X_hibio_image", "def")):
        one.uns["embeddings"] = {key: {"model": "hibio", "params": {}, "sha256": digest}}
    with pytest.raises(ValueError, match=r"different models \(sha256 abc\.\.\. and def\.\.\.\)"):
        sfm.tl.retrieve(adata, reference, "gene->image")
    del reference.uns["embeddings"]
    recurring = reference.copy()
    recurring.obs_names = ["r"] * 30
    with pytest.raises(ValueError, match=r"reference\.obs_names_make_unique"):
        sfm.tl.retrieve(adata, recurring, "gene->image")
    twice = adata.copy()
    twice.obs_names = ["r1"] * 20
    with pytest.raises(ValueError, match=r"adata\.obs_names_make_unique"):
        sfm.tl.retrieve(twice, reference, "gene->image", paired=True)
    assert set(adata.obsm) == fields
    assert list(adata.uns) == ["embeddings"]
