"""Runs a study: base model, the grid, then the reference runs matched to the pruned ones.

A cell is finished when its done.json holds the key of what it is made from: its config, the data
and the base model. Finished cells are skipped, so a study that was stopped, or got more cells,
goes on; an unfinished cell starts again. keys.json has the keys of the study as it is now.
"""

from __future__ import annotations

import fcntl
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from slap_ds.config.schema import Config, SelectionConfig
from slap_ds.jsonl import read_lines
from slap_ds.study.data import write_data
from slap_ds.study.keys import Keys
from slap_ds.study.plan import (
    PLAIN,
    Cell,
    Study,
    all_configs,
    base_config,
    cell_config,
    plan,
    pruned_groups,
)
from slap_ds.study.pool import Failure, run_tasks
from slap_ds.study.results import KEYS_FILE, finished
from slap_ds.study.work import LossesTask, TimeTask, TrainTask, work, write_json

PRELOAD = "slap_ds.study.work"
STUDY_FILE = "study.json"


@dataclass(frozen=True)
class Matched:
    """Pruned cells, and the number of steps at which the reference costs as much as they do."""

    method: str
    keep: float
    strata: int | None
    variant: str
    basis: str  # samples, flops or seconds
    steps: int | None  # None: the config's own number


@dataclass(frozen=True)
class Outcome:
    """What a study has run."""

    cells: list[Cell]
    matched: list[Matched]
    failed: list[str]  # names of cells


def run_study(study: Study, folder: Path, jobs: int, console: Console) -> Outcome:
    """Run what of the study is not finished yet, on `jobs` processes of one thread each.

    Raises:
        ValueError: mistakes in the study or its configs; the base model could not be trained;
            another process works in the same folder.
    """
    if jobs < 1:
        raise ValueError(f"--jobs is {jobs}, expected 1 or more")
    cells = plan(study)
    configs = all_configs(study, cells, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        write_json(folder / STUDY_FILE, study.model_dump(mode="json"))
        if study.data is not None:
            made = write_data(study, folder)
            if made["rejected"]:
                console.print(f"{made['rejected']} rows of the data cannot be used")
        keys = Keys()
        base = _train_base(study, folder, keys, console)
        if study.base.losses:
            _write_base_losses(study, folder, cells[0], keys, base, console)
        wanted = {cell: keys.of(config, base) for cell, config in configs.items()}
        _write_keys(folder, wanted)
        failed = _run_cells(configs, wanted, jobs, console)
        matched = _match(study, folder, [c for c in cells if c.name not in failed], console)
        (folder / "matched.json").write_text(
            json.dumps([asdict(m) for m in matched], indent=1) + "\n", "utf-8"
        )
        more = _matched_cells(study, cells, matched)
        configs = {cell: cell_config(study, cell, folder) for cell in more}
        matching = {cell: keys.of(config, base) for cell, config in configs.items()}
        _write_keys(folder, wanted | matching)
        failed += _run_cells(configs, matching, jobs, console)
    return Outcome(cells + more, matched, failed)


def read_outcome(folder: Path) -> tuple[Study, Outcome]:
    """The study in `folder`, finished or not, as far as its files tell.

    Raises:
        FileNotFoundError: there is none.
    """
    path = folder / STUDY_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} is no study: it has no {STUDY_FILE}")
    study = Study.model_validate_json(path.read_text("utf-8"))
    cells, matched = plan(study), []
    if (folder / "matched.json").is_file():
        entries = json.loads((folder / "matched.json").read_text("utf-8"))
        matched = [Matched(**entry) for entry in entries]
    cells += _matched_cells(study, cells, matched)
    failed = [cell.name for cell in cells if (_place(folder, cell) / "error.txt").is_file()]
    return study, Outcome(cells, matched, failed)


def _write_keys(folder: Path, keys: Mapping[Cell, str]) -> None:
    write_json(folder / KEYS_FILE, {cell.name: key for cell, key in keys.items()})


