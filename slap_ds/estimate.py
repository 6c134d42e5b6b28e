"""What a configuration needs before it is started: memory per GPU and time per step, by formula.

    estimate(config, model shape, tokens per sample, gpus) -> Estimate

Memory counts what slap_ds and ZeRO hold; the allocator's fragmentation and CUDA's own context
come on top (allow 10 % and 2 GiB). Time is a model, not a measurement: its constants are arguments,
and benchmarks/bench_step.py measures them. docs/performance.md lists the assumptions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from slap_ds.config.deepspeed import resolve_deepspeed
from slap_ds.config.schema import Config, LoraConfig
from slap_ds.models.causal import block_flops, block_parameters, head_flops, trainable
from slap_ds.models.lora import add_adapter
from slap_ds.models.reuse import host_boundary_bytes, pinned_bytes
from slap_ds.selection import make_selector

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2}
WEIGHTS, GRADIENTS = "weights", "gradients"
OPTIMIZER = "optimizer (float32 master, two moments)"
BOUNDARIES = "block inputs"


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
    host_gib: dict[str, float]  # in host memory instead: by DeepSpeed's offload, step.boundaries

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
    """Memory and time per step of `config` on `gpus` GPUs, at the ZeRO stage of its settings.

    Args:
        sample_tokens: mean tokens per candidate. response_share: share of them that is trained.
        candidates_per_gpu: N / gpus; the batch grows with the GPUs.
    """
    hw = hardware or Hardware()
    settings: dict[str, Any] = {}  # the plain engine holds what DeepSpeed holds without ZeRO
    if config.engine.kind == "deepspeed":
        settings = resolve_deepspeed(config, gpus, shape.width)
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    scores = bool(make_selector(config.selection.model_dump()).needs)
    can_reuse = config.step.forward != "separate" and config.model.gradient_checkpointing
    reuse = scores and can_reuse
    n = max(1, round(candidates_per_gpu * gpus))
    device, host = _states(config, shape, gpus, settings, stage)
    kept_on_device, kept_on_host = _boundaries(config, shape, sample_tokens * n / gpus, reuse)
    device |= _work(config, shape, n, stage) | {BOUNDARIES: kept_on_device}
    if kept_on_host:
        host[BOUNDARIES] = kept_on_host
    step = (config, shape, sample_tokens, response_share, n, gpus, stage, hw)
    return Estimate(
        gpus=gpus,
        candidates=n,
        memory_gib={name: size / GIB for name, size in device.items()},
        host_gib={name: size / GIB for name, size in host.items()},
        step_s=_step(*step, keep=config.selection.keep, scores=scores, reuse=reuse),
        full_step_s=sum(_step(*step, keep=1.0, scores=False, reuse=False).values()),
    )


def _states(
    config: Config, shape: Shape, gpus: int, settings: dict[str, Any], stage: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes of weights, gradients and optimizer: on a GPU, and offloaded to its host.

    tests/distributed/test_estimate.py counts what DeepSpeed holds.
    """
    zero = settings.get("zero_optimization", {})
    value = BYTES[config.model.dtype]
    trained = shape.parameters if shape.trained is None else shape.trained
    accumulated = settings.get("data_types", {}).get("grad_accum_dtype")
    gradient = value if accumulated is None else 4 if "32" in accumulated else 2
    if stage == 1 and gradient > value:  # ZeRO-1 sums them in float32 beside those of the weights
        gradient += value
    master = 0 if stage == 0 and value == 4 else 4  # float32 weights without ZeRO have no copy
    device = {
        WEIGHTS: shape.parameters * value / (gpus if stage == 3 else 1),
        GRADIENTS: trained * gradient / (gpus if stage >= 2 else 1),
        OPTIMIZER: trained * (master + 8.0) / (gpus if stage >= 1 else 1),
    }
    host: dict[str, float] = {}
    size, part = _offload(zero, "offload_param"), trained / gpus
    if size is not None and stage == 3:
        host[WEIGHTS] = size(device.pop(WEIGHTS))
    size = _offload(zero, "offload_optimizer")
    if size is not None and stage >= 1:
        # The optimizer's step takes float32 gradients, which have buffers of their own beside those
        # that gradients are accumulated in. ZeRO-1 accumulates on the GPU.
        host[GRADIENTS] = size(device.pop(GRADIENTS)) if stage >= 2 else 0.0
        if stage == 3:
            group = zero.get("sub_group_size", 1e9)
            host[GRADIENTS] += part // group * size(4 * group) + size(4 * (part % group))
            host[OPTIMIZER] = device.pop(OPTIMIZER)
        else:  # a buffer for the new weights too; the master is pinned as well
            host[GRADIENTS] += size(4 * part) + size(value * part)
            host[OPTIMIZER] = device.pop(OPTIMIZER) - 4 * part + size(4 * part)
    return device, host


