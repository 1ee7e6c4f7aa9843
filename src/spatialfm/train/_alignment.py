r"""Initialisation of HiBio: vectors of genes and weights of image features in closed form.

With F the features of the patches and T the TF-IDF profiles of the spots, both minus the means of their slides, ridge
regression predicts :math:`\hat T = F (F^\top F + \lambda I)^{-1} F^\top T`. The first right singular vectors V of
:math:`\hat T` are the directions of expression that histology predicts best (reduced-rank regression, Izenman 1975).
They are the vectors of the genes, and :math:`(F^\top F + \lambda I)^{-1} F^\top T V` are the weights of the features.
From random weights, gradient descent on a few thousand spots fits noise instead (see the research log).

The spots of a slide are always predicted from the other slides. The heads, and the estimates of how well each gene can
be predicted, are therefore learned from predictions of the quality expected on a new slide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from spatialfm.models.hibio import center

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix
    from torch import Tensor

# Ridge penalty per section, chosen by leaving one section out; 14 to 41 gave nearly the same result.
_RIDGE = 30.0
_DECODER_RIDGE = 0.1
_ITERATIONS = 4
_OVERSAMPLING = 16
_FOLDS = 4
# Genes that are scored at a time.
GENES_AT_ONCE = 2048


@dataclass
class Section:
    """The n spots of one file."""

    patches: Tensor
    """(n, p) float32 features of the patches within each radius, standardised within slides."""
    profile: csr_matrix
    """(n, genes) TF-IDF."""
    expression: csr_matrix
    """(n, genes) log-normalised."""
    slide: Tensor
    """(n,) int64."""
    measured: np.ndarray
    """(genes,) bool, whether each gene was measured."""
    contexts: list[np.ndarray]
    """Training rows, in groups of adjacent spots; empty if the section is held out."""

    @property
    def rows(self) -> np.ndarray:
        """Training rows."""
        return np.concatenate([np.zeros(0, np.int64), *self.contexts])

    @property
    def weight(self) -> float:
        """Weight of each spot. All sections have the same total weight, whatever their number of spots."""
        return 1 / max(1, len(self.rows))

    def gram(self, rows: np.ndarray) -> Tensor:
        """Weighted products of the features, (p, p)."""
        return self.weight * (self.patches[rows].T @ self.patches[rows])

    def project(self, values: csr_matrix, vectors: Tensor) -> Tensor:
        """Centre ``values`` (n, genes) within slides and multiply them by ``vectors`` (genes, k)."""
        return center(torch.from_numpy(values @ vectors.numpy()), self.slide)


@dataclass
class Alignment:
    """Result of the closed form."""

    gene_vectors: Tensor
    """(genes, d) orthonormal columns."""
    image_weights: Tensor
    """(p, d)."""
    decoder: Tensor
    """(d, genes)."""
    mean_expression: Tensor
    confidence: Tensor
    """(genes,) correlation of predicted and measured expression in slides that were left out; 0 if it is undefined."""
    image: list[Tensor]
    """(n, d) for each section: the patches around each spot, with weights fitted to the other sections."""
    genes: list[Tensor]
    """(n, d) for each section: the weighted sum of the vectors of the genes of each spot."""


def align(sections: list[Section], width: int, *, seed: int) -> Alignment:
    """Compute the closed form, with at most ``width`` directions."""
    train = [s for s in sections if s.contexts]
    n_genes = train[0].profile.shape[1]
    width = min(width, n_genes)
    folds = _folds(train)
    total = torch.zeros(train[0].patches.shape[1], train[0].patches.shape[1])
    for k, rows in folds:
        total += train[k].gram(rows)
    ridge = _RIDGE * sum(len(s.rows) * s.weight for s in train)

    factor = _factor(total, ridge)
    basis = torch.randn(n_genes, min(width + _OVERSAMPLING, n_genes), generator=torch.Generator().manual_seed(seed))
    basis = torch.linalg.qr(basis).Q
    for _ in range(_ITERATIONS):
        predicted = _predict(train, factor, [s.project(s.profile, basis) for s in train])
        # The adjoint is the same operator, because it is symmetric.
        back = _predict(train, factor, predicted)
        updates = [s.profile.T @ center(s.weight * b, s.slide).numpy() for s, b in zip(train, back, strict=True)]
        basis = torch.linalg.qr(torch.from_numpy(np.sum(updates, axis=0))).Q
    predicted = _predict(train, factor, [s.project(s.profile, basis) for s in train])
    stacked = torch.cat([p * s.weight**0.5 for p, s in zip(predicted, train, strict=True)])
    axes = torch.linalg.svd(stacked, full_matrices=False).Vh[:width].T
    vectors = basis @ axes
    # Signs are arbitrary: the gene with the largest weight is made positive.
    vectors = vectors * torch.sign(vectors.gather(0, vectors.abs().argmax(0, keepdim=True)))

    genes = [s.project(s.profile, vectors) for s in sections]
    of_train = [g for g, s in zip(genes, sections, strict=True) if s.contexts]
    shares = [train[k].weight * (train[k].patches[rows].T @ of_train[k][rows]) for k, rows in folds]
    everything = torch.stack(shares).sum(0)
    weights = torch.cholesky_solve(everything.double(), factor).float()
    image = [s.patches @ weights for s in sections]
    at_train = [x for x, s in zip(image, sections, strict=True) if s.contexts]
    for (k, rows), share in zip(folds, shares, strict=True):
        # Computed again, because one factor for each of many slides would not fit into memory.
        left = _factor(total - train[k].gram(rows), ridge)
        without = torch.cholesky_solve((everything - share).double(), left).float()
        # If there are several sections, all spots of a section are predicted from the others, also its held-out spots.
        chosen = slice(None) if len(train) > 1 else rows
        at_train[k][chosen] = train[k].patches[chosen] @ without
    decoder, confidence = _decode(train, at_train, folds)
    measured = np.stack([s.measured for s in train])
    means = np.stack([np.asarray(s.expression[s.rows].mean(axis=0)).ravel() for s in train])
    mean = (means * measured).sum(0) / np.maximum(measured.sum(0), 1)
    return Alignment(vectors, weights, decoder, torch.from_numpy(mean).float(), confidence, image, genes)


def _folds(train: list[Section]) -> list[tuple[int, np.ndarray]]:
    """Split the training rows into folds (section, rows): the sections, or quarters of the contexts of a single one."""
    if len(train) > 1:
        return [(k, s.rows) for k, s in enumerate(train)]
    contexts = train[0].contexts
    if len(contexts) < 2:
        msg = (
            "it is the only slide to train on, and too small to leave a part of it out: "
            "pass more slides, or lower context_size"
        )
        raise ValueError(msg)
    parts = np.array_split(np.arange(len(contexts)), min(_FOLDS, len(contexts)))
    return [(0, np.concatenate([contexts[i] for i in part])) for part in parts]


def _factor(gram: Tensor, ridge: float) -> Tensor:
    return torch.linalg.cholesky(gram.double() + ridge * torch.eye(len(gram), dtype=torch.float64))


def _predict(sections: list[Section], factor: Tensor, targets: list[Tensor]) -> list[Tensor]:
    """Predict the targets by ridge regression, at the training rows; other rows are zero."""
    shares = [s.weight * (s.patches[s.rows].T @ t[s.rows]) for s, t in zip(sections, targets, strict=True)]
    weights = torch.cholesky_solve(torch.stack(shares).sum(0).double(), factor).float()
    out = []
    for s, t in zip(sections, targets, strict=True):
        predicted = torch.zeros_like(t)
        predicted[s.rows] = s.patches[s.rows] @ weights
        out.append(predicted)
    return out


def _decode(train: list[Section], image: list[Tensor], folds: list[tuple[int, np.ndarray]]) -> tuple[Tensor, Tensor]:
    """Fit the expression (d, genes) of each gene to the patches, and the correlation (genes,) in folds left out."""
    n_genes, d = train[0].expression.shape[1], image[0].shape[1]
    squares, products = [], []
    for k, rows in folds:
        # Expression need not be centred, because x is.
        x, weight = image[k][rows] - image[k][rows].mean(0), train[k].weight
        squares.append(weight * (x.T @ x))
        products.append(weight * torch.from_numpy(train[k].expression[rows].T @ x.numpy()).T)
    measured = np.stack([train[k].measured for k, _ in folds])

    def solve(chosen: list[int]) -> Tensor:
        weights = torch.zeros(d, n_genes)
        # Each gene is fitted to the folds in which it was measured; elsewhere its values are zeros that mean nothing.
        patterns, of_gene = np.unique(measured[chosen], axis=1, return_inverse=True)
        for j, pattern in enumerate(patterns.T):
            used = [i for i, has in zip(chosen, pattern, strict=True) if has]
            if not used:
                continue
            genes = np.flatnonzero(of_gene.ravel() == j)
            a = torch.stack([squares[i] for i in used]).sum(0)
            b = torch.stack([products[i][:, genes] for i in used]).sum(0)
            weights[:, genes] = torch.linalg.solve(a + _DECODER_RIDGE * a.trace() / d * torch.eye(d), b)
        return weights

    correlation, counted = torch.zeros(n_genes), torch.zeros(n_genes)
    every_fold = list(range(len(folds)))
    for i, (k, rows) in enumerate(folds):
        weights = solve(every_fold[:i] + every_fold[i + 1 :])
        x = image[k][rows] - image[k][rows].mean(0)
        expression = train[k].expression[rows].tocsc()
        for start in range(0, n_genes, GENES_AT_ONCE):
            part = slice(start, start + GENES_AT_ONCE)
            predicted = x @ weights[:, part]
            actual = torch.from_numpy(expression[:, part].toarray())
            actual = actual - actual.mean(0)
            scale = (predicted.square().sum(0) * actual.square().sum(0)).sqrt()
            varies = scale > 1e-6 * len(rows)
            correlation[part] += torch.where(varies, (predicted * actual).sum(0) / scale.clamp(min=1e-12), 0.0)
            counted[part] += varies
    return solve(every_fold), correlation / counted.clamp(min=1)
