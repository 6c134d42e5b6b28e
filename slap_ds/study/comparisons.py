"""Every pruned group of cells against the reference, at each basis, and against other methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from slap_ds.study.plan import Cell, Study
from slap_ds.study.results import sample_losses
from slap_ds.study.run import Matched
from slap_ds.study.statistics import Array, difference, verdict

COSTS = ("samples", "trained_tokens", "flops", "step_s")


def compare_cells(
    study: Study, folder: Path, rows: Sequence[dict[str, Any]], matched: Sequence[Matched]
) -> list[dict[str, Any]]:
    """One row for every pruned group, opponent, basis and part of the evaluation data.

    `basis` says what both had the same of: candidates (the same steps), samples trained, FLOPs or
    seconds. `on` is all evaluation samples or one task. `samples_ratio` and the like: the method's
    cost / the opponent's. Only seeds that both have run are compared.
    """
    table = {_cell(row): row for row in rows}
    groups: dict[Any, list[Cell]] = {}
    for cell in table:
        if cell.method != study.reference:
            groups.setdefault(cell.group, []).append(cell)
    losses: dict[str, dict[str, list[Any]]] = {}
    out = []
    for cells in groups.values():
        first = cells[0]
        opponents: list[tuple[str, str, list[Cell]]] = [
            ("candidates", study.reference, [_reference(study, cell, None) for cell in cells])
        ]
        for match in matched:
            if (match.method, match.keep, match.strata, match.variant) == first.group[:4]:
                full = [_reference(study, cell, match.steps) for cell in cells]
                opponents.append((match.basis, study.reference, full))
        for rival in study.against:
            if rival in study.methods and first.method != rival:
                same = [replace(cell, method=rival, strata=None) for cell in cells]
                opponents.append(("candidates", rival, same))
        for basis, against, others in opponents:
            pairs = [(c, o) for c, o in zip(cells, others, strict=True) if o in table]
            if pairs:
                names = [table[cell]["cell"] for pair in pairs for cell in pair]
                for name in names:
                    if name not in losses:
                        losses[name] = sample_losses(folder / "cells" / name)
                out += _rows(study, pairs, basis, against, table, losses)
    return out


def _rows(
    study: Study,
    pairs: Sequence[tuple[Cell, Cell]],
    basis: str,
    against: str,
    table: dict[Cell, dict[str, Any]],
    losses: dict[str, dict[str, list[Any]]],
) -> list[dict[str, Any]]:
    ours, theirs = ([losses[table[pair[i]]["cell"]] for pair in pairs] for i in (0, 1))
    ids = ours[0]["ids"]
    if any(found["ids"] != ids for found in (*ours, *theirs)):
        raise ValueError(
            f"cells of {pairs[0][0].method} and {against} were evaluated on different samples: "
            "evaluation.max_samples and data.eval must be the same for all"
        )
    cell = pairs[0][0]
    tokens = np.asarray(ours[0]["tokens"], dtype=np.float64)
    task = np.asarray(ours[0]["task"])
    method, other = _stack(ours), _stack(theirs)
    ratios = {
        f"{cost}_ratio": float(np.mean([table[a][cost] / table[b][cost] for a, b in pairs]))
        for cost in COSTS
    }
    out = []
    for on in ["all", *sorted(set(task.tolist()) - {""})]:
        part = np.ones(len(task), dtype=bool) if on == "all" else task == on
        if part.sum() < 2:
            continue
        found = difference(method[:, part], other[:, part], tokens[part])
        out.append(
            {
                "variant": cell.variant,
                "method": cell.method,
                "keep": cell.keep,
                "strata": cell.strata,
                "against": against,
                "basis": basis,
                "on": on,
                "seeds": found.seeds,
                "loss": float((method[:, part].sum(1) / tokens[part].sum()).mean()),
                "loss_against": float((other[:, part].sum(1) / tokens[part].sum()).mean()),
                "difference": found.mean,
                "low": found.low,
                "high": found.high,
                "boot_low": found.boot_low,
                "boot_high": found.boot_high,
                "verdict": verdict(found, study.margin),
                **ratios,
            }
        )
    return out


def _stack(found: Sequence[dict[str, list[Any]]]) -> Array:
    return np.asarray([each["loss"] for each in found], dtype=np.float64)


def _reference(study: Study, cell: Cell, steps: int | None) -> Cell:
    return Cell(study.reference, 1.0, None, cell.variant, cell.seed, steps)


def _cell(row: dict[str, Any]) -> Cell:
    return Cell(**{key: row[key] for key in Cell.__dataclass_fields__})
