"""What a function writes never replaces what it did not write."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import spatialfm as sfm
from spatialfm._data._write import REGISTER, adopt, check_free, record_params, write

KEYS = {"obs": ["kind"], "uns": ["kind"]}


def tissue(n=30, g=8):
    rng = np.random.default_rng(0)
    adata = ad.AnnData(rng.poisson(3, (n, g)).astype(np.float32), obsm={"spatial": rng.uniform(0, 9, (n, 2))})
    adata.obs_names = [f"cell{i}" for i in range(n)]
    return adata


def fields(labels=("a", "b")):
    return {
        "obs": {"kind": pd.Categorical(np.resize(list(labels), 30))},
        "obsm": {"X_kind": np.zeros((30, 3), np.float32)},
        "obsp": {"kind": sp.eye(30, format="csr")},
        "layers": {"kind": np.zeros((30, 8))},
        "varm": {"kind": np.zeros((8, 2))},
        "var": {"kind": np.arange(8.0)},
        "uns": {"kind": {"params": {"n": 3}}},
    }


def written():
    adata = tissue()
    write(adata, "tl.one", "kind", fields(), copy=False)
    return adata


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize(
    "through",
    [
        lambda a, _: a,
        lambda a, _: a.copy(),
        lambda a, _: a[5:20].copy(),
        lambda a, _: a[a.obs["kind"] == "a"].copy(),
        lambda a, p: a.write_h5ad(p / "a.h5ad") or ad.read_h5ad(p / "a.h5ad"),
        lambda a, p: a.write_zarr(p / "a.zarr") or ad.read_zarr(p / "a.zarr"),
        lambda a, _: ad.concat([a[:15], a[15:]], merge="same", uns_merge="same", pairwise=True),
    ],
    ids=["itself", "copy", "subset", "one label", "h5ad", "zarr", "concat"],
)
def test_own_fields_may_be_replaced(through, tmp_path):
    adata = through(written(), tmp_path)
    new = {"obs": {"kind": pd.Categorical(np.resize(["c"], adata.n_obs))}, "uns": {"kind": {"params": {"n": 4}}}}
    write(adata, "tl.one", "kind", new, copy=False)
    assert set(adata.obs["kind"]) == {"c"}
    assert adata.uns["kind"]["params"]["n"] == 4
    # What the earlier call wrote beside is gone, and so is what the register said of it.
    assert "X_kind" not in adata.obsm
    assert "kind" not in adata.layers
    assert "kind" not in adata.obsp
    register = adata.uns[REGISTER]["written"]
    assert [field for field in register if register[field]] == ["obs", "uns"]


@pytest.mark.parametrize("field", list(fields()))
def test_fields_of_the_user_are_refused(field):
    adata = tissue()
    for key, value in fields()[field].items():
        getattr(adata, field)[key] = value
    before = adata.copy()
    with pytest.raises(
        ValueError, match=rf"{field}\['\w+'\] is there already, and sfm\.tl\.one did not write it.*key_added="
    ):
        write(adata, "tl.one", "kind", fields(), copy=False)
    assert str(adata) == str(before)
    assert REGISTER not in adata.uns


def test_fields_of_another_function_are_refused():
    with pytest.raises(ValueError, match=r"obs\['kind'\] was written by sfm\.tl\.one; .* del adata\.obs\['kind'\]"):
        check_free(written(), "tl.two", KEYS)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.rename_categories("kind", ["x", "y"]),
        lambda a: a.obs.__setitem__("kind", "by hand"),
        lambda a: a.obs.__setitem__("kind", np.arange(30)),
        lambda a: a.obs.__setitem__("kind", pd.Categorical(np.resize(["a", "c"], 30))),
    ],
    ids=["renamed", "text", "numbers", "another label"],
)
def test_fields_that_the_user_changed_are_refused(change):
    adata = written()
    change(adata)
    with pytest.raises(ValueError, match=r"obs\['kind'\] was changed after sfm\.tl\.one wrote it"):
        check_free(adata, "tl.one", KEYS)
    # What else stands under the name is not deleted with it.
    del adata.obs["kind"]
    check_free(adata, "tl.one", KEYS)


def test_other_shape_of_a_matrix_is_a_change():
    adata = written()
    adata.obsm["X_kind"] = np.zeros((30, 5))
    with pytest.raises(ValueError, match=r"obsm\['X_kind'\] was changed"):
        check_free(adata, "tl.one", {"obsm": ["X_kind"]})
    # It stays when the call writes under this name without it.
    write(adata, "tl.one", "kind", {"uns": {"kind": {}}}, copy=False)
    assert adata.obsm["X_kind"].shape == (30, 5)


def test_copy_and_its_original_have_registers_of_their_own():
    adata = tissue()
    copied = write(adata, "tl.one", "kind", fields(), copy=True)
    assert REGISTER not in adata.uns
    again = write(copied, "tl.one", "other", {"obs": {"other": np.arange(30)}}, copy=True)
    assert "other" in again.uns[REGISTER]["written"]["obs"]
    assert "other" not in copied.uns[REGISTER]["written"]["obs"]


def test_adopted_fields_keep_their_author():
    adata, carrier = tissue(), written()
    adopt(adata, carrier, {"obs": ["kind"]})
    with pytest.raises(ValueError, match=r"written by sfm\.tl\.one"):
        check_free(adata, "tl.two", KEYS)
    check_free(adata, "tl.one", KEYS)


def test_register_of_another_kind_is_refused():
    adata = tissue()
    adata.uns[REGISTER] = 3
    with pytest.raises(ValueError, match=r"uns\['spatialfm'\] holds int"):
        write(adata, "tl.one", "kind", fields(), copy=False)
    assert adata.uns[REGISTER] == 3


@pytest.mark.parametrize("register", [{"written": []}, {"written": {"obs": 2}}, {"mine": 1}])
def test_strange_register(register):
    """Somebody else's field of this name does not stop a call, and stays."""
    adata = tissue()
    adata.uns[REGISTER] = register
    write(adata, "tl.one", "kind", fields(), copy=False)
    assert "kind" in adata.uns[REGISTER]["written"]["obs"]
    if register == {"mine": 1}:
        assert adata.uns[REGISTER]["mine"] == 1


