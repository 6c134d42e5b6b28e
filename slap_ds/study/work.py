"""What a worker of a study does: train the base model, train a cell, measure kinds of step."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from slap_ds.answers.questions import Answering
from slap_ds.checkpoint.export import export
from slap_ds.config.schema import Config
from slap_ds.data.batch import CandidateBatch
from slap_ds.engine import start_ranks, stop_ranks
from slap_ds.evaluation.evaluate import evaluate
from slap_ds.evaluation.reference import write_losses
from slap_ds.evaluation.subject import open_subject
from slap_ds.files import write_text
from slap_ds.jsonl import read_lines
from slap_ds.study.plan import Answers
from slap_ds.train.inputs import make_parts
from slap_ds.train.loop import train
from slap_ds.train.record import train_step
from slap_ds.train.run import TrainState, prepare

TIMING_ROUNDS = 9
TIMING_WARMUP = 2


@dataclass(frozen=True)
class TrainTask:
    """Train `config` from the start; with `export_to` write the model there."""

    config: Config
    key: str  # written into done.json: what the result depends on
    export_to: str | None = None
    answers: Answers | None = None  # let the model answer evaluation rows
    keep: bool = True  # the checkpoint, once the answers are there


@dataclass(frozen=True)
class LossesTask:
    """Write the loss of each of `config`'s training samples under its model."""

    config: Config
    out: str


@dataclass(frozen=True)
class TimeTask:
    """Measure a step of each of `configs` against one of `reference`."""

    reference: Config
    configs: dict[str, Config]


def work(task: TrainTask | LossesTask | TimeTask) -> dict[str, Any]:
    """Run a task in this process, on one thread, what it prints in log.txt of its run folder."""
    torch.set_num_threads(1)
    config = task.reference if isinstance(task, TimeTask) else task.config
    folder = Path(config.run_dir)
    if folder.exists():
        shutil.rmtree(folder)  # an interrupted run starts again
    folder.mkdir(parents=True)
    with _printing_to(folder / "log.txt"):
        try:
            if isinstance(task, TrainTask):
                return _train(task)
            if isinstance(task, LossesTask):
                return _score(task)
            return measure_steps(task)
        finally:
            gc.collect()


def _train(task: TrainTask) -> dict[str, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    run = prepare(task.config)
    train(run)
    stop_ranks(run.comm)
    if task.export_to is not None:
        export(run.run_dir, Path(task.export_to))
    result = {
        "key": task.key,
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
    }
    if task.answers is not None:
        run_dir = run.run_dir
        del run  # its weights would lie beside those that answer
        result["answers"] = _answers(run_dir, task.answers)
        if not task.keep:
            shutil.rmtree(run_dir / "checkpoints")
        write_json(run_dir / "done.json", result)
        return result
    write_json(run.run_dir / "done.json", result)
    return result


def _answers(run_dir: Path, how: Answers) -> dict[str, Any]:
    """Metrics of greedy answers by task and source, and how they were made."""
    answering = Answering(samples=how.samples, max_new_tokens=how.max_new_tokens)
    with open_subject(run_dir, None, [], {}) as subject:
        found = evaluate(subject, answering)
    return {"settings": asdict(answering), **found["answers"]}


def _score(task: LossesTask) -> dict[str, Any]:
    comm = start_ranks(task.config)
    count = write_losses(task.config, Path(task.out), comm)
    stop_ranks(comm)
    return {"samples": count}


def measure_steps(task: TimeTask) -> dict[str, dict[str, float]]:
    """Each config's step against the reference's, on the same candidates: `seconds`, the median
    over rounds of the ratios, and `flops`, the ratio of the sums.

    All share one engine and take turns, so that a machine that becomes busy slows them alike.
    """
    base = prepare(task.reference)
    runs = {"": base}
    for name, config in task.configs.items():
        # Another's scorer and selector, this one's engine and candidates.
        _, scorer, selector = make_parts(config, base.inputs.train)
        runs[name] = replace(
            base, config=config, scorer=scorer, selector=selector, state=TrainState()
        )
    ratios: dict[str, list[float]] = {name: [] for name in task.configs}
    flops = dict.fromkeys(runs, 0.0)
    rounds = min(TIMING_ROUNDS, len(base.stream))
    for number in range(rounds):
        batch = CandidateBatch(base.inputs.train, next(base.stream))
        took = {}
        for name, run in runs.items():
            record = train_step(run, number, batch).metrics
            took[name] = record["step_s"]
            flops[name] += record["flops"]
        if number >= min(TIMING_WARMUP, rounds - 1):
            for name, values in ratios.items():
                values.append(took[name] / took[""])
    stop_ranks(base.comm)
    return {
        name: {"seconds": statistics.median(values), "flops": flops[name] / flops[""]}
        for name, values in ratios.items()
    }


def evaluations(run_dir: Path) -> list[float]:
    """The evaluation losses of a run, in order."""
    records = read_lines(run_dir / "metrics.jsonl")
    return [record["eval_loss"] for record in records if record["event"] == "eval"]


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _printing_to(path: Path) -> Iterator[None]:
    """Inside, stdout and stderr, also those of libraries in C, go to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(1), os.dup(2)]
    with path.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for target, saved in zip((1, 2), before, strict=True):
            os.dup2(saved, target)
            os.close(saved)
