"""EleutherAI's lm-evaluation-harness on a model folder; it is an extra (`slap_ds[harness]`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text


def run_harness(
    folder: Path, tasks: str, limit: int | None = None, chat: bool = False
) -> dict[str, Any]:
    """Evaluate a Hugging Face folder on tasks of the harness, in this process.

    Args:
        tasks: names or YAML files of tasks, with commas between them. Files lie beside what they
            include; nothing is downloaded that they do not name.
        limit: rows of each task.
        chat: put the tokenizer's chat template around prompts.

    Returns: the harness's `results`, `n-samples`, `versions` and `configs`.

    Raises:
        ValueError: lm_eval is not installed, or there is no such task.
        FileNotFoundError: no such file.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ValueError("--lm-eval needs lm_eval: pip install 'slap_ds[harness]'") from None
    asked = [part for name in tasks.split(",") if (part := name.strip())]
    files = [Path(name) for name in asked if name.endswith((".yaml", ".yml"))]
    names = [_task_of(Path(name)) if Path(name) in files else name for name in asked]
    manager = TaskManager(include_path=[str(f.resolve().parent) for f in files] or None)
    if unknown := sorted(set(names) - set(manager.all_tasks)):
        raise ValueError(
            f"the harness knows no task {', '.join(unknown)}: `lm_eval ls tasks` lists all; for "
            "one of your own, name its .yaml file"
        )
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "tokenizer": str(folder)},
        tasks=names,
        task_manager=manager,
        limit=limit,
        batch_size=8,
        device="cuda" if torch.cuda.is_available() else "cpu",
        apply_chat_template=chat,
        log_samples=False,
    )
    assert found is not None, "only ranks other than 0 get nothing"
    kept = ("results", "n-samples", "versions", "configs", "n-shot", "higher_is_better")
    return {"lm_eval": lm_eval.__version__, **{name: found.get(name) for name in kept}}


def show_harness(found: Mapping[str, Any], console: Console) -> None:
    """Print the table of tasks and metrics."""
    table = Table(title=f"lm_eval {found['lm_eval']}")
    for name in ("task", "metric", "value", "standard error"):
        table.add_column(name)
    for task, values in found["results"].items():
        for key, value in values.items():
            if isinstance(value, float) and "_stderr," not in key:
                error = values.get(key.replace(",", "_stderr,", 1))
                shown = f"{error:.4f}" if isinstance(error, float) else "-"
                table.add_row(Text(task), key.removesuffix(",none"), f"{value:.4f}", shown)
    console.print(table)


def _task_of(file: Path) -> str:
    """The name a task file gives to its task or group. It is not parsed: it may hold tags."""
    if not file.is_file():
        raise FileNotFoundError(f"--lm-eval: no task file at {str(file)!r}")
    found = re.search(
        r"^(?:task|group):\s*([\w.-]+)\s*(?:#.*)?$", file.read_text("utf-8"), re.MULTILINE
    )
    if found is None:
        raise ValueError(f"--lm-eval: {file} names no task (a line `task: NAME`)")
    return found[1]
