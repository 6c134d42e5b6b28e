"""How many steps a cell's share of the cost buys.

The budget is a share of the analytic FLOPs of training all candidates for the config's steps. What
a step costs depends on what a method picks (answers of other lengths, whole batches in InfoBatch's
first epoch), so it is measured: a few steps on the base model give a first number of steps, the
first seed's run corrects it, and is run again where it missed its share by more than `tolerance`.
All seeds of a group then take the same steps, each with a learning rate that ends with them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from slap_ds.study.base import PRELOAD
from slap_ds.study.plan import Cell, Study, cell_config
from slap_ds.study.pool import Failure, run_tasks
from slap_ds.study.records import Records, cost_share
from slap_ds.study.work import TimeTask, work

STEPS_FILE = "steps.json"
MOST_TRIES = 4


def kind_of(cell: Cell) -> str:
    """How steps of different cost are told apart: seeds, data and budgets do not change them."""
    return f"{cell.method}-keep{cell.keep:g}" + (f"-k{cell.strata}" if cell.strata else "")


class Costs:
    """The steps of every group, and the cost of a step of every kind against the reference's."""

    def __init__(self, study: Study, folder: Path, cells: Sequence[Cell], records: Records) -> None:
        self.study, self.folder, self.records = study, folder, records
        self.steps: dict[str, int] = {}  # group name -> steps, as far as they are known
        self.kinds: dict[str, dict[str, float]] = {}  # kind -> flops, seconds of a step, ratios
        self.tries: dict[str, int] = {}
        # Group name -> the key of the run that settled its steps, perhaps in an earlier start.
        self.settled_by: dict[str, str] = {}
        self.settled: set[str] = set()
        path = records.places[0] / STEPS_FILE
        if path.is_file():
            known = json.loads(path.read_text("utf-8"))
            self.steps, self.kinds = known["steps"], known["kinds"]
            self.settled_by = known["settled_by"]
        self.total = self._total(cells)

    def _total(self, cells: Sequence[Cell]) -> int:
        """Steps of the reference's whole run; 0 where no cell has a share of its cost."""
        if not any(cell.cost is not None for cell in cells):
            return 0
        steps = cell_config(self.study, cells[0], self.folder).steps
        if steps is None:
            raise ValueError("a grid with cost needs steps in the config of its cells, not epochs")
        return steps

    def measure(self, cells: Sequence[Cell], console: Console) -> None:
        """Measure the kinds of step that are not known yet: each takes turns with the reference's,
        on one engine and the same candidates, so that a busy machine slows them alike."""
        missing = {
            kind_of(cell): cell
            for cell in reversed(cells)
            if cell.cost is not None
            and cell.method != self.study.reference
            and kind_of(cell) not in self.kinds
        }
        if not missing:
            return
        console.print(f"measuring {len(missing)} kinds of step against the reference's")
        first = cells[0]
        full = Cell(self.study.reference, 1.0, None, first.variant, first.seed)
        config = cell_config(self.study, full, self.folder)
        config = config.model_copy(update={"run_dir": str(self.folder / "timing")})
        configs = {k: cell_config(self.study, cell, self.folder) for k, cell in missing.items()}
        for _, result in run_tasks(work, [TimeTask(config, configs)], 1, PRELOAD):
            if isinstance(result, Failure):
                raise ValueError(f"the steps cannot be timed: {result.error}\n{result.trace}")
            self.kinds.update(result)
        self._write()

    def steps_of(self, cell: Cell) -> int | None:
        """The steps of a cell, settled or guessed; None: the config's, or not known at all yet."""
        if cell.cost is None:
            return None
        if cell.method == self.study.reference:
            return max(1, round(cell.cost * self.total))
        known = self.steps.get(cell.group_name)
        if known is None and (kind := self.kinds.get(kind_of(cell))) is not None:
            known = max(1, round(cell.cost * self.total / kind["flops"]))
        return known

    def is_settled(self, cell: Cell) -> bool:
        """Whether the group's steps are final."""
        fixed = cell.cost is None or cell.method == self.study.reference
        return fixed or cell.group_name in self.settled

    def take(self, cell: Cell, record: Mapping[str, Any]) -> None:
        """Learn from a finished first seed: settle the steps of its group, or correct them."""
        assert cell.cost is not None
        name, steps = cell.group_name, int(record["measured"]["steps_taken"])
        share = cost_share(record, self.total)
        better = max(1, round(steps * cell.cost / share))
        self.tries[name] = self.tries.get(name, 0) + 1
        close = abs(share / cell.cost - 1) <= self.study.tolerance or better == steps
        before = self.settled_by.get(name) == record["key"]
        if close or before or self.tries[name] >= MOST_TRIES:
            self.settled.add(name)
            self.settled_by[name] = record["key"]
            better = steps
        self.steps[name] = better
        self._write()

    def _write(self) -> None:
        self.records.write(
            STEPS_FILE,
            {
                "steps": self.steps,
                "settled_by": self.settled_by,
                "kinds": self.kinds,
            },
        )


def read_kinds(records: Records) -> dict[str, dict[str, float]]:
    """The ratios of FLOPs and seconds of each kind of step, as far as they have been measured."""
    path = records.places[0] / STEPS_FILE
    if not path.is_file():
        return {}
    kinds: dict[str, dict[str, float]] = json.loads(path.read_text("utf-8"))["kinds"]
    return kinds
