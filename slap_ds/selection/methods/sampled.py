"""Draws by what a candidate adds to the step's gradient and what it costs; weights undo the bias.

The step's loss is a mean over response tokens. Where the gradients of tokens are nearly orthogonal,
the length of a candidate's part of it grows as the root of its response tokens n, times its mean
loss; its cost are all its tokens. The chances that follow (inclusion.py) need no forward for n.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Generator, Tensor

from slap_ds.selection.base import ScoredBatch, Selection, Signal, Stateless, unweighted
from slap_ds.selection.inclusion import chances, systematic

_LEAST_LOSS = 1e-3  # nats: what is learnt by heart keeps a chance above `least`


@dataclass
class Sampled(Stateless):
    """Picks with chances proportional to sqrt(n) / sqrt(tokens), weighing the inverse.

    Picks are spread over the order of n. `by` loss multiplies the chances by the mean loss: all
    candidates are scored for that, and the picks are spread over the order of losses, so that every
    loss stratum, however it is cut, trains its expected share to within one pick.

    The budget is one of tokens: `keep` of the batch's, prompts included, in expectation. How many
    picks that makes varies. `least` bounds the weights by its inverse. Quotas would bias the draw:
    with forward reuse picks stay where they are, and the ranks' tokens are level in expectation.
    """

    keep: float
    by: Literal["size", "loss"] = "size"
    least: float = 0.1
    own_count = True
    needs: frozenset[Signal] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.needs = frozenset({"loss"} if self.by == "loss" else ())

    def select(self, batch: ScoredBatch, budget: int, generator: Generator) -> Selection:
        assert batch.response_tokens is not None, "sampled needs sizes"
        if budget == len(batch):
            return unweighted(torch.arange(budget))
        chance = self.chances(batch)
        key = batch.loss.cpu() if self.by == "loss" else batch.response_tokens
        # Equal keys, frequent among short answers, stand in another order at every step.
        mixed = torch.randperm(len(batch), generator=generator)
        order = mixed[torch.argsort(key[mixed], stable=True)]
        start = float(torch.rand((), dtype=torch.float64, generator=generator))
        picks = systematic(chance, order, start)
        if not len(picks):
            picks = chance.argmax()[None]  # a step cannot train nothing
        weights = (1 / chance[picks]).float()
        stats = {"largest_weight": float(weights.max()), "certain": int((chance == 1).sum())}
        return Selection(picks, weights, stats)

    def chances(self, batch: ScoredBatch) -> Tensor:
        """(N,) float64: how probable each candidate is to be picked."""
        assert batch.tokens is not None, "sampled needs sizes"
        assert batch.response_tokens is not None, "sampled needs sizes"
        value = batch.response_tokens.double().clamp(min=1).sqrt()
        if self.by == "loss":
            value *= batch.loss.double().cpu().clamp(min=_LEAST_LOSS)
        return chances(value, batch.tokens, self.keep, min(self.least, self.keep))
