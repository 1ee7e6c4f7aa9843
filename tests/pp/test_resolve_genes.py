from __future__ import annotations

import gzip
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

import spatialfm as sfm
from spatialfm._data import _genes as module
from spatialfm._data._genes import ORGANISMS, gene_table, guess_organism, match_genes

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "src" / "spatialfm" / "pp" / "data" / "genes.npz"
HUMAN = ["GAPDH", "TP53", "TNF", "ACTB", "EPCAM", "PTPRC"]
MOUSE = ["Gapdh", "Trp53", "Tnf", "Actb", "Epcam", "Ptprc"]
PREFIX = {"human": "ENSG", "mouse": "ENSMUSG"}


def make(names, x=None, **kwargs) -> ad.AnnData:
    x = np.arange(3 * len(names), dtype=np.float32).reshape(3, -1) if x is None else x
    return ad.AnnData(
        X=x,
        obs=pd.DataFrame(index=[f"c{i}" for i in range(x.shape[0])]),
        var=pd.DataFrame(index=pd.Index(names, dtype=object)),
        **kwargs,
    )


def plain(organism):
    """The shipped table read without the package: id to symbol."""
    with np.load(SHIPPED) as stored:
        numbers = np.cumsum(stored[f"{organism}_numbers"])
        symbols = bytes(stored[f"{organism}_symbols"]).decode().split("\n")
    return {f"{PREFIX[organism]}{n:011d}": s for n, s in zip(numbers, symbols, strict=True)}


def plain_pairs():
    """Pairs (human id, mouse id): confidence."""
    human, mouse = list(plain("human")), list(plain("mouse"))
    with np.load(SHIPPED) as stored:
        return {
            (human[i], mouse[j]): int(c)
            for (i, j), c in zip(stored["orthologs"].tolist(), stored["confidence"].tolist(), strict=True)
        }


SYMBOLS = {organism: plain(organism) for organism in ORGANISMS}
IDS = {organism: list(SYMBOLS[organism]) for organism in ORGANISMS}


@pytest.mark.parametrize("organism", ORGANISMS)
def test_every_gene_of_the_table(organism):
    table = SYMBOLS[organism]
    found = match_genes(table, organism)
    assert found["gene_id"].tolist() == list(table) == found.index.tolist()
    assert found["gene_symbol"].tolist() == list(table.values())
    assert match_genes([f"{gene.lower()}.3" for gene in table], organism)["gene_id"].tolist() == list(table)

    mine = ORGANISMS.index(organism)
    has = {pair[mine] for pair in plain_pairs()}
    expected: dict[str, str] = {}
    for gene in sorted(table, key=lambda g: (g not in has, g)):
        expected.setdefault(table[gene], gene)
    found = match_genes(expected, organism)
    assert found["gene_symbol"].tolist() == list(expected)
    assert found["gene_id"].tolist() == list(expected.values())


@pytest.mark.parametrize(("organism", "to"), [("human", "mouse"), ("mouse", "human")])
def test_orthologs(organism, to):
    """The same symbol but for case, or the only confident symbol, or none."""
    partners: dict[str, list[tuple[str, int]]] = {}
    for pair, confidence in plain_pairs().items():
        gene, other = pair if organism == "human" else pair[::-1]
        partners.setdefault(gene, []).append((other, confidence))
    found = match_genes(IDS[organism], organism, to=to)
    for gene, symbol, other_id, other in zip(
        IDS[organism], SYMBOLS[organism].values(), found["gene_id"], found["gene_symbol"], strict=True
    ):
        options = partners.get(gene, [])
        alike = sorted(o for o, _ in options if SYMBOLS[to][o].upper() == symbol.upper())
        sure = sorted(o for o, confidence in options if confidence)
        if not alike and len({SYMBOLS[to][o] for o in sure}) == 1:
            alike = sure
        assert other_id == (alike[0] if alike else "")
        assert other == (SYMBOLS[to][alike[0]] if alike else "")
    assert match_genes(HUMAN, "human", to="mouse")["gene_symbol"].tolist() == MOUSE
    assert match_genes(MOUSE, "mouse", to="human")["gene_symbol"].tolist() == HUMAN


