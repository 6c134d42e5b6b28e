"""Draws with known chances: how probable each candidate is, and picks that are so.

    value, cost, share -> chances (N,) -> systematic -> picks

A pick that weighs the inverse of its chance stands for those that were left out: whatever the
chances are, the expected gradient is that of all candidates (Horvitz and Thompson 1952).
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    # What is spent grows with k in straight pieces: from least / wish on a candidate's chance
    # grows, at 1 / wish it is certain.
    edge, index = torch.cat([least / wish, 1 / wish]).sort()
    slope = torch.cat([wish * cost, -wish * cost])[index].cumsum(0)[:-1]
    width = edge.diff()
    spent = least * cost.sum() + (slope * width).cumsum(0)
    target = share * cost.sum()
    piece = min(int((spent < target).sum()), len(width) - 1)
    missing = target - spent[piece] + slope[piece] * width[piece]
    k = edge[piece] + (missing / slope[piece]).nan_to_num().clamp(max=width[piece])
    return (k * wish).clamp(least, 1)


def systematic(chance: Tensor, order: Tensor, start: float) -> Tensor:
    """Picks (M,) int64 along `order` (N,), a permutation, with the given chances (N,).

    With `start` uniform in [0, 1) a pick stands wherever the running sum of the chances passes
    start, start + 1, ... (Madow 1949): every stretch of the order gets its expected count, to
    within one, and M is the sum of the chances rounded up or down.
    """
    ends = chance[order].double().cumsum(0)
    passed = torch.ceil(torch.cat([ends.new_zeros(1), ends]) - start).clamp(min=0)
    return order[passed[1:] > passed[:-1]]
