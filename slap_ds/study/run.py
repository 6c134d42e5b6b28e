"""Runs a study: data and base model, then the grid, what is finished left alone.

    cells -> steps that their cost buys -> runs in worker processes -> records

A cell is finished when its record holds the key of what it is made from: its config, the data and
the base model. Finished cells are skipped, so a study that was stopped, got more cells, or moved to
another machine with its records, goes on. keys.json has the keys of the study as it is now.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from slap_ds.config.schema import Config
from slap_ds.study.base import PRELOAD, base_key, train_base, write_base_losses
from slap_ds.study.costs import Costs
from slap_ds.study.data import write_data
from slap_ds.study.keys import Keys
from slap_ds.study.plan import Cell, Study, all_configs, cell_config, plan
from slap_ds.study.pool import Failure, run_tasks
from slap_ds.study.records import Records
from slap_ds.study.results import KEYS_FILE
from slap_ds.study.work import TrainTask, evaluations, work, write_json

STUDY_FILE = "study.json"


@dataclass(frozen=True)
class Outcome:
    """What a study has run."""

    cells: list[Cell]
    failed: list[str]  # names of cells


def run_study(
    study: Study, folder: Path, jobs: int, console: Console, results: Path | None = None
) -> Outcome:
    """Run what of the study is not finished yet, on `jobs` processes of one thread each.

    Args:
        results: a second folder of records, whose cells count as finished where they fit, and that
            gets a copy of every new record.

    Raises:
        ValueError: mistakes in the study or its configs; the base model could not be trained;
            another process works in the same folder.
    """
    if jobs < 1:
        raise ValueError(f"--jobs is {jobs}, expected 1 or more")
    cells = plan(study)
    all_configs(study, cells, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        write_json(folder / STUDY_FILE, study.model_dump(mode="json"))
        if study.data is not None:
            made = write_data(study, folder)
            if made["rejected"]:
                console.print(f"{made['rejected']} rows of the data cannot be used")
        failed = _Grid(study, folder, cells, jobs, console, results).run()
    return Outcome(cells, failed)


class _Grid:
    """The cells of a study, run in rounds: while the first seeds of some groups still look for
    their steps, the cells of groups whose steps are settled run beside them."""

    def __init__(
        self,
        study: Study,
        folder: Path,
        cells: list[Cell],
        jobs: int,
        console: Console,
        results: Path | None,
    ) -> None:
        self.study, self.folder, self.cells = study, folder, cells
        self.jobs, self.console = jobs, console
        self.records = Records(folder, results)
        self.costs = Costs(study, folder, cells, self.records)
        self.keys = Keys()
        self.base = base_key(study, folder, self.keys)
        answers = study.answers
        self.facts = self.base if answers is None else [self.base, answers.model_dump()]
        self.wanted: dict[Cell, str] = {}  # the key of every cell whose steps are known
        self.failed: list[str] = []

    def run(self) -> list[str]:
        if self.study.base.losses:  # they decide the keys of cells
            self._make_base()
        scouts: dict[str, Cell] = {}
        for cell in self.cells:
            scouts.setdefault(cell.group_name, cell)
        first = True
        while True:
            tasks = self._unfinished(scouts)
            if first:
                self._report_finished()
            if not tasks and not self._needs_measuring():
                break
            if first:
                self._make_base()
                first = False
            if self._needs_measuring():
                self.costs.measure(self.cells, self.console)
                continue
            self.failed += self._run(tasks)
        return self.failed

    def _needs_measuring(self) -> bool:
        return any(c.cost is not None and self.costs.steps_of(c) is None for c in self.cells)

    def _make_base(self) -> None:
        train_base(self.study, self.folder, self.base, self.console)
        if self.study.base.losses:
            any_cell = self.cells[0]
            write_base_losses(self.study, self.folder, any_cell, self.keys, self.base, self.console)

    def _unfinished(self, scouts: Mapping[str, Cell]) -> dict[Cell, Config]:
        """What can be run now: first seeds, and further seeds of groups whose steps are settled."""
        out = {}
        for cell in self.cells:
            scout = scouts[cell.group_name]
            if not self.costs.is_settled(cell) and cell != scout:
                continue
            config = self._config(cell)
            if config is None:
                continue
            while self._finished(cell, config) and not self.costs.is_settled(cell):
                record = self.records.read(cell)
                assert record is not None
                self.costs.take(cell, record)
                config = self._config(cell)
                assert config is not None
            if not self._finished(cell, config) and cell.name not in self.failed:
                out[cell] = config
        write_json(self.folder / KEYS_FILE, {cell.name: key for cell, key in self.wanted.items()})
        # Those that decide the steps of others come first.
        return dict(sorted(out.items(), key=lambda item: self.costs.is_settled(item[0])))

    def _config(self, cell: Cell) -> Config | None:
        steps = self.costs.steps_of(cell)
        if cell.cost is not None and steps is None:
            return None
        return cell_config(self.study, cell, self.folder, steps)

    def _finished(self, cell: Cell, config: Config) -> bool:
        self.wanted[cell] = self.keys.of(config, self.facts)
        return self.records.key(cell) == self.wanted[cell]

    def _report_finished(self) -> None:
        done = sum(self.records.key(cell) == key for cell, key in self.wanted.items())
        if done:
            self.console.print(f"{done} of {len(self.cells)} cells are finished already")

    def _run(self, configs: Mapping[Cell, Config]) -> list[str]:
        """Train these cells; returns the names of those that failed."""
        tasks = {
            c.run_dir: (
                cell,
                TrainTask(
                    c,
                    self.wanted[cell],
                    answers=self.study.answers,
                    keep=self.study.keep_checkpoints,
                ),
            )
            for cell, c in configs.items()
        }
        failed, started = [], time.perf_counter()
        for cell in configs:
            self.records.drop(cell)
        results = run_tasks(work, [task for _, task in tasks.values()], self.jobs, PRELOAD)
        for took, (task, result) in enumerate(results, 1):
            cell, _ = tasks[task.config.run_dir]
            run_dir = Path(task.config.run_dir)
            if isinstance(result, Failure):
                failed.append(cell.name)
                run_dir.mkdir(parents=True, exist_ok=True)
                (run_dir / "error.txt").write_text(f"{result.error}\n{result.trace}", "utf-8")
                said = f"FAILED: {result.error}"
            else:
                self.records.add(cell, run_dir)
                evals = evaluations(run_dir)
                said = f"evaluation loss {evals[-1]:.4f}, " if evals else ""
                said += f"{result['wall_s']:.0f} s"
            left = len(tasks) - took
            eta = (time.perf_counter() - started) / took * left
            self.console.print(
                f"[{took}/{len(tasks)}] {cell.name}: {said}; about {_minutes(eta)} left",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
        return failed


def read_outcome(folder: Path) -> tuple[Study, Outcome]:
    """The study in `folder`, finished or not, as far as its files tell.

    Raises:
        FileNotFoundError: there is none.
    """
    path = folder / STUDY_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} is no study: it has no {STUDY_FILE}")
    study = Study.model_validate_json(path.read_text("utf-8"))
    cells = plan(study)
    failed = [c.name for c in cells if (folder / "cells" / c.name / "error.txt").is_file()]
    return study, Outcome(cells, failed)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the study's folder, so that two processes never train the same cell."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process is running the study in {str(folder)!r}") from None
        yield
