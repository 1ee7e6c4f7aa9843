import gzip

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import spatialfm as sfm
from spatialfm._data._genes import match_genes

SETS = {"a": ["Gad1", "Gad2", "Slc32a1"], "b": ["Mbp", "Mog", "Plp1", "Gad1"], "none": ["Nope1", "Nope2"]}
GENES = ["Gad1", "Gad2", "Slc32a1", "Mbp", "Mog", "Plp1", "Aqp4", "Actb", "Gapdh", "Snap25", "Olig1", "Cldn5"]


def make(names=GENES, n=40, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.poisson(rng.gamma(1, 3, len(names)), (n, len(names))).astype(np.float32)
    return ad.AnnData(
        sp.csr_matrix(x), obs=pd.DataFrame(index=[f"c{i}" for i in range(n)]), var=pd.DataFrame(index=list(names))
    )


def logged(adata):
    x = adata.X.toarray().astype(float)
    total = x.sum(1, keepdims=True)
    return np.log1p(np.divide(1e4 * x, total, out=np.zeros_like(x), where=total > 0))


def scores(x, names, genes, method):
    columns = [i for i, name in enumerate(names) if name in genes]
    z = x[:, columns]
    if method == "zscore":
        spread = z.std(0)
        z = np.divide(z - z.mean(0), spread, out=np.zeros_like(z), where=spread > 0)
    return z.mean(1)


@pytest.mark.parametrize("method", ["mean", "zscore"])
@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_against_a_plain_mean(method, form):
    adata = make()
    adata.X = {"csr": adata.X, "csc": adata.X.tocsc(), "dense": adata.X.toarray()}[form]
    before = adata.copy()
    assert sfm.pp.pathways(adata, SETS, method=method, min_genes=2) is None
    found = adata.obsm["pathways"]
    assert list(found.columns) == ["a", "b"] == list(adata.uns["pathways"]["names"])
    x = logged(make())
    for name in found:
        np.testing.assert_allclose(found[name], scores(x, GENES, SETS[name], method), atol=1e-5)
    assert adata.varm["pathways"].toarray().T.tolist() == [
        [float(gene in SETS[name]) for gene in GENES] for name in found
    ]
    assert adata.uns["pathways"]["n_genes"] == [3, 4]
    assert adata.uns["pathways"]["n_left_out"] == 1
    assert adata.uns["pathways"]["organism"] == "mouse"
    np.testing.assert_array_equal(sp.csr_matrix(adata.X).toarray(), sp.csr_matrix(before.X).toarray())


def test_values_are_taken_as_they_are():
    adata = make()
    adata.layers["own"] = adata.X * 2
    sfm.pp.pathways(adata, SETS, layer="own", values="log", method="mean", min_genes=2)
    np.testing.assert_allclose(adata.obsm["pathways"]["a"], 2 * make().X[:, :3].toarray().mean(1), rtol=1e-5, atol=1e-6)


def test_names_in_every_spelling_and_organism():
    reference = make()
    sfm.pp.pathways(reference, SETS, min_genes=2)
    ids = list(match_genes(GENES, "mouse")["gene_id"])
    human = {name: list(match_genes(genes, "mouse", to="human")["gene_symbol"]) for name, genes in SETS.items()}
    human["none"] = ["NOPE"]
    assert human["a"] == ["GAD1", "GAD2", "SLC32A1"]
    for names, sets in (
        (ids, SETS),
        ([f"{i}.7" for i in ids], human),
        (GENES, human),
        ([g.upper() for g in GENES], human),
    ):
        adata = make(names)
        sfm.pp.pathways(adata, sets, min_genes=2, organism="mouse")
        np.testing.assert_allclose(adata.obsm["pathways"].to_numpy(), reference.obsm["pathways"].to_numpy(), atol=1e-6)
    adata = make()
    adata.var["symbol"] = adata.var_names
    adata.var_names = [f"x{i}" for i in range(adata.n_vars)]
    sfm.pp.pathways(adata, SETS, min_genes=2, gene_column="symbol")
    np.testing.assert_allclose(adata.obsm["pathways"].to_numpy(), reference.obsm["pathways"].to_numpy(), atol=1e-6)


def test_proteins_match_by_equal_names():
    adata = make(["CD45", "Ly6C", "TCR", "B220", "F4/80", "CD8a (x)"])
    sfm.pp.pathways(adata, {"T/NK": ["TCR", "CD8a (x)"]}, min_genes=2)
    assert list(adata.obsm["pathways"].columns) == ["T-NK"]
    assert adata.uns["pathways"]["n_genes"] == [2]


def test_rows_and_constants():
    adata = make()
    adata.X = sp.csr_matrix(adata.X.toarray() * (np.arange(len(GENES)) != 0))  # Gad1 is never seen
    order = np.random.default_rng(1).permutation(adata.n_obs)
    shuffled = adata[order].copy()
    for a in (adata, shuffled):
        sfm.pp.pathways(a, SETS, min_genes=2)
    assert np.isfinite(adata.obsm["pathways"].to_numpy()).all()
    np.testing.assert_allclose(
        adata.obsm["pathways"].to_numpy()[order], shuffled.obsm["pathways"].to_numpy(), atol=1e-6
    )


@pytest.mark.parametrize(
    ("collection", "organism"), [("hallmark", "human"), ("hallmark", "mouse"), ("reactome", "human")]
)
def test_bundled_collections(collection, organism, tmp_path):
    from importlib.resources import files

    text = gzip.decompress((files("spatialfm.pp") / "data" / f"{collection}_{organism}.gmt.gz").read_bytes()).decode()
    first = text.splitlines()[0].split("\t")
    genes = [g for g in dict.fromkeys(first[2:]) if g]
    adata = make([*genes, *(f"other{i}" for i in range(5))], n=10)
    sfm.pp.pathways(adata, collection, organism=organism, min_genes=len(set(genes)))
    assert first[0].replace("/", "-") in adata.obsm["pathways"]
    plain = tmp_path / "sets.gmt"
    plain.write_text(text)
    again = make([*genes, *(f"other{i}" for i in range(5))], n=10)
    sfm.pp.pathways(again, plain, organism=organism, min_genes=len(set(genes)))
    pd.testing.assert_frame_equal(adata.obsm["pathways"], again.obsm["pathways"])


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
def test_survives_files(tmp_path):
    adata = make()
    sfm.pp.pathways(adata, {"with/slash": SETS["a"], **SETS}, min_genes=2, key_added="p")
    adata.write_h5ad(tmp_path / "x.h5ad")
    adata.write_zarr(tmp_path / "x.zarr")
    for back in (ad.read_h5ad(tmp_path / "x.h5ad"), ad.read_zarr(tmp_path / "x.zarr")):
        np.testing.assert_array_equal(back.obsm["p"].to_numpy(), adata.obsm["p"].to_numpy())
        assert list(back.obsm["p"].columns) == list(adata.obsm["p"].columns) == ["with-slash", "a", "b"]
        assert list(back.uns["p"]["names"]) == ["with/slash", "a", "b"]
        assert (back.varm["p"] != adata.varm["p"]).nnz == 0


@pytest.mark.parametrize(
    ("change", "arguments", "error", "message"),
    [
        (None, {"gene_sets": "kegg"}, FileNotFoundError, "'kegg' is neither one of"),
        (None, {"gene_sets": {}}, ValueError, "gene_sets is empty"),
        (None, {"gene_sets": {1: ["Mbp"], "1": ["Mog"]}}, ValueError, "in more than one way"),
        (None, {"min_genes": 9}, ValueError, "none of the 3 gene sets has 9 features .* 'b' has most, 4 of 4"),
        (None, {"min_genes": 0}, ValueError, "min_genes must be a positive integer"),
        (None, {"method": "median"}, ValueError, "method='median' is not known"),
        (None, {"organism": "rat"}, ValueError, "organism='rat' is not known"),
        (None, {"layer": "x"}, KeyError, "layer='x'"),
        (None, {"gene_column": "x"}, KeyError, "gene_column='x'"),
        ("nan", {}, ValueError, "NaN or infinite"),
    ],
)  # fmt: skip
def test_errors_leave_adata_as_it_was(change, arguments, error, message):
    adata = make()
    if change == "nan":
        adata.X[0, 0] = np.nan
    with pytest.raises(error, match=message):
        sfm.pp.pathways(adata, **{"gene_sets": SETS, "min_genes": 2, **arguments})
    assert not adata.obsm
    assert not adata.varm
    assert not adata.uns


@pytest.mark.parametrize("text", ["only a name\n", "a\tx\tMbp\na\ty\tMog\n", b"\xff\xfe\x00"])
def test_no_gmt(text, tmp_path):
    path = tmp_path / "bad.gmt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"bad\.gmt"):
        sfm.pp.pathways(make(), path)
