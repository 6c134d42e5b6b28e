"""Runs side by side: what each trained, what it cost, what it reached."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from slap_ds.config.file import read_yaml
from slap_ds.files import sha256
from slap_ds.jsonl import read_lines

# What decides which tokens an evaluation loss is a mean over, beside the tokenizer.
_EVALUATED = {
    "data": ("eval", "format", "template", "max_tokens", "over_length"),
    "evaluation": ("max_samples",),
}

COST = "FLOPs, scoring included"


def compare(run_dirs: Sequence[Path], console: Console) -> None:
    """Print a table of runs: samples, tokens, FLOPs, seconds, evaluation loss per task.

    The ratio of the first to the last run is left out for losses that were not taken of the same
    tokens, as far as the runs' config.yaml say.

    Raises:
        FileNotFoundError, ValueError: a run without metrics or config.yaml.
    """
    runs = [_summary(run_dir) for run_dir in run_dirs]
    different = _differences(run_dirs)
    table = Table(title=f"runs side by side{_equal(runs)}")
    table.add_column("")
    for run_dir in run_dirs:
        table.add_column(Text(run_dir.name), justify="right")
    if len(runs) > 1:
        table.add_column(Text(f"{run_dirs[0].name} / {run_dirs[-1].name}"), justify="right")
    for name in runs[0]:
        values = [run.get(name) for run in runs]
        cells = [_show(name, value) for value in values]
        if len(runs) > 1:
            first, last = values[0], values[-1]
            alike = not different or not _is_loss(name)
            cells.append(f"{first / last:.3f}" if first and last and alike else "")
        table.add_row(Text(name), *cells)
    console.print(table)
    if different:
        console.print(
            "The losses are of different tokens, so that their ratio would say nothing: "
            + "; ".join(different),
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _equal(runs: Sequence[dict[str, float]]) -> str:
    """Which budgets all of them had alike: steps; FLOPs to 2 %, as steps are whole."""

    def within(share: float, name: str) -> bool:
        values = [run[name] for run in runs]
        return max(values) <= (1 + share) * min(values)

    equal = ["steps"] if within(0, "steps") else []
    equal += ["cost"] if within(0.02, COST) else []
    return f", at equal {' and '.join(equal)}" if equal and len(runs) > 1 else ""


def _differences(run_dirs: Sequence[Path]) -> list[str]:
    """In what the first and the last run were evaluated differently."""
    first, last = (_evaluated(run_dir) for run_dir in (run_dirs[0], run_dirs[-1]))
    return [
        f"{key} is {first[key][0]} in {run_dirs[0].name}, {last[key][0]} in {run_dirs[-1].name}"
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


def _summary(run_dir: Path) -> dict[str, float]:
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
    return "loss" in name or (name.startswith("  ") and "of them" not in name)
