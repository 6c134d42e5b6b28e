"""eval.json as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

# Rows that never became a sample, by their counts in eval.json's `data`.
LEFT_OUT = {
    "rejected": "rejected (rejects.jsonl)",
    "dropped_too_long": "longer than max_tokens",
    "dropped_no_trained_tokens": "without an answer within max_tokens",
}


def show(result: Mapping[str, Any], console: Console) -> None:
    """Losses and metrics per task and source."""
    loss, answers = result["loss"], result["answers"]
    table = Table(title="loss, nats per response token")
    for name in ("", "loss", "samples", "response tokens"):
        table.add_column(name, justify="left" if not name else "right")
    rows = [("all", loss["all"])]
    rows += [(name or "no task", entry) for name, entry in loss["by_task"].items()]
    rows += [(f"  {name}", entry) for name, entry in loss["by_source"].items()]
    rows += [(f"dialogue, turn {n}", entry) for n, entry in loss["dialogue_by_turn"].items()]
    for name, entry in rows:
        shown = "-" if entry["loss"] is None else f"{entry['loss']:.4f}"
        table.add_row(Text(name), shown, str(entry["samples"]), str(entry["response_tokens"]))
    console.print(table)
    left_out = [f"{n} {said}" for name, said in LEFT_OUT.items() if (n := result["data"][name])]
    if left_out:
        console.print(f"rows in neither losses nor answers: {', '.join(left_out)}")
    if not answers["predictions"]:
        return
    table = Table(title=f"{answers['predictions']} greedy answers")
    for name in ("", "answers", "stopped", "metrics (count where it is not all)"):
        table.add_column(name, justify="left" if not name or "metric" in name else "right")
    for group in ("by_task", "by_source"):
        for name, entry in answers[group].items():
            metrics = ", ".join(
                f"{metric} {found['value']:.4g}"
                + (f" ({found['count']})" if found["count"] != entry["count"] else "")
                for metric, found in entry["metrics"].items()
            )
            label = f"  {name}" if group == "by_source" else name or "no task"
            table.add_row(Text(label), str(entry["count"]), f"{entry['stopped']:.0%}", metrics)
    console.print(table)
    if answers["too_long"]:
        console.print(f"{answers['too_long']} rows were not answered: their prompts are too long")


def show_judged(result: Mapping[str, Any], console: Console) -> None:
    """What the judge said, over all and per task."""
    table = Table(title=f"judged by {result['judge']}, both orders")
    for name in ("", "win", "tie", "loss", "malformed", "failed", "win share, 95 %"):
        table.add_column(name, justify="right" if name else "left")
    for name, entry in [("all", result), *result["by_task"].items()]:
        share = "-"
        if entry["interval_95"]:
            low, high = entry["interval_95"]
            share = f"{entry['win_share']:.2f} ({low:.2f} to {high:.2f})"
        counts = [str(entry[key]) for key in ("win", "tie", "loss", "malformed", "failed")]
        table.add_row(Text(name or "no task"), *counts, share)
    console.print(table)
    if result["failed"]:
        text = f"{result['failed']} pairs got no reply ({result['reasons']}): start again"
        console.print(text, markup=False)