def user_fields(adata):
    """Everything that the functions below write by default, held by the user."""
    n, g = adata.shape
    for key in (
        "domain",
        "annotation",
        "subpopulation",
        "grn_group",
        "tissue_region",
        "tissue_region_1",
        "annotation_probability",
    ):
        adata.obs[key] = "by hand"
    for key in ("imputed", "tfidf"):
        adata.layers[key] = np.full((n, g), 7.0)
    for key in ("X_niche", "X_heist", "X_state", "pathways", "annotation_probabilities"):
        adata.obsm[key] = np.full((n, 2), 7.0)
    for key in ("spatial_connectivities", "attention"):
        adata.obsp[key] = sp.eye(n, format="csr")
    for key in ("evaluation", "ligand_receptor", "niche_composition", "fine_tune", "resolve_genes"):
        adata.uns[key] = "by hand"
    adata.var["gene_id"] = adata.var["tfidf_idf"] = "by hand"


CALLS = {
    "embed": lambda a: sfm.tl.embed(a),
    "embed heist": lambda a: sfm.tl.embed(a, "heist"),
    "domains": lambda a: sfm.tl.domains(a, 2, use_rep="X_mine"),
    "annotate": lambda a: sfm.tl.annotate(a, groupby="half", use_rep="X_mine"),
    "annotate_regions": lambda a: sfm.tl.annotate_regions(a, "half", use_rep="X_mine", key_added="annotation"),
    "subpopulations": lambda a: sfm.tl.subpopulations(a, "type", "a", use_rep="X_mine", n_clusters=2),
    "impute": lambda a: sfm.tl.impute(a, [a.var_names[0]]),
    "evaluate": lambda a: sfm.tl.evaluate(a, "type", use_rep="X_mine"),
    "ligand_receptor": lambda a: sfm.tl.ligand_receptor(a, "type"),
    "niche_composition": lambda a: sfm.tl.niche_composition(a, "type"),
    "attention": lambda a: sfm.tl.attention(a, groupby="type"),
    "fine_tune": lambda a: sfm.tl.fine_tune(a, max_steps=1),
    "spatial_neighbors": lambda a: sfm.pp.spatial_neighbors(a),
    "grn": lambda a: sfm.pp.grn(a),
    "regions": lambda a: sfm.pp.regions(a, size=5, use_rep=None),
    "tfidf": lambda a: sfm.pp.tfidf(a),
    "pathways": lambda a: sfm.pp.pathways(a, {"set": list(a.var_names)}),
    "resolve_genes": lambda a: sfm.pp.resolve_genes(a),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_function_refuses_before_it_works(call):
    adata = tissue(60)
    adata.obs["type"] = np.resize(["a", "b"], 60)
    adata.obs["half"] = pd.Series(np.resize(["a", "b", None], 60), index=adata.obs_names)
    adata.obsm["X_mine"] = np.random.default_rng(1).normal(size=(60, 4))
    user_fields(adata)
    before = adata.copy()
    with pytest.raises(ValueError, match=r"is there already, and sfm\.\w+\.\w+ did not write it"):
        CALLS[call](adata)
    assert str(adata) == str(before)
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    for key in ("imputed", "tfidf"):
        assert (adata.layers[key] == 7).all()


def test_params_are_what_a_file_can_hold():
    found = record_params(
        a=None, b=np.int64(3), c=np.float32(0.5), d=("x", "y"), e=np.random.default_rng(0), f=Path("m/w"), g=True
    )
    assert found == {"a": "", "b": 3, "c": 0.5, "d": ["x", "y"], "e": "generator", "f": str(Path("m/w")), "g": True}
    assert (type(found["b"]), type(found["c"])) == (int, float)
