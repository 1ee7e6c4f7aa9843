"""Gated attention over the cells of a sample (Ilse, Tomczak & Welling 2018, arXiv:1802.04712)."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

_WIDTH = 32
_EPOCHS, _PATIENCE = 200, 20
_CELLS = 512  # of a sample in an epoch, drawn anew


class AttentionPooling(nn.Module):
    """One linear classifier on the attention-weighted mean of the cells of a sample."""

    def __init__(self, columns: int, n_classes: int) -> None:
        super().__init__()
        self.content = nn.Linear(columns, _WIDTH)
        self.gate = nn.Linear(columns, _WIDTH)
        self.weight = nn.Linear(_WIDTH, 1)
        self.classify = nn.Linear(columns, n_classes)
        # It starts without an opinion of any column.
        nn.init.zeros_(self.classify.weight)
        nn.init.zeros_(self.classify.bias)

    def forward(self, x: Tensor, bag: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (samples, classes) and attention (cells,) that sums to 1 in each sample; ``bag`` is the sample of each cell, from 0."""
        raw = self.weight(torch.tanh(self.content(x)) * torch.sigmoid(self.gate(x)))[:, 0]
        n = int(bag.max()) + 1
        top = raw.new_full((n,), -torch.inf).scatter_reduce(0, bag, raw.detach(), "amax")
        raw = (raw - top[bag]).exp()
        attention = raw / raw.new_zeros(n).index_add(0, bag, raw)[bag]
        pooled = x.new_zeros(n, x.shape[1]).index_add(0, bag, attention[:, None] * x)
        return self.classify(pooled), attention


def fit_attention(
    bags: list[np.ndarray], labels: np.ndarray, patients: np.ndarray, *, n_classes: int, seed: int
) -> AttentionPooling:
    """Train on samples, each patient counting the same, until a quarter of the patients that it does not learn from says stop.

    Parameters
    ----------
    bags
        float32 (cells, columns) of each sample.
    labels, patients
        Class and patient of each sample.
    n_classes
        Number of classes.
    seed
        Of the start, of the patients that say stop and of the cells drawn.
    """
    rng = np.random.default_rng(seed)
    judges: list[int] = []
    for c in range(n_classes):
        own = np.unique(patients[labels == c])
        judges += list(rng.permutation(own)[: max(1, len(own) // 4) if len(own) > 1 else 0])
    judge = np.isin(patients, judges)
    if not judge.any():
        judge[:] = True  # two patients to learn from: nobody can be spared
    learn = ~judge if not judge.all() else judge
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = AttentionPooling(bags[0].shape[1], n_classes)
    target = torch.from_numpy(labels)
    weight = torch.from_numpy(1 / np.bincount(patients)[patients]).float()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.1)

    def loss(chosen: np.ndarray) -> Tensor:
        rows = np.flatnonzero(chosen)
        drawn = [bags[i][rng.integers(len(bags[i]), size=_CELLS)] if len(bags[i]) > _CELLS else bags[i] for i in rows]
        each = nn.functional.cross_entropy(network(*_join(drawn))[0], target[rows], reduction="none")
        return (each * weight[rows]).sum() / weight[rows].sum()

    least, best, waited = np.inf, copy.deepcopy(network.state_dict()), 0
    for _ in range(_EPOCHS):
        optimizer.zero_grad()
        loss(learn).backward()
        optimizer.step()
        with torch.no_grad():
            judged = float(loss(judge))
        if judged < least:
            least, best, waited = judged, copy.deepcopy(network.state_dict()), 0
        else:
            waited += 1
            if waited == _PATIENCE:
                break
    network.load_state_dict(best)
    return network


@torch.no_grad()
def predict_attention(network: AttentionPooling, bags: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Probabilities (samples, classes) as float64, and the attention of each sample's cells, which sums to 1."""
    logits, attention = network(*_join(bags))
    parts = np.split(attention.double().numpy(), np.cumsum([len(bag) for bag in bags])[:-1])
    return logits.double().softmax(dim=1).numpy(), parts


def _join(bags: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    x = torch.from_numpy(np.concatenate(bags))
    return x, torch.from_numpy(np.repeat(np.arange(len(bags)), [len(bag) for bag in bags]))
