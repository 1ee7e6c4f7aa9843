"""The linear probe that the annotating functions share."""

from __future__ import annotations

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits

from spatialfm.tl._probe import fit_probe


def test_one_thread_fits_and_the_others_come_back(monkeypatch):
    """Its small products are 80 times slower on two threads of a busy machine, and round differently."""
    from sklearn.linear_model import LogisticRegression

    def threads():
        return {entry["num_threads"] for entry in threadpool_info() if entry["user_api"] == "blas"}

    seen, fit = [], LogisticRegression.fit
    monkeypatch.setattr(LogisticRegression, "fit", lambda *args: (seen.append(threads()), fit(*args))[1])
    rng = np.random.default_rng(0)
    with threadpool_limits(2):
        before = threads()
        model = fit_probe(rng.normal(size=(60, 3)), np.arange(60) % 3, balanced=False, tol=1e-4)
        assert threads() == before
    assert seen == [{1}]
    assert model.coef_.shape == (3, 3)
