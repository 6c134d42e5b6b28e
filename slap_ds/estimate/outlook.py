"""What a whole run takes: memory that fits or not, hours, bytes on disk; and advice."""

from __future__ import annotations

import math
from dataclasses import dataclass

from slap_ds.config.deepspeed import resolve_deepspeed
from slap_ds.config.schema import Config
from slap_ds.estimate import Estimate, Gpu, Hardware, Shape, estimate
from slap_ds.estimate.advice import advice
from slap_ds.estimate.shape import BYTES


@dataclass(frozen=True)
class Tokens:
    """The samples of a run, as far as its cost depends on them."""

    mean: float = 512.0  # tokens of a sample
    response_share: float = 0.5  # of them that are trained
    samples: int | None = None  # None: they were assumed, not counted


@dataclass(frozen=True)
class Outlook:
    """A run on `estimate.gpus` GPUs of a kind."""

    estimate: Estimate
    fits: bool  # with the margin of `needed_gib`
    steps: int | None  # None: depends on data that were not read
    hours: float | None  # without evaluations and checkpoints
    checkpoint_bytes: float
    disk_bytes: float  # checkpoint.at_once of them
    advice: str | None  # where it gains nothing over full training


def outlook(
    config: Config,
    shape: Shape,
    tokens: Tokens,
    gpus: int,
    candidates: float,
    gpu: Gpu,
    hardware: Hardware | None = None,
) -> Outlook:
    """What `config` takes with so many candidates a step, on `gpus` of such GPUs.

    Args:
        hardware: its rates; default: those of `gpu`.
    """
    hardware = hardware or Hardware.of(gpu, gpus)
    given = (config, shape, tokens.mean, tokens.response_share)
    e = estimate(*given, gpus, candidates / gpus, hardware)
    steps = config.steps
    if steps is None and tokens.samples is not None:
        steps = math.ceil(math.ceil(tokens.samples * (config.epochs or 0)) / e.candidates)
    whole = min(1.0, config.selection.warmup + config.selection.cooldown)
    mean_s = whole * e.full_step_s + (1 - whole) * sum(e.step_s.values())
    size = checkpoint_bytes(config, shape)
    return Outlook(
        estimate=e,
        fits=e.needed_gib <= gpu.gib,
        steps=steps,
        hours=None if steps is None else steps * mean_s / 3600,
        checkpoint_bytes=size,
        disk_bytes=size * config.checkpoint.at_once,
        advice=advice(*given, e, gpu, hardware),
    )


def checkpoint_bytes(config: Config, shape: Shape) -> float:
    """On disk: float32 master weights and two moments; the weights too where ZeRO-3 does not divide
    them. Of an adapter nothing of the frozen base (tests/distributed/test_estimate.py)."""
    stage = 0
    if config.engine.kind == "deepspeed":
        settings = resolve_deepspeed(config, 1, shape.width)
        stage = settings["zero_optimization"]["stage"]
    trained = shape.parameters if shape.trained is None else shape.trained
    return trained * (12.0 + (BYTES[config.model.dtype] if stage < 3 else 0))
