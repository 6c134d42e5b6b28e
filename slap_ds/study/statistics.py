"""What the difference between two methods is, and how sure that is.

Both methods ran with the same seeds and were evaluated on the same samples, so differences are
taken within pairs. Two things make the mean difference uncertain: which seeds were run, and which
samples it was evaluated on. With three to five seeds a bootstrap over seeds is too narrow (of 3
seeds it can draw 10 different sets, and it divides by S where S - 1 is due), so the interval here
is Student's: variances of both kinds added, degrees of freedom by Welch and Satterthwaite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """A method's loss minus another's, nats per response token; NaN ends where nothing is known."""

    mean: float
    low: float
    high: float
    boot_low: float
    boot_high: float
    seeds: int


def difference(method: Array, other: Array, tokens: Array, level: float = 0.95) -> Difference:
    """The mean paired difference of token-mean losses, and intervals that hold it with `level`.

    Args:
        method, other: (S, I) nats, summed over the response tokens of I samples, under S seeds;
            row s of both is the same seed.
        tokens: (I,) response tokens of each sample.

    `low`, `high`: mean ± t * sqrt(v_seed + v_sample). With D = method - other and n = tokens,
    d_s = sum_i D_si / sum_i n_i and v_seed = var(d) / S. v_sample is the variance of the ratio
    sum_i z_i / sum_i n_i, z_i the mean of D_si over seeds, linearised (Cochran, Sampling
    Techniques, section 6.4). What is particular to one seed and sample counts in both, so the
    interval is a little wide rather than narrow. One seed says nothing about seeds: NaN.
    `boot_low`, `boot_high`: percentiles of 2,000 draws of seeds and samples, with replacement.

    Raises:
        ValueError: shapes do not fit, or fewer than two samples.
    """
    if method.shape != other.shape or method.shape[1:] != tokens.shape or method.ndim != 2:
        raise ValueError(f"losses of shapes {method.shape} and {other.shape} for {tokens.shape}")
    seeds, samples = method.shape
    if samples < 2:
        raise ValueError(f"{samples} evaluation samples: an interval takes two")
    gap = method - other
    mean, low, high = _student(gap, tokens, level)
    if seeds == 1:
        return Difference(mean, low, high, math.nan, math.nan, 1)
    boot_low, boot_high = _bootstrap(gap, tokens, level)
    return Difference(mean, low, high, boot_low, boot_high, seeds)


def _student(gap: Array, tokens: Array, level: float) -> tuple[float, float, float]:
    """Mean, low and high of `difference`, of the gaps (S, I) alone."""
    seeds, samples = gap.shape
    by_seed = gap.sum(1) / tokens.sum()
    mean = float(by_seed.mean())
    if seeds == 1:
        return mean, math.nan, math.nan
    v_seed = float(by_seed.var(ddof=1)) / seeds
    rest = gap.mean(0) - mean * tokens
    v_sample = float(rest @ rest) * samples / (samples - 1) / float(tokens.sum()) ** 2
    half = 0.0
    if v_seed + v_sample > 0:
        freedom = (v_seed + v_sample) ** 2 / (v_seed**2 / (seeds - 1) + v_sample**2 / (samples - 1))
        half = float(stats.t.ppf((1 + level) / 2, freedom)) * math.sqrt(v_seed + v_sample)
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class Curve:
    """A method trained for several shares of its whole cost, each run with a learning rate of its
    own that ends with it."""

    shares: Array  # (C,) ascending
    losses: Array  # (C, S, I) nats, summed over response tokens

    def at(self, share: float) -> Array:
        """(S, I) losses at `share`, linear in its logarithm between the two runs beside it.

        Raises:
            ValueError: it lies outside.
        """
        if not self.shares[0] <= share <= self.shares[-1]:
            raise ValueError(f"share {share:g} outside {self.shares[0]:g} to {self.shares[-1]:g}")
        right = max(1, int(np.searchsorted(self.shares, share)))
        x0, x1 = np.log(self.shares[right - 1 : right + 1])
        weight = (math.log(share) - x0) / (x1 - x0)
        out: Array = (1 - weight) * self.losses[right - 1] + weight * self.losses[right]
        return out


def same_loss(
    method: Array, curve: Curve, tokens: Array, level: float = 0.95
) -> tuple[float, float, float]:
    """The share at which the curve's runs reach the method's loss, and an interval of it.

    The interval holds the shares at which the difference of both is not sure (Fieller's way: the
    test is inverted). 0 or infinity stands for what lies beyond the curve's ends; NaN ends for
    one seed.

    Args:
        method: (S, I) nats; tokens: (I,), as in `difference`.
    """
    first_share, last_share = float(curve.shares[0]), float(curve.shares[-1])
    grid = np.geomspace(first_share, last_share, 201).clip(first_share, last_share)
    found = np.array([_student(method - curve.at(x), tokens, level) for x in grid])
    mean, low, high = found.T  # the method minus the curve, which falls: negative to positive
    above = np.flatnonzero(mean > 0)
    if not len(above):
        point = math.inf
    elif above[0] == 0:
        point = 0.0
    else:
        i = int(above[0])
        part = mean[i - 1] / (mean[i - 1] - mean[i])
        point = float(grid[i - 1] * (grid[i] / grid[i - 1]) ** part)
    if np.isnan(low).any():
        return point, math.nan, math.nan
    unsure = np.flatnonzero((low <= 0) & (high >= 0))
    if not len(unsure):
        return point, point, point
    first, last = int(unsure[0]), int(unsure[-1])
    return (
        point,
        0.0 if first == 0 else float(grid[first]),
        math.inf if last == len(grid) - 1 else float(grid[last]),
    )


def _bootstrap(gap: Array, tokens: Array, level: float, draws: int = 2000) -> tuple[float, float]:
    generator = np.random.Generator(np.random.Philox(key=[0, 0]))
    seeds, samples = gap.shape
    times = generator.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds  # (B, S)
    drawn = generator.multinomial(samples, np.full(samples, 1 / samples), draws)  # (B, I)
    means = ((times @ gap) * drawn).sum(1) / (drawn @ tokens)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_interval(values: Array, level: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high) by Student's t over seeds; NaN ends for one value."""
    mean = float(values.mean())
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values))
    return mean, mean - half, mean + half


def verdict(found: Difference, margin: float) -> str:
    """better: the interval lies below 0; not worse: below `margin` (nats); worse: above 0;
    undecided: none of these, or one seed only."""
    if math.isnan(found.high):
        return "undecided"
    if found.high < 0:
        return "better"
    if found.high < margin:
        return "not worse"
    return "worse" if found.low > 0 else "undecided"
