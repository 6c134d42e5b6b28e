"""What a configuration needs before it is started: memory per GPU, time per step, by formula.

    estimate(config, model shape, tokens per sample, gpus) -> Estimate -> advice

Memory counts what slap_ds and ZeRO hold; `needed_gib` adds what lies between that and a GPU that
does not run out. Time is a model, not a measurement: its constants are arguments, and
benchmarks/bench_step.py measures them. docs/performance.md lists the assumptions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slap_ds.config.deepspeed import resolve_deepspeed
from slap_ds.config.schema import Config
from slap_ds.estimate.hardware import GPUS, Gpu, Hardware, needed_gib
from slap_ds.estimate.memory import (
    BOUNDARIES,
    BUFFERS,
    GATHERED,
    GRADIENTS,
    OPTIMIZER,
    WEIGHTS,
    memory,
)
from slap_ds.estimate.shape import GIB, Shape
from slap_ds.estimate.steps import Step, exchanged_bytes, row_gathers, seconds
from slap_ds.selection import make_selector

__all__ = [
    "BOUNDARIES",
    "BUFFERS",
    "GATHERED",
    "GPUS",
    "GRADIENTS",
    "OPTIMIZER",
    "WEIGHTS",
    "Estimate",
    "Gpu",
    "Hardware",
    "Shape",
    "estimate",
    "row_gathers",
]


@dataclass(frozen=True)
class Estimate:
    """Per GPU: GiB by part, seconds of a step by part, and of full training on all candidates."""

    gpus: int
    candidates: int
    rows: float  # that full training fills on a GPU in a step, alone or with those that share rows
    exchanged_mib: float  # that a GPU sends these in a layer's forward of a row
    memory_gib: dict[str, float]
    step_s: dict[str, float]
    full_step_s: float
    host_gib: dict[str, float]  # in host memory instead: by DeepSpeed's offload, step.boundaries

    @property
    def total_gib(self) -> float:
        """Counted on a GPU."""
        return sum(self.memory_gib.values())

    @property
    def needed_gib(self) -> float:
        """What a GPU should have."""
        return needed_gib(self.total_gib)

    @property
    def ratio_to_full(self) -> float:
        """Seconds of a step over those of full training on the same candidates."""
        return sum(self.step_s.values()) / self.full_step_s

    @property
    def selection_share(self) -> float:
        """Of a step's time."""
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
        candidates_per_gpu: N / gpus.

    Raises:
        ValueError: the GPUs do not fall into groups of `engine.sequence_parallel`.
    """
    settings: dict[str, Any] = {}  # the plain engine holds what DeepSpeed holds without ZeRO
    if config.engine.kind == "deepspeed":
        settings = resolve_deepspeed(config, gpus, shape.width)
    scores = bool(make_selector(config.selection.model_dump()).needs)
    can_reuse = config.step.forward != "separate" and config.model.gradient_checkpointing
    step = Step(
        config=config,
        shape=shape,
        sample_tokens=sample_tokens,
        response_share=response_share,
        candidates=max(1, round(candidates_per_gpu * gpus)),
        gpus=gpus,
        stage=settings.get("zero_optimization", {}).get("stage", 0),
        keep=1.0 if config.selection.method == "full" else config.selection.keep,
        scores=scores,
        reuse=scores and can_reuse,
    )
    device, host = memory(config, shape, step.candidates, sample_tokens, gpus, settings, step.reuse)
    hw, row = hardware or Hardware(), config.batch.micro_batch_tokens
    return Estimate(
        gpus=gpus,
        candidates=step.candidates,
        rows=step.candidates / step.groups * sample_tokens / row,
        exchanged_mib=exchanged_bytes(config, shape, row * step.groups / gpus) / 2**20,
        memory_gib={name: size / GIB for name, size in device.items()},
        host_gib={name: size / GIB for name, size in host.items()},
        step_s=seconds(step, hw),
        full_step_s=sum(seconds(step.full(), hw).values()),
    )
