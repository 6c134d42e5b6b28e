"""Squared distances to the nearest of some targets, with the bits of the farthest-point op."""

from __future__ import annotations

import torch
from torch import Tensor

from slap_ds.ops.farthest_point import run_plan
from slap_ds.ops.plan import Plan


def nearest_squared(points: Tensor, targets: Tensor) -> Tensor:
    """(n, D) and (p, D), float32, finite -> (n,) float32 on the points' device.

    The op itself computes them: the targets are a stratum that is picked whole, and the points one
    that is not to be picked from, so that its distances come back as they stand at the end.
    """
    p, n = len(targets), len(points)
    strata = torch.zeros(p + n, dtype=torch.int64)
    strata[p:] = 1
    plan = Plan(
        picks=p,
        budgets=torch.tensor([p, 0]),
        first=0,
        across_strata=True,
        strata=strata,
        groups=None,
        quotas=None,
    )
    _, _, squared = run_plan(torch.cat([targets, points]).contiguous(), plan)
    return squared[p:].to(points.device)
