"""Every pruned group of cells against the reference, and against other methods.

A method and its opponent have had the same of something, the `basis`: cost (analytic FLOPs),
candidates (the config's steps), samples, response tokens or seconds; or the opponent is the
reference's whole run, "all". Where the reference was not run at the very number, its losses are
interpolated between its runs with fewer and more steps (`Curve`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slap_ds.study.costs import kind_of, read_kinds
from slap_ds.study.plan import Cell, Study
from slap_ds.study.records import Records
from slap_ds.study.statistics import Array, Curve, difference, same_loss, verdict

Places = npt.NDArray[np.int64]
COSTS = ("samples", "response_tokens", "trained_tokens", "flops")
REFUSED = "no verdict"
SOURCES = "sources"


@dataclass(frozen=True)
class Part:
    """Some evaluation samples, and how much each counts; the weights are 1 but in SOURCES."""

    name: str  # all, sources, or a task
    where: Places  # (i,) places in the records' losses
    weight: Array  # (I,) of each of them
    tokens: Array  # (I,) response tokens times weight

    def of(self, losses: Array) -> Array:
        """(S, I) nats of these samples out of (S, all)."""
        return losses[:, self.where] * self.weight


@dataclass(frozen=True)
class Side:
    """Cells that differ in their seeds only, in the order of `seeds`."""

    seeds: tuple[int, ...]
    rows: tuple[dict[str, Any], ...]
    losses: Array  # (S, all samples) nats

    def mean(self, column: str) -> float:
        return float(np.mean([row[column] for row in self.rows]))

    def only(self, seeds: Sequence[int]) -> Side:
        index = [self.seeds.index(seed) for seed in seeds]
        return Side(tuple(seeds), tuple(self.rows[i] for i in index), self.losses[index])


def compare_cells(
    study: Study, folder: Path, rows: Sequence[dict[str, Any]], losses: str = "last"
) -> list[dict[str, Any]]:
    """One row for every pruned group, opponent, basis and part of the evaluation data.

    `on` is all (the mean over response tokens), sources (the mean over sources, each of which
    counts the same) or a task. `samples_ratio` and the like: the method's cost / the opponent's.
    `gain`: what the reference's whole run gained over the base; where it is less than
    `study.min_gain` margins the verdict is REFUSED. `share`, `share_low`, `share_high`, against the
    reference at equal cost: the method's cost / what the reference would have cost for the same
    loss; infinite or 0 where that lies outside the reference's runs. Only seeds that both have run
    are compared.

    Args:
        losses: which of the records' losses, `last` or `best`; cells without `best` ones are
            left out then.
    """
    table = _Table(study, folder, rows, losses)
    out = []
    for group, method in table.sides.items():
        cell = replace(table.first[group], seed=0)
        if cell.method != study.reference:
            for basis, against, pair in _opponents(study, table, cell, method):
                out += _compared(study, table, cell, basis, against, pair)
    return out


class _Table:
    """The finished cells of a study by group, and the parts of their evaluation samples."""

    def __init__(
        self, study: Study, folder: Path, rows: Sequence[dict[str, Any]], losses: str
    ) -> None:
        records = Records(folder)
        self.study, self.kinds = study, read_kinds(records)
        self.sides: dict[Any, Side] = {}
        self.first: dict[Any, Cell] = {}
        samples: dict[str, Any] = {}
        groups: dict[Any, list[tuple[Cell, dict[str, Any], Any]]] = {}
        for row in rows:
            cell = cell_of(row)
            record = records.read(cell)
            assert record is not None
            if losses in record["losses"]:
                samples.setdefault(record["samples"], record)
                groups.setdefault(cell.group, []).append((cell, row, record["losses"][losses]))
        if len(samples) > 1:
            raise ValueError(
                "the cells were evaluated on different samples: evaluation.max_samples and "
                "data.eval must be the same for all"
            )
        for group, members in groups.items():
            members.sort(key=lambda member: member[0].seed)
            self.first[group] = members[0][0]
            seeds, found, values = zip(*((c.seed, row, x) for c, row, x in members), strict=True)
            self.sides[group] = Side(seeds, found, np.asarray(values, dtype=np.float64))
        self.parts = [p for r in samples.values() for p in make_parts(records.samples(r))]

    def side(self, cell: Cell) -> Side | None:
        return self.sides.get(cell.group)

    def reference(self, cell: Cell, cost: float | None) -> Side | None:
        """The reference on the cell's data, at a share of its cost; None: its whole run."""
        return self.side(Cell(self.study.reference, 1.0, None, cell.variant, 0, cost))

    def curve(self, cell: Cell, seeds: Sequence[int]) -> tuple[Curve, tuple[int, ...]] | None:
        """The reference's runs of different lengths on the cell's data, and the seeds that all of
        them share with `seeds`."""
        name, variant = self.study.reference, cell.variant
        runs = {
            1.0 if group[4] is None else group[4]: side
            for group, side in self.sides.items()
            if group[0] == name and group[3] == variant
        }
        common = tuple(s for s in seeds if all(s in side.seeds for side in runs.values()))
        if len(runs) < 2 or not common:
            return None
        shares = sorted(runs)
        stack = np.stack([runs[share].only(common).losses for share in shares])
        return Curve(np.asarray(shares), stack), common

    def gain(self, cell: Cell, part: Part) -> float | None:
        """What the reference's whole run gained over the base, nats per token."""
        full = self.reference(cell, None)
        if full is None:
            return None
        key = {"all": "", SOURCES: ""}.get(part.name, f".task.{part.name}")
        if part.name == SOURCES:
            names = [k.split(".", 2)[2] for k in full.rows[0] if k.startswith("eval_loss.source.")]
            gains = [
                full.mean(f"eval_loss_before.source.{n}") - full.mean(f"eval_loss.source.{n}")
                for n in names
            ]
            return float(np.mean(gains))
        return full.mean(f"eval_loss_before{key}") - full.mean(f"eval_loss{key}")