def _offload(zero: dict[str, Any], key: str) -> Callable[[float], float] | None:
    """Bytes of a host buffer -> what it takes; None: `key` is not in use."""
    settings = zero.get(key) or {}
    if settings.get("device", "none") == "none":
        return None
    return pinned_bytes if settings.get("pin_memory", True) else float


def _boundaries(
    config: Config, shape: Shape, local_tokens: float, reuse: bool
) -> tuple[float, float]:
    """Bytes of block inputs on a GPU and on its host."""
    value, row = BYTES[config.model.dtype], config.batch.micro_batch_tokens
    if not reuse:
        return float(row * shape.layers * shape.width * value), 0.0
    one = (shape.layers + 1) * shape.width * value
    if config.step.boundaries == "device":
        return local_tokens * one, 0.0
    on_host = host_boundary_bytes(
        local_tokens,
        config.score_row_tokens,
        shape.layers,
        shape.width,
        value,
    )
    return min(row, local_tokens) * one, on_host  # the row in training is on the GPU


def _work(config: Config, shape: Shape, n: int, stage: int) -> dict[str, float]:
    """Bytes that a row and the selection take on a GPU."""
    value, row = BYTES[config.model.dtype], config.batch.micro_batch_tokens
    e, v = shape.width, shape.vocab
    block = block_parameters(shape.config, shape.parameters) / shape.layers
    recompute = row * (12 * e + 4 * shape.intermediate) * value
    if not config.model.gradient_checkpointing:
        recompute *= shape.layers
    return {
        "gathered weights (two blocks, head)": (2 * block + e * v) * value if stage == 3 else 0.0,
        "head gradient": 0.0 if shape.trained else e * v * (4.0 + value),
        "head chunk": float(config.scoring.chunk_on("cuda") * v * (4 + 4 + value)),
        "one block's activations": float(recompute),
        "scores of all candidates": n * (sketch_width(config, e) * 4 * 2 + 20.0),
    }


def _step(
    config: Config,
    shape: Shape,
    sample_tokens: float,
    response_share: float,
    n: int,
    gpus: int,
    stage: int,
    hw: Hardware,
    *,
    keep: float,
    scores: bool,
    reuse: bool,
) -> dict[str, float]:
    """Seconds by phase of a step that trains the share `keep` of the candidates."""
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
    trained_rows = rows(keep * local, row)
    # Forward and backward gather; the forward of a replayed row gathers no block's weights.
    share = block_parameters(shape.config, shape.parameters) / shape.parameters
    per_row = 2 - share if reuse else 2
    # Whole weights are gathered once a step, after it; ZeRO-2 reduces the gradients of every row.
    gathers = {3: per_row * trained_rows, 2: trained_rows + 1}.get(stage, 2)
    train = phase(keep * (passes * forward + (3 - frozen) * head), gathers)
    if not scores:
        return {"train": train, "score": 0.0, "gather": 0.0, "select": 0.0}
    doublings = math.log2(max(gpus, 2))
    d = sketch_width(config, shape.width)
    payload = n * (4 * d + 20)
    scored_rows = rows(local, config.score_row_tokens) if stage == 3 else 0
    return {
        "score": phase(forward + 2 * head, scored_rows),
        "gather": payload / hw.gather_bytes_per_s + 6 * hw.latency_s * doublings,
        "select": _pairs(n, keep) * d / hw.pair_dims_per_s,
        "train": train,
    }


def sketch_width(config: Config, width: int) -> int:
    """D, the numbers of a sketch that are gathered and compared, for a model of width E."""
    scoring = config.scoring
    if scoring.sketch == "head_kron":
        return math.prod(scoring.sketch_size)
    return scoring.sketch_dim or width


def _pairs(n: int, keep: float) -> float:
    """Distances that farthest points need: every pick to every point not picked before it."""
    picks = keep * n
    return picks * n - picks * picks / 2
