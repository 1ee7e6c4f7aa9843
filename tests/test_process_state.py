"""Calls leave the process as it was: random states, threads, modes, settings of other libraries."""

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
    """What other code of the process can see."""
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
def test_a_call_leaves_the_process_as_it_was(name, adata):
    """The second call: libraries that are imported for the first time set variables and filters of their own."""
    before = torch.get_num_threads()
    try:
        CALLS[name](adata.copy())
        # A state that nobody sets by chance.
        torch.set_num_threads(3)
        torch.manual_seed(11)
        own = state()
        CALLS[name](adata.copy())
        found = state()
    finally:
        torch.set_num_threads(before)
    assert [key for key in own if own[key] != found[key]] == []


def test_also_where_a_call_fails(adata):
    wrong = adata.copy()
    wrong.X[3, 3] = np.nan
    own = state()
    with pytest.raises(ValueError, match=r"NaN|finite"):
        sfm.tl.embed(wrong, library_key="slide")
    assert [key for key, value in state().items() if own[key] != value] == []
