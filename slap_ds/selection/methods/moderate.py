"""Moderate coreset: neither near the middle nor far out (Xia et al. 2023, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from slap_ds.selection.base import ScoredBatch, Selection, Signal, Stateless, unweighted
from slap_ds.selection.methods.greedy import first_open


@dataclass
class Moderate(Stateless):
    """The M candidates whose distance to the median feature is nearest to the median distance.

    Ranked by distance, the picks are the central band of M ranks; where it cannot be central, it
    begins one rank nearer. Ties in distance go to the lower position.

    The paper measures hidden features to a centre for each class; answers have no class, so there
    is one centre, the median over the candidates in each dimension (of an even count the mean of
    the middle two, as in published code), and the feature is the sketch. Published code rounds both
    ends of the band, which may give a pick more or less than asked for.
    """

    takes_quotas = True
    needs: frozenset[Signal] = frozenset({"sketch"})

    def select(self, batch: ScoredBatch, budget: int, generator: Generator) -> Selection:
        assert batch.sketch is not None, "moderate needs sketches"
        x = batch.sketch.double().cpu()
        distance = torch.linalg.vector_norm(x - _median(x), dim=1)
        by_distance = torch.argsort(distance, stable=True)
        # From the middle rank outwards: with quotas the band grows on where it is not full.
        off_middle = (2 * torch.arange(len(x)) - (len(x) - 1)).abs()
        order = by_distance[torch.argsort(off_middle, stable=True)]
        return unweighted(first_open(order, batch, budget))


def _median(x: Tensor) -> Tensor:
    """(N, D) -> (D,); torch's own takes the lower of the middle two."""
    middle = x.sort(dim=0).values
    return (middle[(len(x) - 1) // 2] + middle[len(x) // 2]) / 2
