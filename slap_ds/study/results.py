"""Results of a study: one row a cell, as Parquet, and as CSV for reading.

Columns: what tells the cell apart, every setting that differs between cells (`config.KEY`),
evaluation losses in nats per response token, counts, FLOPs, seconds, versions.
"""

from __future__ import annotations

import csv
import json
import logging
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from slap_ds.jsonl import read_lines
from slap_ds.study.plan import Cell

logger = logging.getLogger(__name__)

SUMS = {
    "candidates": "candidates",
    "samples": "picked",
    "candidate_tokens": "candidate_tokens",
    "trained_tokens": "trained_tokens",
    "response_tokens": "response_tokens",
    "flops": "flops",
    "scoring_flops": "scoring_flops",
    "full_flops": "full_flops",
    "step_s": "step_s",
    "score_s": "score_s",
    "selection_s": "selection_s",
}
KEYS_FILE = "keys.json"
PLACES = ("run_dir", "data.train", "data.eval", "data.cache_dir", "model.path", "model.tokenizer")


def finished(run_dir: Path) -> str | None:
    """The key of a finished run, else None."""
    path = run_dir / "done.json"
    return json.loads(path.read_text("utf-8"))["key"] if path.is_file() else None


def collect(folder: Path, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A row for each finished cell, in the order of `cells`; cells that an earlier state of the
    study has made are left out, with a warning."""
    found = {cell: key for cell in cells if (key := finished(folder / "cells" / cell.name))}
    path = folder / KEYS_FILE
    known = json.loads(path.read_text("utf-8")) if path.is_file() else None
    done = [cell for cell, key in found.items() if known is None or known.get(cell.name) == key]
    if stale := [cell.name for cell in found if cell not in done]:
        logger.warning(
            "left out %d cells of an earlier config, data or base model, run the study again: %s",
            len(stale),
            ", ".join(stale),
        )
    settings = [dict(_flat(_config(folder / "cells" / cell.name))) for cell in done]
    differing = [
        key
        for key in dict.fromkeys(key for each in settings for key in each)
        if key not in PLACES and len({repr(each.get(key)) for each in settings}) > 1
    ]
    facts = versions()
    rows = []
    for cell, config in zip(done, settings, strict=True):
        row = {"cell": cell.name, **asdict(cell)}
        row.update(_measured(folder / "cells" / cell.name))
        row.update({f"config.{key}": _plain(config.get(key), folder) for key in differing})
        rows.append({**row, **facts})
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: row.get(key) for key in keys} for row in rows]


def _measured(run_dir: Path) -> dict[str, Any]:
    records = read_lines(run_dir / "metrics.jsonl")
    train = [record for record in records if record["event"] == "train"]
    evals = [record for record in records if record["event"] == "eval"]
    done = json.loads((run_dir / "done.json").read_text("utf-8"))
    out: dict[str, Any] = {}
    if evals:
        out["eval_loss_before"] = evals[0]["eval_loss"]
        out["eval_loss"] = evals[-1]["eval_loss"]
        for label in ("task", "source"):
            for name, loss in sorted(evals[-1][f"eval_loss_by_{label}"].items()):
                out[f"eval_loss.{label}.{name}"] = loss
    out["steps_taken"] = len(train)
    for name, key in SUMS.items():
        out[name] = sum(record.get(key, 0.0) for record in train)
    out["wall_s"], out["cpu_s"] = done["wall_s"], done["cpu_s"]
    return out


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """`path` with the suffixes .parquet and .csv; floats in the CSV with six digits."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path.with_suffix(".parquet"))
    with path.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file, as dictionaries."""
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def sample_losses(run_dir: Path) -> dict[str, list[Any]]:
    """The last evaluation's `ids`, `loss` (nats, summed) and `tokens`, a value a sample."""
    path = run_dir / "eval_samples.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"no losses of evaluation samples at {str(path)!r}")
    return read_lines(path)[-1]


def versions() -> dict[str, str]:
    """The commit of the code, if it is in a repository, and the versions of what it runs on."""
    out = {}
    for package in ("torch", "transformers", "deepspeed"):
        try:
            out[f"version.{package}"] = version(package)
        except PackageNotFoundError:
            out[f"version.{package}"] = "not installed"
    commit = _git("rev-parse", "HEAD")
    changed = "+" if commit and _git("status", "--porcelain", "--untracked-files=no") else ""
    out["commit"] = f"{commit or 'unknown'}{changed}"
    return out


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
            check=False,
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _config(run_dir: Path) -> Any:
    return yaml.safe_load((run_dir / "config.yaml").read_text("utf-8"))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: Any, folder: Path) -> str | None:
    # Text, because one Parquet column has one type; without the place where the study lies.
    return None if value is None else json.dumps(value).replace(str(folder), "{study}")
