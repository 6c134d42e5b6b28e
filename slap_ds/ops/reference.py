"""The specification of farthest-point selection: short, slow, and the truth every path is held to.

Distances are exact to the bit by definition: bfloat16 is widened to float32, then one chain per
pair over the D dimensions in order, `t = a - b; acc = fma(t, t, acc)`, each step rounded once to
float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def square_add(t: Tensor, acc: Tensor) -> Tensor:
    """fma(t, t, acc) in float32, elementwise, for acc >= 0: one rounding, on any hardware.

    t*t is exact in float64. Rounding the sum first to float64 and then to float32 would round
    twice; an inexact float64 sum is therefore moved to its neighbour with an odd last bit (round to
    odd), from which the second rounding is always right (Boldo and Melquiond, 2008).
    """
    product, addend = t.double().square(), acc.double()
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view(torch.int64)
    odd = torch.where(error > 0, bits + 1, bits - 1)
    inexact_even = (error != 0) & (bits % 2 == 0)
    return torch.where(inexact_even, odd, bits).view(torch.float64).float()


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(I, D) and (J, D), float32 or bfloat16, to (I, J) float32, squared."""
    acc = torch.zeros(len(a), len(b))
    for column_a, column_b in zip(a.float().T, b.float().T, strict=True):
        acc = square_add(column_a[:, None] - column_b[None, :], acc)
    return acc


def farthest_point(
    features: Tensor,
    budgets: list[int],
    strata: list[int] | None = None,
    *,
    first: int,
    across_strata: bool = True,
    groups: list[int] | None = None,
    quotas: list[int] | None = None,
) -> tuple[list[int], list[float], list[float]]:
    """Picks, the squared distance at which each was picked, each point's final distance."""
    n, m, left, k = len(features), sum(budgets), list(budgets), 0
    strata, groups, remaining = strata or [0] * n, groups or [0] * n, list(quotas or [n])
    pair = squared_distances(features, features).tolist()
    squared = [float("inf")] * n
    picks: list[int] = []
    at: list[float] = []
    while len(picks) < m:
        taken = set(picks)
        is_open = [strata[i] == k and i not in taken and remaining[groups[i]] > 0 for i in range(n)]
        if left[k] == 0 or not any(is_open):  # what a stratum cannot fill, the next one may
            after = (k + 1) % len(left)
            spare, left[k] = left[k], 0
            left[after] += spare
            k = after
            continue
        candidates = [i for i in range(n) if is_open[i]]
        pick = max(candidates, key=lambda i: (squared[i], -i)) if picks else first
        picks.append(pick)
        at.append(squared[pick])
        left[k] -= 1
        remaining[groups[pick]] -= 1
        reached = [across_strata or strata[i] == k for i in range(n)]
        squared = [min(squared[i], pair[pick][i]) if reached[i] else squared[i] for i in range(n)]
    return picks, at, torch.tensor(squared).sqrt().tolist()
