"""Labels, samples, gene sets and genes may have any name that .h5ad and .zarr can hold; others are refused."""

from __future__ import annotations

from collections.abc import Mapping

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import spatialfm as sfm
from spatialfm._checks import check_name, field_names
from spatialfm.models import HEIST, HEISTConfig

ODD = ["T/NK", "T-NK", "_index", "__x", "1", "", "a\\b", ".", "zarr.json", ".zgroup", " a", "B cell"]
NOT_EMPTY = [name for name in ODD if name]


def tissue(n=360):
    rng = np.random.default_rng(0)
    kind = np.arange(n) % len(ODD)
    rate = np.exp(rng.normal(size=(len(ODD), len(ODD))))[kind] * 3
    adata = ad.AnnData(
        rng.poisson(rate).astype(np.float32),
        obs=pd.DataFrame(index=pd.Index([f"cell{k}" for k in range(n)], name="B cell")),
        var=pd.DataFrame(index=ODD),
    )
    # 1 and "1" are one label.
    adata.obs["type"] = np.array([1, *ODD], dtype=object)[np.where((kind == 4) & (rng.random(n) < 0.5), 0, kind + 1)]
    adata.obs["few"] = adata.obs["type"].astype(str).where((adata.obs["type"] != "") & (rng.random(n) < 0.7))
    slide = np.arange(n) * 4 // n
    adata.obs["slide"] = np.array(["a/b", "_index", "", "1"])[slide]
    adata.obs["condition"] = np.array(["/", "."])[slide % 2]
    adata.obs["patient"] = np.array(["a/b", "_index", "", "1"])[slide]
    adata.obsm["spatial"] = rng.random((n, 2)) * 100
    adata.obsm["X_rep"] = np.column_stack([kind, rng.normal(size=(n, 3))])
    adata.obsm["X_hibio_gene"], adata.obsm["X_hibio_image"] = rng.normal(size=(2, n, 4))
    sfm.pp.spatial_neighbors(adata, library_key="slide")
    return adata


def heist():
    torch.manual_seed(0)
    return HEIST(HEISTConfig(width=16, heads=2, layers=1, pe_dim=16)).eval()


def outcome(adata):
    rows = np.arange(adata.n_obs)
    adata.obs["sample"] = np.array(ODD)[rows % len(ODD)]
    adata.obs["response"] = np.where(rows % len(ODD) < 6, "_index", "/")
    return sfm.tl.outcome(
        adata, condition_key="response", sample_key="sample", patient_key="sample", use_rep="X_rep",
        groupby="condition", n_folds=2, n_permutations=9,
    )  # fmt: skip


CALLS = {
    "niche_composition": lambda a: sfm.tl.niche_composition(
        a, "type", sample_key="slide", condition_key="condition", groupby="type", patient_key="patient"
    ),
    "subpopulations": lambda a: sfm.tl.subpopulations(a, "type", "T/NK", use_rep="X_rep", n_permutations=9),
    "ligand_receptor": lambda a: sfm.tl.ligand_receptor(
        a, "type", pairs=[("T/NK", "T-NK"), ("_index", "__x"), (".", "a\\b")], library_key="slide",
        region_key="condition", min_fraction=0, min_edges=1, n_permutations=20,
    ),
    "annotate": lambda a: sfm.tl.annotate(a, groupby="few", use_rep="X_rep", library_key="slide"),
    "annotate_regions": lambda a: sfm.tl.annotate_regions(a, "few", use_rep="X_rep"),
    "evaluate": lambda a: sfm.tl.evaluate(a, "type", use_rep="X_rep", library_key="slide", n_bootstrap=9),
    "grn": lambda a: sfm.pp.grn(a, groupby="type"),
    "pathways": lambda a: sfm.pp.pathways(
        a, {name: [*ODD[:3], name] for name in NOT_EMPTY} | {"": ODD[:4]}, min_genes=1
    ),
    "retrieve": lambda a: sfm.tl.retrieve(a, a[:, :3], n=2),
    "impute": lambda a: sfm.tl.impute(a, ODD[:3], library_key="slide", n_folds=2),
    "attention": lambda a: sfm.tl.attention(
        a, heist(), groupby="type", condition_key="condition", library_key="slide", context_size=40, n_permutations=9
    ),
    "outcome": outcome,
}  # fmt: skip