def shuffled_case(text, bits):
    return "".join(c.upper() if bits >> k & 1 else c.lower() for k, c in enumerate(text))


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(ORGANISMS),
    st.lists(
        st.tuples(
            st.integers(0, 40_000),
            st.booleans(),
            st.integers(0, 2**24),
            st.sampled_from(["", ".1", ".27", ".4_PAR_Y"]),
            st.sampled_from(["", " "]),
        ),
        max_size=20,
    ),
)
def test_decorations_change_nothing(organism, drawn):
    names, expected = [], []
    for k, by_id, bits, version, space in drawn:
        gene = IDS[organism][k]
        symbol = SYMBOLS[organism][gene]
        names.append(space + shuffled_case((gene + version) if by_id else symbol, bits) + space)
        expected.append((by_id, gene, symbol.upper()))
    found = match_genes(names, organism)
    assert found.index.tolist() == names
    for (by_id, gene, symbol), row in zip(expected, found.itertuples(index=False), strict=True):
        assert row.gene_symbol.upper() == symbol
        assert row.gene_id == gene or not by_id


def test_exact_spelling_before_any_case():
    """Mouse has both; neither hides the other."""
    assert match_genes(["MIR191", "Mir191"], "mouse")["gene_symbol"].tolist() == ["MIR191", "Mir191"]


def test_unknown_names():
    names = ["", "nothing", "ENSG00000000000", "ENSMUSG00000057666", "TP53.1", "ENSG00000141510.18x"]
    found = match_genes(names, "human")
    assert (found == "").all(axis=None)
    assert match_genes([], "mouse").shape == (0, 2)
    with pytest.raises(ValueError, match=r"organism='rat' is not known; choose from \['human', 'mouse'\]"):
        match_genes(["x"], "rat")  # type: ignore[arg-type]


@pytest.mark.parametrize("organism", ORGANISMS)
def test_guess_organism(organism):
    rng = np.random.default_rng(0)
    ids = rng.choice(IDS[organism], 200, replace=False).tolist()
    symbols = [SYMBOLS[organism][gene] for gene in ids]
    short = HUMAN if organism == "human" else MOUSE
    for names in (
        ids,
        [f"{g}.2" for g in ids],
        symbols,
        [*ids, *symbols],
        short,
        short[:1],
        [s.upper() for s in symbols],
    ):
        assert guess_organism(names) == organism
    # Half of the names are something else.
    assert guess_organism(symbols + [f"BLANK_{k}" for k in range(200)]) == organism


def test_capitals_do_not_make_a_mouse_human():
    """Names that mouse alone has outweigh the spelling of all others; a few renamed genes do not."""
    shared = [s for s in SYMBOLS["human"].values() if s.capitalize() in gene_table("mouse").by_symbol and s.isalpha()][
        :100
    ]
    mouse = [s.upper() for s in SYMBOLS["mouse"].values() if s.startswith("Gm") and s[2:].isdigit()]
    assert guess_organism(shared) == "human"
    assert guess_organism([*shared, *mouse[:9]]) == "human"
    assert guess_organism([*shared, *mouse[:10]]) == "mouse"


def test_neither_prevails():
    for names in (HUMAN + MOUSE, [n.lower() for n in ("GAPDH", "TNF", "ACTB")], IDS["human"][:50] + IDS["mouse"][:50]):
        with pytest.raises(ValueError, match=r"cannot distinguish human and mouse.*pass organism="):
            sfm.pp.resolve_genes(make(names))
    adata = make([n.lower() for n in MOUSE])
    sfm.pp.resolve_genes(adata, "mouse")
    assert adata.var["gene_symbol"].tolist() == MOUSE


