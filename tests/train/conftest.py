"""Small slides with graphs, so that tests do not spend time on building them."""

from __future__ import annotations

import json

import pytest
import torch

import spatialfm as sfm


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """The rounding of sums depends on the number of threads, so runs that must be equal use one thread everywhere."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def with_graphs(adata):
    adata = adata.copy()
    adata.obs["kind"] = (adata.obs["celltype"].cat.codes % 3).astype(str)
    sfm.pp.spatial_neighbors(adata)
    sfm.pp.grn(adata, groupby="kind", n_genes=40)
    return adata


@pytest.fixture(scope="session")
def slide():
    """500 cells of the bundled brain."""
    return with_graphs(sfm.datasets.merfish_mouse_brain()[:500])


@pytest.fixture(scope="session")
def other_slide():
    """350 other cells with fewer genes."""
    return with_graphs(sfm.datasets.merfish_mouse_brain()[-350:, :150])


@pytest.fixture(scope="session")
def small():
    """Arguments of a model whose steps take milliseconds."""
    return {
        "config": {"width": 16, "heads": 2, "layers": 2, "pe_dim": 16},
        "context_size": 48,
        "cells_per_step": 48,
        "n_genes": 16,
        "warmup": 5,
    }


@pytest.fixture(scope="session")
def write_run(slide, small):
    """Function that writes a file for ``python -m spatialfm.train``, and its slide ``brain``, to a folder."""

    def write(folder, **arguments):
        slide.write_h5ad(folder / "brain.h5ad")
        arguments = {**small, "slides": "brain.h5ad", "out": "run", **arguments}
        config = arguments.pop("config")
        lines = [f"{key} = {json.dumps(value)}" for key, value in arguments.items()]
        lines += ["[config]", *(f"{key} = {json.dumps(value)}" for key, value in config.items())]
        path = folder / "run.toml"
        path.write_text("\n".join(lines))
        return path

    return write
