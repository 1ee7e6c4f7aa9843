"""get.subpopulations_df: the table of tl.subpopulations, sorted and filtered."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import spatialfm as sfm


@pytest.fixture(scope="module")
def cells():
    """Cells of A whose embedding reflects their neighbours: B on the left, C on the right."""
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, 100, (400, 2))
    right = xy[:, 0] > 40
    types = np.where(rng.random(400) < 0.5, "A", np.where(right, "C", "B"))
    adata = ad.AnnData(
        np.zeros((400, 1), np.float32),
        obs=pd.DataFrame({"type": pd.Categorical(types)}, index=[f"c{i}" for i in range(400)]),
        obsm={"spatial": xy, "X_rep": rng.normal(0, 0.3, (400, 4)) + 6 * right[:, None]},
    )
    sfm.pp.spatial_neighbors(adata)
    sfm.tl.subpopulations(adata, "type", "A", use_rep="X_rep", n_clusters=2, n_permutations=199, key_added="part")
    return adata


def test_rows_and_order(cells):
    table = sfm.get.subpopulations_df(cells, key="part")
    assert list(table) == ["subpopulation", "cell_type", "fraction", "expected", "z", "p", "fdr"]
    assert table["subpopulation"].tolist() == ["A 1"] * 3 + ["A 2"] * 3
    assert table["cell_type"].tolist()[0] == "C"  # the larger part
    assert table["cell_type"].tolist()[3] == "B"
    for _, rows in table.groupby("subpopulation", observed=True):
        assert rows["z"].is_monotonic_decreasing
    assert table.index.equals(pd.RangeIndex(6))
    for row in table.itertuples():
        entry = cells.uns["part"]
        want = entry["composition"][entry["names"].index(row.subpopulation), entry["cell_types"].index(row.cell_type)]
        assert row.fraction == want


def test_filter(cells):
    table = sfm.get.subpopulations_df(cells, key="part")
    kept = sfm.get.subpopulations_df(cells, key="part", max_fdr=0.05)
    assert 0 < len(kept) < len(table)
    pd.testing.assert_frame_equal(kept, table[table["fdr"] <= 0.05].reset_index(drop=True))


def test_leaves_uns_alone(cells):
    before = cells.uns["part"]["enrichment"].copy()
    table = sfm.get.subpopulations_df(cells, key="part")
    table["z"] = 0.0
    pd.testing.assert_frame_equal(cells.uns["part"]["enrichment"], before)


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_survives_a_file(cells, tmp_path, suffix):
    path = tmp_path / f"cells.{suffix}"
    getattr(cells, f"write_{suffix}")(path)
    back = getattr(ad, f"read_{suffix}")(path)
    pd.testing.assert_frame_equal(
        sfm.get.subpopulations_df(back, key="part"), sfm.get.subpopulations_df(cells, key="part"), check_dtype=False
    )


def test_refusals(cells):
    with pytest.raises(KeyError, match=r"sfm\.tl\.subpopulations"):
        sfm.get.subpopulations_df(cells)
    with pytest.raises(ValueError, match="max_fdr=2"):
        sfm.get.subpopulations_df(cells, key="part", max_fdr=2)
