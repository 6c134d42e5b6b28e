"""`slap-ds bench throughput`: the trainer's own steps, timed.

    prepare (real or random data) -> warm-up steps -> measured steps -> Point -> JSON, table, plot

The steps are those of `train.loop`, and their records go to the run's metrics.jsonl as in training.
A rate is a sum over the measured steps divided by the wall clock from a barrier before the first to
a barrier after the last, so what a step does outside its own stopwatch counts too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from slap_ds.bench.random_data import random_inputs
from slap_ds.config.file import validated
from slap_ds.config.schema import Config
from slap_ds.data.batch import CandidateBatch
from slap_ds.engine import logged_collectives
from slap_ds.engine.peak import measured_peak, peak_of
from slap_ds.jsonl import JsonLines
from slap_ds.train.inputs import Inputs
from slap_ds.train.record import train_step
from slap_ds.train.run import Run, TrainState, prepare

PHASES = ("score", "gather", "select", "scatter", "forward", "backward", "optimizer")
# Settings that a sweep changes on the same engine, so that the points share their weights.
SWEEPS = {"micro_batch_tokens": ("batch", int), "keep": ("selection", float)}


@dataclass(frozen=True)
class Data:
    """Where the samples come from; without `random` the configuration's own."""

    random: bool = True
    mean_tokens: float | None = None  # None: 512, or data.max_tokens where that is less
    spread: float = 0.0
    response_share: float = 0.5


