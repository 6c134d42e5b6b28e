"""Points of a benchmark as a table and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from slap_ds.bench.throughput import PHASES
from slap_ds.errors import counted


def table(points: Sequence[dict[str, Any]]) -> Table:
    """One column a point."""
    out = Table(title="throughput")
    out.add_column(points[0]["sweep"] or "")
    for point in points:
        out.add_column(label(point), justify="right")

    def row(name: str, texts: Sequence[str]) -> None:
        out.add_row(name, *texts)

    row("ranks", [str(p["ranks"]) for p in points])
    row("candidate tokens/s", [f"{p['candidate_tokens_per_s']:,.0f}" for p in points])
    row("trained tokens/s", [f"{p['trained_tokens_per_s']:,.0f}" for p in points])
    row("candidates/s", [f"{p['candidates_per_s']:,.2f}" for p in points])
    row("trained samples/s", [f"{p['trained_samples_per_s']:,.2f}" for p in points])
    row("step s", [f"{p['step_s']:.3f}" for p in points])
    for phase in PHASES:
        row(f"  {phase}", [f"{p['phase_s'][phase] / p['step_s']:.1%}" for p in points])
    row("selection share", [f"{p['selection_share']:.2%}" for p in points])
    for name in ("mfu", "hfu"):
        row(name.upper(), ["-" if p[name] is None else f"{p[name]:.1%}" for p in points])
    row("our KiB a rank and step", [f"{_kib(p['collectives']):,.1f}" for p in points])
    theirs = [f"{_kib(p['deepspeed_collectives']):,.1f}" for p in points]
    row("DeepSpeed's KiB a rank and step", theirs)
    out.caption = f"peak: {points[0]['peak_source']}"
    return out


def plot(points: Sequence[dict[str, Any]], path: Path) -> None:
    """A PNG: tokens per second, and where a step's time goes.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError('--plot needs matplotlib: pip install "slap_ds[eval]"') from None
    figure = Figure(figsize=(10, 4), layout="constrained")
    rates, shares = figure.subplots(1, 2)
    names = [label(p) for p in points]
    for key, text in (("candidate", "candidate tokens"), ("trained", "trained tokens")):
        rates.plot(names, [p[f"{key}_tokens_per_s"] for p in points], marker="o", label=text)
    rates.set(ylabel="tokens per second", xlabel=points[0]["sweep"] or "", ylim=(0, None))
    rates.legend()
    bottom = [0.0] * len(points)
    for phase in PHASES:
        height = [p["phase_s"][phase] for p in points]
        shares.bar(names, height, bottom=bottom, label=phase)
        bottom = [b + h for b, h in zip(bottom, height, strict=True)]
    shares.set(ylabel="seconds of a step", xlabel=points[0]["sweep"] or "")
    shares.legend()
    figure.savefig(path)


def label(point: dict[str, Any]) -> str:
    """What a point is called: the value swept over, or its number of ranks."""
    value = point["value"]
    return f"{value:g}" if value is not None else counted(point["ranks"], "rank")


def _kib(collectives: dict[str, dict[str, float]]) -> float:
    return sum(each["bytes"] for each in collectives.values()) / 1024
