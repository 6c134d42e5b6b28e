"""Curvature: the smoothed diagonal of the Hessian that preconditions the sketches.

A step's diagonal is the token mean over the whole candidate batch, all ranks; over steps it is
averaged with a bias-corrected exponential moving average, as Adam averages gradients (Kingma and
Ba 2015, section 3). Averaging over neighbouring dimensions and the division by a power of it are
AdaHessian's (Yao et al. 2021, sections 3.2 and 3.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from slap_ds.device import to_device


class Curvature:
    """Bias-corrected moving average of the Hessian's diagonal: selector state, saved and restored.

    Args:
        decay: beta in v <- beta v + (1 - beta) d, in [0, 1).
        power: exponent of the curvature in the preconditioner; 0 switches it off.
        floor: smallest curvature, as a share of the mean over dimensions.
        block: dimensions that share one value, their mean; 1: each has its own.
    """

    def __init__(self, decay: float, power: float, floor: float, block: int = 1) -> None:
        self.decay, self.power, self.floor, self.block = decay, power, floor, block
        self.updates = 0
        self.average: Tensor | None = None  # (E,) float64

    def update(self, diagonal_sum: Tensor, tokens: int) -> None:
        """Take in a step's diagonal: (E,) summed over `tokens` response tokens.

        A step without tokens or with a non-finite diagonal changes nothing.
        """
        mean = diagonal_sum.double().cpu() / max(1, tokens)  # the only wait for a device
        if tokens < 1 or not torch.isfinite(mean).all():
            return
        if self.average is None:
            self.average = torch.zeros_like(mean)
        self.average = self.decay * self.average + (1 - self.decay) * mean
        self.updates += 1

    def value(self) -> Tensor:
        """The smoothed, floored diagonal: (E,) float64, positive.

        Blocks can have negative curvature, and Hutchinson's estimates can be negative by chance.
        Both count by magnitude (Dauphin et al. 2014, section 4): a floor alone would give such a
        dimension the largest step of all.
        """
        assert self.average is not None, "no curvature before the first update"
        value = _block_means(self.average / (1 - self.decay**self.updates), self.block).abs()
        smallest = max(float(value.mean()) * self.floor, torch.finfo(torch.float32).tiny)
        return value.clamp(min=smallest)

    def scale(self) -> Tensor | None:
        """`D^-power`, (E,) float64; None before the first update."""
        return None if self.average is None else self.value().pow(-self.power)

    def precondition_(self, gradient: Tensor) -> Tensor:
        """`gradient / D^power`, (N, E), in place: returns `gradient`."""
        scale = self.scale()
        return (
            gradient
            if scale is None
            else gradient.mul_(to_device(scale, gradient.device, gradient.dtype))
        )

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates = int(state["updates"])
        self.average = state["average"]


def _block_means(value: Tensor, block: int) -> Tensor:
    """Each entry becomes the mean of its block; the last block may be shorter."""
    if block == 1:
        return value
    group = torch.arange(len(value)) // block
    sums = torch.zeros(int(group[-1]) + 1, dtype=value.dtype).index_add_(0, group, value)
    return (sums / torch.bincount(group))[group]
