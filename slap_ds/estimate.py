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

from slap_ds.config import Config, LoraConfig
from slap_ds.deepspeed_json import resolve_deepspeed
from slap_ds.models.causal import block_flops, head_flops, trainable
from slap_ds.models.lora import add_adapter

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2}
WEIGHTS, GRADIENTS = "weights", "gradients"
OPTIMIZER = "optimizer (float32 master, two moments)"


@dataclass(frozen=True)
class Shape:
    """The numbers of a decoder that memory and time depend on."""

    parameters: int
    layers: int
    width: int  # E
    intermediate: int
    vocab: int  # V
    config: Any
    trained: int | None = None  # parameters of an adapter beside frozen weights; None: all of them

    @classmethod
    def of(cls, model_config: Any, lora: LoraConfig | None = None) -> Shape:
        """From a transformers config; parameters are counted on a meta model."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config)
        parameters = sum(p.numel() for p in model.parameters())
        if lora is not None:
            add_adapter(model, lora, seed=0)
        text = model_config.get_text_config()
        return cls(
            parameters=parameters,
            trained=sum(p.numel() for p in trainable(model)) if lora is not None else None,
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
    host_gib: dict[str, float]  # what DeepSpeed's offload keeps in host memory instead

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
    memory = _memory(config, shape, sample_tokens * n / gpus, n, gpus, reuse)
    host = {name: memory.pop(name) for name in _offloaded(config, shape, gpus)}
    return Estimate(
        gpus=gpus,
        candidates=n,
        memory_gib=memory,
        host_gib=host,
        step_s=_step(config, shape, sample_tokens, response_share, n, gpus, reuse, hw),
        full_step_s=sum(
            _step(config, shape, sample_tokens, response_share, n, gpus, None, hw).values()
        ),
    )


def _offloaded(config: Config, shape: Shape, gpus: int) -> list[str]:
    """The parts of `_memory` that the run's DeepSpeed settings move to the host."""
    zero = resolve_deepspeed(config, gpus, shape.width)["zero_optimization"]
    names = {"offload_param": [WEIGHTS], "offload_optimizer": [GRADIENTS, OPTIMIZER]}
    found = []
    for key, parts in names.items():
        if zero.get(key, {}).get("device", "none") != "none":
            found += parts
    return found


def _memory(
    config: Config, shape: Shape, local_tokens: float, n: int, gpus: int, reuse: bool
) -> dict[str, float]:
    value = BYTES[config.model.dtype]
    row = config.batch.micro_batch_tokens
    e, v, layers = shape.width, shape.vocab, shape.layers
    block = (shape.parameters - 2 * e * v) / layers
    trained = shape.parameters if shape.trained is None else shape.trained
    kept = local_tokens * (layers + 1) if reuse else float(row * layers)
    on_gpu = 0.0 if reuse and config.step.boundaries == "host" else kept * e * value
    recompute = row * (12 * e + 4 * shape.intermediate) * value
    if not config.model.gradient_checkpointing:
        recompute *= layers
    chunk = config.scoring.chunk_tokens * v * (4 + 4 + value)
    parts = {
        WEIGHTS: shape.parameters * value / gpus,
        GRADIENTS: trained * value / gpus,
        OPTIMIZER: trained * 12 / gpus,
        "gathered weights (two blocks, head)": (2 * block + e * v) * value,
        "head gradient": 0.0 if shape.trained else e * v * (4.0 + value),
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
    received = shape.parameters * BYTES[config.model.dtype] * (gpus - 1) / gpus
    gathered = received / hw.gather_bytes_per_s

    def phase(flops: float, gathers: float) -> float:
        # Gathers run ahead of the compute that needs them; the slower of the two counts.
        return max(flops / hw.flops_per_s, gathers * gathered)

    def rows(samples: float, tokens: int) -> int:
        return math.ceil(samples * sample_tokens / tokens)

    row = config.batch.micro_batch_tokens
    # Frozen weights have no gradient, which is half of the backward.
    frozen = shape.trained is not None
    passes = (2 if reuse else 3) + recompute - frozen
    train = phase(keep * (passes * forward + (3 - frozen) * head), 2 * rows(keep * local, row))
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
