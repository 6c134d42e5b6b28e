"""UDS: rich answers unlike those trained lately (Zou et al. 2025, arXiv 2510.16882, section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from slap_ds.selection.base import ScoredBatch, Selection, Signal, Stateless, unweighted
from slap_ds.selection.methods.greedy import largest


@dataclass
class Uds(Stateless):
    """The M largest of nuclear norm + alpha * mean distance to the embeddings of recent picks.

    The nuclear norm is that of the logits of an answer's response tokens, (T_i, V); it is not
    divided by their number. Published code takes all tokens of the padded row, prompt and padding
    included. The embedding is the answer's mean final hidden state, brought to `width` numbers by
    random signs where it is wider; published code projects the logits from both sides by subsampled
    Fourier transforms, to 8 x 128. So its alpha fits its scale alone.

    The queue holds the embeddings of the last `queue` picks, over all steps and ranks, and is
    selector state. While it is empty the distance is 0. Ties go to the lower position.

    Args:
        alpha: weight of the distance (1.5e-3 published); None: what gives both terms the same
            standard deviation in the candidate batch.
    """

    alpha: float | None = None
    queue: int = 1024
    width: int = 1024
    takes_quotas = True
    needs: frozenset[Signal] = frozenset({"nuclear", "hidden"})
    recent: Tensor = field(default_factory=lambda: torch.zeros(0, 0))  # (<= queue, D), oldest first

    def select(self, batch: ScoredBatch, budget: int, generator: Generator) -> Selection:
        assert batch.nuclear is not None, "uds needs nuclear norms"
        assert batch.hidden is not None, "uds needs mean hidden states"
        x = self._embed(batch.hidden.float().cpu())
        norm = batch.nuclear.double().cpu()
        distance = torch.zeros_like(norm)
        if len(self.recent):
            distance = torch.cdist(x.double(), self.recent.double()).mean(1)
        alpha = self.alpha
        if alpha is None:
            spread = float(distance.std(unbiased=False))
            alpha = float(norm.std(unbiased=False)) / spread if spread > 0 else 0.0
        picks = largest(norm + alpha * distance, batch, budget)
        return unweighted(picks, uds_alpha=alpha, uds_distance=float(distance[picks].mean()))

    def remember(self, batch: ScoredBatch, selection: Selection) -> None:
        assert batch.hidden is not None
        new = self._embed(batch.hidden[selection.picks.to(batch.hidden.device)].float().cpu())
        kept = self.recent if len(self.recent) else new[:0]
        self.recent = torch.cat([kept, new])[-self.queue :]

    def state_dict(self) -> dict[str, Any]:
        return {"recent": self.recent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.recent = state["recent"]

    def _embed(self, hidden: Tensor) -> Tensor:
        """(n, E) -> (n, min(E, width)) float32; distances are kept (Achlioptas 2003)."""
        if hidden.shape[1] <= self.width:
            return hidden
        g = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (hidden.shape[1], self.width), generator=g).float() * 2 - 1
        projected: Tensor = hidden @ signs / self.width**0.5
        return projected