@pytest.mark.parametrize(
    ("names", "looks"),
    [
        ([f"ENSDARG000000{k}" for k in range(20000, 20009)], "Ensembl ids of zebrafish"),
        ([f"ENSRNOG000000{k}.4" for k in range(20000, 20009)], "Ensembl ids of rat"),
        ([f"ENSXETG000000{k}" for k in range(20000, 20009)], "Ensembl ids of another organism"),
        ([f"ENST000003{k}.2" for k in range(20000, 20009)], "transcripts"),
        ([f"{k}_at" for k in range(1000, 1009)], "probe ids"),
        ([f"{k}_s_at" for k in range(1000, 1009)], "probe ids"),
        (["0", "1", "2", "3"], "integers"),
        ([f"chr1:{k}00-{k}99" for k in range(1, 9)], "genomic intervals"),
        ([f"GRCh38_{n}" for n in HUMAN], "genome as prefix"),
        ([f"NegPrb{k}" for k in range(9)], "control probes"),
        (["CD45", "Ly6C", "F480", "Ter119"], "unknown names"),
        (["", "x"], "unknown names"),
    ],
)
def test_too_few_matches_says_what_names_look_like(names, looks):
    adata = make(names)
    adata.var["gene_name"] = HUMAN[0]
    with pytest.raises(
        ValueError, match=rf"only 0 of {len(names)} .* look like .*{looks}.*gene_column=.*gene_name"
    ) as raised:
        sfm.pp.resolve_genes(adata)
    assert all(repr(name) in str(raised.value) for name in names[:3])
    assert list(adata.var) == ["gene_name"]
    assert not adata.uns


def test_a_third_must_match():
    names = [*HUMAN[:3], *(f"x{k}" for k in range(6))]
    sfm.pp.resolve_genes(make(names), "human")
    with pytest.raises(ValueError, match="only 3 of 10 names are genes of human"):
        sfm.pp.resolve_genes(make([*names, "x9"]), "human")
    with pytest.raises(ValueError, match="genes of mouse: pass organism='mouse'"):
        sfm.pp.resolve_genes(make(IDS["mouse"][:9]), "human")
    with pytest.raises(ValueError, match="there are no names"):
        sfm.pp.resolve_genes(make([]))


def test_bundled_tissue(messages):
    adata = sfm.datasets.merfish_mouse_brain()
    before = adata.copy()
    assert sfm.pp.resolve_genes(adata) is None
    (line,) = messages()
    assert "200 features" in line
    assert "199 matched as mouse genes" in line
    assert "1 dropped (no match: 'AC149090.1')" in line
    report = dict(adata.uns["resolve_genes"])
    assert report == {
        "organism": "mouse",
        "to": "mouse",
        "gene_column": "",
        "duplicates": "error",
        "columns": ["gene_id", "gene_symbol"],
        "n_in": 200,
        "n_matched": 199,
        "n_dropped": 1,
        "n_genes": 199,
    }
    known = adata.var["gene_id"] != ""
    assert adata.var_names[~known].tolist() == ["AC149090.1"]
    assert (adata.var["gene_symbol"] == adata.var_names)[known].all()
    assert [SYMBOLS["mouse"].get(g, "") for g in adata.var["gene_id"]] == adata.var["gene_symbol"].tolist()
    del adata.uns["resolve_genes"]
    adata.var = adata.var[[]]
    assert (adata.X != before.X).nnz == 0
    assert adata.var_names.equals(before.var_names)
    assert list(adata.uns) == [*before.uns, "spatialfm"]


def test_orthologs_of_the_bundled_tissue():
    adata = sfm.pp.resolve_genes(sfm.datasets.merfish_mouse_brain(), to="human", copy=True)
    assert adata.uns["resolve_genes"]["organism"] == "mouse"
    assert adata.uns["resolve_genes"]["to"] == "human"
    assert adata.uns["resolve_genes"]["n_matched"] == (adata.var["gene_id"] != "").sum() > 150
    assert adata.var.loc["Gad1", ["gene_id", "gene_symbol"]].tolist() == ["ENSG00000128683", "GAD1"]
    assert set(adata.var["gene_id"]) <= {"", *IDS["human"]}