def make_parts(samples: dict[str, list[Any]]) -> list[Part]:
    """All samples, the sources each counting the same, and every task of two or more samples."""
    tokens = np.asarray(samples["tokens"], dtype=np.float64)
    task, source = np.asarray(samples["task"]), np.asarray(samples["source"])
    every = np.arange(len(tokens))
    names, code = np.unique(source, return_inverse=True)
    # sum(loss * w) / sum(tokens * w) is then the mean of the sources' token means.
    even = (tokens.sum() / len(names) / np.bincount(code, tokens))[code]
    parts = [Part("all", every, np.ones(len(every)), tokens)]
    if len(names) > 1:
        parts.append(Part(SOURCES, every, even, tokens * even))
    for name in sorted(set(task.tolist()) - {""}):
        where = np.flatnonzero(task == name)
        parts.append(Part(name, where, np.ones(len(where)), tokens[where]))
    return [part for part in parts if len(part.where) > 1]


@dataclass(frozen=True)
class _Pair:
    """A method and an opponent on the same seeds; the opponent's losses may be interpolated."""

    method: Side
    losses: Array  # (S, all samples) of the opponent
    ratios: dict[str, float]
    # Where the cost of the same loss is asked for: the reference's runs, the method's on their
    # seeds, its cost.
    curve: tuple[Curve, Side, float] | None = None


