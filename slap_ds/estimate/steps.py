"""Seconds of a step, by phase: arithmetic, or the weights' gathers where those take longer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from slap_ds.config.schema import Config
from slap_ds.estimate.hardware import Hardware
from slap_ds.estimate.memory import sketch_width
from slap_ds.estimate.shape import BYTES, Shape
from slap_ds.models.causal import block_flops, head_flops


@dataclass(frozen=True)
class Step:
    """What a step does, as far as its time depends on it."""

    config: Config
    shape: Shape
    sample_tokens: float  # mean, of a candidate
    response_share: float  # of them
    candidates: int  # N, over all GPUs
    gpus: int
    stage: int  # of ZeRO
    keep: float  # share of the candidates that is trained
    scores: bool
    reuse: bool  # the scoring forward is the training forward

    def full(self) -> Step:
        """Training on all of these candidates."""
        return replace(self, keep=1.0, scores=False, reuse=False)

    @property
    def groups(self) -> int:
        """Of GPUs that share their rows."""
        return self.config.engine.groups(self.gpus)

    def rows(self, share: float, row_tokens: int) -> int:
        """Rows that a GPU fills with this share of its candidates, alone or with its group."""
        tokens = share * self.candidates / self.groups * self.sample_tokens
        return math.ceil(round(tokens / row_tokens, 6))


def seconds(step: Step, hw: Hardware) -> dict[str, float]:
    """By phase: score, gather, select, train."""
    config, shape, tokens = step.config, step.shape, step.sample_tokens
    local, keep = step.candidates / step.gpus, step.keep
    forward = block_flops(shape.config, shape.active, [round(tokens)]) * local
    head = head_flops(shape.config, round(tokens * step.response_share)) * local
    recompute = int(config.model.gradient_checkpointing)
    received = shape.parameters * BYTES[config.model.dtype] * (step.gpus - 1) / step.gpus
    gathered = received / hw.gather_bytes_per_s

    def phase(flops: float, gathers: float) -> float:
        # Gathers run ahead of the compute that needs them; the slower of the two counts.
        return max(flops / hw.flops_per_s, gathers * gathered)

    # Frozen weights have no gradient, which is half of the backward.
    frozen = shape.trained is not None
    passes = (2 if step.reuse else 3) + recompute - frozen
    for_scores, for_training = _whole_gathers(step)
    # Nothing hides the attention's exchanges: what follows in a layer waits for them.
    exchange = exchanged_bytes(config, shape, local * tokens) * shape.layers / hw.gather_bytes_per_s
    train = phase(keep * (passes * forward + (3 - frozen) * head), for_training)
    train += keep * (2 - step.reuse + recompute) * exchange  # of the backward as many bytes
    if not step.scores:
        return {"score": 0.0, "gather": 0.0, "select": 0.0, "train": train}
    doublings = math.log2(step.gpus)
    d = sketch_width(config, shape.width)
    payload = step.candidates * (4 * d + 20)
    return {
        "score": phase(forward + 2 * head, for_scores) + exchange,
        "gather": payload / hw.gather_bytes_per_s + 6 * hw.latency_s * doublings
        if step.gpus > 1
        else 0.0,
        "select": _pairs(step.candidates, keep) * d / hw.pair_dims_per_s,
        "train": train,
    }


def _whole_gathers(step: Step) -> tuple[float, float]:
    """How often a step gathers all weights, in scoring and in training (or sends as much)."""
    config = step.config
    trained = step.rows(step.keep, config.batch.micro_batch_tokens)
    if step.stage < 3:
        # Whole weights are gathered once a step, after it; ZeRO-2 reduces each row's gradients.
        return 0.0, trained + 1 if step.stage == 2 else 2.0
    scored = step.rows(1.0, config.score_row_tokens) if step.scores else 0
    on_host = config.step.boundaries == "host"
    return row_gathers(step.shape, scored, trained, step.reuse, on_host)


def row_gathers(
    shape: Shape, scored: int, trained: int, reuse: bool, on_host: bool = False
) -> tuple[float, float]:
    """Gathers of all weights under ZeRO-3, of so many rows in scoring and in training.

    Nothing is kept in between, save a head from its forward to its backward, and from the last
    scored row to the first replayed one. tests/distributed/test_reuse.py counts them.
    """
    head = shape.width * shape.vocab / shape.parameters
    # Used below the blocks and above them: gathered for each, unless it is kept meanwhile.
    twice = head if shape.tied else 0.0
    score = scored * (1 + twice)
    if not reuse:
        return score, trained * (2 - (head - twice))
    if on_host and not shape.tied:  # the embedding is computed again
        twice = head
    kept = head if scored and trained else 0.0
    return score - (kept if shape.tied else 0.0), trained * (1 + twice) - kept


def exchanged_bytes(config: Config, shape: Shape, tokens: float) -> float:
    """Bytes that a GPU which holds `tokens` tokens sends in one layer's forward to those it shares
    rows with: queries, keys, values and attention's result, all but its own share of them."""
    sharing, text = config.engine.sequence_parallel, shape.config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = max(getattr(text, "num_key_value_heads", None) or heads, sharing)
    width = getattr(text, "head_dim", None) or shape.width // heads
    sent: float = 2 * (heads + kv_heads) * width * BYTES[config.model.dtype] * tokens
    return sent * (sharing - 1) / sharing


def _pairs(n: int, keep: float) -> float:
    """Distances that farthest points need: every pick to every point not picked before it."""
    picks = keep * n
    return picks * n - picks * picks / 2