def test_gene_column_key_added_and_running_again():
    adata = make([f"f{k}" for k in range(7)])
    ids = match_genes(HUMAN, "human")["gene_id"].tolist()
    adata.var["gene_ids"] = pd.Categorical([*ids, None])
    sfm.pp.resolve_genes(adata, gene_column="gene_ids")
    assert adata.var["gene_symbol"].tolist() == [*HUMAN, ""]
    assert adata.uns["resolve_genes"]["gene_column"] == "gene_ids"
    sfm.pp.resolve_genes(adata, gene_column="gene_ids", to="mouse")
    assert adata.var["gene_symbol"].tolist() == [*MOUSE, ""]
    sfm.pp.resolve_genes(adata, gene_column="gene_ids", key_added="own")
    assert adata.var["own_symbol"].tolist() == [*HUMAN, ""]
    assert adata.uns["resolve_genes"]["columns"] == ["own_id", "own_symbol"]
    with pytest.raises(KeyError, match="gene_column='absent' is not a column"):
        sfm.pp.resolve_genes(adata, gene_column="absent")


def test_foreign_columns_are_not_overwritten():
    adata = make(HUMAN)
    adata.var["gene_symbol"] = HUMAN
    for column in (None, "gene_symbol"):
        with pytest.raises(ValueError, match=r"'gene_symbol'.* (is there already|which is read)"):
            sfm.pp.resolve_genes(adata, gene_column=column)
    sfm.pp.resolve_genes(adata, gene_column="gene_symbol", key_added="resolved")
    assert adata.var["resolved_symbol"].tolist() == HUMAN
    named = make(HUMAN)
    named.var.index.name = "gene_id"
    with pytest.raises(ValueError, match="would overwrite 'gene_id', which is read"):
        sfm.pp.resolve_genes(named)


FORMS = {
    "dense": np.asarray,
    "fortran": np.asfortranarray,
    "csr": sp.csr_matrix,
    "csc": sp.csc_matrix,
    "csr_array": sp.csr_array,
}
TWICE = ["GAPDH", "x", "gapdh", "TP53", "ENSG00000111640.15", "y", "TNF", "tnf"]


def group_sums(values):
    """By hand, columns in order of first appearance."""
    values = np.asarray(values).astype(np.int64)
    return np.stack(
        [values[:, [0, 2, 4]].sum(1), values[:, 1], values[:, 3], values[:, 5], values[:, [6, 7]].sum(1)], 1
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["uint8", "int64", "uint64", "float32", "float64"])
@pytest.mark.parametrize("copy", [False, True])
def test_duplicates_are_summed(form, dtype, copy):
    values = np.random.default_rng(0).poisson(60, (5, 8)).astype(dtype)
    adata = make(TWICE, FORMS[form](values))
    adata.layers["twice"] = FORMS[form](values.astype(np.int64) * 2)
    adata.obsm["spatial"] = np.ones((5, 2))
    adata.obs["kept"] = range(5)
    adata.raw = adata.copy()
    before = adata.copy()
    out = sfm.pp.resolve_genes(adata, duplicates="sum", copy=copy)
    assert (out is None) != copy
    if copy:
        assert adata.shape == before.shape
        assert not adata.uns
        adata = out
    assert adata.var_names.tolist() == ["GAPDH", "x", "TP53", "y", "TNF"]
    assert adata.var["gene_symbol"].tolist() == ["GAPDH", "", "TP53", "", "TNF"]
    assert {k: adata.uns["resolve_genes"][k] for k in ("n_in", "n_matched", "n_dropped", "n_genes")} == {
        "n_in": 8,
        "n_matched": 6,
        "n_dropped": 2,
        "n_genes": 3,
    }
    for found, factor in ((adata.X, 1), (adata.layers["twice"], 2)):
        assert type(found) is type(before.X)
        assert np.array_equal(found.toarray() if sp.issparse(found) else found, factor * group_sums(values))
    assert adata.X.dtype == ("int64" if dtype == "uint8" else dtype)
    assert adata.raw.shape == (5, 8)
    assert "kept" in adata.obs
    assert adata.obsm["spatial"].shape == (5, 2)
    sfm.pp.resolve_genes(adata)
    assert adata.uns["resolve_genes"]["n_genes"] == 3


