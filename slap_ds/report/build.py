"""`slap-ds report`: a run's or a study's folder -> figures and one HTML page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slap_ds.metrics import read_lines
from slap_ds.report import figures
from slap_ds.report.coverage import (
    MIN_DRAWS,
    STARVED,
    Coverage,
    Labels,
    Slice,
    cover,
    label_samples,
    merged,
    run_config,
    starved,
)
from slap_ds.report.page import figure, heading, paragraph, table, warning, write_page
from slap_ds.run import read_inputs
from slap_ds.study.comparisons import compare_cells
from slap_ds.study.plan import BASES, PLAIN, Cell, Study
from slap_ds.study.results import collect
from slap_ds.study.run import STUDY_FILE, ratio_name, read_outcome, read_ratios
from slap_ds.study.statistics import mean_interval

Row = dict[str, Any]
PHASES = ("score", "gather", "select", "scatter", "forward", "backward", "optimizer")
RULE = (
    f"A slice is starved if at least {MIN_DRAWS} candidates of it were drawn, its share trained is "
    f"less than {STARVED:g} of the share of all candidates, and so few are no accident (binomial "
    "probability below 1 % / number of slices)."
)
INTERVALS = (
    "Intervals hold the mean with 95 %: differences within pairs of equal seed and equal "
    "evaluation sample, Student's t, variances of seeds and of evaluation samples added. With one "
    "seed there is no interval, and no verdict."
)


def report(folder: Path, out: Path | None = None) -> Path:
    """Write index.html and the figures into `out` (default `folder`/report); returns the page.

    Raises:
        FileNotFoundError: `folder` holds neither a run nor a study, or a run's data are gone.
        ValueError: nothing finished to report on.
    """
    out = out or folder / "report"
    is_study = (folder / STUDY_FILE).is_file()
    if not is_study and not (folder / "metrics.jsonl").is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} is neither a run (metrics.jsonl) nor a study ({STUDY_FILE})"
        )
    out.mkdir(parents=True, exist_ok=True)
    parts = _study(folder, out) if is_study else _run(folder, out)
    name = folder.resolve().name
    write_page(out / "index.html", f"{'Study' if is_study else 'Run'} {name}", parts)
    return out / "index.html"


def _run(folder: Path, out: Path) -> list[str]:
    records = read_lines(folder / "metrics.jsonl")
    train = [r for r in records if r["event"] == "train"]
    evals = [r for r in records if r["event"] == "eval"]
    if not train:
        raise ValueError(f"{str(folder)!r} holds no training step yet")
    covered = cover(folder)
    hungry = starved(covered.slices, covered.share)
    total = {key: sum(r.get(key, 0.0) for r in train) for key in train[0] if _number(train[0][key])}
    parts = _warnings([f"{_said(s)} of all {covered.share:.1%}" for s in hungry])
    parts.append(
        table(
            ["", "trained", "candidates", "ratio"],
            [
                ["samples", *_ratio(total["picked"], total["candidates"])],
                ["tokens", *_ratio(total["trained_tokens"], total["candidate_tokens"])],
                ["FLOPs, scoring included", *_ratio(total["flops"], total.get("full_flops"))],
            ],
        )
    )
    steps = [r["step"] for r in train]
    parts += [heading("Loss and learning rate"), *_curves(out, train, evals, steps)]
    parts.append(heading("What a step's time goes into"))
    seconds = {
        name: (steps, [r.get(f"{name}_s", 0.0) for r in train])
        for name in PHASES
        if any(f"{name}_s" in r for r in train)
    }
    path = figures.curves(out / "step_seconds.png", seconds, y="seconds", stacked=True)
    parts.append(figure(path, "Seconds of each step, by phase."))
    share = {
        "scoring": (steps, [100 * r.get("score_s", 0.0) / r["step_s"] for r in train]),
        "selection (gather, select, scatter)": (
            steps,
            [100 * r["selection_s"] / r["step_s"] for r in train],
        ),
    }
    path = figures.curves(out / "selection_share.png", share, y="% of the step")
    parts.append(figure(path, "Share of a step that goes into scoring and selection, over steps."))
    if "full_flops" in total:  # older runs have none
        path = figures.bars(
            out / "flops.png",
            {folder.resolve().name: _flops(total)},
            x="FLOPs / full training's",
            line=1,
        )
        caption = "Analytic FLOPs against training all candidates, scoring included."
        parts += [heading("FLOPs"), figure(path, caption)]
    spread = _spread(train)
    if spread:
        path = figures.loss_histograms(out / "losses.png", {"": spread})
        parts += [
            heading("Losses of what is kept"),
            figure(path, "Losses of candidates and of the picks, mean over pruned steps."),
        ]
    return parts + _coverage(out, covered, hungry)


def _curves(out: Path, train: list[Row], evals: list[Row], steps: list[int]) -> list[str]:
    lines = {"training loss of the picks": (steps, [r["loss"] for r in train])}
    scored = [r for r in train if "candidate_loss" in r]
    if scored:
        lines["mean loss of the candidates"] = (
            [r["step"] for r in scored],
            [r["candidate_loss"] for r in scored],
        )
    if evals:
        lines["evaluation loss"] = ([r["step"] for r in evals], [r["eval_loss"] for r in evals])
    thin = [name for name in lines if name != "evaluation loss"]
    loss = figures.curves(out / "loss.png", lines, y="nats per token", thin=thin)
    rate = {"learning rate": (steps, [r["lr"] for r in train])}
    path = figures.curves(out / "learning_rate.png", rate, y="learning rate")
    found = [figure(loss, "Losses over steps."), figure(path, "Learning rate.")]
    if evals:
        tasks = sorted(evals[-1]["eval_loss_by_task"])
        rows = [
            [
                name or "(no task)",
                *(e["eval_loss_by_task"].get(name) for e in (evals[0], evals[-1])),
            ]
            for name in tasks
        ]
        rows = [["all", evals[0]["eval_loss"], evals[-1]["eval_loss"]], *rows]
        found.append(table(["evaluation loss, nats per token", "first", "last"], rows))
    return found


def _coverage(out: Path, covered: Coverage, hungry: Sequence[Slice]) -> list[str]:
    kinds = dict.fromkeys(each.kind for each in covered.slices)
    groups = {
        kind: [(s.name, s.share, s in hungry) for s in covered.slices if s.kind == kind]
        for kind in kinds
    }
    if covered.loss_deciles:
        groups["loss"] = [
            (f"decile {i}", share, False) for i, share in enumerate(covered.loss_deciles, 1)
        ]
    dots = figures.shares(out / "coverage.png", groups, covered.share, STARVED * covered.share)
    times = figures.counts(out / "times_trained.png", covered.drawn, covered.kept)
    seen = covered.drawn > 0
    never = int((seen & (covered.kept == 0)).sum())
    rows = [[s.kind, s.name, s.drawn, s.kept, f"{s.share:.3f}"] for s in covered.slices]
    return [
        heading("Coverage"),
        paragraph(RULE),
        figure(
            dots, "Share of the candidates that was trained, by slice; circles mark starved ones."
        ),
        table(["slice", "", "drawn", "trained", "share"], rows),
        figure(times, "How often samples were trained, of those that were candidates."),
        paragraph(f"{never} of {int(seen.sum())} samples that were candidates were never trained."),
        paragraph("Trained most often:"),
        table(["trained", "drawn", "sample"], covered.most),
    ]


def _study(folder: Path, out: Path) -> list[str]:
    study, outcome = read_outcome(folder)
    rows = sorted(collect(folder, outcome.cells), key=lambda row: _order(study, _cell(row)))
    if not rows:
        raise ValueError(f"{str(folder)!r} holds no finished cell yet")
    compared = compare_cells(study, folder, rows, outcome.matched)
    groups = _groups(rows)
    shares, hungry = _study_coverage(folder, rows, study)
    unfinished = len(outcome.cells) - len(rows)
    problems = [f"cell {name} failed: {_error(folder, name)}" for name in outcome.failed]
    if unfinished > len(outcome.failed):
        problems.append(f"{unfinished - len(outcome.failed)} cells are not finished yet")
    for label, (found, share) in hungry.items():
        problems += [f"{label}: {_said(each)} of all {share:.1%}" for each in found]
    parts = _warnings(problems)
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    said = f"{len(rows)} runs from one base model; seeds {seeds}; code {commits}. {INTERVALS}"
    parts.append(paragraph(said))
    parts += _quality(out, study, groups)
    parts += _against_strata(out, study, groups)
    parts += _differences(out, study, compared)
    parts += _costs(out, folder, study, groups)
    parts += _losses(out, folder, groups)
    return parts + _study_slices(out, shares, hungry)


Groups = dict[tuple[str, float, int | None, str, int | None], list[Row]]


def _groups(rows: Sequence[Row]) -> Groups:
    """Rows that differ in their seeds only; costs are those of Cell.group."""
    found: Groups = {}
    for row in rows:
        found.setdefault(_cell(row).group, []).append(row)
    return found


def _order(study: Study, cell: Cell) -> tuple[Any, ...]:
    variants = [PLAIN, *study.variants]
    methods = list(study.methods)
    return (
        variants.index(cell.variant),
        methods.index(cell.method),
        -cell.keep,
        cell.strata or 0,
        cell.steps or 0,
        cell.seed,
    )


def _label(group: tuple[str, float, int | None, str, int | None]) -> str:
    method, keep, strata, variant, _ = group
    parts = [method] if keep == 1 else [method, f"keep {keep:.0%}"]
    parts += [f"K={strata}"] if strata is not None else []
    parts += [f"({variant})"] if variant != PLAIN else []
    return " ".join(parts)


def _metrics(rows: Sequence[Row]) -> dict[str, str]:
    """What quality is told on: name -> column."""
    tasks = [key for key in rows[0] if key.startswith("eval_loss.task.")]
    return {"all": "eval_loss"} | {key.split(".", 2)[2] or "(no task)": key for key in tasks}


def _interval(rows: Sequence[Row], column: str) -> tuple[float, float, float]:
    return mean_interval(np.asarray([row[column] for row in rows], dtype=float))


def _quality(out: Path, study: Study, groups: Groups) -> list[str]:
    parts = [heading("Quality against pruning rate")]
    variants = list(dict.fromkeys(group[3] for group in groups))
    for variant in variants:
        mine = {g: rows for g, rows in groups.items() if g[3] == variant and g[4] is None}
        pruned = {g: r for g, r in mine.items() if g[0] != study.reference and g[2] is None}
        if not pruned:
            continue
        panels: dict[str, dict[str, list[figures.Point]]] = {}
        bands: dict[str, dict[str, tuple[float, float, float]]] = {}
        for name, column in _metrics(next(iter(mine.values()))).items():
            lines: dict[str, list[figures.Point]] = {}
            for group, rows in sorted(pruned.items(), key=lambda item: -item[0][1]):
                point = (100 * (1 - group[1]), *_interval(rows, column))
                lines.setdefault(group[0], []).append(point)
            order = [method for method in study.methods if method in lines]
            panels[name] = {method: lines[method] for method in order}
            full = [r for g, r in mine.items() if g[0] == study.reference]
            bands[name] = {study.reference: _interval(full[0], column)} if full else {}
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
    header = ["method", "seeds", *(f"{name}" for name in _metrics(next(iter(groups.values()))))]
    body = [
        [_label(group), len(rows), *(_interval(rows, c)[0] for c in _metrics(rows).values())]
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
    for name, column in _metrics(next(iter(plain.values()))).items():
        lines: dict[str, dict[float, figures.Point]] = {}
        for (method, keep, strata, *_), rows in plain.items():
            k = strata if strata is not None else _setting(rows[0], "selection.strata")
            if method in varied and k is not None:
                point = (float(k), *_interval(rows, column))
                lines.setdefault(f"{method} keep {keep:.0%}", {})[k] = point
        panels[name] = {
            line: [points[k] for k in sorted(points)]
            for line, points in lines.items()
            if len(points) > 1
        }
        bands[name] = {
            _label(group): _interval(rows, column)
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
            "for the number of comparisons. The reference at equal samples, FLOPs or seconds is a "
            "run of its own with fewer steps and a learning rate that ends with them."
        )
    )
    for against in dict.fromkeys(row["against"] for row in compared):
        rows = [
            {
                **row,
                "label": _label((row["method"], row["keep"], row["strata"], row["variant"], None)),
            }
            for row in compared
            if row["against"] == against and row["on"] == "all"
        ]
        rows.sort(key=lambda row: BASES.index(row["basis"]))
        path = figures.differences(
            out / f"differences-{against}.png", rows, study.margin, f"against {against}"
        )
        parts.append(figure(path, f"Evaluation loss minus that of {against}, all tasks."))
    header = [
        "method", "against", "at equal", "on", "seeds", "loss", "against's", "difference",
        "low", "high", "verdict", "samples", "FLOPs", "seconds",
    ]  # fmt: skip
    body = [
        [
            _label((row["method"], row["keep"], row["strata"], row["variant"], None)),
            *(row[k] for k in ("against", "basis", "on", "seeds", "loss", "loss_against")),
            *(row[k] for k in ("difference", "low", "high", "verdict")),
            *(f"{row[f'{k}_ratio']:.2f}" for k in ("samples", "flops", "step_s")),
        ]
        for row in compared
    ]
    note = "The last three columns are the method's cost / its opponent's."
    return [*parts, paragraph(note), table(header, body)]


def _costs(out: Path, folder: Path, study: Study, groups: Groups) -> list[str]:
    plain = {g: r for g, r in groups.items() if g[3] == PLAIN and g[4] is None}
    bars = {
        _label(group): _flops({k: float(np.mean([r[k] for r in rows])) for k in _COSTS})
        for group, rows in plain.items()
    }
    path = figures.bars(out / "flops.png", bars, x="FLOPs / full training's", line=1)
    parts = [
        heading("Costs"),
        figure(
            path, "Analytic FLOPs of a run against training all candidates, selection included."
        ),
    ]
    full = next((r for g, r in plain.items() if g[0] == study.reference), None)
    if full is not None:
        step = float(np.mean([r["step_s"] for r in full]))
        seconds = {}
        for group, rows in plain.items():
            mean = {k: float(np.mean([r[k] for r in rows])) / step for k in _COSTS}
            seconds[_label(group)] = {
                "training": mean["step_s"] - mean["score_s"] - mean["selection_s"],
                "scoring": mean["score_s"],
                "selection": mean["selection_s"],
            }
        alternating = read_ratios(folder)
        marks = {
            _label(group): alternating[name]
            for group, rows in plain.items()
            if (name := ratio_name(_cell(rows[0]))) in alternating
        }
        path = figures.bars(
            out / "seconds.png", seconds, x="seconds / the reference's", line=1, marks=marks
        )
        caption = (
            "Seconds in steps against the reference's, as the runs took them; runs side by side "
            "on one machine disturb each other. Diamonds: the ratio of steps taken in turn on one "
            "engine, which runs matched in seconds go by."
        )
        parts.append(figure(path, caption))
    return parts


_COSTS = ("flops", "scoring_flops", "full_flops", "step_s", "score_s", "selection_s")


def _losses(out: Path, folder: Path, groups: Groups) -> list[str]:
    panels = {}
    for group, rows in groups.items():
        if group[3] == PLAIN and group[2] is None and group[4] is None:
            spreads = [_spread(_train_records(folder, row)) for row in rows]
            found = [spread for spread in spreads if spread is not None]
            if found:
                panels[_label(group)] = (
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


Hungry = dict[str, tuple[list[Slice], float]]


def _study_coverage(
    folder: Path, rows: Sequence[Row], study: Study
) -> tuple[dict[str, dict[str, list[Slice]]], Hungry]:
    """Slices of each pruned group, added up over seeds, by variant and label; the starved ones."""
    labels: dict[str, Labels] = {}
    found: dict[str, dict[str, list[Slice]]] = {}
    hungry: Hungry = {}
    for group, members in _groups(rows).items():
        if group[0] == study.reference:
            continue
        parts, drawn, kept, deciles = [], 0, 0, []
        for row in members:
            run_dir = folder / "cells" / row["cell"]
            config = run_config(run_dir)
            model = config.model.model_dump_json(include={"path", "tokenizer"})
            key = config.data.model_dump_json() + model
            if key not in labels:
                labels[key] = label_samples(read_inputs(config))
            covered = cover(run_dir, labels[key])
            parts.append(covered.slices)
            drawn += int(covered.drawn.sum())
            kept += int(covered.kept.sum())
            if covered.loss_deciles:
                deciles.append(covered.loss_deciles)
        slices = merged(parts)
        missing = starved(slices, kept / drawn)
        if missing:
            hungry[_label(group)] = (missing, kept / drawn)
        # Shares of loss deciles are means over steps, shown as if of a thousand candidates.
        for i, share in enumerate(np.mean(deciles, axis=0) if deciles else [], 1):
            slices.append(Slice("loss", f"decile {i}", 1000, round(1000 * float(share))))
        found.setdefault(group[3], {})[_label(group)] = slices
    return found, hungry


def _study_slices(
    out: Path, shares: dict[str, dict[str, list[Slice]]], hungry: Hungry
) -> list[str]:
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
        title = "share of the candidates that was trained"
        title += "" if variant == PLAIN else f", variant {variant}"
        path = figures.heat(
            out / f"coverage-{variant}.png", rows, list(groups), values, marks, title
        )
        parts.append(figure(path, "Share trained by slice and method; frames mark starved slices."))
        body = [
            [row, *("" if np.isnan(v) else f"{v:.3f}" for v in line)]
            for row, line in zip(rows, values, strict=True)
        ]
        parts.append(table(["slice", *groups], body))
    return parts


def _spread(train: Sequence[Row]) -> tuple[list[list[float]], list[list[float]]] | None:
    found = [r for r in train if "picked_loss_deciles" in r]
    if not found:
        return None
    return (
        [r["candidate_loss_deciles"] for r in found],
        [r["picked_loss_deciles"] for r in found],
    )


def _flops(total: Row) -> dict[str, float]:
    full = total["full_flops"]
    return {
        "training": (total["flops"] - total["scoring_flops"]) / full,
        "scoring": total["scoring_flops"] / full,
    }


def _warnings(lines: Sequence[str]) -> list[str]:
    return [warning("Look at this", lines)] if lines else []


def _said(each: Slice) -> str:
    return (
        f"{each.kind} {each.name!r} is starved: {each.kept} of {each.drawn} candidates trained "
        f"({each.share:.1%}),"
    )


def _ratio(part: float, whole: float | None) -> list[str]:
    if not whole:
        return [f"{part:,.0f}", "", ""]
    return [f"{part:.4g}", f"{whole:.4g}", f"{part / whole:.3f}"]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _setting(row: Row, key: str) -> Any:
    text = row.get(f"config.{key}")
    return None if text is None else json.loads(text)


def _cell(row: Row) -> Cell:
    return Cell(**{key: row[key] for key in Cell.__dataclass_fields__})


def _train_records(folder: Path, row: Row) -> list[Row]:
    records = read_lines(folder / "cells" / row["cell"] / "metrics.jsonl")
    return [record for record in records if record["event"] == "train"]


def _error(folder: Path, name: str) -> str:
    text = (folder / "cells" / name / "error.txt").read_text("utf-8")
    return text.splitlines()[0]
