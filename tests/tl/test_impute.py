"""tl.impute: hidden values are never read, missing ones are filled, scores are those of brute force."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import spatialfm as sfm
from spatialfm._data._expression import log_normalize
from spatialfm.tl._predictors import decoder, mean_nearest, moments, nearest, pearson

METHODS = ["zero_shot", "fine_tune"]


def tissue(n=500, seed=0, *, n_genes=16, n_slides=1):
    """Counts that follow four smooth patterns and two cell types; the last gene is noise."""
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0, 100, (n, 2))
    factors = np.column_stack([np.sin(xy / 15), rng.integers(2, size=n), np.cos(xy[:, 0] / 9)])
    rates = 2 + factors @ rng.normal(0, 0.8, (4, n_genes))
    rates[:, -1] = 2
    counts = rng.poisson(np.exp(np.clip(rates, -1, 4))).astype(np.float32)
    return ad.AnnData(
        sparse.csr_matrix(counts),
        obs=pd.DataFrame(
            {"slide": pd.Categorical([f"s{s}" for s in rng.integers(n_slides, size=n)])},
            index=[f"c{i}" for i in range(n)],
        ),
        var=pd.DataFrame(index=[f"g{j}" for j in range(n_genes)]),
        obsm={"spatial": xy},
    )


def dense(adata, key="imputed"):
    x = adata.layers[key]
    return x.toarray() if sparse.issparse(x) else np.asarray(x)


@pytest.mark.parametrize("method", METHODS)
def test_own_value_is_never_used(method):
    """With a block's values of a gene replaced, its cells are predicted as before; other genes stay as measured."""
    adata = tissue()
    before = adata.copy()
    sfm.tl.impute(adata, ["g1", "g5"], method=method)
    np.testing.assert_array_equal(adata.X.toarray(), before.X.toarray())
    changed = before.copy()
    rng = np.random.default_rng(1)
    x = changed.X.toarray()
    corner = (adata.obsm["spatial"] < np.quantile(adata.obsm["spatial"], 1 / 6, axis=0)).all(axis=1)  # one block
    x[np.ix_(corner, [1, 5])] = rng.integers(1, 500, (corner.sum(), 2))
    changed.X = sparse.csr_matrix(x)
    sfm.tl.impute(changed, ["g1", "g5"], method=method)
    np.testing.assert_allclose(dense(changed)[corner][:, [1, 5]], dense(adata)[corner][:, [1, 5]], rtol=1e-5)
    # The others depend on it, so the test can fail.
    assert not np.allclose(dense(changed)[~corner][:, 5], dense(adata)[~corner][:, 5], rtol=1e-5)
    others = np.setdiff1d(np.arange(16), [1, 5])
    expected = log_normalize(before.X, "counts").toarray()[:, others]
    np.testing.assert_allclose(dense(adata)[:, others], expected, rtol=1e-6)
    assert sparse.issparse(adata.layers["imputed"])
    assert adata.layers["imputed"].dtype == np.float32


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["nan", "sparse nan", "mask"])
def test_masked_values_are_filled_and_never_read(method, form):
    adata = tissue()
    truth = adata.X.toarray()
    lacks = adata.obsm["spatial"][:, 0] < 30
    results = []
    for value in (0.0, 99.0):
        one = adata.copy()
        x = truth.copy()
        x[np.ix_(lacks, [2, 3])] = value if form == "mask" else np.nan
        one.X = sparse.csr_matrix(x) if form == "sparse nan" else x
        one.obs["unseen"] = pd.Categorical(lacks) if value else lacks
        genes, mask = (["g3", "g2"], "unseen") if form == "mask" else (None, None)
        sfm.tl.impute(one, genes, mask=mask, method=method)
        results.append(one)
    np.testing.assert_array_equal(dense(results[0]), dense(results[1]))
    one, found = results[0], dense(results[0])
    assert one.uns["imputed"]["genes"] == ["g2", "g3"]
    assert np.isfinite(found).all()
    # Totals are those of the genes that no cell lacks.
    complete = np.setdiff1d(np.arange(16), [2, 3])
    expected = np.log1p(truth / truth[:, complete].sum(axis=1, keepdims=True) * 1e4)
    np.testing.assert_allclose(found[~lacks], expected[~lacks], rtol=1e-5)
    np.testing.assert_allclose(found[:, complete], expected[:, complete], rtol=1e-5)
    assert np.corrcoef(found[lacks, 2], expected[lacks, 2])[0, 1] > 0.5
    assert (one.uns["imputed"]["n_imputed"] == lacks.sum()).all()
    assert (one.uns["imputed"]["n_held_out"] == (~lacks).sum()).all()


