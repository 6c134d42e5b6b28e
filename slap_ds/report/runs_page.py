"""Several runs on one page: side by side first, then each by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slap_ds.report import figures
from slap_ds.report.coverage import Labels
from slap_ds.report.names import names_of
from slap_ds.report.numbers import duration_text, flops_text, size_text
from slap_ds.report.page import figure, folded, heading, paragraph, table
from slap_ds.report.run_head import RunLog, state
from slap_ds.report.run_page import done, run_page


def runs_page(logs: Sequence[RunLog], out: Path, known: dict[str, Labels]) -> list[str]:
    """The page's parts, in order; each run's figures go into a numbered folder in `out`."""
    names = names_of([log.folder for log in logs])
    parts = [_overview(logs, names), *_evaluations(logs, names, out), heading("Each run")]
    for number, (log, name) in enumerate(zip(logs, names, strict=True), 1):
        own = out / f"run-{number}"
        own.mkdir(exist_ok=True)
        parts.append(folded(name, run_page(log, own, known)))
    return parts


def _overview(logs: Sequence[RunLog], names: Sequence[str]) -> str:
    rows = [
        [
            name,
            log.method,
            state(log),
            size_text(log.total["picked"]),
            size_text(log.total["trained_tokens"]),
            flops_text(log.total["flops"]),
            log.flops_ratio,
            duration_text(log.total["step_s"]),
            log.evals[-1]["eval_loss"] if log.evals else None,
        ]
        for log, name in zip(logs, names, strict=True)
    ]
    header = ["run", "method", "state", "samples", "tokens", "FLOPs", "of full training's"]
    return table([*header, "in steps", "evaluation loss"], rows)


def _evaluations(logs: Sequence[RunLog], names: Sequence[str], out: Path) -> list[str]:
    evaluated = {name: log for log, name in zip(logs, names, strict=True) if log.evals}
    if not evaluated:
        return []
    over_steps = {
        name: ([done(e) for e in log.evals], [e["eval_loss"] for e in log.evals])
        for name, log in evaluated.items()
    }
    over_flops = {}
    for name, log in evaluated.items():
        spent = {0: 0.0}
        for record in log.train:
            spent[done(record)] = record["total"]["flops"]
        over_flops[name] = ([spent[done(e)] for e in log.evals], over_steps[name][1])
    y = "evaluation loss, nats per token"
    steps = figures.curves(out / "eval_steps.png", over_steps, y=y)
    cost = figures.curves(out / "eval_flops.png", over_flops, y=y, x="FLOPs, scoring included")
    last = {name: log.evals[-1]["eval_loss_by_task"] for name, log in evaluated.items()}
    tasks = sorted({task for each in last.values() for task in each})
    rows = [[name, *(each.get(task) for task in tasks)] for name, each in last.items()]
    return [
        heading("Evaluation"),
        figure(steps, "Evaluation loss over the steps done."),
        figure(cost, "Evaluation loss over what the steps cost."),
        paragraph("The last evaluation by task, nats per token."),
        table(["run", *(task or "(no task)" for task in tasks)], rows),
    ]
