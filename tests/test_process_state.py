"""Calls do not change the process: random states, threads, modes, settings of other libraries."""

from __future__ import annotations

import os
import random
import warnings

import anndata as ad
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from threadpoolctl import threadpool_info

import spatialfm as sfm
from spatialfm.models import HEIST, HEISTConfig


def state():
    """Global state of the process that other code depends on."""
    return {
        "random": hash(random.getstate()),
        "numpy.random": np.random.get_state()[1].tobytes() + bytes([np.random.get_state()[2] % 256]),  # noqa: NPY002
        "torch.random": torch.random.get_rng_state().numpy().tobytes(),
        "torch threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "numpy errors": np.geterr(),
        "threadpools": {d["filepath"]: d["num_threads"] for d in threadpool_info()},
        "matplotlib": dict(mpl.rcParams),
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
    }


@pytest.fixture(scope="module")
def adata():
    rng = np.random.default_rng(0)
    kind = rng.integers(3, size=240)
    adata = ad.AnnData(
        rng.poisson(1 + 4 * (kind[:, None] == np.arange(24) % 3)).astype(np.float32),
        obs=pd.DataFrame({"type": [f"t{k}" for k in kind], "slide": np.repeat(["a", "b"], 120)}).rename(index=str),
        obsm={"spatial": rng.uniform(0, 100, (240, 2))},
    )
    adata.obs["some"] = adata.obs["type"].where(np.arange(240) % 2 == 0)
    sfm.tl.embed(adata, library_key="slide")
    return adata


SMALL = HEIST(HEISTConfig(width=16, heads=2, layers=1, pe_dim=16))
CALLS = {
    "embed": lambda a: sfm.tl.embed(a, library_key="slide"),
    "embed, published": lambda a: sfm.tl.embed(a, SMALL, library_key="slide", groupby=None, key_added="published"),
    "embed, from a file": lambda a: sfm.models.load("hibio"),
    "tower": lambda a: sfm.models.load_tower(),
    "domains": lambda a: sfm.tl.domains(a, 3, library_key="slide"),
    "domains, leiden": lambda a: sfm.tl.domains(a, library_key="slide", key_added="found"),
    "annotate": lambda a: sfm.tl.annotate(a, groupby="some", library_key="slide"),
    "annotate, fine-tuned": lambda a: sfm.tl.annotate(
        a, groupby="some", library_key="slide", method="fine_tune", n_folds=2, key_added="tuned"
    ),
    "evaluate": lambda a: sfm.tl.evaluate(a, "type", library_key="slide", n_bootstrap=10, baselines=["majority"]),
    "impute": lambda a: sfm.tl.impute(a, ["0"], library_key="slide", method="fine_tune", n_folds=2),
    "spatial": lambda a: sfm.pl.spatial(a, "type", library_key="slide"),
    "embedding_blocks": lambda a: sfm.pl.embedding_blocks(a, "type"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_does_not_change_the_process(name, adata):
    """Tested on the second call, because the first imports libraries, which set variables and filters."""
    before = torch.get_num_threads()
    try:
        CALLS[name](adata.copy())
        # A state that no code sets by chance.
        torch.set_num_threads(3)
        torch.manual_seed(11)
        expected = state()
        CALLS[name](adata.copy())
        found = state()
    finally:
        torch.set_num_threads(before)
    assert [key for key in expected if expected[key] != found[key]] == []


def test_a_call_that_fails_does_not_change_the_process(adata):
    wrong = adata.copy()
    wrong.X[3, 3] = np.nan
    expected = state()
    with pytest.raises(ValueError, match=r"NaN|finite"):
        sfm.tl.embed(wrong, library_key="slide")
    assert [key for key, value in state().items() if expected[key] != value] == []
