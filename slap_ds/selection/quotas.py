"""Quotas: picks that stay on the ranks that hold them, without one rank getting too many tokens.

In forward reuse a pick is trained where it was scored, and every rank waits for the busiest. A rank
whose share of tokens is full therefore stops offering candidates; the selector chooses among the
others'. The picks before that point, most of them, are those of the free selection.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Generator, Tensor

from slap_ds.selection.base import ScoredBatch, Selection, Selector, select

_WIDER = 1.02  # each time the shares turn out too small to hold the budget


def select_balanced(
    selector: Selector,
    batch: ScoredBatch,
    budget: int,
    generator: Generator,
    *,
    holder: Tensor,
    tokens: Tensor,
    holders: int,
    slack: float,
) -> Selection:
    """`select`, repeated under falling quotas until no holder has more than its share of tokens.

    A holder above its share, (1 + slack) times the mean over holders, may give only those of its
    picks, in the order they were picked, that fit into it. Then the others' picks change, and the
    test is repeated. Where candidates are too few to reach the budget like this, shares widen.

    Args:
        holder: (N,) int64 in [0, holders), who holds each candidate.
        tokens: (N,) int64, what training a candidate costs.

    Returns: the selection; `stats` has `rounds` and `busiest_holder_over_mean`.
    """
    state = generator.get_state()
    quotas = torch.full((holders,), len(batch), dtype=torch.int64)
    share = math.inf
    best: tuple[float, Selection] | None = None
    for rounds in range(1, 4 * holders + 20):
        generator.set_state(state)
        limited = batch if rounds == 1 else replace(batch, groups=holder, quotas=quotas)
        selection = select(selector, limited, budget, generator)
        load = _load(selection.picks, holder, tokens, holders)
        over_mean = float(load.max() / load.mean())
        selection.stats.update(rounds=rounds, busiest_holder_over_mean=over_mean)
        if best is None or over_mean < best[0]:
            best = over_mean, selection
        if rounds == 1:
            share = (1 + slack) * float(load.mean())
        if float(load.max()) <= share or over_mean <= 1 + slack:
            break
        quotas = torch.minimum(quotas, _fitting(selection.picks, holder, tokens, share, holders))
        while _room(quotas, holder, batch) < len(selection.picks):
            share *= _WIDER
            quotas = _fitting(selection.picks, holder, tokens, share, holders)
    assert best is not None
    return best[1]


def _load(picks: Tensor, holder: Tensor, tokens: Tensor, holders: int) -> Tensor:
    """(holders,) float64: tokens of the picks each one holds."""
    load = torch.zeros(holders, dtype=torch.float64)
    return load.index_add_(0, holder[picks], tokens[picks].double())


def _fitting(picks: Tensor, holder: Tensor, tokens: Tensor, share: float, holders: int) -> Tensor:
    """(holders,) int64: how many of its leading picks fit into a holder's share; no limit where
    all of them do."""
    quotas = torch.full((holders,), len(holder), dtype=torch.int64)
    for h in range(holders):
        used = tokens[picks[holder[picks] == h]].cumsum(0)
        if len(used) and float(used[-1]) > share:
            quotas[h] = max(1, int((used <= share).sum()))
    return quotas


def _room(quotas: Tensor, holder: Tensor, batch: ScoredBatch) -> int:
    """How many picks the holders can give together."""
    size = torch.bincount(holder[batch.usable()], minlength=len(quotas))
    return int(torch.minimum(quotas, size).sum())