def test_duplicates_are_refused():
    adata = make(TWICE)
    with pytest.raises(
        ValueError,
        match=r"3 of 8 features .* 'GAPDH', 'gapdh', 'ENSG00000111640.15' are all ENSG00000111640 \(GAPDH\).*'sum'",
    ):
        sfm.pp.resolve_genes(adata)
    adata.varm["PCs"] = np.ones((8, 2))
    with pytest.raises(ValueError, match=r"varm\['PCs'\] cannot be summed"):
        sfm.pp.resolve_genes(adata, duplicates="sum")
    del adata.varm["PCs"]
    adata.layers["log"] = np.log1p(np.random.default_rng(0).poisson(2, (3, 8)).astype(np.float32))
    adata.layers["log"][0, 0] = -1
    with pytest.raises(ValueError, match=r"adata.layers\['log'\] looks like 'log' values"):
        sfm.pp.resolve_genes(adata, duplicates="sum")
    assert adata.shape == (3, 8)
    assert not adata.uns
    assert adata.var.empty
    # Where nothing repeats there is nothing to add, whatever the values are.
    single = make(HUMAN, -np.ones((3, 6), np.float32))
    single.varm["PCs"] = np.ones((6, 2))
    sfm.pp.resolve_genes(single, duplicates="sum")
    assert (single.X == -1).all()


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_names_that_repeat():
    """As the files of 10x have them."""
    adata = make(["GAPDH", "TBCE", "TBCE", "x", "x"], np.arange(10).reshape(2, 5))
    with pytest.raises(ValueError, match="'TBCE', 'TBCE' are all"):
        sfm.pp.resolve_genes(adata)
    sfm.pp.resolve_genes(adata, duplicates="sum")
    assert adata.var_names.tolist() == ["GAPDH", "TBCE", "x", "x"]
    assert adata.X.tolist() == [[0, 3, 3, 4], [5, 13, 8, 9]]


def test_ids_of_one_symbol_are_different_genes():
    ids = [gene for gene, symbol in SYMBOLS["human"].items() if symbol == "Y_RNA"][:5]
    adata = make(ids)
    sfm.pp.resolve_genes(adata)
    assert adata.var["gene_id"].tolist() == ids
    assert set(adata.var["gene_symbol"]) == {"Y_RNA"}


@pytest.mark.parametrize("names", [HUMAN, TWICE])
def test_views(names):
    whole = make([*names, "z"])
    view = whole[:2, :-1]
    sfm.pp.resolve_genes(view, duplicates="sum")
    assert not view.is_view
    assert not whole.uns
    assert whole.shape == (3, len(names) + 1)
    assert view.n_vars == (5 if names is TWICE else 6)


