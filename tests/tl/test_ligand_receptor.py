"""tl.ligand_receptor: scores and null hypotheses against loops over edges, calibration, power, names, invariance."""

from __future__ import annotations

from itertools import permutations, product

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy.stats import kstest

import spatialfm as sfm
from spatialfm.models import HEIST, HEISTConfig

KEYS = ["ligand", "receptor", "source", "target"]
PAIRS = [("L1", "R1"), ("L2", "R1_R2"), ("L1", "R_3"), ("L2", "L2")]


def tissue(n=300, seed=0, *, n_slides=1, planted=False, coupled=False):
    """Make logged counts of types A, B and C.

    ``planted``: on the left half, A has more L1 and B more R1, at the same density of types. ``coupled``: the same in
    every other of 16 fields.
    """
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0, 100, (n, 2))
    types = rng.choice(["A", "B", "C"], n, p=[0.4, 0.4, 0.2])
    rate = np.full((n, 6), 1.0)
    left = xy[:, 0] < 50
    fields = (xy // 25).sum(axis=1) % 2 == 0
    for there, where in ((planted, left), (coupled, fields)):
        if there:
            rate[where & (types == "A"), 0] = 6
            rate[where & (types == "B"), 1] = 6
    x = np.log1p(rng.poisson(rate) * rng.uniform(0.5, 2, (n, 1)))
    names = ["L1", "R1", "L2", "R2", "R_3", "other"]
    slide = [f"s{k}" for k in np.arange(n) % n_slides]
    half = np.where(left, "left", "right")
    obs = pd.DataFrame({"type": pd.Categorical(types), "slide": slide, "half": half}, index=[f"c{k}" for k in range(n)])
    adata = ad.AnnData(sp.csr_matrix(x.astype(np.float32)), obs=obs, var=pd.DataFrame(index=names))
    adata.obsm["spatial"] = xy
    sfm.pp.spatial_neighbors(adata, library_key="slide")
    return adata


def by_loop(adata, x, ligand, receptor, source, target):
    """Mean over edges, one by one."""
    types = adata.obs["type"].astype(str).to_numpy()
    at = {name: k for k, name in enumerate(adata.var_names)}

    def level(cell, name):
        parts = [name] if name in at else name.split("_")
        return min(x[cell, at[part]] for part in parts)

    graph = adata.obsp["spatial_connectivities"].tocoo()
    values = [
        np.sqrt(level(i, ligand) * level(j, receptor))
        for i, j in zip(graph.row, graph.col, strict=True)
        if types[i] == source and types[j] == target
    ]
    return np.mean(values), len(values)


def test_score_by_loop():
    adata = tissue()
    sfm.tl.ligand_receptor(adata, "type", pairs=PAIRS, min_fraction=0, min_edges=1, n_permutations=1)
    table = adata.uns["ligand_receptor"]["table"]
    assert len(table) == 4 * 9
    x = adata.X.toarray()
    for row in table.itertuples():
        score, n = by_loop(adata, x, row.ligand, row.receptor, row.source, row.target)
        assert row.n_edges == n
        np.testing.assert_allclose(row.score, score, rtol=1e-5)


@pytest.mark.parametrize("null", ["specific", "local"])
def test_null_by_loop(null):
    """z and p agree with permutations drawn by numpy."""
    adata = tissue(n=120, n_slides=2, planted=True)
    sfm.tl.ligand_receptor(adata, "type", pairs=[("L1", "R1")], library_key="slide", min_edges=5, n_permutations=2000)
    row = adata.uns["ligand_receptor"]["table"].set_index(["source", "target"]).loc[("A", "B")]
    groups = adata.obs["slide"] + (adata.obs["type"].astype(str) if null == "local" else "")
    x, rng = adata.X.toarray(), np.random.default_rng(1)
    scores = []
    for _ in range(300):
        order = np.arange(adata.n_obs)
        for g in groups.unique():
            here = np.flatnonzero(groups == g)
            order[here] = rng.permutation(here)
        scores.append(by_loop(adata, x[order], "L1", "R1", "A", "B")[0])
    scores = np.array(scores)
    np.testing.assert_allclose(row[f"z_{null}"], (row["score"] - scores.mean()) / scores.std(), atol=0.5, rtol=0.15)
    assert abs(row[f"p_{null}"] - (1 + (scores >= row["score"]).sum()) / 301) < 0.05


@pytest.mark.parametrize("seed", range(4))
def test_z_is_exact(seed):
    """As by all permutations: a type with itself, a feature with itself, and across regions."""
    adata = tissue(n=7, seed=seed)
    adata.obs["type"] = pd.Categorical(list("AABBABA"))
    adata.obs["half"] = list("llllrrr")
    how = {"pairs": PAIRS[:1] + PAIRS[3:], "min_fraction": 0, "min_edges": 1, "n_permutations": 1}
    sfm.tl.ligand_receptor(adata, "type", **how)
    sfm.tl.ligand_receptor(adata, "type", region_key="half", **how, key_added="by_half")
    x, types = np.sqrt(adata.to_df()), adata.obs["type"].astype(str).to_numpy()
    graph = adata.obsp["spatial_connectivities"].toarray() > 0
    for key, null, groups in (
        ("ligand_receptor", "specific", np.zeros(7)),
        ("ligand_receptor", "local", types),
        ("by_half", "local", types.astype(object) + adata.obs["half"].astype(object).to_numpy()),
    ):
        members = [np.flatnonzero(groups == g) for g in np.unique(groups)]
        order = np.empty((np.prod([len(list(permutations(m))) for m in members]), 7), int)
        for k, moved in enumerate(product(*(permutations(m) for m in members))):
            order[k, np.concatenate(members)] = np.concatenate(moved)
        table = adata.uns[key]["table"]
        assert len(table) == 2 * 4
        for row in table.itertuples():
            edges = graph & (types[:, None] == row.source) & (types == row.target)
            ligand, receptor = (x[name].to_numpy()[order] for name in (row.ligand, row.receptor))
            scores = np.einsum("pi,ij,pj->p", ligand, edges.astype(float), receptor) / edges.sum()
            z = (row.score - scores.mean()) / scores.std() if scores.std() > 1e-6 else 0
            np.testing.assert_allclose(getattr(row, f"z_{null}"), z, atol=1e-4)


def test_a_test_ends_when_twenty_permutations_reached_it():
    adata = tissue(planted=True)
    few, many = (
        sfm.tl.ligand_receptor(adata, "type", pairs=PAIRS, n_permutations=n, copy=True).uns["ligand_receptor"]["table"]
        for n in (100, 400)
    )
    for null in ("specific", "local"):
        p, more = few[f"p_{null}"].to_numpy(), many[f"p_{null}"].to_numpy()
        ended = p >= 20 / 100
        np.testing.assert_array_equal(p[ended], more[ended])
        np.testing.assert_allclose(20 / p[ended], np.rint(20 / p[ended]))
        np.testing.assert_allclose(p[~ended] * 101, np.rint(p[~ended] * 101))
        assert 0 < ended.sum() < len(ended)
        # Those that went on: b of 400, or the 20th of n > 100.
        more = more[~ended]
        np.testing.assert_allclose(
            np.minimum(abs(20 / more - np.rint(20 / more)), abs(more * 401 - np.rint(more * 401))), 0, atol=1e-9
        )


def many_pairs(n_pairs=60, n_coupled=3):
    """Pairs of random genes, of which the first are locally coupled within A and B."""
    adata = tissue(n=900, coupled=True)
    names = [f"{kind}{k}" for k in range(n_pairs) for kind in ("l", "r")]
    x = np.log1p(np.random.default_rng(1).poisson(1, (adata.n_obs, len(names)))).astype(np.float32)
    x[:, : 2 * n_coupled] = np.tile(adata.X[:, :2].toarray(), n_coupled)
    wide = ad.AnnData(sp.csr_matrix(x), obs=adata.obs, var=pd.DataFrame(index=names), obsm=dict(adata.obsm))
    sfm.pp.spatial_neighbors(wide)
    return wide, [(f"l{k}", f"r{k}") for k in range(n_pairs)]


def test_few_hits_among_many_tests_are_found():
    """1,000 permutations cannot reach an FDR of 0.05 for three hits of 540 tests: more follow the same first ones."""
    adata, pairs = many_pairs()
    few, more = (
        sfm.tl.ligand_receptor(adata, "type", pairs=pairs, copy=True, **how) for how in ({"n_permutations": 1000}, {})
    )
    entry = few.uns["ligand_receptor"]
    assert entry["n_permutations"]["local"] == 1000
    assert entry["table"]["fdr_local"].min() > 0.05
    assert entry["n_undecided"]["local"] > 0
    with pytest.warns(UserWarning, match=r"not decided under null='local' by 1,000 permutations.*n_permutations="):
        assert sfm.get.ligand_receptor_df(few, max_fdr=0.05).empty
    entry = more.uns["ligand_receptor"]
    assert len(entry["table"]) == 540
    assert 10_000 < entry["n_permutations"]["local"] <= 100_000
    found = sfm.get.ligand_receptor_df(more, max_fdr=0.05)
    assert {("l0", "r0"), ("l1", "r1"), ("l2", "r2")} == set(zip(found["ligand"], found["receptor"], strict=True))
    p, longer = few.uns["ligand_receptor"]["table"]["p_local"], entry["table"]["p_local"]
    np.testing.assert_array_equal(longer[p >= 20 / 1000], p[p >= 20 / 1000])


def test_an_empty_table_names_the_null_that_has_hits():
    adata = tissue()
    x = adata.X.toarray()
    x[(adata.obs["type"] == "A").to_numpy(), 0] += 3
    adata.X = x
    sfm.tl.ligand_receptor(adata, "type", pairs=PAIRS[:1], n_permutations=2000)
    assert (adata.uns["ligand_receptor"]["table"]["fdr_specific"] <= 0.05).any()
    for null in ("local", "both"):
        with pytest.warns(UserWarning, match="are under null='specific'"):
            assert sfm.get.ligand_receptor_df(adata, max_fdr=0.05, null=null).empty
    assert len(sfm.get.ligand_receptor_df(adata, max_fdr=0.05, null="specific"))


def test_filters():
    adata = tissue()
    sfm.tl.ligand_receptor(adata, "type", pairs=PAIRS, min_fraction=0.6, min_edges=40, n_permutations=1)
    got = {tuple(v) for v in adata.uns["ligand_receptor"]["table"][KEYS].astype(str).to_numpy()}
    sfm.tl.ligand_receptor(adata, "type", pairs=PAIRS, min_fraction=0, min_edges=1, n_permutations=1)
    everything = adata.uns["ligand_receptor"]["table"]
    x, types = adata.to_df(), adata.obs["type"].to_numpy()
    x["R1_R2"] = x[["R1", "R2"]].min(axis=1)
    share = (x > 0).groupby(types).mean()
    want = {
        tuple(str(v) for v in row[:4])
        for row in everything[[*KEYS, "n_edges"]].itertuples(index=False)
        if share.loc[row.source, row.ligand] >= 0.6 and share.loc[row.target, row.receptor] >= 0.6 and row.n_edges >= 40
    }
    assert got == want
    assert 0 < len(got) < len(everything)


def test_nulls_are_calibrated():
    """p_local is uniform where location does not matter within types, p_specific where types do not matter."""
    p = {"local": [], "specific": []}
    for seed in range(60):
        adata = tissue(n=150, seed=seed)
        shifted = adata.X.toarray()
        shifted[(adata.obs["type"] == "A").to_numpy(), 0] += 2
        for null, x in (("specific", adata.X), ("local", sp.csr_matrix(shifted))):
            adata.X = x
            sfm.tl.ligand_receptor(adata, "type", pairs=[("L1", "R1")], min_edges=1, n_permutations=99)
            table = adata.uns["ligand_receptor"]["table"]
            p[null] += list(table[(table["source"] == "A") & (table["target"] == "B")][f"p_{null}"])
    for values in p.values():
        assert kstest(values, "uniform").pvalue > 1e-3


def test_planted_pair_is_local():
    adata = tissue(n=600, planted=True)
    sfm.tl.ligand_receptor(adata, "type", pairs=PAIRS[:3])
    table = adata.uns["ligand_receptor"]["table"].set_index(KEYS)
    assert table.index[0] == ("L1", "R1", "A", "B")
    assert table.loc[("L1", "R1", "A", "B"), "fdr_local"] < 0.05
    assert table.loc[("L1", "R_3", "A", "B"), "p_local"] > 0.01
    found = sfm.get.ligand_receptor_df(adata, max_fdr=0.05, null="local")
    assert ("L1", "R1", "A", "B") in set(found[KEYS].astype(str).itertuples(index=False, name=None))


def test_regions_explain_what_differs_between_them():
    """A pair high in one region is local only without regions; a pair coupled within regions is local with them too."""
    p = {key: [] for key in ("planted", "planted, by half", "coupled, by half")}
    for key, values in p.items():
        what, *by = key.split(", by ")
        for seed in range(40):
            adata = tissue(n=600, seed=seed, **{what: True})
            region = by[0] if by else None
            sfm.tl.ligand_receptor(adata, "type", pairs=[("L1", "R1")], region_key=region, n_permutations=199)
            table = adata.uns["ligand_receptor"]["table"]
            values += list(table[(table["source"] == "A") & (table["target"] == "B")]["p_local"])
    assert adata.uns["ligand_receptor"]["params"]["region_key"] == "half"
    assert np.mean(np.array(p["planted"]) <= 0.05) > 0.9
    assert kstest(p["planted, by half"], "uniform").pvalue > 1e-3
    assert np.mean(np.array(p["coupled, by half"]) <= 0.05) > 0.9


@pytest.mark.parametrize("column", ["type", "half"])
def test_cells_without_a_label_are_left_out(column):
    """As if they were not there, but for the graph of the others."""
    adata = tissue(n_slides=2)
    missing = np.random.default_rng(0).random(adata.n_obs) < 0.1
    how = {"pairs": PAIRS, "library_key": "slide", "region_key": "half", "n_permutations": 30}
    want = sfm.tl.ligand_receptor(adata[~missing].copy(), "type", **how, copy=True)
    adata.obs[column] = adata.obs[column].astype(object).where(~missing)
    with pytest.warns(UserWarning, match=rf"obs\['{column}'\] has no value for {missing.sum()} of 300 cells; edges"):
        sfm.tl.ligand_receptor(adata, "type", **how)
    pd.testing.assert_frame_equal(adata.uns["ligand_receptor"]["table"], want.uns["ligand_receptor"]["table"])


def test_cells_without_a_type_and_embeddings():
    adata = tissue(n=60)
    sfm.pp.grn(adata, groupby=None)
    adata.obs["type"] = adata.obs["type"].astype(object).where(np.arange(60) > 3)
    for model in (HEIST(HEISTConfig(width=8, pe_dim=8, heads=2, layers=1)), "heist-niche"):
        with pytest.warns(UserWarning, match="for 4 of 60 cells"):
            sfm.tl.ligand_receptor(
                adata, "type", pairs=PAIRS, model=model, min_fraction=0, min_edges=1, n_permutations=1
            )
        assert np.isfinite(adata.uns["ligand_receptor"]["table"]["embedding_score"]).all()


def test_fdr_is_benjamini_hochberg():
    adata = tissue()
    sfm.tl.ligand_receptor(adata, "type", pairs=PAIRS, n_permutations=50)
    table = adata.uns["ligand_receptor"]["table"].sort_values("p_local", kind="stable")
    raw = table["p_local"].to_numpy() * len(table) / np.arange(1, len(table) + 1)
    np.testing.assert_allclose(table["fdr_local"], np.minimum(np.minimum.accumulate(raw[::-1])[::-1], 1))


@pytest.mark.parametrize("model", [None, "heist-niche"])
def test_order_threads_and_blocks_change_nothing(model, monkeypatch):
    adata = tissue(n_slides=2)
    how = {"pairs": PAIRS, "library_key": "slide", "region_key": "half", "n_permutations": 30, "model": model}
    with sfm.settings.override(n_jobs=1):
        sfm.tl.ligand_receptor(adata, "type", **how)
    table = adata.uns["ligand_receptor"]["table"]
    shuffled = adata[np.random.default_rng(3).permutation(adata.n_obs)].copy()
    with sfm.settings.override(n_jobs=2):
        sfm.tl.ligand_receptor(shuffled, "type", **how)
    again = sfm.tl.ligand_receptor(adata[:, ::-1], "type", **how, copy=True)
    monkeypatch.setattr("spatialfm.tl._edge_tests.BLOCK", 1)
    in_blocks = sfm.tl.ligand_receptor(adata, "type", **how, copy=True)
    for other in (shuffled, again, in_blocks):
        found = other.uns["ligand_receptor"]["table"].astype(dict.fromkeys(KEYS, str)).set_index(KEYS)
        pd.testing.assert_frame_equal(
            found.sort_index(), table.astype(dict.fromkeys(KEYS, str)).set_index(KEYS).sort_index(), rtol=1e-4
        )


def test_kinds_of_input_agree():
    adata = tissue()
    counts = np.random.default_rng(0).poisson(1, adata.shape)
    tables = []
    for x in (
        counts,
        sp.csr_matrix(counts),
        sp.csc_matrix(counts.astype(np.float32)),
        np.log1p(counts / counts.sum(1, keepdims=True) * 1e4),
    ):
        other = adata.copy()
        other.X = x
        sfm.tl.ligand_receptor(other, "type", pairs=PAIRS, n_permutations=20)
        tables.append(other.uns["ligand_receptor"]["table"])
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0], rtol=1e-4)


