"""Fixtures shared by all tests."""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path

import anndata as ad
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import spatialfm as sfm

mpl.use("Agg")


@pytest.fixture(autouse=True)
def _quiet():
    with sfm.settings.override(progress=False):
        yield


@pytest.fixture
def messages(caplog):
    """Function that returns the messages that spatialfm has logged in this test so far, as a list of str."""
    logger = logging.getLogger("spatialfm")
    logger.addHandler(caplog.handler)
    yield lambda: [record.getMessage() for record in caplog.records]
    logger.removeHandler(caplog.handler)


@pytest.fixture(scope="session")
def load_script():
    """Function that imports a script by its path from the root of the project; it may import scripts beside it."""

    def load(path: str):
        file = Path(__file__).parents[1] / path
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(file.parent))
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(file.parent))
        return module

    return load


@pytest.fixture(scope="session")
def make_spots():
    """Function that makes a slide of spots.

    Genes of four Hallmark sets and the image features follow the same four smooth patterns.
    """
    from spatialfm.pp._pathways import read_sets

    sets = list(read_sets("hallmark", "human")[0].values())[:4]
    chosen: list[str] = []
    for genes in sets:
        chosen += [g for g in genes if g not in chosen][:15]
    loadings = np.kron(np.eye(4), np.ones((1, 15))) + np.random.default_rng(0).normal(0, 0.3, (4, 60))
    mixing = np.random.default_rng(1).normal(size=(4, 40))

    def make(seed, n=150, name="s"):
        rng = np.random.default_rng(seed)
        side = int(np.ceil(n**0.5))
        grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=2).reshape(-1, 2)[:n] * 100.0
        xy = grid + rng.normal(0, 5, grid.shape)
        waves = xy @ rng.normal(0, 5 / (100 * side), (2, 4)) + rng.uniform(0, 2 * np.pi, 4)
        factors = np.sin(waves)
        depth = np.exp(rng.normal(0, 0.2, (n, 1)))
        counts = rng.poisson(4 * depth * np.exp(0.8 * factors @ loadings))
        features = factors @ mixing + rng.normal(0, 0.5, (n, 40))
        adata = ad.AnnData(
            sp.csr_matrix(counts.astype(np.float32)),
            obs=pd.DataFrame({"slide": name}, index=[f"{name}{i}" for i in range(n)]),
            var=pd.DataFrame(index=chosen),
        )
        adata.obsm["spatial"] = xy
        # Each slide has its own scanner and stain.
        adata.obsm["image_features"] = (features * rng.uniform(0.5, 2, 40) + rng.normal(0, 3, 40)).astype(np.float32)
        adata.obs["dominant"] = factors.argmax(1).astype(str)
        return adata

    return make
