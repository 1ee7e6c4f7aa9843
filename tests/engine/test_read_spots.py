"""Reading of spots for HiBio, compared with pp.tfidf and sums by hand."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

import spatialfm as sfm
from spatialfm._data._genes import match_genes
from spatialfm.engine._hibio import read_spots


@pytest.fixture
def adata(make_spots):
    import anndata as ad

    adata = ad.concat([make_spots(0, 60, "a"), make_spots(1, 40, "b")])
    adata.obsm["spatial"][60:] += np.array([5000, 0])
    adata.X = sp.csr_matrix(adata.X)
    return adata[np.random.default_rng(0).permutation(100)].copy()


@pytest.mark.parametrize("library_key", [None, "slide"])
@pytest.mark.parametrize("values", ["counts", "normalized", "log"])
def test_profile_is_tfidf(adata, library_key, values):
    expected = sfm.pp.tfidf(adata, library_key=library_key, copy=True).layers["tfidf"].toarray()
    if values != "counts":
        x = adata.X.toarray()
        x = 1e4 * x / x.sum(1, keepdims=True)
        adata.X = sp.csr_matrix(np.log1p(x) if values == "log" else x)
    spots = read_spots(adata, image=None, library_key=library_key)
    np.testing.assert_allclose(spots.profile.toarray(), expected[spots.rows], atol=1e-5)
    assert spots.profile.dtype == np.float32
    assert spots.image is None
    assert spots.organism == "human"
    assert spots.symbols == list(adata.var_names)


def test_without_idf_all_genes_weigh_the_same(adata):
    spots = read_spots(adata, image=None, idf=False)
    x = adata.X.toarray()
    x = np.log1p(1e4 * x / x.sum(1, keepdims=True))
    expected = x / np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(spots.profile.toarray(), expected[spots.rows], atol=1e-5)


@pytest.mark.parametrize("form", ["csc", "dense", "stored zeros"])
def test_forms_and_rows(adata, form):
    reference = read_spots(adata, image=adata.obsm["image_features"], library_key="slide")
    order = np.random.default_rng(1).permutation(100)
    other = adata[order].copy()
    if form == "stored zeros":
        x = sp.csr_matrix(np.ones(other.shape, np.float32))
        x.data = other.X.toarray().ravel()
        other.X = x
    else:
        other.X = other.X.tocsc() if form == "csc" else other.X.toarray()
    spots = read_spots(other, image=other.obsm["image_features"], library_key="slide")
    # The same spots in the same order, with their own image.
    np.testing.assert_array_equal(order[spots.rows], reference.rows)
    np.testing.assert_array_equal(spots.image, reference.image)
    np.testing.assert_array_equal(spots.image, other.obsm["image_features"][spots.rows])
    np.testing.assert_allclose(spots.profile.toarray(), reference.profile.toarray(), atol=1e-6)
    assert spots.profile.nnz == reference.profile.nnz


def test_by_symbol_sums_and_skips(adata):
    """Columns of the same symbol are summed; unknown and unrequested symbols are left out."""
    names = list(adata.var_names)
    ids = list(match_genes(names, "human")["gene_id"])
    adata.var_names = [ids[0], names[0], *ids[2:30], *names[30:59], "no such gene"]
    x = adata.X.toarray()
    spots = read_spots(adata, image=None)
    assert spots.symbols == [names[0], names[0], *names[2:59], ""]
    wanted = [names[40], "ABSENT", names[0]]
    found = spots.by_symbol(x[spots.rows], wanted)
    assert sp.isspmatrix_csr(found)
    expected = np.stack([x[:, 40], np.zeros(100), x[:, 0] + x[:, 1]], axis=1)[spots.rows]
    np.testing.assert_array_equal(found.toarray(), expected)


def test_mouse_genes_are_matched_by_orthologs(adata):
    human = list(adata.var_names)
    mouse = match_genes(human, "human", to="mouse")["gene_symbol"].to_numpy()
    kept = np.flatnonzero(mouse != "")
    assert len(kept) > 50
    adata = adata[:, kept].copy()
    adata.var_names = mouse[kept]
    spots = read_spots(adata, image=None)
    assert spots.organism == "mouse"
    back = np.array(spots.symbols)
    assert (back == np.array(human)[kept]).mean() > 0.95


def test_image_alone(adata):
    image = adata.obsm["image_features"]
    spots = read_spots(adata[:, []].copy(), image=image, library_key="slide")
    assert (spots.genes, spots.symbols, spots.organism) == ([], [], None)
    assert spots.profile.shape == (100, 0)
    np.testing.assert_array_equal(spots.image, image[spots.rows])
    whole = read_spots(adata, image=image, library_key="slide")
    np.testing.assert_array_equal(spots.rows, whole.rows)
    assert (spots.graph != whole.graph).nnz == 0


def test_errors(adata):
    with pytest.raises(ValueError, match="at least one of each is needed"):
        read_spots(adata[:, []].copy(), image=None)
    unknown = adata.copy()
    unknown.var_names = [f"feature{i}" for i in range(60)]
    with pytest.raises(ValueError, match="feature0"):
        read_spots(unknown, image=None)
    scaled = adata.copy()
    scaled.X = np.random.default_rng(0).normal(size=adata.shape).astype(np.float32)
    with pytest.raises(ValueError, match=r"look like scaled values, but HiBio needs transcripts: pass counts.*layer="):
        read_spots(scaled, image=None)
    scaled.layers["counts"] = adata.X
    assert read_spots(scaled, image=None, layer="counts").kind == "counts"
    # The kind is not guessed if the caller names it.
    assert read_spots(adata, image=None, values="log").kind == "log"
