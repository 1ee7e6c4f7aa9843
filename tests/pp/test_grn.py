from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spatialfm.pp._grn import mutual_information_network

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("name", ["mi_bins32", "mi_bins16_constgene"])
def test_reference_mutual_information(name):
    ref = np.load(DATA / f"{name}.npz")
    mi = mutual_information_network(ref["X"], n_bins=int(ref["bins"]), n_candidates=None, edge_fraction=1.0).toarray()
    np.testing.assert_allclose(mi[ref["i"], ref["j"]], ref["mi"], atol=1e-5)


def test_reference_edges():
    ref = np.load(DATA / "grn_topk200.npz")
    network = mutual_information_network(ref["X"], n_bins=32, n_candidates=200, edge_fraction=0.25).tocoo()
    found = {(i, j) for i, j in zip(network.row, network.col, strict=True) if i < j}
    assert found == {tuple(e) for e in ref["edges"].tolist()}
    np.testing.assert_allclose(network.toarray()[tuple(ref["edges"].T)], ref["weights"], atol=1e-5)
