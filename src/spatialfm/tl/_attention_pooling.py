"""Gated attention over the cells of a sample (Ilse, Tomczak & Welling 2018, arXiv:1802.04712)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from spatialfm.engine import torch_threads

_MEMBERS = 5  # networks, each validated on a fifth of the patients
_WIDTH = 8
_EPOCHS, _WARM_UP = 80, 20
_CELLS = 96  # of each sample, drawn anew in each epoch
_RIDGE = 5.0  # penalty on the coefficients of the classifier


class AttentionPooling(nn.Module):
    """Linear classifiers on attention-weighted means of the cells of a sample, several networks at once."""

    def __init__(self, columns: int, n_classes: int) -> None:
        super().__init__()
        self.content = nn.Parameter(torch.randn(_MEMBERS, columns, _WIDTH) / columns**0.5)
        self.gate = nn.Parameter(torch.randn(_MEMBERS, columns, _WIDTH) / columns**0.5)
        # Zeros: the mean of the cells, and coefficients of 0.
        self.weight = nn.Parameter(torch.zeros(_MEMBERS, _WIDTH))
        self.classify = nn.Parameter(torch.zeros(_MEMBERS, columns, n_classes))
        self.bias = nn.Parameter(torch.zeros(_MEMBERS, 1, n_classes))

    def forward(self, x: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (networks, samples, classes) and attention (networks, samples, cells), which sums to 1.

        ``there`` says which rows of ``x`` are cells.
        """
        cells = x.flatten(0, 1)
        hidden = torch.tanh(cells @ self.content) * torch.sigmoid(cells @ self.gate)
        raw = torch.einsum("enh,eh->en", hidden, self.weight).view(-1, *there.shape)
        attention = raw.masked_fill(~there, -torch.inf).softmax(dim=-1)
        return torch.einsum("ebc,bcd->ebd", attention, x) @ self.classify + self.bias, attention


@torch_threads(1)
def fit_attention(
    bags: list[np.ndarray], labels: np.ndarray, patients: np.ndarray, *, n_classes: int, seed: int
) -> AttentionPooling:
    """Train on samples; each patient counts the same.

    Each network is validated on a fifth of the patients, which it is not trained on, and keeps its best state.

    Parameters
    ----------
    bags
        float32 (cells, columns) of each sample.
    labels, patients
        Class and patient of each sample.
    n_classes
        Number of classes.
    seed
        Seed of the start, of the patients for validation and of the cells drawn.
    """
    rng = np.random.default_rng(seed)
    weight = 1 / np.bincount(patients)[patients]
    validation = np.zeros((_MEMBERS, len(bags)))
    for c in range(n_classes):
        for i, patient in enumerate(rng.permutation(np.unique(patients[labels == c]))):
            validation[i % _MEMBERS, patients == patient] = 1
    # The only patient of a class is used for training and validation.
    alone = np.array([len(np.unique(patients[labels == c])) == 1 for c in range(n_classes)])[labels]
    training = torch.from_numpy(np.where(alone, 1, 1 - validation) * weight).float()
    validating = torch.from_numpy(np.where(validation.any(axis=1, keepdims=True), validation, 1) * weight).float()
    training, validating = (share / share.sum(dim=1, keepdim=True) for share in (training, validating))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = AttentionPooling(bags[0].shape[1], n_classes)
    attending = [networks.content, networks.gate, networks.weight]
    deciding = {"params": [networks.classify, networks.bias], "weight_decay": 0.05}
    optimizer = torch.optim.AdamW([{"params": attending, "weight_decay": 1e-3}, deciding], lr=2e-2)
    target = torch.from_numpy(labels).repeat(_MEMBERS)
    best = [p.detach().clone() for p in networks.parameters()]
    least = running = torch.full((_MEMBERS,), torch.inf)
    for epoch in range(_EPOCHS):
        drawn = [bag[rng.integers(len(bag), size=_CELLS)] if len(bag) > _CELLS else bag for bag in bags]
        logits = networks(*_pad(drawn))[0]
        each = nn.functional.cross_entropy(logits.flatten(0, 1), target, reduction="none").view(_MEMBERS, -1)
        found = (each.detach() * validating).sum(dim=1)
        # Smoothed, as the cells drawn differ from epoch to epoch.
        running = found if epoch == 0 else 0.8 * running + 0.2 * found
        better = running < least
        least = torch.where(better, running, least)
        for kept, p in zip(best, networks.parameters(), strict=True):
            kept[better] = p.detach()[better]
        optimizer.zero_grad()
        ((each * training).sum() + _RIDGE / 2 * networks.classify.square().sum() / len(bags)).backward()
        if epoch < _WARM_UP:
            for p in attending:
                p.grad = None
        optimizer.step()
    with torch.no_grad():
        for kept, p in zip(best, networks.parameters(), strict=True):
            p.copy_(kept)
    return networks


@torch_threads(1)
@torch.no_grad()
def predict_attention(networks: AttentionPooling, bags: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Probabilities (samples, classes), float64, of the mean logits, and mean attention to the cells of each sample."""
    chance, weights = [], []
    for bag in bags:
        given, attention = networks(*_pad([bag]))
        chance.append(given.double().mean(dim=0)[0].softmax(dim=-1).numpy())
        weights.append(attention.double().mean(dim=0)[0].numpy())
    return np.array(chance), weights


def _pad(bags: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Give samples (samples, most cells, columns), padded with zeros; and which rows are cells."""
    x = np.zeros((len(bags), max(map(len, bags)), bags[0].shape[1]), np.float32)
    there = np.zeros(x.shape[:2], bool)
    for i, bag in enumerate(bags):
        x[i, : len(bag)] = bag
        there[i, : len(bag)] = True
    return torch.from_numpy(x), torch.from_numpy(there)
