"""Rows of a study's results by group: cells that differ in their seeds only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from slap_ds.study.comparisons import cell_of
from slap_ds.study.plan import PLAIN, Cell, Study
from slap_ds.study.statistics import mean_interval

Row = dict[str, Any]
Group = tuple[str, float, int | None, str, float | None]  # Cell.group
Groups = dict[Group, list[Row]]


def groups_of(rows: Sequence[Row]) -> Groups:
    """Rows that differ in their seeds only; costs are those of Cell.group."""
    found: Groups = {}
    for row in rows:
        found.setdefault(cell_of(row).group, []).append(row)
    return found


def order_of(study: Study, cell: Cell) -> tuple[Any, ...]:
    """Where a cell stands: as the study file lists variants and methods, then keep, cost, seed."""
    variants = [PLAIN, *study.variants]
    methods = list(study.methods)
    return (
        variants.index(cell.variant),
        methods.index(cell.method),
        -cell.keep,
        cell.strata or 0,
        cell.cost or 0,
        cell.seed,
    )


def label_of(group: Group) -> str:
    """What figures and tables call a group."""
    method, keep, strata, variant, cost = group
    parts = [method] if keep == 1 else [method, f"keep {keep:.0%}"]
    parts += [f"K={strata}"] if strata is not None else []
    parts += [f"({variant})"] if variant != PLAIN else []
    parts += [f"cost {cost:g}"] if cost is not None else []
    return " ".join(parts)


def metrics_of(rows: Sequence[Row]) -> dict[str, str]:
    """What quality is told on: name -> column."""
    tasks = [key for key in rows[0] if key.startswith("eval_loss.task.")]
    return {"all": "eval_loss"} | {key.split(".", 2)[2] or "(no task)": key for key in tasks}


def interval_of(rows: Sequence[Row], column: str) -> tuple[float, float, float]:
    """(mean, low, high) of a column over seeds."""
    return mean_interval(np.asarray([row[column] for row in rows], dtype=float))


def setting_of(row: Row, key: str) -> Any:
    """A setting that differs between cells, None where it does not."""
    text = row.get(f"config.{key}")
    return None if text is None else json.loads(text)
