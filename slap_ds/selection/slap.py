"""SLAP: loss strata, budgets by exp(loss), farthest points (our reading of arXiv 2605.23969)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator

from slap_ds.ops import farthest_point
from slap_ds.selection.base import ScoredBatch, Selection, Signal, Stateless
from slap_ds.selection.strata import assign_strata, expected_budgets, sampled_budgets


@dataclass
class Slap(Stateless):
    """Stratified Loss-based Pruning: hard strata get larger budgets, each spread over its features.

    The first pick of the first stratum with a budget is random; every further one is the point of
    its stratum farthest from all picks so far (of its own stratum's with `across_strata` False).

    With `reweight` inverse a pick weighs its stratum's size over the number of its picks, the
    inverse probability of a uniform draw inside the stratum, scaled to mean 1.
    """

    strata: int = 4
    strata_by: Literal["quantile", "width"] = "quantile"
    budgets: Literal["sampled", "expected"] = "sampled"
    temperature: float = 1.0
    across_strata: bool = True
    reweight: Literal["none", "inverse"] = "none"
    preset: Literal["measured", "paper"] = "measured"  # of the sketches, which the scorer makes
    takes_quotas = True
    needs: frozenset[Signal] = frozenset({"loss", "sketch"})

    def __post_init__(self) -> None:
        self.unit_sketches = self.preset == "measured"

    def select(self, batch: ScoredBatch, budget: int, generator: Generator) -> Selection:
        assert batch.sketch is not None, "slap needs sketches"
        k = min(self.strata, len(batch))
        strata = assign_strata(batch.loss, k, self.strata_by)
        if self.budgets == "sampled":
            share = sampled_budgets(batch.loss, strata, k, budget, self.temperature, generator)
        else:
            share = expected_budgets(batch.loss, strata, k, budget, self.temperature)
        members = (strata == int(share.nonzero()[0])).nonzero()[:, 0]
        if batch.groups is not None and batch.quotas is not None:
            members = members[batch.quotas[batch.groups[members]] > 0]
        first = int(members[torch.randint(len(members), (1,), generator=generator)])
        points = farthest_point(
            batch.sketch,
            share,
            strata,
            first=first,
            across_strata=self.across_strata,
            groups=batch.groups,
            quotas=batch.quotas,
        )
        sizes = torch.bincount(strata, minlength=k)
        weights = torch.ones(len(points.picks), dtype=torch.float32)
        if self.reweight == "inverse":
            home = strata[points.picks.cpu()]
            weights = (sizes / torch.bincount(home, minlength=k))[home].float()
            weights /= weights.mean()
        stats = {"strata_sizes": sizes.tolist(), "strata_budgets": share.tolist()}
        return Selection(points.picks, weights, stats)