def _place(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / cell.name


def _train_base(study: Study, folder: Path, keys: Keys, console: Console) -> Any:
    """Train and export the base model unless it is there; returns what stands for it in keys."""
    config = base_config(study, folder)
    if config is None:
        return keys.of_path(study.base.path)
    key = keys.of(config, keys.of_path(config.model.path))
    model, note = folder / "base" / "model", folder / "base" / "model.json"
    if note.is_file() and json.loads(note.read_text("utf-8"))["key"] == key:
        return key
    note.unlink(missing_ok=True)
    _write_keys(folder, {})  # no cell is of the new one, should this be interrupted
    console.print("training the base model")
    for _, result in run_tasks(work, [TrainTask(config, key, str(model))], 1, PRELOAD):
        if isinstance(result, Failure):
            raise ValueError(f"the base model could not be trained: {result.error}\n{result.trace}")
        evals = _evaluations(Path(config.run_dir))
        losses = f", evaluation loss {evals[0]:.4f} -> {evals[-1]:.4f}" if evals else ""
        console.print(f"base model: {result['wall_s']:.0f} s{losses}", highlight=False)
        write_json(note, result)
    return key


def _write_base_losses(
    study: Study, folder: Path, any_cell: Cell, keys: Keys, base: Any, console: Console
) -> None:
    """The loss of each training row under the base model, unless it is there."""
    out, note = folder / "base" / "losses.jsonl", folder / "base" / "losses.json"
    config = cell_config(study, replace(any_cell, variant=PLAIN), folder)
    run_dir, every = str(folder / "base" / "scoring"), SelectionConfig(method="full")
    config = config.model_copy(update={"run_dir": run_dir, "selection": every})
    key = keys.of(config, base)
    if note.is_file() and json.loads(note.read_text("utf-8"))["key"] == key:
        return
    note.unlink(missing_ok=True)
    _write_keys(folder, {})
    console.print("scoring the training rows with the base model")
    for _, result in run_tasks(work, [LossesTask(config, str(out))], 1, PRELOAD):
        if isinstance(result, Failure):
            raise ValueError(f"the rows could not be scored: {result.error}\n{result.trace}")
        write_json(note, {"key": key, **result})


def _run_cells(
    configs: Mapping[Cell, Config], keys: Mapping[Cell, str], jobs: int, console: Console
) -> list[str]:
    """Train what is not finished; returns the names of the cells that failed."""
    tasks = {}
    for cell, config in configs.items():
        if finished(Path(config.run_dir)) != keys[cell]:
            tasks[config.run_dir] = (cell, TrainTask(config, keys[cell]))
    if len(tasks) < len(configs):
        console.print(f"{len(configs) - len(tasks)} of {len(configs)} cells are finished already")
    failed, took, started = [], [], time.perf_counter()
    for task, result in run_tasks(work, [task for _, task in tasks.values()], jobs, PRELOAD):
        cell, _ = tasks[task.config.run_dir]
        run_dir = Path(task.config.run_dir)
        if isinstance(result, Failure):
            failed.append(cell.name)
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "error.txt").write_text(f"{result.error}\n{result.trace}", "utf-8")
            said = f"FAILED: {result.error}"
        else:
            evals = _evaluations(run_dir)
            said = f"evaluation loss {evals[-1]:.4f}, " if evals else ""
            said += f"{result['wall_s']:.0f} s"
        took.append(time.perf_counter() - started)
        done, left = len(took), len(tasks) - len(took)
        eta = took[-1] / done * left
        console.print(
            f"[{done}/{len(tasks)}] {cell.name}: {said}; about {_minutes(eta)} left",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    return failed


def _match(study: Study, folder: Path, cells: Sequence[Cell], console: Console) -> list[Matched]:
    """The steps at which the reference costs what finished pruned cells cost."""
    if not study.matched:
        return []
    full = {
        (cell.variant, cell.seed): _train_records(folder, cell)
        for cell in cells
        if cell.method == study.reference and cell.steps is None
    }
    ratios = _ratios(study, folder, cells, console) if "seconds" in study.matched else {}
    out = []
    for group in pruned_groups(study, cells):
        pairs = [
            (_train_records(folder, cell), full[cell.variant, cell.seed])
            for cell in group
            if (cell.variant, cell.seed) in full
        ]
        if not pairs:
            continue
        steps = len(pairs[0][1])
        first = group[0]
        share = {
            "samples": _ratio(pairs, "picked"),
            "flops": _ratio(pairs, "flops"),
            "seconds": ratios.get(ratio_name(first), 0.0),
        }
        for basis in study.matched:
            # Neighbouring numbers of steps are one run: to 1 % the costs are equal.
            grain = max(1, steps // 100)
            wanted = max(1, round(share[basis] * steps / grain)) * grain
            matched_steps = wanted if wanted != steps else None
            out.append(
                Matched(first.method, first.keep, first.strata, first.variant, basis, matched_steps)
            )
    return out


def _ratio(pairs: Sequence[tuple[list[dict[str, Any]], list[dict[str, Any]]]], key: str) -> float:
    """Mean over seeds of a pruned run's total / the reference's."""
    return statistics.fmean(
        sum(record[key] for record in pruned) / sum(record[key] for record in full)
        for pruned, full in pairs
    )


def _matched_cells(study: Study, cells: Sequence[Cell], matched: list[Matched]) -> list[Cell]:
    """The reference runs that `matched` asks for and the grid does not have, each once."""
    found = [
        replace(cell, steps=match.steps)
        for match in matched
        for cell in cells
        if cell.method == study.reference and cell.variant == match.variant
    ]
    return sorted(set(found) - set(cells), key=lambda cell: (cell.seed, cell.name))


def ratio_name(cell: Cell) -> str:
    """How step seconds are told apart: seeds and data do not change them."""
    return f"{cell.method}-keep{cell.keep:g}" + (f"-k{cell.strata}" if cell.strata else "")


def _ratios(
    study: Study, folder: Path, cells: Sequence[Cell], console: Console
) -> dict[str, float]:
    """Seconds of a pruned step / a reference step, by `ratio_name`: given, measured before, or
    measured now."""
    known = read_ratios(folder)
    configs: dict[str, Config] = {}
    for group in pruned_groups(study, cells):
        name = ratio_name(group[0])
        given = study.seconds_ratio.get(name, study.seconds_ratio.get(group[0].method))
        if given is not None:
            known[name] = given
        elif name not in known:
            configs[name] = cell_config(study, group[0], folder)
    reference = next((c for c in cells if c.method == study.reference and c.steps is None), None)
    if not configs or reference is None:
        return known
    console.print(f"timing {len(configs)} kinds of step against the reference's")
    config = cell_config(study, reference, folder)
    config = config.model_copy(update={"run_dir": str(folder / "timing")})
    for _, result in run_tasks(work, [TimeTask(config, configs)], 1, PRELOAD):
        if isinstance(result, Failure):
            raise ValueError(f"the steps could not be timed: {result.error}\n{result.trace}")
        known.update(result)
    write_json(folder / "seconds.json", known)
    return known


def read_ratios(folder: Path) -> dict[str, float]:
    """Seconds of a pruned step / a reference step, by `ratio_name`, as far as they are known."""
    path = folder / "seconds.json"
    known: dict[str, float] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return known


def _train_records(folder: Path, cell: Cell) -> list[dict[str, Any]]:
    records = read_lines(_place(folder, cell) / "metrics.jsonl")
    return [record for record in records if record["event"] == "train"]


def _evaluations(run_dir: Path) -> list[float]:
    records = read_lines(run_dir / "metrics.jsonl")
    return [record["eval_loss"] for record in records if record["event"] == "eval"]


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the study's folder, so that two processes never train the same cell."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process runs the study in {str(folder)!r}") from None
        yield
