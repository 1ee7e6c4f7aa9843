"""Embeddings with different axes on each slide are refused, and no others."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import spatialfm as sfm
from spatialfm._data._embeddings import get_embedding


def slide(name, seed, n=150):
    """A slide of two layers that differ in their genes, the more so from slide to slide."""
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0, 100, (n, 2))
    layer = (xy[:, 0] + 10 * seed > 55).astype(int)
    counts = rng.poisson(1 + 3 * (layer[:, None] == np.arange(14) % 2) + seed * (np.arange(14) % 3 == 0))
    return ad.AnnData(
        counts.astype(np.float32),
        obs=pd.DataFrame(
            {"slide": name, "layer": layer.astype(str), "half": rng.integers(2, size=n).astype(str)},
            index=[f"{name}{i}" for i in range(n)],
        ),
        obsm={"spatial": xy},
    )


@pytest.fixture(scope="module")
def slides():
    return [slide(name, seed, n) for seed, (name, n) in enumerate((("a", 150), ("b", 120), ("c", 150)))]


@pytest.fixture(scope="module")
def together(slides):
    adata = ad.concat(slides)
    sfm.tl.embed(adata, library_key="slide")
    return adata


@pytest.fixture(scope="module")
def apart(slides):
    own = [part.copy() for part in slides]
    for part in own:
        sfm.tl.embed(part)
    return own


READERS = {
    "domains": lambda a: sfm.tl.domains(a, 2, use_rep="X_niche", library_key="slide"),
    "subpopulations": lambda a: sfm.tl.subpopulations(a, "layer", "0", n_clusters=2, library_key="slide"),
    "annotate": lambda a: sfm.tl.annotate(a, groupby="some", library_key="slide"),
    "annotate_regions": lambda a: sfm.tl.annotate_regions(a, "some", use_rep="X_niche"),
    "evaluate": lambda a: sfm.tl.evaluate(a, "layer", library_key="slide"),
    "outcome": lambda a: sfm.tl.outcome(a, sample_key="slide", condition_key="outcome", use_rep=("X_niche", "X_state")),
    "regions": lambda a: sfm.pp.regions(a, use_rep="X_niche", key_added="found", library_key="slide"),
    "embedding_blocks": lambda a: sfm.pl.embedding_blocks(a, "layer"),
}


@pytest.mark.parametrize("how", [None, "same", "unique", "first", "only"])
def test_embedded_one_by_one(apart, how):
    joined = ad.concat(apart, uns_merge=how)
    for key in ("X_niche", "X_state", ("X_niche", "X_state")):
        with pytest.raises(ValueError, match=r"axes of each.*Embed them together.*library_key="):
            get_embedding(joined, key)


@pytest.mark.parametrize("name", READERS)
def test_every_reader_notices(apart, name):
    joined = ad.concat(apart)
    joined.obs["some"] = joined.obs["layer"].where(np.arange(joined.n_obs) % 2 == 0)
    joined.obs["outcome"] = joined.obs["slide"].map({"a": "x", "b": "y", "c": "x"})
    before = (list(joined.obs), list(joined.obsm), list(joined.obsp), list(joined.uns))
    with pytest.raises(ValueError, match="Embed them together"):
        READERS[name](joined)
    assert (list(joined.obs), list(joined.obsm), list(joined.obsp), list(joined.uns)) == before


def test_one_slide_added_to_two(slides, apart):
    """Two embedded together and one by itself are no joint embedding either."""
    two = ad.concat(slides[:2])
    sfm.tl.embed(two, library_key="slide")
    for how in (None, "same", "first"):
        with pytest.raises(ValueError, match="Embed them together"):
            get_embedding(ad.concat([two, apart[2]], uns_merge=how), "X_niche")


def test_what_was_filtered_after_embedding(apart):
    """The means are no longer 0, but the record shows it."""
    kept = [part[part.obs["layer"] == "0"].copy() for part in apart]
    for how in ("same", "unique"):
        with pytest.raises(ValueError, match="only what their records have in common"):
            get_embedding(ad.concat(kept, uns_merge=how), "X_niche")
    few = slide("a", 0)
    sfm.tl.embed(few, library_key="slide")
    joined = ad.concat([few[:40].copy(), *[part[:40].copy() for part in apart[1:]]])
    joined.uns["embeddings"] = few.uns["embeddings"]
    with pytest.warns(UserWarning, match=r"on the slides \['a'\] of obs\['slide'\], and \['b', 'c'\] are none"):
        get_embedding(joined, "X_niche")


def test_models_of_spots(make_spots):
    parts = [make_spots(seed, name=name) for seed, name in ((0, "a"), (1, "b"))]
    both = ad.concat(parts)
    for one in (*parts, both):
        sfm.tl.embed(one, "hibio", image=False, gene_sets=None, library_key="slide")
    for how in (None, "same", "first"):
        joined = ad.concat(parts, uns_merge=how)
        with pytest.raises(ValueError, match="Embed them together"):
            get_embedding(joined, "X_hibio")
        get_embedding(joined, "X_hibio_gene")  # of the model: comparable everywhere
    get_embedding(both, "X_hibio")


def test_names_of_ones_own_are_warned_of(apart):
    joined = ad.concat(apart)
    joined.obsm["X_mine"] = joined.obsm["X_niche"]
    with pytest.warns(UserWarning, match=r"obsm\['X_mine'\]: its columns have mean 0.*obs\['slide'\]"):
        get_embedding(joined, "X_mine")


def test_no_false_alarm(together, slides):
    """Parts of a joint embedding, with and without a record; one slide; other embeddings."""
    for key in ("X_niche", "X_state", ("X_niche", "X_state")):
        get_embedding(together, key)
        get_embedding(together[together.obs["slide"] != "b"], key)
        get_embedding(together[::2], key)
        joined = ad.concat([together[together.obs["slide"] == name].copy() for name in "abc"], uns_merge="same")
        get_embedding(joined, key)
        lost = ad.concat([together[together.obs["slide"] == name].copy() for name in "abc"])
        assert not lost.uns
        get_embedding(lost, key)
        renamed = together.copy()
        renamed.obs["slide"] = (
            renamed.obs["slide"].astype("category").cat.rename_categories({"a": "p", "b": "q", "c": "r"})
        )
        get_embedding(renamed, key)
    one = slides[0].copy()
    one.obs["checked"] = np.arange(one.n_obs) > 0
    sfm.tl.embed(one)
    del one.uns["embeddings"]
    get_embedding(one, ("X_niche", "X_state"))
    # Scaled by slide, as others do.
    other = ad.concat(slides)
    x = pd.DataFrame(np.random.default_rng(0).normal(size=(other.n_obs, 5)))
    by_slide = x.groupby(other.obs["slide"].to_numpy())
    other.obsm["X_pca"] = ((x - by_slide.transform("mean")) / by_slide.transform("std")).to_numpy()
    get_embedding(other, "X_pca")


def test_the_published_model_is_comparable(slides):
    own = [part.copy() for part in slides[:2]]
    for part in own:
        sfm.tl.embed(part, "heist", groupby=None)
    for how in (None, "same", "first"):
        get_embedding(ad.concat(own, uns_merge=how), "X_heist")


def test_parts_of_one_embedding_are_an_outcome_of_several_files(together):
    """Split by sample after it was embedded together, all columns mean the same."""
    parts = {name: together[together.obs["slide"] == name].copy() for name in "abc"}
    from spatialfm.tl._provenance import check_same_axes

    both = ("X_niche", "X_state")
    check_same_axes(list(parts.values()), both, fix="embed them together")
    other = parts["a"].copy()
    sfm.tl.embed(other)
    with pytest.raises(ValueError, match="different axes in each"):
        check_same_axes([other, parts["b"]], both, fix="embed them together")


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
@pytest.mark.filterwarnings("ignore:Writing zarr v2")
def test_the_record_survives_a_file(together, suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    getattr(together, f"write_{suffix}")(path)
    back = (ad.read_h5ad if suffix == "h5ad" else ad.read_zarr)(path)
    entry = back.uns["embeddings"]["X_niche"]
    assert (str(entry["axes"]), str(entry["id"])) == ("data", together.uns["embeddings"]["X_niche"]["id"])
    assert list(entry["slides"]["names"]) == ["a", "b", "c"]
    assert list(entry["slides"]["n_cells"]) == [150, 120, 150]
    get_embedding(back, ("X_niche", "X_state"))
