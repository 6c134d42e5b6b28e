"""Curvature: the smoothed diagonal of the Hessian that preconditions the sketches.

A step's diagonal is the token-weighted mean over the whole candidate batch, all ranks; over steps
it is averaged with a bias-corrected exponential moving average, as Adam averages gradients
(Kingma and Ba 2015, section 3; AdaHessian, Yao et al. 2021, section 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Curvature:
    """Bias-corrected moving average of the Hessian's diagonal: selector state, saved and restored.

    Args:
        decay: beta in v <- beta v + (1 - beta) d, in [0, 1).
        power: exponent of the curvature in the preconditioner; 0 switches it off.
        floor: smallest curvature, as a share of the mean over dimensions.
    """

    def __init__(self, decay: float, power: float, floor: float) -> None:
        self.decay, self.power, self.floor = decay, power, floor
        self.updates = 0
        self.average: Tensor | None = None  # (E,) float64

    def update(self, diagonal_sum: Tensor, tokens: int) -> None:
        """Take in a step's diagonal: (E,) summed over `tokens` response tokens.

        A step without tokens or with a non-finite diagonal changes nothing.
        """
        if tokens < 1 or not torch.isfinite(diagonal_sum).all():
            return
        mean = diagonal_sum.double().cpu() / tokens
        if self.average is None:
            self.average = torch.zeros_like(mean)
        self.average = self.decay * self.average + (1 - self.decay) * mean
        self.updates += 1

    def value(self) -> Tensor:
        """The smoothed, floored diagonal: (E,) float64, positive."""
        assert self.average is not None, "no curvature before the first update"
        value = self.average / (1 - self.decay**self.updates)
        # Rounding can leave a tiny negative where the exact diagonal is zero.
        smallest = max(float(value.mean()) * self.floor, torch.finfo(torch.float32).tiny)
        return value.clamp(min=smallest)

    def precondition(self, gradient: Tensor) -> Tensor:
        """`gradient / D^power`: (N, E) -> (N, E), same dtype and device."""
        if self.average is None:
            return gradient
        scale = self.value().pow(-self.power)
        return gradient * scale.to(gradient)

    def state_dict(self) -> dict[str, Any]:
        return {
            "updates": self.updates,
            "average": None if self.average is None else self.average.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates = int(state["updates"])
        average = state["average"]
        self.average = None if average is None else torch.tensor(average, dtype=torch.float64)
