"""GraNd: the largest gradients (Paul et al. 2021, section 2, definition 2.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator

from slap_ds.selection.base import ScoredBatch, Selection, Signal, Stateless, unweighted
from slap_ds.selection.methods.greedy import largest


@dataclass
class Grand(Stateless):
    """The M candidates whose gradient sketch is longest; ties go to the lower position.

    The paper takes the mean norm over several trained networks; here it is the norm on the current
    weights, of the mean over response tokens. `scoring.sketch: head_kron` with `curvature: none`
    estimates the norm of the last layer's gradient, as published code has it.
    """

    takes_quotas = True
    needs: frozenset[Signal] = frozenset({"sketch"})

    def select(self, batch: ScoredBatch, budget: int, generator: Generator) -> Selection:
        assert batch.sketch is not None, "grand needs sketches"
        norm = torch.linalg.vector_norm(batch.sketch.double().cpu(), dim=1)
        return unweighted(largest(norm, batch, budget))
