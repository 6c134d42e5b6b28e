"""The selector's contract: a scored candidate batch in, the picks out.

A selector is deterministic and blind to ranks: the same state, input and generator give the same
picks. `select` is the one way to call it: it keeps broken candidates out, whatever the method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Generator, Tensor

Signal = Literal["loss", "sketch"]


@dataclass(frozen=True)
class ScoredBatch:
    """What a selector sees of N candidates."""

    loss: Tensor  # (N,) float32, nats per response token
    sketch: Tensor | None = None  # (N, D) float32 or bfloat16
    groups: Tensor | None = None  # (N,) int64 in [0, G): candidates that share a quota
    quotas: Tensor | None = None  # (G,) int64: most picks of a group

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, index: Tensor) -> ScoredBatch:
        """The candidates at `index` (n,), in that order; quotas stay."""
        return replace(
            self,
            loss=self.loss[index],
            sketch=None if self.sketch is None else self.sketch[index],
            groups=None if self.groups is None else self.groups[index],
        )


@dataclass(frozen=True)
class Selection:
    """The candidates to train in this step."""

    picks: Tensor  # (M,) int64, positions in the candidate batch, no position twice
    weights: Tensor  # (M,) float32, each pick's weight in the loss
    stats: dict[str, Any] = field(default_factory=dict)  # for metrics.jsonl


class Selector(Protocol):
    """One selection method. `needs` says what the scorer has to compute for it."""

    needs: frozenset[Signal]
    takes_quotas: bool  # whether `select` honours the batch's groups and quotas

    def select(self, batch: ScoredBatch, budget: int, generator: Generator) -> Selection:
        """Pick exactly `budget` of the batch's candidates, 1 <= budget <= N."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Stateless:
    """For selectors that remember nothing."""

    takes_quotas = False

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert not state, f"{type(self).__name__} keeps no state, found {sorted(state)}"


def select(selector: Selector, batch: ScoredBatch, budget: int, generator: Generator) -> Selection:
    """Run `selector` on the candidates whose scores are finite.

    NaN or infinite scores come from broken samples (no response token, overflow). Argmax and top-k
    would always pick them, so they are left out here; `stats["nonfinite"]` counts them. When fewer
    than `budget` remain, all of them are picked.

    Raises:
        ValueError: no candidate has finite scores.
    """
    finite = torch.isfinite(batch.loss)
    if batch.sketch is not None:
        finite &= torch.isfinite(batch.sketch).all(-1)
    index = finite.nonzero()[:, 0]
    if not len(index):
        raise ValueError(
            f"all {len(batch)} candidates have NaN or infinite scores: the model has diverged "
            "(lower optimizer.lr) or its weights are broken"
        )
    kept = selector.select(batch.take(index), min(budget, len(index)), generator)
    picks = index[kept.picks.to(index.device)].cpu()
    assert len(picks.unique()) == len(picks), "a selector picked a candidate twice"
    stats = {**kept.stats, "nonfinite": len(batch) - len(index)}
    return Selection(picks, kept.weights.cpu(), stats)


def unweighted(picks: Tensor, **stats: Any) -> Selection:
    """A selection in which every pick weighs 1."""
    return Selection(picks, torch.ones(len(picks), dtype=torch.float32), stats)
