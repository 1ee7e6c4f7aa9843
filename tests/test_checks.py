"""Arguments of public functions are checked against their annotations."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import spatialfm as sfm
from spatialfm._checks import ArgumentError, check_name, checked

ON_ANNDATA = [
    (module, name)
    for module in ("get", "pl", "pp", "tl")
    for name in getattr(sfm, module).__all__
    if "adata" in inspect.signature(getattr(getattr(sfm, module), name)).parameters
]


class Networked:
    """A class that is only used in an annotation."""


Method = Literal["fast", "slow"]


@checked
def example(
    adata: Any,
    n: int | None = None,
    *,
    share: float = 0.5,
    method: Method = "fast",
    at: list[str] | Networked | None = None,
    genes: str | Literal["all"] | list[str] | None = None,
    copy: bool = False,
    rng: int | np.random.Generator | None = 0,
) -> Any:
    """Return the arguments."""
    return SimpleNamespace(**locals())


@pytest.mark.parametrize(
    "given",
    [
        {"n": np.int64(3)},
        {"share": 1},
        {"share": np.float32(0.25)},
        {"share": float("inf")},
        {"method": "slow"},
        {"at": Networked()},
        {"copy": np.True_},
        {"rng": np.random.default_rng(0)},
        {"genes": "all"},
        {"genes": "one"},
    ],
)
def test_valid_arguments(given):
    found = example(None, **given)
    assert all(getattr(found, name) is value for name, value in given.items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n": 2.0}, r"n must be a whole number or None, got 2\.0 of type float"),
        ({"n": True}, r"n must be a whole number or None, got True of type bool"),
        ({"n": [1, 2]}, r"n must be a whole number or None, got \[1, 2\] of type list"),
        ({"share": "half"}, r"share must be a number, got 'half' of type str"),
        ({"share": float("nan")}, r"share must be a number, got nan of type float \(nan is not a number\)"),
        ({"method": "quick"}, r"method='quick' is not known; choose from \['fast', 'slow'\]"),
        ({"method": np.zeros(2)}, r"method must be 'fast' or 'slow', got array"),
        ({"copy": 1}, r"copy must be True or False, got 1"),
        ({"copy": "no"}, r"copy must be True or False"),
        ({"rng": "seed"}, r"rng must be a whole number, a numpy\.random\.Generator or None"),
        ({"genes": {"a": 1}}, r"genes must be 'all', text, "),
        ({"n_cells": 3}, r"example\(\): got an unexpected keyword argument 'n_cells'; it takes adata, n, share"),
    ],
)
def test_invalid_arguments(given, message):
    with pytest.raises(ArgumentError, match=message):
        example(None, **given)
    with pytest.raises(TypeError):
        example(None, **given)
    with pytest.raises(ValueError):  # noqa: PT011  it is both, whichever a caller expects
        example(None, **given)


def test_signature_and_docstring_are_kept():
    assert list(inspect.signature(example).parameters)[:2] == ["adata", "n"]
    assert example.__doc__ == "Return the arguments."


@pytest.mark.parametrize("name", ["a/b", "a\\b", "a\0", "", " ", ".", "..", "_index", "__x", "a\n", "\ud800", " a"])
def test_names_that_files_cannot_hold(name):
    with pytest.raises(ArgumentError, match="key_added="):
        check_name("key_added", name)


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize("name", ["a", "µm", "T cells (2)", "a.b", "Δ", "细胞"])
def test_names_that_files_can_hold(name, tmp_path):
    check_name("key_added", name)
    adata = ad.AnnData(np.ones((2, 1)), obs=pd.DataFrame({name: [1, 2]}, index=["x", "y"]), uns={name: {"a": 1}})
    adata.write_h5ad(tmp_path / "a.h5ad")
    adata.write_zarr(tmp_path / "a.zarr")
    for back in (ad.read_h5ad(tmp_path / "a.h5ad"), ad.read_zarr(tmp_path / "a.zarr")):
        assert list(back.obs) == [name]
        assert list(back.uns) == [name]


@pytest.mark.parametrize(("module", "name"), ON_ANNDATA)
def test_every_public_function_checks(module, name):
    """Other values instead of an AnnData are refused, naming the argument."""
    function = getattr(getattr(sfm, module), name)
    needed = [
        p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty and p.name != "adata"
    ]
    for wrong in (3, "tissue.h5ad", {"a": 1}, np.zeros((3, 2))):
        with pytest.raises(ValueError, match=r"adata must be an AnnData"):
            function(wrong, **dict.fromkeys(needed, "x"))
