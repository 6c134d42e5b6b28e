"""What a configuration needs before it is started: memory per GPU and time per step, by formula.

    estimate(config, model shape, tokens per sample, gpus) -> Estimate

Memory counts what slap_ds and ZeRO-3 hold; the allocator's fragmentation and CUDA's own context
come on top (allow 10 % and 2 GiB). Time is a model, not a measurement: its constants are arguments,
and benchmarks/bench_step.py measures them. docs/performance.md lists the assumptions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from slap_ds.config import Config
from slap_ds.models.causal import block_flops, head_flops

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Shape:
    """The numbers of a decoder that memory and time depend on."""

    parameters: int
    layers: int
    width: int  # E
    intermediate: int
    vocab: int  # V
    config: Any

    @classmethod
    def of(cls, model_config: Any) -> Shape:
        """From a transformers config; parameters are counted on a meta model."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config)
        text = model_config.get_text_config()
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            layers=text.num_hidden_layers,
            width=text.hidden_size,
            intermediate=getattr(text, "intermediate_size", 4 * text.hidden_size),
            vocab=text.vocab_size,
            config=model_config,
        )


@dataclass(frozen=True)
class Hardware:
    """One GPU and its network; the defaults are an H100's and a 400 Gb/s port's, derated."""

    flops_per_s: float = 400e12  # what dense bf16 training reaches, not the peak
    gather_bytes_per_s: float = 40e9  # all-gather of weights, per GPU
    latency_s: float = 20e-6  # of one collective, per doubling of ranks
    pair_dims_per_s: float = 13e12  # farthest points: pairs * dimensions; derived, not measured


@dataclass(frozen=True)
class Estimate:
    """Per GPU: GiB by part, seconds of a step by part, and of full training on all candidates."""

    gpus: int
    candidates: int
    memory_gib: dict[str, float]
    step_s: dict[str, float]
    full_step_s: float

    @property
    def total_gib(self) -> float:
        return sum(self.memory_gib.values())

    @property
    def ratio_to_full(self) -> float:
        return sum(self.step_s.values()) / self.full_step_s

    @property
    def selection_share(self) -> float:
        parts = self.step_s
        return (parts["gather"] + parts["select"]) / sum(parts.values())


def estimate(
    config: Config,
    shape: Shape,
    sample_tokens: float,
    response_share: float,
    gpus: int,
    candidates_per_gpu: float,
    hardware: Hardware | None = None,
) -> Estimate:
    """Memory and time per step of `config` on `gpus` GPUs under ZeRO-3.

    Args:
        sample_tokens: mean tokens per candidate. response_share: share of them that is trained.
        candidates_per_gpu: N / gpus; the batch grows with the GPUs.
    """
    hw = hardware or Hardware()
    reuse = config.step.forward != "separate" and config.model.gradient_checkpointing
    n = max(1, round(candidates_per_gpu * gpus))
    return Estimate(
        gpus=gpus,
        candidates=n,
        memory_gib=_memory(config, shape, sample_tokens * n / gpus, n, gpus, reuse),
        step_s=_step(config, shape, sample_tokens, response_share, n, gpus, reuse, hw),
        full_step_s=sum(
            _step(config, shape, sample_tokens, response_share, n, gpus, None, hw).values()
        ),
    )


def _memory(
    config: Config, shape: Shape, local_tokens: float, n: int, gpus: int, reuse: bool
) -> dict[str, float]:
    value = BYTES[config.model.dtype]
    row = config.batch.micro_batch_tokens
    e, v, layers = shape.width, shape.vocab, shape.layers
    block = (shape.parameters - 2 * e * v) / layers
    kept = local_tokens * (layers + 1) if reuse else float(row * layers)
    on_gpu = 0.0 if reuse and config.step.boundaries == "host" else kept * e * value
    recompute = row * (12 * e + 4 * shape.intermediate) * value
    if not config.model.gradient_checkpointing:
        recompute *= layers
    chunk = config.scoring.chunk_tokens * v * (4 + 4 + value)
    parts = {
        "weights": shape.parameters * value / gpus,
        "gradients": shape.parameters * value / gpus,
        "optimizer (float32 master, two moments)": shape.parameters * 12 / gpus,
        "gathered weights (two blocks, head)": (2 * block + e * v) * value,
        "head gradient": e * v * (4 + value),
        "head chunk": float(chunk),
        "block inputs": on_gpu,
        "one block's activations": float(recompute),
        "scores of all candidates": n * (e * 4 * 2 + 20.0),
    }
    return {name: size / GIB for name, size in parts.items()}


def _step(
    config: Config,
    shape: Shape,
    sample_tokens: float,
    response_share: float,
    n: int,
    gpus: int,
    reuse: bool | None,
    hw: Hardware,
) -> dict[str, float]:
    """Seconds by phase; `reuse` None: full training on all candidates, nothing scored."""
    keep = 1.0 if reuse is None else config.selection.keep
    local = n / gpus
    forward = block_flops(shape.config, shape.parameters, [round(sample_tokens)]) * local
    head = head_flops(shape.config, round(sample_tokens * response_share)) * local
    recompute = int(config.model.gradient_checkpointing)
    gathered = shape.parameters * BYTES[config.model.dtype] / hw.gather_bytes_per_s

    def phase(flops: float, gathers: float) -> float:
        # Gathers run ahead of the compute that needs them; the slower of the two counts.
        return max(flops / hw.flops_per_s, gathers * gathered)

    def rows(samples: float, tokens: int) -> int:
        return math.ceil(samples * sample_tokens / tokens)

    row = config.batch.micro_batch_tokens
    passes = (2 if reuse else 3) + recompute
    train = phase(keep * (passes * forward + 3 * head), 2 * rows(keep * local, row))
    if reuse is None:
        return {"train": train, "score": 0.0, "gather": 0.0, "select": 0.0}
    doublings = math.log2(max(gpus, 2))
    payload = n * (4 * shape.width + 20)
    return {
        "score": phase(forward + 2 * head, rows(local, config.score_row_tokens)),
        "gather": payload / hw.gather_bytes_per_s + 6 * hw.latency_s * doublings,
        "select": _pairs(n, keep) * shape.width / hw.pair_dims_per_s,
        "train": train,
    }


def _pairs(n: int, keep: float) -> float:
    """Distances that farthest points need: every pick to every point not picked before it."""
    picks = keep * n
    return picks * n - picks * picks / 2