def throughput(
    config: Config,
    steps: int,
    warmup: int,
    data: Data,
    sweep: str | None = None,
    values: Sequence[float] = (),
    peak_flops: float | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[Run, list[dict[str, Any]]]:
    """Measure `steps` steps after `warmup`, once for each value of the sweep (or once).

    Every rank calls it. Rates and sums are the same on all; seconds of phases, shares of them and
    memory are this rank's, bytes those of one rank and one step.

    Args:
        peak_flops: of one device; default: by its name, on a CPU measured.
        tell: is told what begins, and of each step.

    Raises:
        ValueError, FileNotFoundError: what `prepare` raises; steps or a swept value out of range.
    """
    if steps < 1 or warmup < 1:
        raise ValueError(f"--steps is {steps} and --warmup {warmup}, expected at least 1 of each")
    settings: list[tuple[float | None, Config]] = [(None, config)]
    if values:
        settings = [(value, _set(config, sweep, value)) for value in values]
    total = len(settings) * (warmup + steps + 1)
    updates = {"steps": total, "epochs": None, "run_dir": f"{config.run_dir}-bench"}
    config = config.model_copy(update=updates)
    if Path(config.run_dir, "checkpoints").exists():
        raise ValueError(f"{config.run_dir!r} holds a run with checkpoints: change run_dir")

    def read(config: Config) -> Inputs:
        mean = data.mean_tokens
        if mean is None:
            mean = min(512, config.data.max_tokens)
        return random_inputs(config, mean, data.spread, data.response_share)

    run = prepare(config, read=read if data.random else None, tell=tell)
    tell(f"measuring {steps} steps after {warmup} of warm-up")
    peak, source = _peak(run, peak_flops)
    metrics = JsonLines(run.run_dir / "metrics.jsonl", 0) if run.comm.rank == 0 else None
    points = []
    for value, changed in settings:
        if value is not None:
            tell(f"{sweep} {value:g}")
        state = TrainState(run.state.step)
        point_run = replace(run, config=changed.model_copy(update=updates), state=state)
        point = _measure(point_run, steps, warmup, metrics, peak, source, tell)
        run.state.step = point_run.state.step
        points.append({"sweep": sweep, "value": value, **point})
    if metrics is not None:
        metrics.close()
    return run, points


def _set(config: Config, sweep: str | None, value: float) -> Config:
    if sweep not in SWEEPS:
        raise ValueError(f"--sweep is {sweep!r}, expected {' or '.join(SWEEPS)} here")
    section, kind = SWEEPS[sweep]
    tree = config.model_dump()
    tree[section][sweep] = kind(value)
    return validated(Config, tree, f"--values {value:g}")


def _measure(
    run: Run,
    steps: int,
    warmup: int,
    metrics: JsonLines | None,
    peak: float | None,
    source: str,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    records: list[dict[str, Any]] = []
    first = run.state.step
    start, traffic = 0.0, {}
    for number in range(warmup + steps):
        if number == warmup:
            traffic = {phase: list(count) for phase, count in run.comm.traffic.items()}
            run.comm.barrier(run.state.step, "the first measured step")
            start = time.perf_counter()
        batch = CandidateBatch(run.inputs.train, next(run.stream))
        record = train_step(run, run.state.step, batch)
        record.metrics["warmup"] = number < warmup
        tell(f"step {number + 1}/{warmup + steps}: {record.metrics['step_s']:.3g} s")
        if metrics is not None:
            metrics.write(record.metrics)
        if number >= warmup:
            records.append(record.metrics)
        run.step_done(run.state.step)
    run.comm.barrier(run.state.step, "the last measured step")
    # Rank 0's clock, so that every rank reports the same numbers.
    (wall_s,) = run.comm.sum(
        run.state.step, "wall clock", [time.perf_counter() - start if run.comm.rank == 0 else 0.0]
    )
    ours = {
        phase: _per_step(count, traffic.get(phase, [0, 0]), steps)
        for phase, count in run.comm.traffic.items()
    }
    with logged_collectives() as theirs:
        train_step(run, run.state.step)
    run.step_done(run.state.step)
    return {
        "steps": [first + warmup, first + warmup + steps - 1],
        "ranks": run.comm.world,
        "wall_s": wall_s,
        **_rates(records, wall_s),
        **_utilisation(records, wall_s, run.comm.world, peak, source),
        "step_s": wall_s / steps,
        "phase_s": {p: _sum(records, f"{p}_s") / steps for p in PHASES},
        "selection_share": _sum(records, "selection_s") / wall_s,
        "scoring_share": _sum(records, "score_s") / wall_s,
        "busiest_rank_over_mean": max(r["busiest_rank_over_mean"] for r in records),
        "peak_gib": max((r["peak_gib"] for r in records if "peak_gib" in r), default=None),
        "collectives": {phase: count for phase, count in ours.items() if count["calls"]},
        "deepspeed_collectives": {
            name: {"calls": calls, "bytes": size} for name, (calls, size) in theirs.items()
        },
        "keep": run.config.selection.keep,
        "micro_batch_tokens": run.config.batch.micro_batch_tokens,
        "candidates": run.stream.candidates,
        "forward": records[-1]["forward"],
        "parameters": run.engine.parameters,
    }


def _rates(records: Sequence[Mapping[str, Any]], wall_s: float) -> dict[str, float]:
    return {
        "candidate_tokens_per_s": _sum(records, "candidate_tokens") / wall_s,
        "trained_tokens_per_s": _sum(records, "trained_tokens") / wall_s,
        "candidates_per_s": _sum(records, "candidates") / wall_s,
        "trained_samples_per_s": _sum(records, "picked") / wall_s,
        "flops_per_s": _sum(records, "flops") / wall_s,
    }


def _utilisation(
    records: Sequence[Mapping[str, Any]],
    wall_s: float,
    ranks: int,
    peak: float | None,
    source: str,
) -> dict[str, Any]:
    """MFU counts what training the picks needs; HFU all that was computed, scoring and recompute
    too (Chowdhery et al. 2022, appendix B). Both are left out where no peak is known."""
    if peak is None:
        return {"mfu": None, "hfu": None, "peak_flops": None, "peak_source": source}
    whole = peak * ranks * wall_s
    return {
        "mfu": _sum(records, "model_flops") / whole,
        "hfu": _sum(records, "flops") / whole,
        "peak_flops": peak,
        "peak_source": source,
    }


def _peak(run: Run, given: float | None) -> tuple[float | None, str]:
    if given is not None:
        return given, "--peak-flops"
    dtype = run.config.model.dtype
    if run.engine.device.type == "cuda":
        return peak_of(torch.cuda.get_device_name(run.engine.device), dtype)
    run.comm.barrier(-1, "the peak")
    (total,) = run.comm.sum(-1, "the peak", [measured_peak(dtype)])
    return total / run.comm.world, f"matrix products of this run, {dtype}, the ranks at once"


def _per_step(after: Sequence[int], before: Sequence[int], steps: int) -> dict[str, float]:
    return {
        "calls": (after[0] - before[0]) / steps,
        "bytes": (after[1] - before[1]) / steps,
    }


def _sum(records: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(sum(record.get(key, 0.0) for record in records))
