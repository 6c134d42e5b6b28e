"""DivBS: a subset whose gradients span the batch's (Hong et al. 2024, section 3, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from slap_ds.selection.base import ScoredBatch, Selection, Signal, Stateless, unweighted
from slap_ds.selection.methods.greedy import Open

_NOTHING_LEFT = 1e-9  # share of the batch's mean gradient below which a residual is rounding


@dataclass
class DivBS(Stateless):
    """Greedy orthogonal matching: the pick explains most of what is left of the mean gradient.

    The residual r starts as the sum of the gradients g. Each pick is the candidate of the largest
    |<g_i, r>|; the part of g_i orthogonal to the picks so far, normalised, is then taken out of r.
    The paper says which gradient: the last layer's; here it is the sketch (`curvature: none` leaves
    it as published).

    Once the picks span r, every candidate scores 0: published code repeats picks there. Here a new
    round starts on the candidates not picked yet, with a fresh r; when their gradients are zero,
    the lowest positions fill the budget.
    """

    takes_quotas = True
    needs: frozenset[Signal] = frozenset({"sketch"})

    def select(self, batch: ScoredBatch, budget: int, generator: Generator) -> Selection:
        assert batch.sketch is not None, "divbs needs sketches"
        g = batch.sketch.double().cpu()  # (N, D)
        free, rounds = Open(batch, budget), 0
        picks: list[int] = []
        while len(picks) < budget:
            before = len(picks)
            rounds += 1
            for index in _round(g, free, budget - before):
                picks.append(index)
            if len(picks) == before:
                index = free.best(torch.zeros(len(g)))
                free.take(index)
                picks.append(index)
        return unweighted(torch.tensor(picks), rounds=rounds)


def _round(g: Tensor, free: Open, budget: int) -> list[int]:
    """Picks until the residual of the open candidates' sum is spanned, or `budget` are found."""
    residual = g[free.mask].sum(0)
    smallest = _NOTHING_LEFT * float(g[free.mask].norm(dim=1).max()) if free.mask.any() else 0.0
    basis = torch.zeros(0, g.shape[1], dtype=g.dtype)  # (picks of this round, D) orthonormal
    picks: list[int] = []
    while len(picks) < budget and float(residual.norm()) > smallest:
        index = free.best((g @ residual).abs())
        # Twice is enough (Giraud et al. 2005): once loses orthogonality to rounding.
        new = g[index] - basis.t() @ (basis @ g[index])
        new = new - basis.t() @ (basis @ new)
        if float(new.norm()) <= smallest:
            break
        new = new / new.norm()
        residual = residual - (new @ residual) * new
        basis = torch.cat([basis, new[None]])
        free.take(index)
        picks.append(index)
    return picks
