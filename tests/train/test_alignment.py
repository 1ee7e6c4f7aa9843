"""The closed form compared with dense linear algebra in numpy, in double precision."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from spatialfm.train import _alignment
from spatialfm.train._alignment import Section, align

RIDGE, DECODER_RIDGE = 30.0, 0.1
G, P, WIDTH = 26, 9, 4


def make(n, seed, *, held_out=False, slides=1):
    """Spots whose profiles depend on three of their nine image features."""
    rng = np.random.default_rng(seed)
    pattern = np.random.default_rng(0).normal(size=(3, G))
    patches = rng.normal(size=(n, P)) * 4
    profile = np.maximum(patches[:, :3] @ pattern * 0.3 + rng.normal(0, 0.3, (n, G)) + 0.2, 0)
    expression = np.maximum(patches[:, :3] @ pattern + rng.normal(size=(n, G)) + 2, 0)
    rows = rng.permutation(n)
    # Ten spots are held out.
    contexts = [] if held_out else np.array_split(rows[: n - 10], 5)
    return Section(
        patches=torch.from_numpy(patches).float(),
        profile=sp.csr_matrix(profile.astype(np.float32)),
        expression=sp.csr_matrix(expression.astype(np.float32)),
        slide=torch.from_numpy(np.arange(n) % slides),
        measured=np.ones(G, bool),
        contexts=[np.sort(c) for c in contexts],
    )


@pytest.fixture(scope="module")
def sections():
    return [make(120, 1), make(80, 2, slides=2), make(60, 3), make(50, 4, held_out=True)]


def dense(section):
    """Features and centred profile of all spots, in double precision."""
    t = section.profile.toarray().astype(float)
    for k in range(int(section.slide.max()) + 1):
        here = section.slide.numpy() == k
        t[here] -= t[here].mean(0)
    return section.patches.numpy().astype(float), t


def ridge(parts, ridge_of=None):
    """Weights from (features, targets, weight of a spot) of each part; penalty as for ``ridge_of``, if given."""
    strength = RIDGE * sum(len(f) * w for f, _, w in ridge_of or parts)
    gram = sum(w * f.T @ f for f, _, w in parts) + strength * np.eye(P)
    return np.linalg.solve(gram, sum(w * f.T @ t for f, t, w in parts))


def training_rows(sections):
    """Features, centred profile and weight of a spot of each section, at the training rows."""
    out = []
    for s in sections:
        if s.contexts:
            f, t = dense(s)
            out.append((f[s.rows], t[s.rows], 1 / len(s.rows)))
    return out


def subspace(a, b):
    """Cosine of the largest angle between the spaces of the columns."""
    return np.linalg.svd(np.linalg.qr(a)[0].T @ np.linalg.qr(b)[0])[1].min()


def test_is_reduced_rank_regression(sections):
    found = align(sections, WIDTH, seed=0)
    parts = training_rows(sections)
    weights = ridge(parts)
    stacked = np.vstack([w**0.5 * f @ weights for f, _, w in parts])
    expected = np.linalg.svd(stacked)[2][:WIDTH].T
    vectors = found.gene_vectors.numpy()
    assert vectors.shape == (G, WIDTH)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(WIDTH), atol=1e-5)
    # The columns themselves are equal, not only their space: largest first, the gene with the largest weight positive.
    expected *= np.sign(expected[np.abs(expected).argmax(0), np.arange(WIDTH)])
    np.testing.assert_allclose(vectors, expected, atol=2e-4)
    np.testing.assert_allclose(found.image_weights.numpy(), weights @ vectors, atol=1e-5)
    for s, genes in zip(sections, found.genes, strict=True):
        np.testing.assert_allclose(genes.numpy(), dense(s)[1] @ vectors, atol=1e-4)


def test_iterations_find_the_space_among_many_genes(monkeypatch):
    """With fewer columns than genes, subspace iteration replaces the decomposition."""
    monkeypatch.setattr(_alignment, "_OVERSAMPLING", 2)
    sections = [make(120, 1), make(80, 2)]
    parts = training_rows(sections)
    weights = ridge(parts)
    expected = np.linalg.svd(np.vstack([w**0.5 * f @ weights for f, _, w in parts]))[2][:3].T
    assert subspace(align(sections, 3, seed=0).gene_vectors.numpy(), expected) > 0.9999


def test_a_slide_is_predicted_from_the_others(sections):
    found = align(sections, WIDTH, seed=0)
    vectors = found.gene_vectors.numpy()
    parts = training_rows(sections)
    for k in range(3):
        others = parts[:k] + parts[k + 1 :]
        expected = dense(sections[k])[0] @ ridge(others, parts) @ vectors
        np.testing.assert_allclose(found.image[k].numpy(), expected, atol=1e-4)
    expected = dense(sections[3])[0] @ ridge(parts) @ vectors
    np.testing.assert_allclose(found.image[3].numpy(), expected, atol=1e-4)


def test_parts_of_a_single_slide_are_predicted_from_each_other():
    section = make(130, 5)
    found = align([section, make(40, 6, held_out=True)], WIDTH, seed=0)
    f, t = dense(section)
    w = len(section.rows) ** -0.5
    everything = [(f[section.rows], t[section.rows], w)]
    vectors = found.gene_vectors.numpy()
    # Five contexts in four parts.
    parts = [np.concatenate(section.contexts[:2]), *section.contexts[2:]]
    for part in parts:
        rest = np.setdiff1d(section.rows, part)
        expected = f[part] @ ridge([(f[rest], t[rest], w)], everything) @ vectors
        np.testing.assert_allclose(found.image[0].numpy()[part], expected, atol=1e-4)
    unseen = np.setdiff1d(np.arange(130), section.rows)
    np.testing.assert_allclose(found.image[0].numpy()[unseen], f[unseen] @ ridge(everything) @ vectors, atol=1e-4)
    assert found.confidence.mean() > 0.5
    one = replace(section, contexts=section.contexts[:1])
    with pytest.raises(
        ValueError, match="too small to leave a part of it out: pass more slides, or lower context_size"
    ):
        align([one], WIDTH, seed=0)


def decoders(sections, images, genes):
    """Weights for each gene from the sections that measured it, by hand."""
    out = np.zeros((WIDTH, G))
    for g in genes:
        a, b = np.zeros((WIDTH, WIDTH)), np.zeros(WIDTH)
        for s, x in zip(sections, images, strict=True):
            if s.measured[g]:
                x, y = x[s.rows], s.expression.toarray().astype(float)[s.rows, g]
                x = x - x.mean(0)
                a += 1 / len(s.rows) * x.T @ x
                b += 1 / len(s.rows) * x.T @ (y - y.mean())
        if a.any():
            out[:, g] = np.linalg.solve(a + DECODER_RIDGE * np.trace(a) / WIDTH * np.eye(WIDTH), b)
    return out


@pytest.mark.parametrize("at_once", [2048, 7])
@pytest.mark.parametrize("panels", ["same", "different"])
def test_decoder_and_confidence(sections, panels, at_once, monkeypatch):
    monkeypatch.setattr(_alignment, "GENES_AT_ONCE", at_once)
    if panels == "different":
        # A gene that only one section has, and genes that one section lacks.
        lacks = [np.arange(6), np.array([0, 10, 11]), np.array([20])]
        sections = [*(without(s, genes) for s, genes in zip(sections, lacks, strict=False)), sections[3]]
    found = align(sections, WIDTH, seed=0)
    train, images = sections[:3], [x.numpy().astype(float) for x in found.image[:3]]
    np.testing.assert_allclose(found.decoder.numpy(), decoders(train, images, range(G)), atol=1e-3)

    means = np.array([s.expression.toarray()[s.rows].mean(0) for s in train])
    measured = np.array([s.measured for s in train])
    np.testing.assert_allclose(found.mean_expression.numpy(), (means * measured).sum(0) / measured.sum(0), rtol=1e-4)

    correlation = np.full((3, G), np.nan)
    for k, s in enumerate(train):
        rest = [j for j in range(3) if j != k]
        weights = decoders([train[j] for j in rest], [images[j] for j in rest], range(G))
        predicted, actual = images[k][s.rows] @ weights, s.expression.toarray()[s.rows]
        for g in range(G):
            if s.measured[g] and weights[:, g].any():
                correlation[k, g] = np.corrcoef(predicted[:, g], actual[:, g])[0, 1]
    known = ~np.isnan(correlation).all(0)
    assert known.sum() == (G if panels == "same" else G - 1)
    np.testing.assert_allclose(found.confidence.numpy()[known], np.nanmean(correlation[:, known], axis=0), atol=1e-3)
    assert not found.confidence.numpy()[~known].any()


def without(section, genes):
    """The section with a panel that lacks genes."""
    keep = np.ones(G)
    keep[genes] = 0
    profile, expression = (
        sp.csr_matrix(x.multiply(keep), dtype=np.float32) for x in (section.profile, section.expression)
    )
    return replace(section, profile=profile, expression=expression, measured=keep > 0)


def test_held_out_spots_have_no_influence(sections):
    found = align(sections, WIDTH, seed=0)
    other = make(70, 99, held_out=True)
    changed = align([*sections[:3], other], WIDTH, seed=0)
    for name in ("gene_vectors", "image_weights", "decoder", "mean_expression", "confidence"):
        assert torch.equal(getattr(found, name), getattr(changed, name)), name
    for k in range(3):
        assert torch.equal(found.image[k], changed.image[k])
    # Nor have features and expression of held-out spots of a training section.
    section = sections[0]
    unseen = np.setdiff1d(np.arange(120), section.rows)
    patches, expression = section.patches.clone(), section.expression.toarray()
    patches[unseen], expression[unseen] = 1e3, 1e3
    again = align(
        [replace(section, patches=patches, expression=sp.csr_matrix(expression)), *sections[1:]], WIDTH, seed=0
    )
    for name in ("gene_vectors", "image_weights", "decoder", "mean_expression", "confidence"):
        assert torch.equal(getattr(found, name), getattr(again, name)), name


def test_the_seed_hardly_changes_the_result(sections):
    one, two = (align(sections, WIDTH, seed=seed) for seed in (0, 1))
    np.testing.assert_allclose(one.gene_vectors.numpy(), two.gene_vectors.numpy(), atol=1e-3)


def test_fewer_genes_than_directions(sections):
    few = [
        replace(s, profile=s.profile[:, :3], expression=s.expression[:, :3], measured=s.measured[:3]) for s in sections
    ]
    found = align(few, 8, seed=0)
    assert found.gene_vectors.shape == (3, 3)
    assert found.decoder.shape == (3, 3)
