"""Kronecker sketches keep inner products within the Johnson-Lindenstrauss bound, over seeds."""

import numpy as np
import pytest
import torch

from slap_ds.scoring import Head, HeadScores, ScoreRequest, collect, score_head
from slap_ds.scoring.probes import projection

SEEDS = 300


def bound(a, b):
    """Standard deviation of <S_i, S_j>, over |G_i| |G_j| (docs/method.md)."""
    return ((1 + 2 / a) * (1 + 2 / b) - 1) ** 0.5


def check_inner_products(sketches, grams, deviation):
    """sketches: (seeds, n, D). grams: (n, n) exact inner products."""
    found = sketches @ sketches.transpose(1, 2)
    length = grams.diagonal().sqrt()
    error = (found - grams) / (length[:, None] * length)
    # Unbiased: the mean over seeds is within four of its standard errors of nothing.
    assert error.mean(0).abs().max() <= 4 * deviation / SEEDS**0.5
    # A sample deviation over 300 seeds may exceed the true one by a little.
    assert error.square().mean(0).sqrt().max() <= 1.15 * deviation
    return error


@pytest.mark.parametrize(("a", "b"), [(4, 4), (16, 4), (8, 32)])
def test_head_kron_keeps_inner_products(a, b):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(30, 20, generator=g, dtype=torch.float64)
    # Shared directions, as real hidden states have: inner products that are not all near zero.
    hidden += torch.randn(20, generator=g, dtype=torch.float64)
    head = Head(torch.randn(61, 20, generator=g, dtype=torch.float64))
    targets = torch.randint(0, 61, (30,), generator=g)
    sample = torch.arange(30) // 6

    exact = torch.zeros(5, 400, dtype=torch.float64)
    for h, y, s in zip(hidden, targets, sample, strict=True):
        p = torch.softmax(head.weight @ h, 0)
        p[y] -= 1
        exact[s] += torch.outer(head.weight.t() @ p, h).flatten()
    sketches = torch.stack(
        [
            score_head(
                hidden,
                head,
                targets,
                sample,
                5,
                ScoreRequest("head_kron", size=(a, b), seed=seed),
                chunk_tokens=64,
            ).gradient
            for seed in range(SEEDS)
        ]
    )
    error = check_inner_products(sketches, exact @ exact.t(), bound(a, b))
    # Chebyshev's side of the lemma: distances beyond five bounds are rarer than one in 25.
    assert (error.abs() > 5 * bound(a, b)).double().mean() < 1 / 25


@pytest.mark.parametrize("dim", [4, 32, 200])
@pytest.mark.parametrize("scaled", [False, True])
def test_projected_sketches_keep_inner_products(dim, scaled):
    """Of what is scaled first: the projection must come after the curvature's division."""
    g = torch.Generator().manual_seed(0)
    gradient = torch.randn(6, 256, generator=g) + torch.randn(256, generator=g)
    scale = 10 * torch.rand(256, generator=g) if scaled else torch.ones(256)
    tokens = torch.ones(6, dtype=torch.int64)
    sketches = []
    for seed in range(SEEDS):
        request = ScoreRequest(
            "head_input", sketch_dim=dim, seed=seed, scale=scale if scaled else None
        )
        halves = [
            HeadScores(torch.zeros(3), tokens[:3], gradient[part])
            for part in (slice(0, 3), slice(3, 6))
        ]
        scores = collect(torch.arange(6).split(3), halves, request)
        assert scores.gradient.shape == (6, dim)
        sketches.append(scores.gradient.double())
    exact = (gradient * scale).double()
    error = check_inner_products(torch.stack(sketches), exact @ exact.t(), (2 / dim) ** 0.5)
    # Not far below the bound either: it is what D numbers can keep.
    assert error.square().mean(0).sqrt().max() >= 0.5 * (2 / dim) ** 0.5


@pytest.mark.parametrize("size", [1, 8, 33])
def test_projections_keep_lengths_on_average(size):
    x = torch.from_numpy(np.random.default_rng(0).standard_normal(57))
    lengths = [(projection(s, "P", size, 57).double() @ x).square().sum() for s in range(400)]
    lengths = torch.stack(lengths) / x.square().sum()
    assert abs(lengths.mean() - 1) < 4 * (2 / size / 400) ** 0.5
    assert lengths.var() < 1.3 * 2 / size