def equal(a, b):
    """Whether two values of ``uns`` or ``obsm`` say the same; lists come back as arrays."""
    if isinstance(a, Mapping):
        return set(a) == set(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, pd.DataFrame):
        return list(a.columns) == list(b.columns) and all(equal(list(a[c]), list(b[c])) for c in a)
    if sp.issparse(a):
        return (a != b).nnz == 0
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype.kind in "OUTS" or b.dtype.kind in "OUTS":
        return a.tolist() == b.tolist()
    return a.shape == b.shape and np.array_equal(a, b, equal_nan=True)


@pytest.mark.filterwarnings("ignore:Writing zarr v2", "ignore::UserWarning")
@pytest.mark.parametrize("call", list(CALLS))
def test_results_come_back_equal(call, tmp_path):
    adata = tissue()
    adata = CALLS[call](adata) or adata
    if "type" in adata.obs:
        # No file holds a column of numbers and text.
        adata.obs["type"] = adata.obs["type"].astype(str)
    for suffix in ("h5ad", "zarr"):
        getattr(adata, f"write_{suffix}")(tmp_path / f"a.{suffix}")
        back = getattr(ad, f"read_{suffix}")(tmp_path / f"a.{suffix}")
        for field in ("obs", "obsm", "uns", "layers", "obsp"):
            then, now = getattr(adata, field), getattr(back, field)
            assert set(then) == set(now)
            for key in then:
                assert equal(then[key], now[key]), (suffix, field, key)


def test_columns_are_those_of_the_names():
    adata = tissue()
    CALLS["annotate_regions"](adata)
    table, names = adata.obsm["region_label_probabilities"], adata.uns["region_label"]["names"]
    assert sorted(names) == sorted(NOT_EMPTY)
    found = np.array(names)[table.to_numpy().argmax(axis=1)]
    unlabelled = adata.obs["few"].isna()
    assert (found == adata.obs["region_label"])[unlabelled].all()
    column = dict(zip(names, table.columns, strict=True))
    assert column["T-NK"] == "T-NK"
    assert column["T/NK"] == "T-NK-2"
    # The index of the cells is called so.
    assert column["B cell"] == "B cell-2"

    sfm.pp.pathways(adata, {"T/NK": ODD[:3], "T-NK": ODD[3:6]}, min_genes=1)
    assert adata.uns["pathways"]["names"] == ["T/NK", "T-NK"]
    assert list(adata.obsm["pathways"]) == ["T-NK-2", "T-NK"]
    with pytest.raises(ValueError, match="more than one way"):
        sfm.pp.pathways(adata, {1: ODD[:3], "1": ODD[3:6]}, min_genes=1)


@pytest.mark.parametrize(
    "labels", [ODD, ["a", "b"], ["/", "-", "-2", "\\", "\n"], ["", ".", "..", "__", "_"], ["x\ud800", "x\0", "x-"]]
)
def test_field_names(labels):
    names = field_names(labels)
    assert len(set(names)) == len(labels)
    for label, name in zip(labels, names, strict=True):
        check_name("key_added", name)
        try:
            check_name("key_added", label)
        except ValueError:
            assert name != label
        else:
            assert name == label


NEW_PANDAS = int(pd.__version__.partition(".")[0]) >= 3


@pytest.mark.parametrize(
    "bad",
    ["a\0b", pytest.param("a\ud800", marks=pytest.mark.skipif(NEW_PANDAS, reason="pandas refuses it itself"))],
)
@pytest.mark.parametrize("call", [name for name in CALLS if name != "outcome"])
def test_text_that_no_file_holds_is_refused_by_name(call, bad):
    adata = tissue()
    for column in ("type", "few"):
        adata.obs[column] = adata.obs[column].astype(object).where(adata.obs[column] != "B cell", bad)
    adata.var_names = [*ODD[:-1], bad]
    adata.obs_names = [*adata.obs_names[:-1], bad]
    before = {field: list(getattr(adata, field)) for field in ("obs", "obsm", "uns", "layers", "obsp")}
    with pytest.raises(ValueError, match=r"which \.h5ad files cannot hold"):
        CALLS[call](adata)
    assert {field: list(getattr(adata, field)) for field in before} == before
