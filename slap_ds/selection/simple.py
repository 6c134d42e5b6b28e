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

    takes_quotas = True
    needs: frozenset[Signal] = frozenset({"loss"})

    def select(self, batch: ScoredBatch, budget: int, generator: Generator) -> Selection:
        order = torch.argsort(batch.loss.cpu(), descending=True, stable=True)
        if batch.groups is not None and batch.quotas is not None:
            room, kept = batch.quotas.tolist(), []
            for i in order.tolist():
                group = int(batch.groups[i])
                if room[group] > 0:
                    room[group] -= 1
                    kept.append(i)
            order = torch.tensor(kept)
        return unweighted(order[:budget])
