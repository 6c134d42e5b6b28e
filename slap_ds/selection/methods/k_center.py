"""k-center: farthest points, no strata (Gonzalez 1985; Sener and Savarese 2018, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator

from slap_ds.ops import farthest_point
from slap_ds.selection.base import ScoredBatch, Selection, Signal, Stateless, unweighted


@dataclass
class KCenter(Stateless):
    """A random first pick, then always the candidate farthest from all picks so far."""

    takes_quotas = True
    needs: frozenset[Signal] = frozenset({"sketch"})

    def select(self, batch: ScoredBatch, budget: int, generator: Generator) -> Selection:
        assert batch.sketch is not None, "k_center needs sketches"
        members = torch.arange(len(batch))
        if batch.groups is not None and batch.quotas is not None:
            members = members[(batch.quotas[batch.groups] > 0).cpu()]
        first = int(members[torch.randint(len(members), (1,), generator=generator)])
        points = farthest_point(
            batch.sketch,
            torch.tensor([budget]),
            first=first,
            groups=batch.groups,
            quotas=batch.quotas,
        )
        return unweighted(points.picks)
