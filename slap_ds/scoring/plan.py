"""From the `scoring` section to what a step's scoring forward computes.

    config + the selector's needs -> ScoringPlan -> ScoreRequest of a step

The trainer and the engine pass `ScoreRequest` on and never look at which source or sketch it names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from slap_ds.config.schema import ScoringConfig
from slap_ds.scoring.curvature import Curvature
from slap_ds.scoring.head import head_cost
from slap_ds.scoring.request import Extra, ScoreRequest
from slap_ds.selection import Signal


@dataclass(frozen=True)
class ScoringPlan:
    """What scoring computes in this run; the same on every rank."""

    config: ScoringConfig
    needs: frozenset[Signal]
    seed: int = 0

    @property
    def sketches(self) -> bool:
        return "sketch" in self.needs

    @property
    def projects(self) -> bool:
        """Whether each rank projects its sketches before they are gathered.

        What is projected cannot be divided by this step's curvature any more, which is known only
        after all ranks' tokens: the average over the steps before stands in for it.
        """
        return self.config.sketch == "head_kron" or self.config.sketch_dim is not None

    @property
    def extras(self) -> tuple[Extra, ...]:
        """The further signals, in the order of their columns."""
        every: tuple[Extra, ...] = ("el2n", "nuclear", "hidden")
        return tuple(name for name in every if name in self.needs)

    def curvature(self) -> Curvature | None:
        """A fresh curvature, or None where none is wanted."""
        c = self.config
        if not self.sketches or c.curvature == "none":
            return None
        return Curvature(c.curvature_decay, c.curvature_power, c.curvature_floor, c.curvature_block)

    def request(self, step: int, curvature: Curvature | None) -> ScoreRequest:
        """The order for one step."""
        c = self.config
        if not self.sketches:
            return ScoreRequest(extras=self.extras)
        source = None if c.curvature == "none" else c.curvature
        scale: Tensor | None = None
        if self.projects and curvature is not None:
            scale = curvature.scale()
        return ScoreRequest(
            sketch=c.sketch,
            diagonal=source,
            probes=c.probes,
            size=c.sketch_size,
            blocks=c.blocks if source == "hutchinson_blocks" else 0,
            token_share=c.curvature_tokens if source == "exact_head" else 1.0,
            seed=self.seed,
            step=step,
            sketch_dim=c.sketch_dim,
            scale=None if scale is None else scale.float(),
            bfloat16=c.sketch_dtype == "bfloat16",
            extras=self.extras,
        )

    def head_flops(self, model_config: Any, tokens: int, samples: int, chunk_tokens: int) -> float:
        """FLOPs of the head's products for `samples` candidates of `tokens` response tokens."""
        text, asked = model_config.get_text_config(), self.request(0, None)
        return head_cost(asked, tokens, samples, text.hidden_size, text.vocab_size, chunk_tokens)

    def block_passes(self, layers: int) -> float:
        """Work in blocks beside the forward, in forwards of all `layers` blocks."""
        return block_passes(self.request(0, None), layers)


def block_passes(request: ScoreRequest, layers: int) -> float:
    """Work in blocks beside the scoring forward, in forwards of all `layers` blocks.

    The last blocks' forward is run again; their backward to hidden states alone costs as much. Of a
    Hessian-vector product each of the two is differentiated once more.
    """
    return request.blocks / layers * (2 + 4 * request.probes)