def _opponents(
    study: Study, table: _Table, cell: Cell, method: Side
) -> list[tuple[str, str, _Pair]]:
    """(basis, opponent, pair) of a group, as far as the opponents have been run."""
    out = []
    basis = "candidates" if cell.cost is None else "cost"
    curve = table.curve(cell, method.seeds)
    named = [(study.reference, table.reference(cell, cell.cost))]
    for rival in study.against:
        if rival in study.methods and rival != cell.method:
            named.append((rival, table.side(replace(cell, method=rival, strata=None))))
    for against, side in named:
        if side is not None and (pair := _paired(method, side)) is not None:
            if against == study.reference and cell.cost is not None and curve is not None:
                pair = replace(pair, curve=(curve[0], method.only(curve[1]), cell.cost))
            out.append((basis, against, pair))
    full = table.reference(cell, None)
    pair = _paired(method, full) if full is not None and cell.cost is not None else None
    if pair is not None:
        out.append(("all", study.reference, pair))
    if full is not None and curve is not None:
        line, seeds = curve
        mine = method.only(seeds)
        for name, share in _shares(table, cell, method, full).items():
            if line.shares[0] <= share <= line.shares[-1]:
                ratios = {f"{c}_ratio": mine.mean(c) / full.mean(c) / share for c in COSTS}
                out.append((name, study.reference, _Pair(mine, line.at(share), ratios)))
    return out


def _shares(table: _Table, cell: Cell, method: Side, full: Side) -> dict[str, float]:
    """Basis -> the share of its whole run at which the reference has had as much as the method."""
    out = {name: method.mean(name) / full.mean(name) for name in ("samples", "response_tokens")}
    kind = table.kinds.get(kind_of(cell))
    if kind is not None:
        out["seconds"] = kind["seconds"] * method.mean("steps_taken") / full.mean("steps_taken")
    return out


def _paired(method: Side, other: Side) -> _Pair | None:
    seeds = [seed for seed in method.seeds if seed in other.seeds]
    if not seeds:
        return None
    mine, theirs = method.only(seeds), other.only(seeds)
    ratios = {
        f"{cost}_ratio": float(
            np.mean([a[cost] / b[cost] for a, b in zip(mine.rows, theirs.rows, strict=True)])
        )
        for cost in COSTS
    }
    return _Pair(mine, theirs.losses, ratios)


def _compared(
    study: Study, table: _Table, cell: Cell, basis: str, against: str, pair: _Pair
) -> list[dict[str, Any]]:
    out = []
    for part in table.parts:
        method, other = part.of(pair.method.losses), part.of(pair.losses)
        found = difference(method, other, part.tokens)
        gain = table.gain(cell, part)
        said = verdict(found, study.margin)
        if gain is not None and gain < study.min_gain * study.margin:
            said = REFUSED
        row = {
            "variant": cell.variant,
            "method": cell.method,
            "keep": cell.keep,
            "strata": cell.strata,
            "cost": cell.cost,
            "against": against,
            "basis": basis,
            "on": part.name,
            "seeds": found.seeds,
            "steps": pair.method.mean("steps_taken"),
            "loss": float((method.sum(1) / part.tokens.sum()).mean()),
            "loss_against": float((other.sum(1) / part.tokens.sum()).mean()),
            "gain": gain,
            "difference": found.mean,
            "low": found.low,
            "high": found.high,
            "boot_low": found.boot_low,
            "boot_high": found.boot_high,
            "verdict": said,
            **pair.ratios,
            "share": None,
            "share_low": None,
            "share_high": None,
        }
        if pair.curve is not None:
            row |= _same_loss(*pair.curve, part)
        out.append(row)
    return out


def _same_loss(curve: Curve, method: Side, cost: float, part: Part) -> dict[str, float]:
    """The method's cost / the reference's for the same loss, with its interval."""
    line = Curve(curve.shares, np.stack([part.of(losses) for losses in curve.losses]))
    point, low, high = same_loss(part.of(method.losses), line, part.tokens)
    ratio = [cost / x if x else math.inf for x in (point, high, low)]
    return dict(zip(("share", "share_low", "share_high"), ratio, strict=True))


def cell_of(row: dict[str, Any]) -> Cell:
    """The cell of a row of results."""
    return Cell(**{key: row[key] for key in Cell.__dataclass_fields__})
