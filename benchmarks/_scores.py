"""How well an embedding agrees with experts' labels, as the benchmarks measure it.

Labels of fewer than 20 cells and undetermined ones are left out. Beyond 20,000 cells, a fixed sample is scored; all
cells were embedded.

``F1``
    Macro F1 of a logistic regression on the embedding, across spatial blocks, or slides where there are several.
``NMI``, ``ARI``
    k-means with the true number of labels on the embedding as it is, mean of five seeds.
``ARIg``
    A Gaussian mixture with one covariance, on at most 20 principal components of the embedding, mean of three seeds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, f1_score, normalized_mutual_info_score
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler

from spatialfm._data._splits import spatial_blocks

if TYPE_CHECKING:
    import pandas as pd

METRICS = ("F1", "NMI", "ARI", "ARIg")
NOT_LABELS = ["", "nan", "NA", "unknown", "undetermined"]
MIN_CELLS = 20
MAX_CELLS = 20_000
FOLDS = 4


def labelled(labels: pd.Series, max_cells: int | None = MAX_CELLS) -> np.ndarray:
    """Find the rows whose labels count."""
    names = labels.astype(str)
    common = names.map(names.value_counts()).to_numpy() >= MIN_CELLS
    rows = np.flatnonzero(common & labels.notna().to_numpy() & ~names.isin(NOT_LABELS).to_numpy())
    if max_cells is not None and len(rows) > max_cells:
        rows = np.sort(np.random.default_rng(0).choice(rows, max_cells, replace=False))
    return rows


def kmeans(z: np.ndarray, k: int) -> list[np.ndarray]:
    """Cluster by k-means, five seeds."""
    return [KMeans(k, n_init=3, random_state=seed).fit_predict(z) for seed in range(5)]


def mixtures(z: np.ndarray, k: int) -> list[np.ndarray]:
    """Cluster by a Gaussian mixture with one covariance, three seeds."""
    reduced = PCA(min(20, z.shape[1], len(z) - 1), random_state=0).fit_transform(z)
    return [
        GaussianMixture(k, covariance_type="tied", n_init=2, reg_covar=1e-5, random_state=seed).fit_predict(reduced)
        for seed in range(3)
    ]


def probe_f1(z: np.ndarray, y: np.ndarray, groups: np.ndarray) -> float:
    """Macro F1 of out-of-fold predictions, no group in two folds."""
    predicted = np.empty_like(y)
    for train, test in GroupKFold(min(FOLDS, len(np.unique(groups)))).split(z, y, groups):
        scaler = StandardScaler().fit(z[train])
        model = LogisticRegression(C=0.1, max_iter=400).fit(scaler.transform(z[train]), y[train])
        predicted[test] = model.predict(scaler.transform(z[test]))
    return float(f1_score(y, predicted, average="macro"))


def scores(z: np.ndarray, labels: pd.Series, xy: np.ndarray, slides: pd.Series | None = None) -> dict[str, float]:
    """Score an embedding, rows as in ``labels``, by all metrics."""
    rows = labelled(labels)
    z, y = np.asarray(z)[rows].astype(np.float64), labels.astype(str).to_numpy()[rows]
    if slides is not None and slides.nunique() >= 2:
        groups = slides.astype("category").cat.codes.to_numpy()[rows]
    else:
        groups = spatial_blocks(np.asarray(xy)[rows], np.zeros(len(rows), int))
    k = len(np.unique(y))
    found = kmeans(z, k)
    return {
        "F1": probe_f1(z, y, groups),
        "NMI": float(np.mean([normalized_mutual_info_score(y, c) for c in found])),
        "ARI": float(np.mean([adjusted_rand_score(y, c) for c in found])),
        "ARIg": float(np.mean([adjusted_rand_score(y, c) for c in mixtures(z, k)])),
    }
