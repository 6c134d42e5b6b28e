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
            room = int(torch.minimum(quotas, torch.bincount(groups, minlength=len(quotas))).sum())
            if budget > room:
                raise ValueError(f"quotas leave room for {room} picks, the budget is {budget}")
            self.groups, self.room = groups.tolist(), quotas.tolist()
            self.mask &= quotas[groups] > 0

    def take(self, index: int) -> None:
        """`index` has been picked."""
        assert self.mask[index]
        self.mask[index] = False
        if self.groups is not None:
            group = self.groups[index]
            self.room[group] -= 1
            if self.room[group] == 0:
                self.mask &= torch.tensor(self.groups) != group

    def best(self, value: torch.Tensor) -> int:
        """The open candidate of the largest value, the lowest of equals; (N,) -> index."""
        return int(torch.where(self.mask, value, -torch.inf).argmax())
