"""The objectives of HEIST compared with plain formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spatialfm.train import _objectives as objectives


def test_info_nce_is_its_formula():
    torch.manual_seed(0)
    a, b = torch.randn(6, 5), torch.randn(6, 5)
    positive, negative = torch.rand(6, 6) < 0.4, torch.rand(6, 6) < 0.4
    negative &= ~positive
    positive[2] = False
    total = []
    for i in range(6):
        s = [float(torch.cosine_similarity(a[i], b[j], dim=0)) / objectives.TEMPERATURE for j in range(6)]
        plus, minus = (sum(np.exp(s[j]) for j in range(6) if pairs[i, j]) for pairs in (positive, negative))
        if plus and minus:
            total.append(-np.log(plus / (plus + minus)))
    assert float(objectives.info_nce(a, b, positive, negative)) == pytest.approx(np.mean(total), rel=1e-5)
    assert float(objectives.info_nce(a, b, torch.zeros_like(positive), negative)) == 0


def test_orthogonal_is_mean_squared_correlation():
    z = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    z[:, 1] += z[:, 0]
    r = np.corrcoef(z.numpy().T)
    assert float(objectives.orthogonal(z)) == pytest.approx((r[~np.eye(4, dtype=bool)] ** 2).mean(), rel=1e-4)


def test_contrastive_compares_neighbours_of_one_context_only():
    """Cells beyond the radius or in another context have no influence; similar cells of two groups have a loss."""
    generator = torch.Generator().manual_seed(0)
    none = torch.zeros(2, 0, dtype=torch.long)
    xy = torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1], [50, 50], [0, 0]])
    group, context = torch.tensor([0, 0, 1, 1, 1, 1]), torch.tensor([0, 0, 0, 0, 0, 1])
    x = torch.rand(6, 3)
    augmented = torch.full_like(xy, torch.nan)  # augmented coordinates are not used
    batch = objectives.MaskableBatch(
        augmented, none, x, [none], group, context, shown=x, position=xy, radius=2.0, scale=1.0
    )
    h, g = torch.randn(6, 4, generator=generator), torch.randn(6, 3, 4, generator=generator)
    genes = torch.arange(3)
    loss = objectives.contrastive(h, g, batch, genes)
    away = h.clone()
    away[4:] = torch.randn(2, 4, generator=generator)
    torch.testing.assert_close(objectives.contrastive(away, g, batch, genes), loss)
    mixed, sorted_out = h.clone(), h.clone()
    mixed[:4] = h[0]
    sorted_out[:2], sorted_out[2:4] = h[0], -h[0]
    assert objectives.contrastive(mixed, g, batch, genes) > objectives.contrastive(sorted_out, g, batch, genes)


def test_a_share_of_cells_and_of_expressed_genes_is_masked():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(400, 30, generator=generator) * (torch.rand(400, 30, generator=generator) < 0.5)
    none = torch.zeros(2, 0, dtype=torch.long)
    zeros = torch.zeros(400, dtype=torch.long)
    xy, shown = torch.randn(400, 2), x * (torch.rand(400, 30, generator=generator) < 0.8)
    batch = objectives.MaskableBatch(xy, none, x, [none], zeros, zeros, shown=shown, position=xy, radius=1.0, scale=1.0)
    masked = objectives.mask_batch(batch, 0.2, generator)
    assert 0.12 < masked.cells.float().mean() < 0.28
    assert not (masked.entries & (x == 0)).any()
    assert 0.17 < masked.entries.sum() / (x != 0).sum() < 0.23
    assert (masked.coords[masked.cells] == 0).all()
    assert (masked.expression[masked.entries] == 0).all()
    torch.testing.assert_close(masked.expression[~masked.entries], shown[~masked.entries])
