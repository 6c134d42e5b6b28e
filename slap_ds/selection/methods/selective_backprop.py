"""Selective backprop: draws by the rank of the loss (Jiang et al. 2019, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator

from slap_ds.selection.base import ScoredBatch, Selection, Signal, Stateless, unweighted
from slap_ds.selection.methods.greedy import first_open


@dataclass
class SelectiveBackprop(Stateless):
    """M draws without replacement, P proportional to p^(1 / keep - 1), p the loss's percentile.

    p is (rank + 1/2) / N in ascending order of the mean loss over response tokens; ties go by
    position. This is the widely used form (Composer); the paper takes p^beta among recent losses,
    keeps each sample independently, and so has no fixed budget.

    `published` is Composer's schedule: whole batches, save from `start` to `end` of the run, where
    every `interrupt`-th batch is still whole (0: none). It prunes far less than `keep` says. The
    schedule `always` draws at every step and so has the same budget as every other method.
    """

    keep: float
    schedule: Literal["always", "published"] = "always"
    start: float = 0.5
    end: float = 0.9
    interrupt: int = 2
    takes_quotas = True
    needs: frozenset[Signal] = frozenset({"loss"})

    def budget(self, step: int, steps: int, candidates: int, keep: float) -> int:
        if self.schedule == "published":
            active = self.start * steps <= step < self.end * steps
            if not active or (self.interrupt and (step + 1) % self.interrupt == 0):
                return candidates
        return super().budget(step, steps, candidates, keep)

    def select(self, batch: ScoredBatch, budget: int, generator: Generator) -> Selection:
        n = len(batch)
        percentile = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        log_p = (1 / self.keep - 1) * percentile.log()
        # The largest of log p + Gumbel noise are such draws, in their order (Kool et al. 2019).
        uniform = torch.rand(n, dtype=torch.float64, generator=generator).clamp(1e-300, 1 - 1e-16)
        drawn = torch.argsort(log_p - torch.log(-torch.log(uniform)), descending=True, stable=True)
        ascending = torch.argsort(batch.loss.cpu(), stable=True)
        return unweighted(first_open(ascending[drawn], batch, budget))