def test_names_in_every_spelling_and_organism():
    rng = np.random.default_rng(0)
    genes = {"symbols": ["Igf1", "Igf1r", "Cd47", "Thbs1", "Gad1"]}
    genes["human"] = [g.upper() for g in genes["symbols"]]
    n, found = 200, {}
    for what, names in genes.items():
        adata = ad.AnnData(rng.poisson(2, (n, 5)).astype(np.float32), var=pd.DataFrame(index=names))
        adata.obs_names = [f"c{k}" for k in range(n)]
        adata.obsm["spatial"] = rng.uniform(0, 1, (n, 2))
        adata.obs["type"] = pd.Categorical(rng.choice(["A", "B"], n))
        organism = "mouse" if what == "symbols" else "human"
        sfm.tl.ligand_receptor(adata, "type", organism=organism, n_permutations=2)
        entry = adata.uns["ligand_receptor"]
        found[what] = set(
            zip(entry["table"]["ligand"].str.upper(), entry["table"]["receptor"].str.upper(), strict=True)
        )
        assert entry["n_defined"] == {"mouse": 3989, "human": 4620}[organism]
        assert entry["n_pairs"] == len(found[what])
        assert "spatial_connectivities" in adata.obsp
    assert ("IGF1", "IGF1R") in found["symbols"] & found["human"]
    assert ("THBS1", "CD47") in found["symbols"] & found["human"]
    # Human pairs for mouse features, by orthologs.
    adata.var_names = genes["symbols"]
    pairs = pd.DataFrame({"ligand": ["THBS1", "IGF1"], "receptor": ["CD47", "NOPE"], "note": [1, 2]})
    sfm.tl.ligand_receptor(adata, "type", pairs=pairs, organism="mouse", n_permutations=2)
    assert adata.uns["ligand_receptor"]["n_pairs"] == 1


