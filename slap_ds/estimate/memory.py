"""What a GPU and its host hold, in bytes by part."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from slap_ds.config.schema import Config
from slap_ds.estimate.shape import BYTES, Shape
from slap_ds.models.reuse import host_boundary_bytes, pinned_bytes

WEIGHTS, GRADIENTS = "weights", "gradients"
OPTIMIZER = "optimizer (float32 master, two moments)"
BOUNDARIES = "block inputs"
GATHERED = "gathered weights (two blocks, head)"
BUFFERS = "DeepSpeed's buffers"


def memory(
    config: Config,
    shape: Shape,
    n: int,
    sample_tokens: float,
    gpus: int,
    settings: dict[str, Any],
    reuse: bool,
) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes on a GPU and on its host, by part.

    Args:
        n: candidates of a step. settings: DeepSpeed's, resolved; {}: its absence.
        reuse: the block inputs of all candidates are kept.
    """
    device, host = _states(config, shape, gpus, settings)
    kept_on_device, kept_on_host = _boundaries(config, shape, sample_tokens * n / gpus, reuse)
    device |= _work(config, shape, n, settings) | {BOUNDARIES: kept_on_device}
    if kept_on_host:
        host[BOUNDARIES] = kept_on_host
    return device, host


def _states(
    config: Config, shape: Shape, gpus: int, settings: dict[str, Any]
) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes of weights, gradients and optimizer: on a GPU, and offloaded to its host.

    tests/distributed/test_estimate.py counts what DeepSpeed holds.
    """
    zero = settings.get("zero_optimization", {})
    stage = zero.get("stage", 0)
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
    value, sharing = BYTES[config.model.dtype], config.engine.sequence_parallel
    row = config.batch.micro_batch_tokens / sharing
    if not reuse:
        return float(row * shape.layers * shape.width * value), 0.0
    one = (shape.layers + 1) * shape.width * value
    if config.step.boundaries == "device":
        return local_tokens * one, 0.0
    on_host = host_boundary_bytes(
        local_tokens,
        config.score_row_tokens // sharing,
        shape.layers,
        shape.width,
        value,
    )
    return min(row, local_tokens) * one, on_host  # the row in training is on the GPU


def _work(config: Config, shape: Shape, n: int, settings: dict[str, Any]) -> dict[str, float]:
    """Bytes that a row, or a GPU's part of it, and the selection take on a GPU."""
    value = BYTES[config.model.dtype]
    row = config.batch.micro_batch_tokens / config.engine.sequence_parallel
    e, v = shape.width, shape.vocab
    zero = settings.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    recompute = row * (12 * e + 4 * shape.intermediate) * value
    if not config.model.gradient_checkpointing:
        recompute *= shape.layers
    return {
        GATHERED: (2 * shape.block + e * v) * value if stage == 3 else 0.0,
        BUFFERS: _buffers(zero, stage) * value,
        "head gradient": 0.0 if shape.trained else e * v * (4.0 + value),
        "head chunk": float(config.scoring.chunk_on("cuda") * v * (4 + 4 + value)),
        "one block's activations": float(recompute),
        "scores of all candidates": n * (sketch_width(config, e) * 4 * 2 + 20.0),
    }


def _buffers(zero: dict[str, Any], stage: int) -> float:
    """Values in DeepSpeed's own buffers: gradients on their way to their rank, weights ahead of
    the block that needs them. ZeRO-1 and -2 fill one bucket while they send another."""
    if stage == 0:
        return 0.0
    bucket = float(zero.get("reduce_bucket_size", 5e8))
    if stage < 3:
        return bucket * (2 if zero.get("overlap_comm", False) else 1)
    return bucket + float(zero.get("stage3_prefetch_bucket_size", 5e7))


def sketch_width(config: Config, width: int) -> int:
    """D, the numbers of a sketch that are gathered and compared, for a model of width E."""
    scoring = config.scoring
    if scoring.sketch == "head_kron":
        return math.prod(scoring.sketch_size)
    return scoring.sketch_dim or width
