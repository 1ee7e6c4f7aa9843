"""Warnings of hibio about data unlike its training data: other tissue and single cells."""

from __future__ import annotations

import warnings

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pytest

import spatialfm as sfm


def with_features(adata):
    """Random image features; only the expression is compared."""
    adata = adata.copy()
    adata.uns.pop("spatial", None)
    adata.obsm["image_features"] = np.random.default_rng(0).normal(size=(adata.n_obs, 1290)).astype(np.float32)
    return adata


@pytest.fixture(scope="module")
def tumour():
    """A section that was left out of training, of a patient of four training slides."""
    return with_features(sfm.datasets.her2_breast_tumour())


@pytest.fixture(scope="module")
def cortex():
    return with_features(sfm.datasets.visium_human_dlpfc()[::4])


def test_confidence_is_shown_for_tumours(tumour):
    found = sfm.tl.predict_expression(tumour, ["ERBB2", "COL1A1"], copy=True)
    tissue = found.uns["predicted_expression"]["tissue"]
    assert tissue["trained_on"] == "HER2-positive breast tumour, breast cancer"
    assert tissue["alike"]
    assert tissue["similarity"] > 0.9
    assert sfm.get.predicted_expression(found).uns["tissue"] == tissue
    axes = sfm.pl.predicted_expression(found, ["ERBB2"])
    assert any("confidence 0." in axis.get_title(loc="left") for axis in axes)
    plt.close("all")


def test_other_tissue_gives_a_warning(cortex):
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
def test_similarity_depends_on_the_tissue_only(cortex, values):
    """Not on the order of rows or genes, the layout, or the scale of the values."""
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


def test_similarity_is_left_out_if_unknown(tumour):
    """Without genes, with few genes, and with values that are not expression."""
    for few in (tumour[:, []], tumour[:, :300]):
        found = sfm.tl.predict_expression(few.copy(), "ERBB2", copy=True)
        assert set(found.uns["predicted_expression"]["tissue"]) == {"trained_on"}
    broken = tumour.copy()
    broken.X = broken.X.toarray()
    broken.X[0, 0] = np.nan
    found = sfm.tl.predict_expression(broken, "ERBB2", copy=True)
    assert set(found.uns["predicted_expression"]["tissue"]) == {"trained_on"}


def cells(n_genes=300, seed=0, *, lattice=False):
    """Single cells with few detected genes, at irregular locations or on a lattice."""
    rng = np.random.default_rng(seed)
    names = list(sfm.models.load("hibio").config.genes[:n_genes])
    side = np.arange(20.0)
    xy = np.stack(np.meshgrid(side, side), 2).reshape(-1, 2) if lattice else rng.uniform(0, 20, (400, 2))
    adata = ad.AnnData(rng.poisson(60 / n_genes, (400, n_genes)).astype(np.float32), obsm={"spatial": xy})
    adata.var_names = names
    return adata


def test_single_cells_give_a_warning():
    with pytest.warns(
        UserWarning,
        match=r"genes are detected in the median row of adata, and the rows are not on a regular array.*single cells",
    ):
        sfm.tl.embed(cells(), "hibio", image=False, gene_sets=None)
    # Small bins on an array, with the whole transcriptome.
    with pytest.warns(UserWarning, match=r"median row of adata: these look like single cells or small bins"):
        sfm.tl.embed(cells(6000, lattice=True), "hibio", image=False, gene_sets=None)
    some = with_features(cells())
    with pytest.warns(UserWarning, match="single cells"):
        sfm.tl.predict_expression(some, "ERBB2")


def test_spots_give_no_warning(tumour):
    """Nor does a panel on an array, nor a selection of genes."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sfm.tl.embed(cells(lattice=True), "hibio", image=False, gene_sets=None)
        sfm.tl.embed(tumour[:, :400].copy(), "hibio", image=False, gene_sets=None)
