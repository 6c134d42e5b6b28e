"""CCS: coverage of all losses but the hardest (Zheng et al. 2023, section 4, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from slap_ds.selection.base import ScoredBatch, Selection, Signal, Stateless, unweighted
from slap_ds.selection.methods.greedy import Open
from slap_ds.selection.strata import assign_strata


@dataclass
class Ccs(Stateless):
    """Drop the hardest, cut the rest into strata of equal loss ranges, draw evenly from them.

    Strata are visited from the smallest up; each gives min(its size, what is left to pick // strata
    left), drawn uniformly, so that a stratum that is too small passes its share on. An empty one
    gives nothing.

    The paper prunes a data set once, by AUM over a whole training; here the score is the current
    loss, the mean over response tokens, in each candidate batch. No more are dropped as hardest
    than leaves the budget. Quotas may close candidates: their places go to the next of the same
    stratum's draw, and, where it has none, to the other strata's in the order of visits.

    Args:
        beta: share of the candidates that is dropped as hardest.
        strata: K.
    """

    beta: float = 0.0
    strata: int = 50
    takes_quotas = True
    needs: frozenset[Signal] = frozenset({"loss"})

    def select(self, batch: ScoredBatch, budget: int, generator: Generator) -> Selection:
        loss = batch.loss.cpu()
        n = len(loss)
        dropped = min(int(self.beta * n), n - budget)
        ascending = torch.argsort(loss, stable=True)
        kept, hardest = ascending[: n - dropped].sort().values, ascending[n - dropped :]
        strata = assign_strata(loss[kept], self.strata, "width")
        size = torch.bincount(strata, minlength=self.strata)
        share = even_budgets(size, budget)
        draw = torch.randperm(len(kept), generator=generator)
        free = Open(batch, budget)
        picks: list[int] = []
        order: list[int] = []
        for k in torch.argsort(size, stable=True).tolist():
            members = kept[draw[strata[draw] == k]].tolist()
            order += members
            picks += free.take_first(members, int(share[k]))
        picks += free.take_first(order + hardest.tolist(), budget - len(picks))
        return unweighted(
            torch.tensor(picks), strata_sizes=size.tolist(), strata_budgets=share.tolist()
        )


def even_budgets(size: Tensor, budget: int) -> Tensor:
    """min(size, what is left // strata left), from the smallest stratum up: (K,) -> (K,) int64.

    They sum to `budget` where the sizes allow it (<= their sum).
    """
    share = torch.zeros_like(size)
    for visited, k in enumerate(torch.argsort(size, stable=True).tolist()):
        share[k] = min(int(size[k]), (budget - int(share.sum())) // (len(size) - visited))
    return share
