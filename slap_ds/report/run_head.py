"""What stands at the top of a run's page: what was trained, on what, how fast, with what result."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

from slap_ds.config.outputs import EvaluationConfig
from slap_ds.config.schema import Config
from slap_ds.distributed.heart import DONE, read_heartbeat
from slap_ds.errors import counted
from slap_ds.jsonl import read_lines
from slap_ds.report.coverage import run_config
from slap_ds.report.numbers import duration_text, flops_text, size_text
from slap_ds.report.page import facts, tiles
from slap_ds.train.evaluate import values_of

Row = dict[str, Any]
# A first rank whose heartbeat is older has ended without a word.
SILENT_S = 60.0


@dataclass(frozen=True)
class RunLog:
    """What a run folder says of its run, but for the picks."""

    folder: Path
    config: Config
    train: list[Row]
    evals: list[Row]  # in order, one of a step
    starts: list[Row]
    elapsed_s: float | None

    @cached_property
    def total(self) -> dict[str, float]:
        """Sums over all steps, of the numbers that add up."""
        keys = [key for key, value in self.train[-1].items() if isinstance(value, int | float)]
        return {key: float(sum(r.get(key) or 0 for r in self.train)) for key in keys}

    @property
    def done(self) -> int:
        """Steps that are done."""
        return int(self.train[-1]["step"]) + 1

    @property
    def steps(self) -> int | None:
        """Steps there are to do, if known."""
        return self.starts[-1]["steps"] if self.starts else self.config.steps

    @property
    def flops_ratio(self) -> float | None:
        """FLOPs over those of training all candidates; None: an older run, which has none."""
        full = self.total.get("full_flops")
        return self.total["flops"] / full if full else None

    @property
    def method(self) -> str:
        """The selection in words."""
        chosen = self.config.selection
        return "all data" if chosen.method == "full" else f"{chosen.method}, keep {chosen.keep:g}"


def read_log(folder: Path) -> RunLog:
    """The run in `folder`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: no training step is finished.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} is no run: it has no metrics.jsonl")
    records = read_lines(path)
    train = [r for r in records if r["event"] == "train"]
    if not train:
        raise ValueError(f"{str(folder)!r} holds no training step yet")
    evals = {r["step"]: r for r in records if r["event"] == "eval"}
    starts = folder / "starts.jsonl"
    return RunLog(
        folder,
        run_config(folder),
        train,
        [evals[step] for step in sorted(evals)],
        read_lines(starts) if starts.is_file() else [],
        records[-1].get("elapsed_s"),
    )


def is_running(folder: Path) -> bool:
    """Whether the run's first rank has given a sign of life and has not ended."""
    heart = read_heartbeat(folder / "heartbeat", 0)
    return heart is not None and heart["exit"] is None and time.time() - heart["time"] < SILENT_S


def head(log: RunLog) -> list[str]:
    """The page's first parts."""
    return [tiles(_numbers(log)), facts(_facts(log))]


def _numbers(log: RunLog) -> list[tuple[str, str]]:
    total = log.total
    found = []
    if log.evals:
        first, last = log.evals[0], log.evals[-1]
        loss = f"{last['eval_loss']:.3f}" if last["eval_loss"] is not None else "NaN"
        if len(log.evals) > 1 and first["eval_loss"] is not None:
            loss = f"{first['eval_loss']:.3f} → {loss}"
        found.append((loss, "evaluation loss, nats per token"))
    if log.flops_ratio is not None:
        found.append((f"{log.flops_ratio:.2f} ×", "the FLOPs of training all candidates"))
    share = total["picked"] / total["candidates"]
    found.append((f"{share:.0%}", f"trained, of {size_text(total['candidates'])} candidates"))
    rate = size_text(total["candidate_tokens"] / total["step_s"])
    return [*found, (rate, "candidate tokens a second, in steps")]


def _facts(log: RunLog) -> dict[str, str]:
    config, total = log.config, log.total
    model = config.model.path or "fresh weights"
    if config.model.lora is not None:
        model += f", LoRA of rank {config.model.lora.r}"
    found = {"State": state(log), "Model": f"{model}, {config.model.dtype}"}
    start = log.starts[-1] if log.starts else None
    if start:
        found["Model"] += f", {start['model_type']}, {size_text(start['parameters'])} parameters"
    found["Method"] = f"{log.method}; {log.train[-1]['candidates']:,} candidates a step"
    if start:
        found["Ranks"] = f"{counted(start['ranks'], 'rank')}, {start['device']}"
        found["Started"] = date_text(log.starts[0]["time"])
        if len(log.starts) > 1:
            found["Started"] += f"; {len(log.starts)} starts, the last {date_text(start['time'])}"
    found["Time"] = f"{duration_text(total['step_s'])} in steps"
    if log.elapsed_s is not None:
        found["Time"] = f"{duration_text(log.elapsed_s)}, {found['Time']}"
    found["Trained"] = (
        f"{size_text(total['picked'])} samples, {size_text(total['trained_tokens'])} tokens "
        f"({size_text(total['trained_tokens'] / total['step_s'])} a second in steps), "
        f"{flops_text(total['flops'])}"
    )
    peaks = [r["peak_gib"] for r in log.train if "peak_gib" in r]
    found["Peak memory"] = (
        f"{max(peaks):.1f} GiB of the first rank's GPU" if peaks else "not counted on a CPU"
    )
    found["Rejects"] = rejects(log)
    if start:
        versions = (f"{name} {number}" for name, number in start["versions"].items())
        found["Versions"] = ", ".join(versions)
    return found


def state(log: RunLog) -> str:
    """How far the run has come, and whether it goes on."""
    done, steps = log.done, log.steps
    if steps is not None and done >= steps:
        return f"finished, {counted(done, 'step')}"
    heart = read_heartbeat(log.folder / "heartbeat", 0)
    if steps is not None and heart is not None and heart["exit"] == DONE:
        return f"ended early (evaluation.patience), {done:,} of {steps:,} steps"
    of = f"{done:,} of {steps:,} steps" if steps is not None else counted(done, "step")
    return f"{'trains' if is_running(log.folder) else 'stopped'}, {of}"


def rejects(log: RunLog) -> str:
    """What of the data was not used."""
    parts = []
    for what, name in (("training", "rejects.jsonl"), ("evaluation", "rejects-eval.jsonl")):
        path = log.folder / name
        if path.is_file() and (count := len(read_lines(path))):
            parts.append(f"{counted(count, 'row')} of the {what} data ({name})")
    rows = log.starts[-1]["rows"] if log.starts else {}
    for key, what in (
        ("dropped_too_long", "too long"),
        ("dropped_no_trained_tokens", "without a token to train"),
        ("truncated", "cut to data.max_tokens"),
    ):
        if rows.get(key):
            parts.append(f"{rows[key]:,} {what}")
    path = log.folder / "quarantine.jsonl"
    if path.is_file() and (count := len(read_lines(path))):
        parts.append(f"{counted(count, 'sample')} set aside (quarantine.jsonl)")
    return ", ".join(parts) if parts else "none"


def date_text(time: str) -> str:
    """`28 Nov 2026, 14:05 UTC` of an ISO 8601 time."""
    at = datetime.fromisoformat(time).astimezone(timezone.utc)
    return f"{at.day} {at:%b %Y, %H:%M} UTC"


def best_of(evals: Sequence[Row], how: EvaluationConfig) -> Row:
    """The best evaluation by the run's `evaluation.metric`."""

    def badness(record: Row) -> float:
        value = values_of(record).get(how.metric)
        if value is None:
            return math.inf
        return -value if how.by_answers else value

    return min(evals, key=badness)
