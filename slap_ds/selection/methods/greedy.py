"""Which candidates a greedy selector may still pick."""

from __future__ import annotations

import torch

from slap_ds.selection.base import ScoredBatch


class Open:
    """Candidates not picked yet whose group's quota is not used up."""

    def __init__(self, batch: ScoredBatch, budget: int) -> None:
        n = len(batch)
        self.mask = torch.ones(n, dtype=torch.bool)
        self.groups: list[int] | None = None
        if batch.groups is not None and batch.quotas is not None:
            groups, quotas = batch.groups.cpu(), batch.quotas.cpu()
            limit = int(torch.minimum(quotas, torch.bincount(groups, minlength=len(quotas))).sum())
            if budget > limit:
                raise ValueError(f"quotas leave room for {limit} picks, the budget is {budget}")
            self.groups, self.remaining = groups.tolist(), quotas.tolist()
            self.mask &= quotas[groups] > 0

    def take(self, index: int) -> None:
        """`index` has been picked."""
        assert self.mask[index]
        self.mask[index] = False
        if self.groups is not None:
            group = self.groups[index]
            self.remaining[group] -= 1
            if self.remaining[group] == 0:
                self.mask &= torch.tensor(self.groups) != group

    def take_first(self, order: torch.Tensor | list[int], count: int) -> list[int]:
        """Take the first `count` open candidates of `order`, or as many as there are."""
        taken: list[int] = []
        for index in order if isinstance(order, list) else order.tolist():
            if len(taken) == count:
                break
            if self.mask[index]:
                self.take(index)
                taken.append(index)
        return taken

    def best(self, value: torch.Tensor) -> int:
        """The open candidate of the largest value, the lowest of equals; (N,) -> index."""
        return int(torch.where(self.mask, value, -torch.inf).argmax())


def first_open(order: torch.Tensor | list[int], batch: ScoredBatch, budget: int) -> torch.Tensor:
    """The first `budget` candidates of `order` that quotas allow, in that order: (M,) int64."""
    return torch.tensor(Open(batch, budget).take_first(order, budget))


def largest(score: torch.Tensor, batch: ScoredBatch, budget: int) -> torch.Tensor:
    """The `budget` candidates of the largest scores (N,), largest first; of equals the lower
    position first, and quotas kept."""
    return first_open(torch.argsort(score.cpu(), descending=True, stable=True), batch, budget)
