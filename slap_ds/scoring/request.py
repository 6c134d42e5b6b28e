"""What one scoring forward computes beside the loss."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

Sketch = Literal["head_input", "head_kron", "hvp"]
Source = Literal["exact_head", "hutchinson_head", "hutchinson_blocks"]
Extra = Literal["el2n", "nuclear", "hidden"]


class ScoreRequest(NamedTuple):
    """What a scoring forward is asked for, made by `ScoringPlan.request` for one step.

    A tuple, because DeepSpeed's hooks look for tensors in the inputs of modules.
    """

    sketch: Sketch | None = None  # per sample
    diagonal: Source | None = None  # over all tokens
    probes: int = 0  # m: random vectors of the Hutchinson sources and of the sketch hvp
    size: tuple[int, int] = (1, 1)  # (a, b) of head_kron
    blocks: int = 0  # n: how many of the last blocks take part; 0: the head alone
    token_share: float = 1.0  # share of the response tokens in the exact diagonal
    seed: int = 0
    step: int = 0
    sketch_dim: int | None = None  # D: numbers that a sketch of width E is projected to
    scale: Tensor | None = None  # (E,) multiplies what is projected, before it is
    bfloat16: bool = False  # the sketch leaves the forward in bfloat16
    extras: tuple[Extra, ...] = ()  # further numbers per sample, side by side; hidden comes last

    def sketch_only(self) -> ScoreRequest:
        """The sketch as here, and nothing else."""
        return self._replace(diagonal=None, token_share=1.0, blocks=0, extras=())
