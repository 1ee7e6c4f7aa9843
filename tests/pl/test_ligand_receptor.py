"""pl.ligand_receptor: dots and map show what was computed."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import EllipseCollection

import spatialfm as sfm


@pytest.fixture
def adata():
    rng = np.random.default_rng(0)
    n = 200
    adata = ad.AnnData(
        np.log1p(rng.poisson(1, (n, 4)) * 1.5).astype(np.float32),
        obs=pd.DataFrame(
            {"type": rng.choice(["A", "B"], n), "slide": np.repeat(["s1", "s2"], n // 2)}, index=map(str, range(n))
        ),
        var=pd.DataFrame(index=["L1", "R1", "L2", "R2"]),
        obsm={"spatial": rng.uniform(0, 100, (n, 2))},
    )
    sfm.tl.ligand_receptor(adata, "type", pairs=[("L1", "R1"), ("L2", "R1_R2")], library_key="slide", n_permutations=50)
    return adata


def test_dots(adata):
    before = adata.uns["ligand_receptor"]["table"].copy()
    (ax,) = sfm.pl.ligand_receptor(adata, null="specific", max_fdr=1.0, n=3)
    assert {t.get_text() for t in ax.get_yticklabels()} == {"L1 → R1", "L2 → R1_R2"}
    columns = [t.get_text() for t in ax.get_xticklabels()]
    assert len(columns) == 3
    rows = [t.get_text() for t in ax.get_yticklabels()]
    points = ax.collections[0]
    table = before.assign(pair=before["ligand"].astype(str) + " → " + before["receptor"].astype(str))
    table = table.assign(types=table["source"].astype(str) + " → " + table["target"].astype(str)).set_index(
        ["pair", "types"]
    )
    for (x, y), score in zip(points.get_offsets(), points.get_array(), strict=True):
        assert np.isclose(score, table.loc[(rows[int(y)], columns[int(x)]), "score"])
    pd.testing.assert_frame_equal(before, adata.uns["ligand_receptor"]["table"])


def test_dots_of_one_sender(adata):
    (ax,) = sfm.pl.ligand_receptor(adata, source="A", max_fdr=0.0)
    assert {t.get_text() for t in ax.get_xticklabels()} == {"A → A", "A → B"}
    with pytest.raises(ValueError, match="source='C'"):
        sfm.pl.ligand_receptor(adata, source="C")
    table = adata.uns["ligand_receptor"]["table"]
    adata.uns["ligand_receptor"]["table"] = table[table["source"] != "A"]
    with pytest.raises(ValueError, match="no test has source='A'"):
        sfm.pl.ligand_receptor(adata, source="A")


def test_names_of_columns_lie_inside_the_figure(adata):
    table = adata.uns["ligand_receptor"]["table"]
    for column in ("source", "target"):
        table[column] = table[column].astype(str) + " with a rather long name"
    (ax,) = sfm.pl.ligand_receptor(adata, n=2)
    ax.figure.canvas.draw()
    box = ax.figure.get_tightbbox()
    assert min(box.x0, box.y0) >= 0
    assert box.x1 <= ax.figure.get_figwidth()
    assert box.y1 <= ax.figure.get_figheight()


def test_dots_where_nothing_is_significant(adata):
    (ax,) = sfm.pl.ligand_receptor(adata, max_fdr=0.0)
    assert len(ax.collections[0].get_offsets()) == 8
    assert not np.any(ax.collections[0].get_linewidths())


def test_map(adata):
    axes = sfm.pl.ligand_receptor(adata, pair=("L2", "R1_R2"), library_key="slide")
    assert len(axes) == 2
    graph, x = adata.obsp["spatial_connectivities"].toarray() > 0, adata.X
    want = {}
    for j in range(adata.n_obs):
        near = np.flatnonzero(graph[j])
        want[tuple(adata.obsm["spatial"][j])] = np.sqrt(x[near, 2] * min(x[j, 1], x[j, 3])).mean()
    for ax in axes:
        (points,) = [c for c in ax.collections if isinstance(c, EllipseCollection)]
        for place, value in zip(points.get_offsets(), points.get_array(), strict=True):
            np.testing.assert_allclose(value, want[tuple(place)], rtol=1e-4, atol=1e-6)


def test_errors(adata):
    with pytest.raises(ValueError, match="none of the 1 ligand-receptor pairs"):
        sfm.pl.ligand_receptor(adata, pair=("L1", "nope"))
    with pytest.raises(ValueError, match="null='both'"):
        sfm.pl.ligand_receptor(adata, null="both")
    with pytest.raises(KeyError, match=r"sfm\.tl\.ligand_receptor"):
        sfm.pl.ligand_receptor(adata, key="nope")
