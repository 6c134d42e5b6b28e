"""What the report of a study shows: methods against each other, over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slap_ds.jsonl import read_lines
from slap_ds.report import figures
from slap_ds.report.coverage import (
    RULE,
    Labels,
    Slice,
    cover,
    labels_of,
    merged,
    run_config,
    said_starved,
    starved,
)
from slap_ds.report.numbers import interval_text
from slap_ds.report.page import figure, folded, heading, paragraph, table, verdict, warnings
from slap_ds.report.run_page import flop_shares, loss_spread
from slap_ds.report.study_cost import cost_parts
from slap_ds.report.study_groups import (
    Groups,
    Row,
    groups_of,
    interval_of,
    label_of,
    metrics_of,
    order_of,
    setting_of,
)
from slap_ds.study.comparisons import REFUSED, SOURCES, cell_of, compare_cells
from slap_ds.study.costs import kind_of, read_kinds
from slap_ds.study.plan import BASES, PLAIN, Study
from slap_ds.study.records import Records
from slap_ds.study.results import collect
from slap_ds.study.run import read_outcome

Hungry = dict[str, tuple[list[Slice], float]]
_COSTS = ("flops", "scoring_flops", "full_flops", "step_s", "score_s", "selection_s")
INTERVALS = (
    "Intervals hold the mean with 95 %: differences within pairs of equal seed and equal "
    "evaluation sample, Student's t, variances of seeds and of evaluation samples added. With one "
    "seed there is no interval, and no verdict."
)


def study_page(folder: Path, out: Path) -> list[str]:
    """The page's parts, in order; figures are written into `out`.

    Raises:
        ValueError: no cell is finished.
    """
    study, outcome = read_outcome(folder)
    rows = sorted(collect(folder, outcome.cells), key=lambda row: order_of(study, cell_of(row)))
    if not rows:
        raise ValueError(f"{str(folder)!r} holds no finished cell yet")
    compared = compare_cells(study, folder, rows)
    groups = groups_of(rows)
    shares, hungry = _coverage(folder, rows, study)
    unfinished = len(outcome.cells) - len(rows)
    problems = [f"cell {name} failed: {_error(folder, name)}" for name in outcome.failed]
    if unfinished > len(outcome.failed):
        problems.append(f"{unfinished - len(outcome.failed)} cells are not finished yet")
    for label, (found, share) in hungry.items():
        problems += [f"{label}: {said_starved(each)} of all {share:.1%}" for each in found]
    refused = sorted({row["on"] for row in compared if row["verdict"] == REFUSED})
    if refused:
        problems.append(
            f"no verdicts on {', '.join(refused)}: there {study.reference} gains less than "
            f"{study.min_gain:g} margins of {study.margin:g} over the base, so nothing that is "
            "ranked is learning"
        )
    parts = warnings(problems)
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
    commits = ", ".join(sorted({row["commit"][:10] for row in rows}))
    said = f"{len(rows)} runs from one base model; seeds {seeds}; code {commits}. {INTERVALS}"
    parts.append(paragraph(said))
    parts += cost_parts(out, study, groups, compared)
    parts += _quality(out, study, groups)
    parts += _against_strata(out, study, groups)
    parts += _differences(out, study, compared)
    parts += _costs(out, folder, study, groups)
    parts += _losses(out, folder, groups)
    return parts + _slices(out, shares, hungry)


def _quality(out: Path, study: Study, groups: Groups) -> list[str]:
    if all(g[4] is not None for g in groups if g[0] != study.reference):
        return []
    parts = [heading("Quality against pruning rate")]
    variants = list(dict.fromkeys(group[3] for group in groups))
    for variant in variants:
        mine = {g: rows for g, rows in groups.items() if g[3] == variant and g[4] is None}
        pruned = {g: r for g, r in mine.items() if g[0] != study.reference and g[2] is None}
        if not pruned:
            continue
        panels: dict[str, dict[str, list[figures.Point]]] = {}
        bands: dict[str, dict[str, tuple[float, float, float]]] = {}
        for name, column in metrics_of(next(iter(mine.values()))).items():
            lines: dict[str, list[figures.Point]] = {}
            for group, rows in sorted(pruned.items(), key=lambda item: -item[0][1]):
                point = (100 * (1 - group[1]), *interval_of(rows, column))
                lines.setdefault(group[0], []).append(point)
            order = [method for method in study.methods if method in lines]
            panels[name] = {method: lines[method] for method in order}
            full = [r for g, r in mine.items() if g[0] == study.reference]
            bands[name] = {study.reference: interval_of(full[0], column)} if full else {}
        path = figures.lines_with_intervals(
            out / f"quality-{variant}.png",
            panels,
            bands,
            x="pruned, %",
            y="evaluation loss, nats per token",
        )
        said = "the data as they are" if variant == PLAIN else f"variant {variant}"
        parts.append(
            figure(
                path,
                f"Evaluation loss at equal numbers of steps, {said}: mean over seeds, 95 % t "
                "interval over seeds; dashed: the reference.",
            )
        )
    header = ["method", "seeds", *metrics_of(next(iter(groups.values())))]
    body = [
        [label_of(group), len(rows), *(interval_of(rows, c)[0] for c in metrics_of(rows).values())]
        for group, rows in groups.items()
        if group[4] is None
    ]
    return [*parts, table(header, body)]


def _against_strata(out: Path, study: Study, groups: Groups) -> list[str]:
    varied = {g[0] for g in groups if g[2] is not None}
    plain = {g: r for g, r in groups.items() if g[3] == PLAIN and g[4] is None}
    if not varied:
        return []
    panels: dict[str, dict[str, list[figures.Point]]] = {}
    bands: dict[str, dict[str, tuple[float, float, float]]] = {}
    for name, column in metrics_of(next(iter(plain.values()))).items():
        lines: dict[str, dict[float, figures.Point]] = {}
        for (method, keep, strata, *_), rows in plain.items():
            k = strata if strata is not None else setting_of(rows[0], "selection.slap.strata")
            if method in varied and k is not None:
                point = (float(k), *interval_of(rows, column))
                lines.setdefault(f"{method} keep {keep:.0%}", {})[k] = point
        panels[name] = {
            line: [points[k] for k in sorted(points)]
            for line, points in lines.items()
            if len(points) > 1
        }
        bands[name] = {
            label_of(group): interval_of(rows, column)
            for group, rows in plain.items()
            if group[0] == study.reference
        }
    path = figures.lines_with_intervals(
        out / "strata.png",
        panels,
        bands,
        x="strata K",
        y="evaluation loss, nats per token",
        log_x=True,
    )
    caption = "Evaluation loss against the number of strata; dashed: the reference."
    return [heading("Number of strata"), figure(path, caption)]


def _differences(out: Path, study: Study, compared: Sequence[Row]) -> list[str]:
    parts = [heading("Differences")]
    parts.append(
        paragraph(
            f"Verdicts with a margin of {study.margin:g} nats: better, the interval lies below 0; "
            "not worse, below the margin; worse, above 0; else undecided. They are not corrected "
            "for the number of comparisons. Cost is analytic FLOPs, scoring and selection "
            "included. The reference at equal samples, response tokens or seconds is interpolated "
            "between its runs of fewer and more steps."
        )
    )
    for against in dict.fromkeys(row["against"] for row in compared):
        rows = [
            {**row, "label": label_of(_group_of(row))}
            for row in compared
            if row["against"] == against and row["on"] == "all"
        ]
        rows.sort(key=lambda row: BASES.index(row["basis"]))
        path = figures.differences(
            out / f"differences-{against}.png", rows, study.margin, f"against {against}"
        )
        parts.append(figure(path, f"Evaluation loss minus that of {against}, all tasks."))
    header = [
        "method", "on", "seeds", "loss", "against's", "difference, 95 % interval", "verdict",
        "samples", "tokens", "FLOPs",
    ]  # fmt: skip
    overall = [row for row in compared if row["on"] in ("all", SOURCES)]
    note = (
        "The last three columns are the method's samples, response tokens and FLOPs / its "
        "opponent's. ▼ is better, ▲ worse, ≈ not worse than by the margin."
    )
    by_task = folded("The same by task", [table(header, _compared(compared))])
    return [*parts, paragraph(note), table(header, _compared(overall)), by_task]


def _compared(rows: Sequence[Row]) -> list[list[object]]:
    """Cells of the table of differences, under a line for each opponent and basis."""
    body: list[list[object]] = []
    for against, basis in dict.fromkeys((row["against"], row["basis"]) for row in rows):
        body.append([f"Against {against}, {figures.SAID[basis]}"])
        body += [
            [
                label_of(_group_of(row)),
                *(row[k] for k in ("on", "seeds", "loss", "loss_against")),
                interval_text(row["difference"], row["low"], row["high"]),
                verdict(row["verdict"]),
                *(f"{row[f'{k}_ratio']:.2f}" for k in ("samples", "response_tokens", "flops")),
            ]
            for row in rows
            if (row["against"], row["basis"]) == (against, basis)
        ]
    return body


def _costs(out: Path, folder: Path, study: Study, groups: Groups) -> list[str]:
    plain = {g: r for g, r in groups.items() if g[3] == PLAIN}
    bars = {
        label_of(group): flop_shares({k: float(np.mean([r[k] for r in rows])) for k in _COSTS})
        for group, rows in plain.items()
    }
    path = figures.bars(out / "flops.png", bars, x="FLOPs / full training's", line=1)
    parts = [
        heading("Costs"),
        figure(
            path,
            "Analytic FLOPs of a run against training all of its candidates, selection included.",
        ),
    ]
    full = plain.get((study.reference, 1.0, None, PLAIN, None))
    if full is not None:
        step = float(np.mean([r["step_s"] for r in full]))
        seconds = {}
        for group, rows in plain.items():
            mean = {k: float(np.mean([r[k] for r in rows])) / step for k in _COSTS}
            seconds[label_of(group)] = {
                "training": mean["step_s"] - mean["score_s"] - mean["selection_s"],
                "scoring": mean["score_s"],
                "selection": mean["selection_s"],
            }
        kinds = read_kinds(Records(folder))
        marks = {
            label_of(group): kinds[name]["seconds"]
            * rows[0]["steps_taken"]
            / full[0]["steps_taken"]
            for group, rows in plain.items()
            if (name := kind_of(cell_of(rows[0]))) in kinds
        }
        path = figures.bars(
            out / "seconds.png", seconds, x="seconds / the reference's", line=1, marks=marks
        )
        caption = (
            "Seconds in steps against the reference's, as the runs took them; runs side by side "
            "on one machine disturb each other. Diamonds: from steps taken in turn on one "
            "engine, which comparisons at equal seconds go by."
        )
        parts.append(figure(path, caption))
    return parts


def _losses(out: Path, folder: Path, groups: Groups) -> list[str]:
    panels = {}
    for group, rows in groups.items():
        if group[3] == PLAIN and group[2] is None:
            spreads = [loss_spread(_train_records(folder, row)) for row in _here(folder, rows)]
            found = [spread for spread in spreads if spread is not None]
            if found:
                panels[label_of(group)] = (
                    [step for spread in found for step in spread[0]],
                    [step for spread in found for step in spread[1]],
                )
    if not panels:
        return []
    path = figures.loss_histograms(out / "losses.png", panels)
    caption = (
        "Losses of candidates and of what each method trains, mean over pruned steps and seeds "
        "(methods that score)."
    )
    return [heading("Losses of what is kept"), figure(path, caption)]


def _coverage(
    folder: Path, rows: Sequence[Row], study: Study
) -> tuple[dict[str, dict[str, list[Slice]]], Hungry]:
    """Slices of each pruned group, added up over seeds, by variant and label; the starved ones."""
    labels: dict[str, Labels] = {}
    found: dict[str, dict[str, list[Slice]]] = {}
    hungry: Hungry = {}
    for group, members in groups_of(rows).items():
        members = _here(folder, members)
        if group[0] == study.reference or not members:
            continue
        parts, drawn, kept, deciles = [], 0, 0, []
        for row in members:
            run_dir = folder / "cells" / row["cell"]
            covered = cover(run_dir, labels_of(run_config(run_dir), labels))
            parts.append(covered.slices)
            drawn += int(covered.drawn.sum())
            kept += int(covered.kept.sum())
            if covered.loss_deciles:
                deciles.append(covered.loss_deciles)
        slices = merged(parts)
        missing = starved(slices, kept / drawn)
        if missing:
            hungry[label_of(group)] = (missing, kept / drawn)
        # Shares of loss deciles are means over steps, shown as if of a thousand candidates.
        for i, share in enumerate(np.mean(deciles, axis=0) if deciles else [], 1):
            slices.append(Slice("loss", f"decile {i}", 1000, round(1000 * float(share))))
        found.setdefault(group[3], {})[label_of(group)] = slices
    return found, hungry


def _slices(out: Path, shares: dict[str, dict[str, list[Slice]]], hungry: Hungry) -> list[str]:
    parts = [heading("Coverage"), paragraph(RULE)]
    for variant, groups in shares.items():
        names = list(dict.fromkeys((s.kind, s.name) for slices in groups.values() for s in slices))
        order = list(dict.fromkeys(kind for kind, _ in names))
        names.sort(key=lambda name: order.index(name[0]))
        values = np.full((len(names), len(groups)), np.nan)
        marks = np.zeros(values.shape, dtype=bool)
        for j, (label, slices) in enumerate(groups.items()):
            starving = {(s.kind, s.name) for s in hungry.get(label, ([], 0.0))[0]}
            for each in slices:
                place = names.index((each.kind, each.name))
                values[place, j] = each.share
                marks[place, j] = (each.kind, each.name) in starving
        rows = [f"{kind}: {name}" for kind, name in names]
        path = figures.heat(out / f"coverage-{variant}.png", rows, list(groups), values, marks)
        caption = "Share of the candidates that was trained; frames mark starved slices."
        parts.append(figure(path, caption if variant == PLAIN else f"Variant {variant}. {caption}"))
        body = [
            [row, *("" if np.isnan(v) else f"{v:.3f}" for v in line)]
            for row, line in zip(rows, values, strict=True)
        ]
        parts.append(folded("The numbers", [table(["slice", *groups], body)]))
    return parts


def _here(folder: Path, rows: Sequence[Row]) -> list[Row]:
    """The rows whose run folders lie in the study; of others there are records alone."""
    return [row for row in rows if (folder / "cells" / row["cell"] / "picks.jsonl").is_file()]


def _group_of(row: Row) -> Any:
    return (row["method"], row["keep"], row["strata"], row["variant"], row["cost"])


def _train_records(folder: Path, row: Row) -> list[Row]:
    records = read_lines(folder / "cells" / row["cell"] / "metrics.jsonl")
    return [record for record in records if record["event"] == "train"]


def _error(folder: Path, name: str) -> str:
    text = (folder / "cells" / name / "error.txt").read_text("utf-8")
    return text.splitlines()[0]
