"""What is kept of a finished cell: one small JSON file, which can be committed.

    cells/NAME/ (a run folder, megabytes) -> results/NAME.json + results/samples-HASH.json

A record holds the key of what the cell was made from, so a study continues on another machine from
the records alone: cells whose records fit are not run again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from slap_ds.bench.environment import describe
from slap_ds.config.schema import Config
from slap_ds.jsonl import read_lines
from slap_ds.study.plan import Cell

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
SAMPLE_FIELDS = ("ids", "task", "source", "tokens")


class Records:
    """The records in a study's folder, and a second place that they are copied to and, where they
    are newer there, from."""

    def __init__(self, folder: Path, other: Path | None = None) -> None:
        self.places = [folder / "results", *([other] if other is not None else [])]
        for place in self.places:
            place.mkdir(parents=True, exist_ok=True)
        if other is not None:
            for path in sorted(other.glob("*.json")):
                mine = self.places[0] / path.name
                if not mine.exists() or mine.stat().st_mtime_ns < path.stat().st_mtime_ns:
                    shutil.copyfile(path, mine)

    def key(self, cell: Cell) -> str | None:
        """The key of a finished cell, else None."""
        found = self.read(cell)
        return None if found is None else str(found["key"])

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """The record of a cell, if there is one."""
        path = self.places[0] / f"{cell.name}.json"
        if not path.is_file():
            return None
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return found

    def samples(self, record: Mapping[str, Any]) -> dict[str, list[Any]]:
        """`ids`, `task`, `source` and `tokens` of what a record's losses are those of."""
        path = self.places[0] / f"samples-{record['samples']}.json"
        found: dict[str, list[Any]] = json.loads(path.read_text("utf-8"))
        return found

    def add(self, cell: Cell, run_dir: Path) -> None:
        """Keep what the finished run of `cell` has measured."""
        record, samples = make_record(cell, run_dir)
        self.write(f"samples-{record['samples']}.json", samples)
        self.write(f"{cell.name}.json", record)

    def drop(self, cell: Cell) -> None:
        """Forget a cell that is about to be run again."""
        (self.places[0] / f"{cell.name}.json").unlink(missing_ok=True)

    def write(self, name: str, value: Any) -> None:
        """A file of the records, whole or not at all, in both places."""
        for place in self.places:
            temporary = place / f"{name}.tmp"
            text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
            # A line for each part, so that a change of one shows as such.
            temporary.write_text(text.replace(',"', ',\n"') + "\n", "utf-8")
            temporary.replace(place / name)


def make_record(cell: Cell, run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record of a finished run, and the evaluation samples that its losses are those of.

    `losses` holds nats summed over response tokens, one value a sample: of the `last` evaluation
    and, where there are several after training began, of the `best` (`best_losses`).
    """
    done = json.loads((run_dir / "done.json").read_text("utf-8"))
    config = Config.model_validate(yaml.safe_load((run_dir / "config.yaml").read_text("utf-8")))
    settings = config.model_dump(mode="json", exclude_defaults=True)
    text = json.dumps(settings).replace(str(run_dir.parent.parent), "{study}")
    evaluated = read_lines(run_dir / "eval_samples.jsonl")
    samples = {field: evaluated[-1][field] for field in SAMPLE_FIELDS}
    losses = np.asarray([each["loss"] for each in evaluated], dtype=float)  # (evaluations, I)
    kept = {"last": losses[-1]}
    if len(losses) > 2:
        kept["best"] = best_losses(losses[1:], np.asarray(samples["tokens"]))
    record = {
        "key": done["key"],
        "cell": asdict(cell),
        "measured": measured(run_dir) | {"wall_s": done["wall_s"], "cpu_s": done["cpu_s"]},
        "answers": done.get("answers"),
        "config": json.loads(text),
        "environment": describe(),
        "samples": hashlib.sha256(json.dumps(samples).encode()).hexdigest()[:12],
        "losses": {name: [round(float(x), 4) for x in each] for name, each in kept.items()},
    }
    return record, samples


def best_losses(losses: np.ndarray[Any, Any], tokens: np.ndarray[Any, Any]) -> Any:
    """(I,) the losses at the best of several evaluations (C, I), chosen without looking at them.

    The best evaluation for the samples of even places is the one with the lowest token mean over
    the odd ones, and the other way round: a minimum over the samples themselves would flatter.
    """
    out = np.empty(losses.shape[1])
    for half in (0, 1):
        other = losses[:, 1 - half :: 2].sum(1) / tokens[1 - half :: 2].sum()
        out[half::2] = losses[int(other.argmin()), half::2]
    return out


def measured(run_dir: Path) -> dict[str, Any]:
    """Evaluation losses before and after, by task and source (nats per response token), counts,
    FLOPs and seconds of a run."""
    records = read_lines(run_dir / "metrics.jsonl")
    train = [record for record in records if record["event"] == "train"]
    evals = [record for record in records if record["event"] == "eval"]
    out: dict[str, Any] = {}
    if evals:
        for name, found in (("eval_loss_before", evals[0]), ("eval_loss", evals[-1])):
            out[name] = found["eval_loss"]
            for label in ("task", "source"):
                for each, loss in sorted(found[f"eval_loss_by_{label}"].items()):
                    out[f"{name}.{label}.{each}"] = loss
    out["steps_taken"] = len(train)
    for name, key in SUMS.items():
        out[name] = sum(record.get(key, 0.0) for record in train)
    return out


def cost_share(record: Mapping[str, Any], steps: int) -> float:
    """A cell's analytic FLOPs / those of training all its candidates for `steps` steps."""
    of = record["measured"]
    return float(of["flops"] / of["full_flops"] * of["steps_taken"] / steps)
