"""Loss strata and their budgets (SLAP steps 1 and 2, our reading of arXiv 2605.23969)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Generator, Tensor


def assign_strata(loss: Tensor, strata: int, by: Literal["quantile", "width"]) -> Tensor:
    """Stratum of each candidate, 0 = smallest losses: (N,) -> (N,) int64 in [0, strata).

    quantile: equal counts (they differ by at most one), ties in loss broken by position.
    width: equal ranges between the smallest and the largest loss, as in CCS (Zheng et al. 2023,
    section 4); a stratum may be empty.
    """
    if by == "quantile":
        rank = torch.empty(len(loss), dtype=torch.int64)
        rank[torch.argsort(loss.cpu(), stable=True)] = torch.arange(len(loss))
        return rank * strata // len(loss)
    low, high = loss.min(), loss.max()
    if low == high:
        return torch.zeros(len(loss), dtype=torch.int64)
    place = (loss.double() - low) / (high.double() - low) * strata
    return place.long().clamp(max=strata - 1).cpu()


def sampled_budgets(
    loss: Tensor, strata: Tensor, k: int, budget: int, temperature: float, generator: Generator
) -> Tensor:
    """Count per stratum of `budget` draws without replacement, P proportional to exp(loss / T).

    The draw is Gumbel top-M: the `budget` largest of loss / T + Gumbel noise are such a sample
    (Kool et al. 2019, section 2). Returns (k,) int64 summing to `budget`.
    """
    uniform = torch.rand(len(loss), dtype=torch.float64, generator=generator)
    gumbel = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
    keys = loss.double().cpu() / temperature + gumbel
    drawn = torch.topk(keys, budget).indices
    return torch.bincount(strata[drawn], minlength=k)


def expected_budgets(
    loss: Tensor, strata: Tensor, k: int, budget: int, temperature: float
) -> Tensor:
    """`budget * (stratum's share of softmax(loss / T))`, rounded by largest remainder.

    No stratum gets more than its size; what a full stratum leaves over is shared again among the
    others by the same shares. Returns (k,) int64 summing to `budget`.
    """
    p = torch.softmax(loss.double().cpu() / temperature, 0)
    share = torch.zeros(k, dtype=torch.float64).index_add_(0, strata, p)
    size = torch.bincount(strata, minlength=k)
    filled = torch.zeros(k, dtype=torch.int64)
    while (left := budget - int(filled.sum())) > 0:
        open_ = filled < size
        # A share can underflow to 0 beside a huge loss; the sizes then decide.
        weight = torch.where(open_, share, 0.0)
        if weight.sum() == 0:
            weight = torch.where(open_, size.double(), 0.0)
        ideal = left * weight / weight.sum()
        floor = ideal.floor().long()
        rest = left - int(floor.sum())
        remainder = torch.where(open_, ideal - floor, -1.0)
        floor[torch.argsort(remainder, descending=True, stable=True)[:rest]] += 1
        filled = torch.minimum(filled + floor, size)
    return filled
