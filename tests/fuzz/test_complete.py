"""The suite covers every public function, and detects faults."""

from __future__ import annotations

import inspect

import anndata as ad
import numpy as np
import pytest
from fuzzing.calls import CALLS, Call, tissue_with
from fuzzing.examine import examine
from fuzzing.leaves import changes, fingerprints
from fuzzing.oddities import SAME, apply

import spatialfm as sfm


def test_every_function_is_called():
    public = {f"{module}.{name}" for module in ("pp", "tl", "get", "pl") for name in getattr(sfm, module).__all__}
    functions = {name: getattr(getattr(sfm, name[: name.index(".")]), name.split(".")[1]) for name in public}
    functions = {
        name for name, f in functions.items() if inspect.isfunction(f) and "adata" in inspect.signature(f).parameters
    }
    assert functions == {call.name for call in CALLS.values()}


@pytest.mark.parametrize("name", SAME)
def test_layouts_differ_and_hold_the_same_numbers(name):
    plain, other = tissue_with(), apply(tissue_with(), [name])
    assert changes(fingerprints(plain), fingerprints(other)) or "raw.X" in fingerprints(other)
    x = other.X if isinstance(other, ad.AnnData) and not other.isbacked else other.to_memory().X
    x = x.compute() if hasattr(x, "dask") else x
    np.testing.assert_array_equal(x.toarray() if hasattr(x, "toarray") else np.asarray(x), plain.X.toarray())


FAULTS = {
    "changed": lambda adata: adata.obs.__setitem__("cell_type", "all"),
    "changed: X": lambda adata: adata.X.data.__imul__(2),
    "infinite": lambda adata: adata.obs.__setitem__("new", np.inf),
    "NaN": lambda adata: adata.obsm.__setitem__("new", np.full(adata.shape, np.nan)),
    "round trip": lambda adata: adata.uns.__setitem__("new", {"a": object}),
    "internal error": lambda adata: adata.obs["not there"],
    "process: numpy": lambda adata: np.random.rand(),  # noqa: NPY002
    "warning": lambda adata: np.array([1e38], "f4") * 1e38 / np.zeros(1),
    "hang": lambda adata: [None for _ in iter(int, 1)],
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_are_detected(kind, monkeypatch):
    def fault(adata: ad.AnnData, *, copy: bool = False) -> None:
        FAULTS[kind](adata)

    monkeypatch.setattr(Call, "function", property(lambda _: fault))
    found = examine(Call("pp.grn"), tissue_with(), {}, round_trip="h5ad", seconds=0.5)
    assert any(problem.startswith(kind) for problem in found.problems), found.problems
