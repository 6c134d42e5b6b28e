"""GREATS: gradients that point where the validation loss falls (Wang et al. 2024, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator

from slap_ds.selection.base import ScoredBatch, Selection, Signal, Stateless, unweighted
from slap_ds.selection.methods.greedy import Open


@dataclass
class Greats(Stateless):
    """Greedy by eta <g_i, g_val>, from which each pick j takes eta^2 <g_i, g_j>.

    That is the second-order change of the validation loss after a gradient step on the picks, with
    the identity in place of its Hessian. Ties go to the lower position.

    g is the sketch, the mean over an answer's response tokens, of the head alone; published code
    takes the gradients of the trained layers through ghost products. A preconditioned sketch makes
    both products preconditioned ones.
    g_val is the mean over a few validation samples (`selection.greats.batch`), drawn anew at each
    step as in published code, and scored beside the candidates.

    Args:
        validation: where the validation samples are read from.
        eta: step size in the formula; None: the step's learning rate, as published.

    Raises:
        ValueError: there are no validation samples.
    """

    validation: Sequence[str]
    eta: float | None = None
    takes_quotas = True
    needs: frozenset[Signal] = frozenset({"sketch", "validation"})

    def __post_init__(self) -> None:
        if not self.validation:
            raise ValueError(
                "selection.method greats needs selection.validation, files of samples whose loss "
                "shall fall; not those of data.eval, which would then measure nothing"
            )

    def select(self, batch: ScoredBatch, budget: int, generator: Generator) -> Selection:
        assert batch.sketch is not None, "greats needs sketches"
        assert batch.validation is not None, "greats needs the sketch of validation samples"
        eta = batch.lr if self.eta is None else self.eta
        g = batch.sketch.double().cpu()  # (N, D)
        # Divided by eta, which changes no comparison and keeps a tiny one from underflow.
        score = g @ batch.validation.double().cpu()
        alignment = score.clone()
        free = Open(batch, budget)
        picks: list[int] = []
        while len(picks) < budget:
            index = free.best(score)
            free.take(index)
            picks.append(index)
            score = score - eta * (g @ g[index])
        chosen = torch.tensor(picks)
        return unweighted(chosen, aligned_share=float((alignment[chosen] > 0).double().mean()))