def test_embedding_score_of_heist_by_loop():
    adata = tissue(n=60)
    model = HEIST(HEISTConfig(width=8, pe_dim=8, heads=2, layers=1))
    sfm.pp.grn(adata, groupby=None)
    sfm.tl.ligand_receptor(adata, "type", pairs=PAIRS, model=model, min_fraction=0, min_edges=1, n_permutations=1)
    assert "embedding_score" in adata.uns["ligand_receptor"]["table"]
    import torch

    from spatialfm.engine import cut_contexts, read_tissue
    from spatialfm.engine._heist import make_batches

    read = read_tissue(adata)
    ((batch, cells, _),) = make_batches(read, cut_contexts(read.xy, read.graph, read.slide), device=torch.device("cpu"))
    with torch.inference_mode():
        _, g = model.eval().encode(
            batch.coords, batch.cell_edges, batch.expression, batch.gene_edges, batch.group, context=batch.context
        )
    g = g.numpy() / np.linalg.norm(g.numpy(), axis=2, keepdims=True)
    row_of = np.empty(len(cells), int)
    row_of[read.rows[cells]] = np.arange(len(cells))
    graph, types = adata.obsp["spatial_connectivities"].tocoo(), adata.obs["type"].to_numpy()
    at = {gene: k for k, gene in enumerate(read.genes)}
    for row in adata.uns["ligand_receptor"]["table"].itertuples():
        parts = [[name] if name in at else name.split("_") for name in (row.ligand, row.receptor)]
        cosines = []
        for i, j in zip(graph.row, graph.col, strict=True):
            if types[i] == row.source and types[j] == row.target:
                a, b = (g[row_of[c], [at[v] for v in own]].mean(0) for c, own in zip((i, j), parts, strict=True))
                cosines.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        np.testing.assert_allclose(row.embedding_score, np.mean(cosines), atol=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"groupby": "nope"}, KeyError, "groupby='nope'"),
        ({"pairs": None}, ValueError, "give the pairs"),
        ({"pairs": [("X", "Y")]}, ValueError, "none of the 1 ligand-receptor pairs"),
        ({"pairs": []}, ValueError, "got 'none'"),
        ({"pairs": ["ab"]}, ValueError, "got 'ab'"),
        ({"min_edges": 10**6}, ValueError, "can be tested"),
        ({"min_fraction": 2}, ValueError, "min_fraction=2"),
        ({"n_permutations": 0}, ValueError, "n_permutations must be a positive integer, got 0"),
        ({"n_permutations": 2.5}, TypeError, "n_permutations must be a whole number, got 2.5"),
        ({"organism": "rat"}, ValueError, "organism='rat'"),
        ({"layer": "scaled"}, ValueError, "scaled values"),
        ({"neighbors_key": "nope"}, KeyError, "neighbors_key='nope'"),
        ({"library_key": "half"}, ValueError, "between slides"),
        ({"region_key": "nope"}, KeyError, "region_key='nope'"),
        ({"region_key": "nothing"}, ValueError, "has no value for any"),
        ({"model": "hibio"}, ValueError, "has no embedding of single genes"),
    ],
)
def test_refusals_leave_the_data_alone(kwargs, error, message):
    adata = tissue()
    adata.layers["scaled"] = np.random.default_rng(0).normal(size=adata.shape).astype(np.float32)
    adata.obs["nothing"] = np.nan
    uns = list(adata.uns)
    with pytest.raises(error, match=message):
        sfm.tl.ligand_receptor(adata, **{"groupby": "type", "pairs": PAIRS, **kwargs})
    assert list(adata.uns) == uns


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_round_trip_and_table(tmp_path, suffix):
    adata = tissue()
    sfm.tl.ligand_receptor(adata, "type", pairs=PAIRS, n_permutations=20, key_added="lr")
    path = tmp_path / f"x.{suffix}"
    getattr(adata, f"write_{suffix}")(path)
    back = getattr(ad, f"read_{suffix}")(path)
    table = sfm.get.ligand_receptor_df(back, key="lr", source=["A", "B"], target="C")
    want = adata.uns["lr"]["table"]
    want = want[want["source"].isin(["A", "B"]) & (want["target"] == "C")].reset_index(drop=True)
    pd.testing.assert_frame_equal(table.astype(dict.fromkeys(KEYS, str)), want.astype(dict.fromkeys(KEYS, str)))
    assert len(sfm.get.ligand_receptor_df(back, key="lr", max_fdr=0.0)) == 0
    with pytest.raises(KeyError, match=r"sfm\.tl\.ligand_receptor\(adata, groupby\) first"):
        sfm.get.ligand_receptor_df(back)
    with pytest.raises(ValueError, match="source='Z'"):
        sfm.get.ligand_receptor_df(back, key="lr", source="Z")


def test_a_type_without_any_region_is_in_no_test():
    adata = tissue()
    adata.obs["half"] = adata.obs["half"].where(adata.obs["type"] != "C")
    how = {"pairs": PAIRS, "min_fraction": 0, "min_edges": 1, "n_permutations": 20}
    with pytest.warns(UserWarning, match="has no value for"):
        sfm.tl.ligand_receptor(adata, "type", region_key="half", **how)
    table = sfm.get.ligand_receptor_df(adata)
    assert set(table["source"]) == set(table["target"]) == {"A", "B"}
    assert np.isfinite(table.select_dtypes("number")).all(axis=None)


def test_numbered_types_may_be_asked_for_by_number():
    adata = tissue()
    adata.obs["type"] = adata.obs["type"].map({"A": 1, "B": 2}).astype(float)
    with pytest.warns(UserWarning, match="has no value for"):
        sfm.tl.ligand_receptor(adata, "type", pairs=PAIRS, min_fraction=0, min_edges=1, n_permutations=20)
    table = sfm.get.ligand_receptor_df(adata, source=[1], target=[2.0])
    assert set(table["source"]) == {"1"}
    assert set(table["target"]) == {"2"}
