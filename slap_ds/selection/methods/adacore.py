"""AdaCore: weighted medoids of curvature-scaled gradients (Pooladzandi et al. 2022, section 4)."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch
from torch import Generator

from slap_ds.selection.base import ScoredBatch, Selection, Signal, Stateless
from slap_ds.selection.methods.greedy import Open


@dataclass
class AdaCore(Stateless):
    """Greedy facility location on distances between preconditioned gradients; a pick weighs as
    many candidates as it is the nearest pick of.

    F(S) = sum_i max_{j in S} (d_max - d_ij) is monotone and submodular, so greedy picks reach
    (1 - 1/e) of the best (Nemhauser et al. 1978). d_ij is the distance of sketches, which the
    scorer has divided by the bias-corrected moving average of the Hessian's diagonal
    (`scoring.curvature`). The paper averages a sample's gradient over steps as well; a stream shows
    each sample once, so here it is the current one. The weights sum to N and every pick's is >= 1.
    """

    takes_quotas = True
    needs: frozenset[Signal] = frozenset({"sketch"})

    def select(self, batch: ScoredBatch, budget: int, generator: Generator) -> Selection:
        assert batch.sketch is not None, "adacore needs sketches"
        x = batch.sketch.double().cpu()
        distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")  # (N, N)
        nearest = torch.full((len(x),), float(distance.max()), dtype=x.dtype)
        free = Open(batch, budget)
        picks: list[int] = []

        def gain(j: int) -> float:
            return float((nearest - distance[j]).clamp(min=0).sum())

        # Gains only fall, so an old gain is an upper bound: most need no second look (Minoux 1978).
        heap = [(-gain(j), j) for j in range(len(x))]
        heapq.heapify(heap)
        while len(picks) < budget:
            _, j = heapq.heappop(heap)
            if not free.mask[j]:
                continue
            now = (-gain(j), j)
            if heap and now > heap[0]:
                heapq.heappush(heap, now)
                continue
            free.take(j)
            picks.append(j)
            nearest = torch.minimum(nearest, distance[j])
        chosen = torch.tensor(picks)
        owner = distance[:, chosen].argmin(1)
        # Of equal candidates that are all picked, each stands for itself.
        owner[chosen] = torch.arange(budget)
        weights = torch.bincount(owner, minlength=budget).float()
        return Selection(chosen, weights, {"largest_weight": float(weights.max())})