@pytest.mark.parametrize("names", [HUMAN, TWICE])
def test_backed(tmp_path, names):
    adata = make(names)
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    own = sfm.pp.resolve_genes(backed, duplicates="sum", copy=True)
    assert not own.isbacked
    sfm.pp.resolve_genes(adata, duplicates="sum")
    assert np.array_equal(own.X, adata.X)
    if names is TWICE:
        with pytest.raises(ValueError, match="backed mode; pass copy=True"):
            sfm.pp.resolve_genes(backed, duplicates="sum")
    else:
        sfm.pp.resolve_genes(backed)
        assert backed.var["gene_symbol"].tolist() == HUMAN
    backed.file.close()


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_round_trip(tmp_path, suffix):
    adata = sfm.datasets.merfish_mouse_brain()[:20].copy()
    sfm.pp.resolve_genes(adata)
    getattr(adata, f"write_{suffix}")(tmp_path / f"a.{suffix}")
    back = getattr(ad, f"read_{suffix}")(tmp_path / f"a.{suffix}")
    assert back.var["gene_id"].astype(str).tolist() == adata.var["gene_id"].astype(str).tolist()
    assert (back.var["gene_id"] == "").sum() == 1
    sfm.pp.resolve_genes(back.copy())
    report = back.uns["resolve_genes"]
    assert list(report.pop("columns")) == ["gene_id", "gene_symbol"]
    assert report == {k: v for k, v in adata.uns["resolve_genes"].items() if k != "columns"}


def test_bad_arguments():
    adata = make(HUMAN)
    for wrong in ({"organism": "rat"}, {"to": "auto"}, {"duplicates": "keep"}):
        with pytest.raises(ValueError, match="is not known; choose from"):
            sfm.pp.resolve_genes(adata, **wrong)


def test_no_expression_is_needed():
    adata = ad.AnnData(obs=pd.DataFrame(index=["c"]), var=pd.DataFrame(index=pd.Index(HUMAN, dtype=object)))
    sfm.pp.resolve_genes(adata)
    assert adata.X is None
    assert adata.var["gene_symbol"].tolist() == HUMAN


@pytest.fixture
def tool(load_script):
    return load_script("tools/make_gene_table.py")


def test_made_from_a_table_of_ensembl(tool, tmp_path, monkeypatch):
    rows = [
        ("mouse", "ENSMUSG00000000009", "Bb", "ENSG00000000007", "B", 0),
        ("human", "ENSG00000000007", "B", "ENSMUSG00000000009", "Bb", 1),
        ("human", "ENSG00000000003", "A-1", "", "", ""),
        ("human", "ENSG00000000004", "", "ENSMUSG00000000009", "Bb", 1),
        ("mouse", "ENSMUSG00000000002", "Aµ", "ENSG00000000004", "", 1),
    ]
    header = ["organism", "ensembl", "symbol", "ortholog_ensembl", "ortholog_symbol", "confidence"]
    text = "\n".join("\t".join(map(str, row)) for row in [header, *rows])
    (tmp_path / "genes.tsv.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "data").mkdir()
    target = tmp_path / "data" / "genes.npz"
    assert tool.make(tmp_path / "genes.tsv.gz", target) == {"human": 2, "mouse": 2, "orthologs": 1}
    first = target.read_bytes()
    tool.make(tmp_path / "genes.tsv.gz", target)
    assert target.read_bytes() == first

    monkeypatch.setattr(module, "files", lambda _: tmp_path)
    gene_table.cache_clear()
    try:
        found = match_genes(["b", "a-1", "ENSG00000000004"], "human")
        assert found["gene_id"].tolist() == ["ENSG00000000007", "ENSG00000000003", ""]
        assert match_genes(["B", "A-1"], "human", to="mouse")["gene_symbol"].tolist() == ["Bb", ""]
        assert match_genes(["aµ"], "mouse")["gene_id"].tolist() == ["ENSMUSG00000000002"]
    finally:
        gene_table.cache_clear()

    (tmp_path / "bad.tsv").write_text(
        "\n".join("\t".join(map(str, row)) for row in [header, ("human", "TP53", "TP53", "", "", "")])
    )
    with pytest.raises(ValueError, match="ids of human must be ENSG and 11 digits"):
        tool.make(tmp_path / "bad.tsv", tmp_path / "bad.npz")


def test_table_is_small_and_read_late():
    assert SHIPPED.stat().st_size < 1_500_000
    assert gene_table("human") is gene_table("human")