@pytest.mark.parametrize("method", METHODS)
def test_signal_is_found_and_noise_is_named(method, messages):
    adata = tissue(900)
    # Not normalised to totals: a share of all counts depends on the other genes.
    adata.X = np.log1p(adata.X.toarray())
    sfm.tl.impute(adata, method=method, values="log")
    table = sfm.get.imputation_df(adata).set_index("gene")
    assert table["correlation"].median() > 0.6
    assert abs(table.loc["g15", "correlation"]) < 0.2
    assert (table["correlation"] > table["correlation_smoothing"]).mean() > 0.8
    assert (table["correlation_low"] < table["correlation"]).all()
    assert (table["correlation"] < table["correlation_high"]).all()
    assert table["skill"].median() > table["skill_smoothing"].median()
    found = dense(adata)
    brute = [np.corrcoef(found[:, j], adata.X[:, j])[0, 1] for j in range(16)]
    np.testing.assert_allclose(adata.uns["imputed"]["correlation"], brute, rtol=1e-4)
    doubtful = table.index[~table["better"]]
    assert all(any(name in message for message in messages()) for name in doubtful)


def test_whole_slides_are_held_out_where_whole_slides_lack_a_gene():
    adata = tissue(900, n_slides=3)
    adata.obs["unseen"] = (adata.obs["slide"] == "s1").to_numpy()
    sfm.tl.impute(adata, "g2", mask="unseen", library_key="slide")
    assert adata.uns["imputed"]["n_units"].tolist() == [2]
    sfm.tl.impute(adata, "g2", mask="unseen", key_added="joint")
    assert adata.uns["joint"]["n_units"][0] > 20


@pytest.mark.parametrize("method", METHODS)
def test_row_order_layout_and_copies_change_nothing(method):
    adata = tissue(n_slides=2)
    expected = sfm.tl.impute(adata, ["g1", "g4"], method=method, library_key="slide", copy=True)
    assert "imputed" not in adata.layers
    permutation = np.random.default_rng(3).permutation(adata.n_obs)
    whole = adata.copy()
    whole.X = whole.X.toarray().astype(int)
    # Dense and sparse values differ by rounding, which the decoder magnifies.
    for other, atol in ((adata, 1e-6), (whole, 5e-3)):
        view = other[permutation]
        sfm.tl.impute(view, ["g4", "g1"], method=method, library_key="slide")
        at = view.obs_names.get_indexer(adata.obs_names)
        np.testing.assert_allclose(dense(view)[at], dense(expected), atol=atol)
        found, scores = (a.uns["imputed"]["correlation"] for a in (view, expected))
        np.testing.assert_allclose(found, scores, atol=atol)
    i, j = expected.obsp["spatial_connectivities"].nonzero()
    slide = adata.obs["slide"].to_numpy()
    assert (slide[i] == slide[j]).all()


def test_threads_change_nothing():
    from threadpoolctl import threadpool_limits

    adata = tissue(300)
    found = []
    for threads in (1, 2):
        with threadpool_limits(threads), sfm.settings.override(n_jobs=threads):
            found.append(dense(sfm.tl.impute(adata, ["g1"], method="fine_tune", n_folds=2, copy=True)))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_round_trip(tmp_path, suffix):
    adata = tissue(300)
    sfm.tl.impute(adata, ["g1", "g4"])
    path = tmp_path / f"a.{suffix}"
    getattr(adata, f"write_{suffix}")(path)
    back = (ad.read_h5ad if suffix == "h5ad" else ad.read_zarr)(path)
    np.testing.assert_array_equal(dense(back), dense(adata))
    pd.testing.assert_frame_equal(sfm.get.imputation_df(back), sfm.get.imputation_df(adata), check_dtype=False)


def test_decoder_equals_scikit_learn():
    """Of the strengths, the one that does best on held-out folds; the fit that of a ridge regression."""
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 3)).astype(np.float32)
    y = (features @ rng.normal(size=(3, 2)) + rng.normal(size=(200, 2))).astype(np.float32)
    fold = rng.integers(-1, 4, size=200)
    predict = decoder(features, y, fold, np.random.default_rng(1))
    angles = features @ np.random.default_rng(1).normal(
        0, (0.3 * 2 * features.var(axis=0, dtype=np.float64).sum()) ** -0.5, (3, 150)
    ).astype(np.float32)
    x = np.hstack([features, np.cos(angles), np.sin(angles)]).astype(np.float64)
    x = (x - x.mean(0)) / x.std(0)
    for f in (-1, 2):
        rows, known = np.flatnonzero(fold == f), (fold != f) & (fold >= 0)
        for j in range(2):
            errors = []
            for strength in (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0):
                error = 0.0
                for g in np.unique(fold[known]):
                    train, test = known & (fold != g), fold == g
                    guess = Ridge(strength * train.sum()).fit(x[train], y[train, j]).predict(x[test])
                    error += np.square(guess - y[test, j]).sum()
                errors.append((error, strength))
            model = Ridge(min(errors)[1] * known.sum()).fit(x[known], y[known, j])
            np.testing.assert_allclose(predict(f, rows)[:, j], model.predict(x[rows]), rtol=1e-5, atol=1e-6)


