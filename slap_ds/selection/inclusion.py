"""Draws with known chances: how probable each candidate is, and picks that are so.

    value, cost, share -> chances (N,) -> systematic -> picks

A pick that weighs the inverse of its chance stands for those that were left out: whatever the
chances are, the expected gradient is that of all candidates (Horvitz and Thompson 1952).
"""

from __future__ import annotations

import torch
from torch import Tensor

_HALVINGS = 100


def chances(value: Tensor, cost: Tensor, share: float, least: float) -> Tensor:
    """Inclusion probabilities (N,) float64 whose expected cost is `share` of all of it.

    p = k value / sqrt(cost), between `least` and 1: of all such chances those with the smallest
    sum of value^2 / p, which is the variance of the weighted gradient if candidates are drawn
    independently and `value` is the length of a candidate's part of it (Neyman 1934's allocation,
    every candidate a stratum).

    Args:
        value: (N,) > 0, in any unit. cost: (N,) > 0. least: in [0, share].
    """
    cost = cost.double().cpu()
    wish = value.double().cpu() / cost.sqrt()
    wish /= wish.mean()
    target = share * float(cost.sum())
    low, high = 0.0, 1.0 / float(wish.min())  # at the upper end all are certain
    for _ in range(_HALVINGS):
        k = (low + high) / 2
        spent = float(((k * wish).clamp(least, 1) * cost).sum())
        low, high = (low, k) if spent > target else (k, high)
    return (low * wish).clamp(least, 1)


def systematic(chance: Tensor, order: Tensor, start: float) -> Tensor:
    """Picks (M,) int64 along `order` (N,), a permutation, with the given chances (N,).

    With `start` uniform in [0, 1) a pick stands wherever the running sum of the chances passes
    start, start + 1, ... (Madow 1949): every stretch of the order gets its expected count, to
    within one, and M is the sum of the chances rounded up or down.
    """
    ends = chance[order].double().cumsum(0)
    passed = torch.ceil(torch.cat([ends.new_zeros(1), ends]) - start).clamp(min=0)
    return order[passed[1:] > passed[:-1]]
