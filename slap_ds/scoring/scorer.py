"""From the gathered sums of a candidate batch to what a selector sees.

    GatheredScores -> mean over response tokens -> curvature update -> sketch -> ScoredBatch

The sums arrive in candidate order and are the same on every rank, so everything here is too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slap_ds.scoring.curvature import Curvature
from slap_ds.selection import ScoredBatch, Signal


class Wants(NamedTuple):
    """What the scoring forward computes beside the loss."""

    gradient: bool = False
    diagonal: bool = False


@dataclass(frozen=True)
class Scores:
    """Head sums of some candidates: a rank's share, or after the gather the whole batch."""

    positions: Tensor  # (n,) int64, in the candidate batch
    loss: Tensor  # (n,) float32, nats summed over response tokens
    tokens: Tensor  # (n,) int64, response tokens
    gradient: Tensor | None  # (n, E) float32, summed over response tokens
    diagonal: Tensor | None  # (E,) float32, summed over all tokens of candidates of finite loss

    def mean_loss(self) -> Tensor:
        """(n,) nats per response token; NaN where a sample has none."""
        return self.loss / self.tokens


class Scorer:
    """Turns gathered sums into a `ScoredBatch`; holds the curvature as its state.

    Args:
        needs: the selector's signals; nothing else is computed.
        curvature: the preconditioner of the sketch, or None.
    """

    def __init__(self, needs: frozenset[Signal], curvature: Curvature | None) -> None:
        self.needs = needs
        sketch = "sketch" in needs
        self.curvature = curvature if sketch else None
        self.wants = Wants(gradient=sketch, diagonal=self.curvature is not None)

    def finish(self, scores: Scores, content: Tensor) -> ScoredBatch:
        """The scored candidate batch.

        Args:
            scores: of all N candidates, in candidate order.
            content: (N,) int64, equal where samples are equal token for token.
        """
        loss = scores.mean_loss()
        sketch = None
        if self.curvature is not None and scores.diagonal is not None:
            counted = scores.tokens[torch.isfinite(scores.loss)]
            self.curvature.update(scores.diagonal, int(counted.sum()))
        if scores.gradient is not None:
            sketch = scores.gradient / scores.tokens[:, None]
            if self.curvature is not None:
                sketch = self.curvature.precondition(sketch)
        # Equal samples have equal scores; packing and the number of ranks round them differently
        # in the last bit, and a tie between twins must not be decided by that.
        first = _first_occurrence(content).to(loss.device)
        return ScoredBatch(
            loss=loss[first], sketch=None if sketch is None else sketch[first].contiguous()
        )

    def state_dict(self) -> dict[str, Any]:
        return {} if self.curvature is None else {"curvature": self.curvature.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.curvature is not None and "curvature" in state:
            self.curvature.load_state_dict(state["curvature"])


def _first_occurrence(content: Tensor) -> Tensor:
    """(N,) -> (N,): for each entry, the index of the first equal entry."""
    _, group = content.unique(return_inverse=True)
    first = torch.full((int(group.max()) + 1,), len(content), dtype=torch.int64)
    first.scatter_reduce_(0, group.cpu(), torch.arange(len(content)), "amin")
    return first[group.cpu()]