def test_nearest_equals_brute_force():
    rng = np.random.default_rng(0)
    points, y, fold = rng.normal(size=(120, 2)), rng.normal(size=(120, 3)).astype(np.float32), np.arange(120) % 3
    rows, known = np.flatnonzero(fold == 1), np.flatnonzero(fold != 1)
    distance = np.linalg.norm(points[rows][:, None] - points[known], axis=2)
    for k, found in (
        (30, nearest(points, y, fold, rng)(1, rows)),
        (5, mean_nearest(points, known, rows, 5) @ y[known]),
    ):
        expected = y[known][np.argsort(distance, axis=1)[:, :k]].mean(axis=1)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_sums_give_the_correlation():
    rng = np.random.default_rng(0)
    a, b, units = rng.normal(size=(50, 3)), rng.normal(size=(50, 3)), rng.integers(4, size=50)
    a[:, 2] = 7
    sums = moments(a, b, units)
    assert sums.shape == (4, 6, 3)
    expected = [np.corrcoef(a[:, j], b[:, j])[0, 1] for j in range(2)]
    np.testing.assert_allclose(pearson(sums.sum(axis=0)), [*expected, np.nan])
    twice = np.r_[np.flatnonzero(units == 0), np.flatnonzero(units == 0), np.flatnonzero(units == 3)]
    drawn = pearson(np.tensordot([2, 0, 0, 1], sums, axes=1))
    np.testing.assert_allclose(drawn[0], np.corrcoef(a[twice, 0], b[twice, 0])[0, 1])


def flat(adata):
    adata.X = adata.X.toarray()
    adata.X[:, 2] = 1


def nans(adata):
    adata.X = adata.X.toarray()
    adata.X[:9, 2] = np.nan


@pytest.mark.parametrize(
    ("kwargs", "change", "error", "message"),
    [
        ({"genes": ["G1"]}, None, KeyError, r"did you mean \['g1'"),
        ({"genes": []}, None, ValueError, "at least one gene"),
        ({"genes": ["g1", "g1"]}, None, ValueError, "each once"),
        ({"genes": ["g2"]}, flat, ValueError, "one value in all cells"),
        ({"genes": ["g1"]}, nans, ValueError, r"hold NaN and are not to be imputed: \['g2'\]"),
        ({"genes": ["g1"], "mask": "nope"}, None, KeyError, "mask='nope'"),
        ({"genes": ["g1"], "mask": "slide"}, None, ValueError, "must be boolean"),
        ({"mask": "most"}, None, ValueError, "name them in genes="),
        ({"genes": ["g1"], "mask": "all"}, None, ValueError, "no cell has a value"),
        ({"genes": ["g1"], "mask": "most"}, None, ValueError, "Lower n_folds"),
        ({"genes": [f"g{j}" for j in range(16)], "mask": "half"}, None, ValueError, "none is left to predict from"),
        ({"method": "nope"}, None, ValueError, "choose from"),
        ({"n_folds": 1}, None, ValueError, "whole number from 2, got 1"),
        ({"key_added": "nope", "layer": "nope"}, None, ValueError, "would be overwritten by the result"),
        ({"model": "heist"}, None, ValueError, "model='heist-niche'"),
        ({"layer": "nope"}, None, KeyError, "layer='nope'"),
        ({"basis": "nope"}, None, KeyError, "obsm\\['nope'\\]"),
        ({"library_key": "nope"}, None, KeyError, "library_key='nope'"),
    ],
)
def test_errors_leave_adata_as_it_was(kwargs, change, error, message):
    adata = tissue(200)
    adata.obs["all"], adata.obs["most"], adata.obs["half"] = True, np.arange(200) > 20, np.arange(200) > 99
    if change:
        change(adata)
    before = adata.copy()
    with pytest.raises(error, match=message):
        sfm.tl.impute(adata, **kwargs)
    assert [key for key in adata.layers if key is not None] == []
    assert not adata.uns
    assert not adata.obsp
    x, y = (a.X.toarray() if sparse.issparse(a.X) else a.X for a in (adata, before))
    np.testing.assert_array_equal(x, y)
