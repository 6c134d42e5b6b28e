"""Farthest-point selection in PyTorch, for machines where `csrc/` was not built.

The same algorithm as csrc/cpu ("pool"), and the same bits: take the BLOCK points that are farthest
now, run the greedy selection on that block alone until its best is beaten by the best point outside
it, then apply the round's picks to all points at once. A pick outside the block could only have
been the outside best, and distances only shrink, so the result is exactly the greedy one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from slap_ds.ops.plan import Plan
from slap_ds.ops.reference import square_add

BLOCK = 128
ROWS = 1024  # (ROWS, BLOCK) float32 is 512 KiB: it stays in the cache while the chain runs over D


def farthest_point(features: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """(N, D) on the CPU to picks (M,) int64, squared pick distance (M,), squared distance (N,)."""
    points = features.float()
    n = points.shape[0]
    strata = torch.zeros(n, dtype=torch.int64) if plan.strata is None else plan.strata
    groups = torch.zeros(n, dtype=torch.int64) if plan.groups is None else plan.groups
    remaining = [n] if plan.quotas is None else plan.quotas.tolist()
    left, m = plan.budgets.tolist(), plan.picks

    squared = torch.full((n,), float("inf"))
    unpicked = torch.ones(n, dtype=torch.bool)
    picks: list[int] = []
    at: list[float] = []
    stratum = 0
    while len(picks) < m:
        is_open = unpicked & (strata == stratum) & (torch.tensor(remaining) > 0)[groups]
        ranked = is_open.nonzero().flatten()
        if left[stratum] == 0 or ranked.numel() == 0:
            spare, left[stratum] = left[stratum], 0
            stratum = (stratum + 1) % len(left)
            left[stratum] += spare
            continue
        ranked = ranked[squared[ranked].argsort(descending=True, stable=True)]
        pool, beyond = ranked[:BLOCK], ranked[BLOCK : BLOCK + 1]
        if not picks:
            pool, beyond = torch.tensor([plan.first]), ranked[:1]
        new, new_at = _greedy(
            points, squared, pool.sort().values, beyond, groups, remaining, left[stratum]
        )
        picks += new
        at += new_at
        left[stratum] -= len(new)
        unpicked[new] = False
        squared[new] = 0.0
        reached = unpicked if plan.across_strata else unpicked & (strata == stratum)
        _shrink(points, squared, reached.nonzero().flatten(), points[new])
    return torch.tensor(picks), torch.tensor(at), squared


def _greedy(
    points: Tensor,
    squared: Tensor,
    pool: Tensor,  # ascending, so that the first maximum is the one with the lowest index
    beyond: Tensor,  # the best point outside the pool, or none
    groups: Tensor,
    remaining: list[int],  # lowered here, a group's picks left
    most: int,
) -> tuple[list[int], list[float]]:
    """The greedy selection inside a pool, until it is beaten from outside or a group is full."""
    index, group = pool.tolist(), groups[pool].tolist()
    pair = squared_distances(points[pool], points[pool]).numpy()
    current = squared[pool].numpy()
    beyond_key = (float(squared[beyond[0]]), -int(beyond[0])) if beyond.numel() else (-1.0, 0)
    new: list[int] = []
    new_at: list[float] = []
    while len(new) < min(most, len(index)):
        best = int(current.argmax())
        if new and (float(current[best]), -index[best]) < beyond_key:
            break
        new.append(index[best])
        new_at.append(float(current[best]))
        pair[:, best] = -1.0  # picked: below every distance, now and after every further minimum
        current = current.clip(max=pair[best])
        remaining[group[best]] -= 1
        if remaining[group[best]] == 0:
            break
    return new, new_at


def _shrink(points: Tensor, squared: Tensor, targets: Tensor, new: Tensor) -> None:
    for rows in torch.split(targets, ROWS):
        nearest = squared_distances(points[rows], new).amin(1)
        squared[rows] = torch.minimum(squared[rows], nearest)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(I, D) and (J, D) float32 to (I, J) float32: the bits of `reference.squared_distances`."""
    step = _square_add_in_place()
    acc = torch.zeros(len(a), len(b))
    t = torch.empty_like(acc)
    for column_a, column_b in zip(a.T.contiguous(), b.T.contiguous(), strict=True):
        torch.sub(column_a[:, None], column_b[None, :], out=t)
        step(acc, t)
    return acc


@cache
def _square_add_in_place() -> Callable[[Tensor, Tensor], object]:
    """`addcmul_` where this build of PyTorch fuses it, else the slower exact emulation.

    PyTorch does not promise a fused multiply-add, so its vector body and its scalar tail are both
    tried: 2,000 values of which more than a third round differently when the product is rounded
    first.
    """
    generator = torch.Generator().manual_seed(0)
    fused = True
    for length in (1, 3, 7, 15, 31, 63, 1880):
        t = torch.randn(length, generator=generator).exp()
        acc = torch.randn(length, generator=generator).exp()
        fused = fused and torch.equal(acc.clone().addcmul_(t, t), square_add(t, acc))
    if fused:
        return lambda acc, t: acc.addcmul_(t, t)
    return lambda acc, t: acc.copy_(square_add(t, acc))
