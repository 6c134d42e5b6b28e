"""Intervals of paired differences: closed forms, brute force, and how often they hold the truth."""

import math

import numpy as np
import pytest
from scipy import stats

from slap_ds.study.statistics import (
    Curve,
    Difference,
    difference,
    mean_interval,
    same_loss,
    verdict,
)


def test_seeds_alone_give_students_interval():
    tokens = np.array([10.0, 30.0, 60.0])
    # Every sample moves in proportion to its tokens: nothing depends on the samples.
    gap = np.array([1.0, 2.0, 3.0])[:, None] * tokens
    found = difference(5 * tokens + gap, np.tile(5 * tokens, (3, 1)), tokens)
    # By hand: mean 2, standard error 1 / sqrt 3, t(0.975, 2) = 4.302653
    assert found.mean == pytest.approx(2)
    assert found.high - found.mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert (found.low, found.high) == pytest.approx(mean_interval(np.array([1.0, 2, 3]))[1:])


def test_samples_alone_give_students_interval():
    generator = np.random.default_rng(0)
    gap, tokens = generator.normal(size=40), np.full(40, 7.0)
    found = difference(np.tile(gap, (3, 1)), np.zeros((3, 40)), tokens)
    low, high = stats.t.interval(0.95, 39, gap.mean() / 7, stats.sem(gap) / 7)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_ratio_of_unequal_samples_against_the_jackknife():
    generator = np.random.default_rng(1)
    tokens = generator.integers(5, 60, 300).astype(float)
    gap = (generator.normal(0.1, 0.3, 300) + generator.normal(size=300) * 0.1) * tokens
    found = difference(np.tile(gap, (4, 1)), np.zeros((4, 300)), tokens)
    left_out = np.array(
        [(gap.sum() - g) / (tokens.sum() - n) for g, n in zip(gap, tokens, strict=True)]
    )
    error = math.sqrt(299 / 300 * ((left_out - left_out.mean()) ** 2).sum())
    half = stats.t.ppf(0.975, 299) * error
    assert found.mean == pytest.approx(gap.sum() / tokens.sum())
    assert found.high - found.mean == pytest.approx(half, rel=0.02)


def test_bootstrap_against_a_plain_loop():
    generator = np.random.default_rng(2)
    tokens = generator.integers(5, 60, 50).astype(float)
    gap = generator.normal(0.1, 0.3, (4, 50)) * tokens + generator.normal(size=(4, 1)) * tokens / 9
    found = difference(gap, np.zeros((4, 50)), tokens)
    means = []
    for _ in range(4000):
        s, i = generator.integers(4, size=4), generator.integers(50, size=50)
        means.append(gap[np.ix_(s, i)].mean(0).sum() / tokens[i].sum())
    low, high = np.quantile(means, [0.025, 0.975])
    spread = high - low
    assert found.boot_low == pytest.approx(low, abs=0.06 * spread)
    assert found.boot_high == pytest.approx(high, abs=0.06 * spread)


@pytest.mark.parametrize(("of_seeds", "of_samples"), [(0.03, 0.1), (0.05, 0.02)])
def test_interval_of_three_seeds_holds_the_truth(of_seeds, of_samples):
    generator = np.random.default_rng(3)
    seeds, samples, rounds, truth = 3, 40, 150, 0.05
    tokens = generator.integers(5, 60, samples).astype(float)
    held = boot = 0
    for _ in range(rounds):
        each = truth + generator.normal(size=(seeds, 1)) * of_seeds
        each = each + generator.normal(size=samples) * of_samples
        each = each + generator.normal(size=(seeds, samples)) * of_samples
        found = difference(each * tokens, np.zeros((seeds, samples)), tokens)
        held += found.low <= truth <= found.high
        boot += found.boot_low <= truth <= found.boot_high
    # 95 % promised; the share of 150 rounds has a standard error of 1.8 %
    assert held / rounds >= 0.92
    if of_seeds > of_samples:  # where seeds matter most, a bootstrap over three is too narrow
        assert boot / rounds < 0.85


def test_one_seed_and_bad_shapes():
    tokens = np.array([1.0, 2.0])
    found = difference(np.array([[1.0, 2.0]]), np.array([[0.0, 0.0]]), tokens)
    assert (found.mean, found.seeds) == (1, 1)
    assert math.isnan(found.low)
    assert verdict(found, 10) == "undecided"
    with pytest.raises(ValueError, match="shapes"):
        difference(np.zeros((2, 2)), np.zeros((3, 2)), tokens)
    with pytest.raises(ValueError, match="takes two"):
        difference(np.zeros((2, 1)), np.zeros((2, 1)), tokens[:1])
    same = difference(np.ones((2, 2)), np.ones((2, 2)), tokens)
    assert (same.low, same.high) == (0, 0)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-0.3, -0.1, "better"),
        (-0.1, 0.01, "not worse"),
        (0.005, 0.015, "not worse"),
        (0.01, 0.03, "worse"),
        (-0.01, 0.03, "undecided"),
    ],
)
def test_verdicts(low, high, said):
    assert verdict(Difference((low + high) / 2, low, high, low, high, 3), margin=0.02) == said


SHARES = np.array([0.4, 0.55, 0.7, 0.85, 1.0])


def falling(tokens, seeds, noise=0.0, generator=None):
    """Runs whose token-mean loss is 4 - log(share), give or take."""
    losses = np.tile(((4 - np.log(SHARES))[:, None] * tokens)[:, None], (1, seeds, 1))
    if generator is not None:
        losses += noise * tokens * generator.normal(size=(len(SHARES), seeds, 1))
    return losses


def test_curve_is_exact_where_losses_fall_with_the_logarithm():
    tokens = np.array([3.0, 5.0, 2.0])
    curve = Curve(SHARES, falling(tokens, 2))
    for share in (0.4, 0.5, 0.7, 0.93, 1.0):
        np.testing.assert_allclose(curve.at(share), np.tile((4 - np.log(share)) * tokens, (2, 1)))
    with pytest.raises(ValueError, match="outside"):
        curve.at(0.39)


@pytest.mark.parametrize(("reached", "expected"), [(0.6, 0.6), (0.3, 0.0), (1.2, math.inf)])
def test_cost_of_the_same_loss(reached, expected):
    tokens = np.array([3.0, 5.0, 2.0])
    method = np.tile((4 - np.log(reached)) * tokens, (3, 1))
    point, *_ = same_loss(method, Curve(SHARES, falling(tokens, 3)), tokens)
    assert point == pytest.approx(expected, rel=1e-3)
    point, low, high = same_loss(method[:1], Curve(SHARES, falling(tokens, 1)), tokens)
    assert point == pytest.approx(expected, rel=1e-3)
    assert math.isnan(low)
    assert math.isnan(high)


def test_interval_of_the_cost_holds_the_truth():
    generator, tokens, truth = np.random.default_rng(5), np.full(30, 4.0), 0.7
    held = 0
    for _ in range(60):
        curve = Curve(SHARES, falling(tokens, 5, 0.03, generator))
        # What is particular to seeds is that of the runs' and of the method's own.
        method = (4 - math.log(truth)) * tokens + 0.03 * tokens * generator.normal(size=(5, 1))
        point, low, high = same_loss(method, curve, tokens)
        assert low <= point <= high
        held += low <= truth <= high
    # 95 % promised; the share of 60 rounds has a standard error of 2.8 %
    assert held >= 52
