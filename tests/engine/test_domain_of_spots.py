"""What hibio was trained on, and what it was not: other tissue and single cells."""

from __future__ import annotations

import warnings

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pytest

import spatialfm as sfm


def with_features(adata):
    """Image features of no meaning: what is compared is the expression."""
    adata = adata.copy()
    adata.uns.pop("spatial", None)
    adata.obsm["image_features"] = np.random.default_rng(0).normal(size=(adata.n_obs, 1290)).astype(np.float32)
    return adata


@pytest.fixture(scope="module")
def tumour():
    """A section of the patient of four of the training slides, which was left out."""
    return with_features(sfm.datasets.her2_breast_tumour())


@pytest.fixture(scope="module")
def cortex():
    return with_features(sfm.datasets.visium_human_dlpfc()[::4])


def test_confidence_is_of_tumours(tumour):
    found = sfm.tl.predict_expression(tumour, ["ERBB2", "COL1A1"], copy=True)
    tissue = found.uns["predicted_expression"]["tissue"]
    assert tissue["trained_on"] == "HER2-positive breast tumour, breast cancer"
    assert tissue["alike"]
    assert tissue["similarity"] > 0.9
    assert sfm.get.predicted_expression(found).uns["tissue"] == tissue
    axes = sfm.pl.predicted_expression(found, ["ERBB2"])
    assert any("confidence 0." in axis.get_title(loc="left") for axis in axes)
    plt.close("all")


def test_other_tissue_is_told(cortex):
    with pytest.warns(
        UserWarning, match=r"correlation of only 0\.\d+ with that of the training data .*breast cancer.*model="
    ):
        found = sfm.tl.predict_expression(cortex, ["MBP", "COL1A1"], copy=True)
    tissue = found.uns["predicted_expression"]["tissue"]
    assert not tissue["alike"]
    assert 0.3 < tissue["similarity"] < 0.55
    axes = sfm.pl.predicted_expression(found, ["MBP"])
    titles = " ".join(axis.get_title(loc="left") for axis in axes)
    assert "(other tissue)" in titles
    assert "confidence" not in titles
    plt.close("all")


@pytest.mark.parametrize("values", ["shuffled", "log", "dense"])
def test_similarity_is_of_the_tissue_alone(cortex, values):
    """Not of the order of rows or genes, the layout, or the scale of the values."""
    rng = np.random.default_rng(0)
    other = cortex[rng.permutation(cortex.n_obs)][:, rng.permutation(cortex.n_vars)].copy()
    if values == "log":
        from spatialfm._data._expression import log_normalize

        other.X = log_normalize(other.X, "counts")
    elif values == "dense":
        other.X = other.X.toarray()
    with pytest.warns(UserWarning, match="another tissue"):
        sfm.tl.predict_expression(other, "MBP")
    with pytest.warns(UserWarning, match="another tissue"):
        found = sfm.tl.predict_expression(cortex, "MBP", copy=True)
    one, two = (a.uns["predicted_expression"]["tissue"]["similarity"] for a in (other, found))
    assert one == pytest.approx(two, abs=0.002)
    x, y = (a[cortex.obs_names].obsm["predicted_expression"]["MBP"] for a in (other, found))
    assert y.std() > 0
    assert x.shape == y.shape


def test_nothing_is_said_where_nothing_is_known(tumour):
    """Without genes, with a few of them, and with values that are no expression."""
    for few in (tumour[:, []], tumour[:, :300]):
        found = sfm.tl.predict_expression(few.copy(), "ERBB2", copy=True)
        assert set(found.uns["predicted_expression"]["tissue"]) == {"trained_on"}
    broken = tumour.copy()
    broken.X = broken.X.toarray()
    broken.X[0, 0] = np.nan
    found = sfm.tl.predict_expression(broken, "ERBB2", copy=True)
    assert set(found.uns["predicted_expression"]["tissue"]) == {"trained_on"}


def cells(n_genes=300, seed=0, *, lattice=False):
    """Single cells: few genes detected, at irregular places unless on a lattice."""
    rng = np.random.default_rng(seed)
    names = list(sfm.models.load("hibio").config.genes[:n_genes])
    side = np.arange(20.0)
    xy = np.stack(np.meshgrid(side, side), 2).reshape(-1, 2) if lattice else rng.uniform(0, 20, (400, 2))
    adata = ad.AnnData(rng.poisson(60 / n_genes, (400, n_genes)).astype(np.float32), obsm={"spatial": xy})
    adata.var_names = names
    return adata


def test_single_cells_are_no_spots():
    with pytest.warns(
        UserWarning, match=r"genes are detected in the median row of adata, and the rows lie on no array.*single cells"
    ):
        sfm.tl.embed(cells(), "hibio", image=False, gene_sets=None)
    # Small bins of an array that measures everything.
    with pytest.warns(UserWarning, match=r"median row of adata: these look like single cells, or bins as small"):
        sfm.tl.embed(cells(6000, lattice=True), "hibio", image=False, gene_sets=None)
    some = with_features(cells())
    with pytest.warns(UserWarning, match="single cells"):
        sfm.tl.predict_expression(some, "ERBB2")


def test_spots_are_spots(tumour):
    """Also of a panel on an array, and of chosen genes."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sfm.tl.embed(cells(lattice=True), "hibio", image=False, gene_sets=None)
        sfm.tl.embed(tumour[:, :400].copy(), "hibio", image=False, gene_sets=None)
