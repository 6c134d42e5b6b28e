"""The plain selectors: everything, a uniform draw, the largest losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator

from slap_ds.selection.base import ScoredBatch, Selection, Signal, Stateless, unweighted


@dataclass
class Full(Stateless):
    """All N candidates, whatever the budget: ordinary training."""

    needs: frozenset[Signal] = frozenset()

    def select(self, batch: ScoredBatch, budget: int, generator: Generator) -> Selection:
        return unweighted(torch.arange(len(batch)))


@dataclass
class Random(Stateless):
    """M candidates uniformly without replacement; scores nothing."""

    needs: frozenset[Signal] = frozenset()

    def select(self, batch: ScoredBatch, budget: int, generator: Generator) -> Selection:
        return unweighted(torch.randperm(len(batch), generator=generator)[:budget])


@dataclass
class Hard(Stateless):
    """The M largest losses; ties go to the lower position."""

    needs: frozenset[Signal] = frozenset({"loss"})

    def select(self, batch: ScoredBatch, budget: int, generator: Generator) -> Selection:
        order = torch.argsort(batch.loss.cpu(), descending=True, stable=True)
        return unweighted(order[:budget])
