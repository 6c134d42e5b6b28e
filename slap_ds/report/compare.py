"""Runs side by side: what each trained, what it cost, what it reached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from slap_ds.config.file import read_yaml
from slap_ds.files import sha256
from slap_ds.jsonl import read_lines
from slap_ds.report.names import names_of
from slap_ds.report.numbers import duration_text, flops_text, size_text

# What decides which tokens an evaluation loss is a mean over, beside the tokenizer.
_EVALUATED = {
    "data": ("eval", "format", "template", "max_tokens", "over_length"),
    "evaluation": ("max_samples",),
}

_EVALUATIONS = ("evaluation loss before", "evaluation loss after")
COST = "FLOPs, scoring included"
Summary = dict[str, float]  # what the table says of a run


def compare(run_dirs: Sequence[Path], console: Console) -> None:
    """Print a table of runs: samples, tokens, FLOPs, seconds, evaluation loss per task.

    A column for each run; where the console is too narrow for that, a line for each, and then the
    tasks with the runs by their numbers, as many side by side as fit.

    The ratio of the first to the last run is left out for losses that were not taken of the same
    tokens, as far as the runs' config.yaml say.

    Raises:
        FileNotFoundError, ValueError: a run without metrics or config.yaml.
    """
    runs = [_summary(run_dir) for run_dir in run_dirs]
    different = _differences(run_dirs)
    names = names_of(run_dirs)
    title = f"runs side by side{_equal(runs)}"
    table = _columns(title, names, runs, not different)
    unbounded = console.options.update_width(10_000)
    if console.measure(table, options=unbounded).maximum <= console.width:
        console.print(table)
    else:
        for part in _lines(title, names, runs, console.width):
            console.print(part)
    if different:
        console.print(
            "The losses are of different tokens, so that their ratio would say nothing: "
            + "; ".join(different),
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _columns(title: str, names: Sequence[str], runs: Sequence[Summary], alike: bool) -> Table:
    """A column a run, and the ratio of the first to the last; of losses only if they are `alike`
    in what they were taken of."""
    table = Table(title=title)
    table.add_column("")
    for name in names:
        table.add_column(Text(name), justify="right")
    if len(runs) > 1:
        table.add_column(Text(f"{names[0]} / {names[-1]}"), justify="right")
    for what in runs[0]:
        values = [run.get(what) for run in runs]
        cells = [_show(what, value) for value in values]
        if len(runs) > 1:
            first, last = values[0], values[-1]
            shown = first and last and (alike or not _is_loss(what))
            cells.append(f"{first / last:.3f}" if first and last and shown else "")
        table.add_row(Text(what), *cells)
    return table


def _lines(
    title: str, names: Sequence[str], runs: Sequence[Summary], width: int
) -> Iterator[Table]:
    """A line a run, and the tasks' losses in as many tables as `width` characters ask for."""
    table = Table(title=title, box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("run", overflow="fold", min_width=12)
    for what in ("steps", "samples", "tokens", "FLOPs", "time", "loss\nbefore", "loss\nafter"):
        table.add_column(what, justify="right", no_wrap=True)
    for number, (name, run) in enumerate(zip(names, runs, strict=True), 1):
        table.add_row(
            str(number),
            Text(name),
            size_text(run["steps"]),
            size_text(run["samples trained"]),
            size_text(run["tokens trained"]),
            flops_text(run[COST]).removesuffix("FLOPs"),
            duration_text(run["seconds in steps"]),
            *(_show(what, run.get(what)) for what in _EVALUATIONS),
        )
    yield table
    tasks = list(dict.fromkeys(what for run in runs for what in run if _is_task(what)))
    first = max(map(len, tasks), default=0)
    many = max(1, (width - min(first, width // 3)) // 8)
    for start in range(0, len(runs) if tasks else 0, many):
        few = runs[start : start + many]
        part = Table(title="loss after, by task", box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
        part.add_column("", overflow="fold", max_width=width // 3)
        for number in range(start + 1, start + len(few) + 1):
            part.add_column(str(number), justify="right", no_wrap=True)
        for task in tasks:
            part.add_row(Text(task.strip()), *(_show(task, run.get(task)) for run in few))
        yield part


def _equal(runs: Sequence[Summary]) -> str:
    """Which budgets all of them had alike: steps; FLOPs to 2 %, as steps are whole."""

    def within(share: float, name: str) -> bool:
        values = [run[name] for run in runs]
        return max(values) <= (1 + share) * min(values)

    equal = ["steps"] if within(0, "steps") else []
    equal += ["cost"] if within(0.02, COST) else []
    return f", at equal {' and '.join(equal)}" if equal and len(runs) > 1 else ""


def _differences(run_dirs: Sequence[Path]) -> list[str]:
    """In what the first and the last run were evaluated differently."""
    names = names_of(run_dirs)
    first, last = (_evaluated(run_dir) for run_dir in (run_dirs[0], run_dirs[-1]))
    return [
        f"{key} is {first[key][0]} in {names[0]}, {last[key][0]} in {names[-1]}"
        for key in first
        if first[key][1] != last[key][1]
    ]


def _evaluated(run_dir: Path) -> dict[str, tuple[Any, Any]]:
    """How a run was evaluated: by key, what its config says and what that stands for."""
    raw = read_yaml(str(run_dir / "config.yaml"))
    found = {}
    for section, names in _EVALUATED.items():
        for name in names:
            value = (raw.get(section) or {}).get(name)
            found[f"{section}.{name}"] = (value, value)
    model = raw.get("model") or {}
    tokenizer = model.get("tokenizer") or model.get("path") or ""
    found["model.tokenizer"] = (tokenizer, _content(tokenizer))
    return found


def _content(tokenizer: str) -> str:
    """sha256 (hex) of a tokenizer's file; its name where it lies elsewhere."""
    path = Path(tokenizer)
    file = path / "tokenizer.json" if path.is_dir() else path
    return sha256(file) if file.is_file() else tokenizer


def _summary(run_dir: Path) -> Summary:
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{str(run_dir)!r} is no run: it has no metrics.jsonl")
    records = read_lines(path)
    train = [r for r in records if r["event"] == "train"]
    evals = [r for r in records if r["event"] == "eval"]
    if not train:
        raise ValueError(f"{path} holds no training step yet")
    total: dict[str, Any] = train[-1]["total"]
    out = {
        "steps": float(len(train)),
        "samples trained": total["picked"],
        "tokens trained": total["trained_tokens"],
        COST: total["flops"],
        "seconds in steps": total["step_s"],
        "  of them scoring": total["score_s"],
        "  of them selection": total["selection_s"],
        "training loss, last step": train[-1]["loss"],
    }
    if evals:
        if len(evals) > 1:
            out["evaluation loss before"] = evals[0]["eval_loss"]
        out["evaluation loss after"] = evals[-1]["eval_loss"]
        for task, loss in sorted(evals[-1]["eval_loss_by_task"].items()):
            out[f"  {task or 'no task'}"] = loss
    return out


def _show(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if "FLOPs" in name:
        return f"{value:.3e}"
    if _is_loss(name):
        return f"{value:.4f}"
    return f"{value:,.1f}" if "seconds" in name or "of them" in name else f"{value:,.0f}"


def _is_loss(name: str) -> bool:
    return "loss" in name or _is_task(name)


def _is_task(name: str) -> bool:
    return name.startswith("  ") and "of them" not in name
