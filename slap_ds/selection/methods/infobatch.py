"""InfoBatch: drop some of what is learnt, more weight for the rest (Qin et al. 2024, section 3).

A sample's score is its loss when it was last trained. At the start of an epoch the mean of all
scores is taken; in the epoch a sample below it is dropped with probability r, and weighs
1 / (1 - r) when it is not, so that the expected gradient is that of all candidates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from slap_ds.selection.base import Course, ScoredBatch, Selection, Signal, Stateless

_LARGEST_R = 0.9  # weights of more than 10 would make single samples rule a step


@dataclass
class InfoBatch(Stateless):
    """All candidates with a score of at least the mean, and a share 1 - r of the others.

    The number of picks varies from step to step. No step of the first epoch is pruned, and none
    after `delta` of the run. A step belongs to the epoch of its first candidate.

    What r follows from: with `r` None the run shall train `keep` of all its candidates. Those to
    be left out fall on the A of its S steps that may prune, (1 - keep) S / A of each step; a share
    q of all samples has scores below the mean; hence r = (1 - keep) S / (A q), at most 0.9. A set
    `r` (0.5 in published code) has the budget that comes out.

    Loss: published code takes mean(w l) over a batch refilled to its size, so that an epoch has
    fewer steps, of larger expected gradients. Here a step has the candidates it has, and the
    trainer divides by the picks' weighted tokens: sum(w l) / sum(w), which estimates the mean over
    all N candidates, so the steps of an epoch add up to the same. mean(w l) over the picks would be
    that times sum(w) / M, about 1 / keep.

    Scores come from the scoring forward, before the step and without dropout; published code takes
    them from the training forward. They are means over response tokens. Quotas would bias the
    draw, so with forward reuse the picks stay where they are and are not levelled.

    Raises (`begin`):
        ValueError: too few steps may prune for `keep`.
    """

    keep: float
    r: float | None = None
    delta: float = 0.875
    own_count = True
    needs: frozenset[Signal] = frozenset({"loss"})
    course: Course | None = field(default=None, repr=False)
    score: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)  # (n,) NaN: unseen
    epoch: int = 0
    mean: float = -math.inf  # of the scores at the epoch's start
    below: float = 0.0  # share of the samples whose score was less

    def __post_init__(self) -> None:
        self.remembers_until = self.delta

    def begin(self, course: Course) -> None:
        self.course = course
        self._ids, self._order = course.ids.sort()
        self.score = torch.full((len(course.ids),), math.nan)
        active = sum(self._may_prune(step, course.steps) for step in range(course.steps))
        wanted = (1 - self.keep) * course.steps
        if self.r is None and wanted > _LARGEST_R * active:
            raise ValueError(
                f"selection.method infobatch prunes from the second epoch to {self.delta:g} of the "
                f"run, here {active} of {course.steps} steps: too few to leave out "
                f"{1 - self.keep:.0%} of all candidates; take more epochs, a higher "
                "selection.keep, or set selection.infobatch.r (0.5 is published)"
            )
        self._dropped_share = wanted / active if active else 0.0

    def budget(self, step: int, steps: int, candidates: int, keep: float) -> int:
        """N, or in a step that may prune what `keep` expects of it; the picks may differ."""
        if not self._may_prune(step, steps):
            return candidates
        expected = round((1 - self._dropped_share) * candidates)
        return max(1, min(candidates - 1, expected))

    def select(self, batch: ScoredBatch, budget: int, generator: Generator) -> Selection:
        n = len(batch)
        uniform = torch.rand(n, dtype=torch.float64, generator=generator)
        learnt = torch.zeros(n, dtype=torch.bool)
        r = 0.0
        if budget < n and self.below > 0:
            r = self.r or min(self._dropped_share / self.below, _LARGEST_R)
            learnt = self.score[self._find(batch)].double() < self.mean
        kept = ~learnt | (uniform >= r)
        if not kept.any():
            kept[int(uniform.argmax())] = True  # a step cannot train nothing
        picks = kept.nonzero()[:, 0]
        weights = torch.where(learnt[picks], 1 / (1 - r), 1.0).float()
        return Selection(picks, weights, {"infobatch_r": r, "below_mean": int(learnt.sum())})

    def remember(self, batch: ScoredBatch, selection: Selection) -> None:
        assert self.course is not None
        picks = selection.picks
        self.score[self._find(batch)[picks]] = batch.loss.cpu()[picks].float()
        epoch = (batch.step + 1) * self.course.candidates // len(self.score)
        if epoch != self.epoch:
            self.epoch = epoch
            seen = self.score[~self.score.isnan()].double()
            self.mean = float(seen.mean())
            self.below = float((seen < self.mean).sum()) / len(self.score)

    def state_dict(self) -> dict[str, Any]:
        """Scores in the order of the training data, which `checkpoint` holds to be the same."""
        mean = None if math.isinf(self.mean) else self.mean
        return {
            "score": self.score,
            "epoch": self.epoch,
            "mean": mean,
            "below": self.below,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.score = state["score"].clone()
        self.epoch, self.below = int(state["epoch"]), float(state["below"])
        self.mean = -math.inf if state["mean"] is None else float(state["mean"])

    def _may_prune(self, step: int, steps: int) -> bool:
        assert self.course is not None, "begin() comes first"
        return step * self.course.candidates >= len(self.course.ids) and step < self.delta * steps

    def _find(self, batch: ScoredBatch) -> Tensor:
        """(N,) int64: where each candidate stands in the training data."""
        assert batch.ids is not None, "infobatch needs sample ids"
        return self._order[torch.searchsorted(self._ids, batch.ids.cpu())]
