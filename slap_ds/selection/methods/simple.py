"""The plain selectors: everything, a uniform draw, the extremes of one score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator

from slap_ds.selection.base import ScoredBatch, Selection, Signal, Stateless, unweighted
from slap_ds.selection.methods.greedy import largest


@dataclass
class Full(Stateless):
    """All N candidates, whatever the budget: ordinary training."""

    own_count = True
    needs: frozenset[Signal] = frozenset()

    def budget(self, step: int, steps: int, candidates: int, keep: float) -> int:
        return candidates

    def select(self, batch: ScoredBatch, budget: int, generator: Generator) -> Selection:
        return unweighted(torch.arange(len(batch)))


@dataclass
class Random(Stateless):
    """M candidates uniformly without replacement; scores nothing."""

    needs: frozenset[Signal] = frozenset()

    def select(self, batch: ScoredBatch, budget: int, generator: Generator) -> Selection:
        return unweighted(torch.randperm(len(batch), generator=generator)[:budget])


@dataclass
class Hard(Stateless):
    """The M largest losses; ties go to the lower position.

    Online hard example mining (Shrivastava et al. 2016, section 4) and Max-K loss selection with
    the mean over response tokens as an answer's loss.
    """

    takes_quotas = True
    needs: frozenset[Signal] = frozenset({"loss"})

    def select(self, batch: ScoredBatch, budget: int, generator: Generator) -> Selection:
        return unweighted(largest(batch.loss, batch, budget))


@dataclass
class Easy(Stateless):
    """The M smallest losses; ties go to the lower position.

    Shah et al. 2020 (Choosing the sample with lowest loss makes SGD robust, section 3) take the one
    smallest of a few; here it is the M smallest of N, by the mean over response tokens.
    """

    takes_quotas = True
    needs: frozenset[Signal] = frozenset({"loss"})

    def select(self, batch: ScoredBatch, budget: int, generator: Generator) -> Selection:
        return unweighted(largest(-batch.loss, batch, budget))


@dataclass
class El2n(Stateless):
    """The M largest errors |softmax - onehot| (Paul et al. 2021, section 2, definition 2.3).

    An answer's error is the mean of its response tokens' L2 norms. The paper's score is for one
    label, the mean over ten networks early in training, and prunes once, offline; published code
    adds the first ten epochs up. Here it is that of the current weights, at every step.
    """

    takes_quotas = True
    needs: frozenset[Signal] = frozenset({"el2n"})

    def select(self, batch: ScoredBatch, budget: int, generator: Generator) -> Selection:
        assert batch.el2n is not None, "el2n needs the norms of the errors"
        return unweighted(largest(batch.el2n, batch, budget))
