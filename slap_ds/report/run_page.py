"""What the report of one run shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slap_ds.config.outputs import ANSWERS
from slap_ds.report import figures
from slap_ds.report.conversations import conversations
from slap_ds.report.coverage import (
    RULE,
    STARVED,
    Coverage,
    Labels,
    Slice,
    cover,
    labels_of,
    said_starved,
    starved,
)
from slap_ds.report.numbers import size_text
from slap_ds.report.page import figure, folded, heading, paragraph, table, warnings
from slap_ds.report.run_head import Row, RunLog, best_of, head

PHASES = ("score", "gather", "select", "scatter", "forward", "backward", "optimizer")
MOST_ROWS = 30  # of a table or figure that is shown unfolded


def run_page(log: RunLog, out: Path, known: dict[str, Labels]) -> list[str]:
    """The page's parts, in order; figures are written into `out`.

    Args:
        known: what `labels_of` remembers.
    """
    parts = [*head(log), *_curves(log, out), *_evaluations(log), *_costs(log, out)]
    spread = loss_spread(log.train)
    if spread:
        path = figures.loss_histograms(out / "losses.png", {"": spread})
        parts += [
            heading("Losses of what is kept"),
            figure(path, "Losses of candidates and of the picks, mean over pruned steps."),
        ]
    try:
        labels = labels_of(log.config, known)
        covered = cover(log.folder, labels)
        shown = conversations(log.config, labels.inputs, covered)
    except (OSError, ValueError) as error:
        said = (
            "The run's data can no longer be read, so that nothing is known here of what was "
            f"trained and what was dropped: {error}. Relative paths in config.yaml are those of "
            "the folder that the run was started in; make the report from there."
        )
        return [*parts, heading("Coverage and conversations"), paragraph(said)]
    hungry = starved(covered.slices, covered.share)
    problems = warnings([f"{said_starved(s)} of all {covered.share:.1%}" for s in hungry])
    return [*problems, *parts, *_coverage(out, covered, hungry), *shown]


def done(record: Row) -> int:
    """Steps that were done when the record was written."""
    return int(record["step"]) + 1


def _curves(log: RunLog, out: Path) -> list[str]:
    steps = [done(r) for r in log.train]
    lines = {"training loss of the picks": (steps, [r["loss"] for r in log.train])}
    if scored := [r for r in log.train if "candidate_loss" in r]:
        losses = [r["candidate_loss"] for r in scored]
        lines["mean loss of the candidates"] = ([done(r) for r in scored], losses)
    thin = list(lines)
    if log.evals:
        losses = [r["eval_loss"] for r in log.evals]
        lines["evaluation loss"] = ([done(r) for r in log.evals], losses)
    loss = figures.curves(out / "loss.png", lines, y="nats per token", thin=thin)
    rate = {"learning rate": (steps, [r["lr"] for r in log.train])}
    path = figures.curves(out / "learning_rate.png", rate, y="learning rate")
    return [
        heading("Loss"),
        figure(loss, "Losses over the steps done."),
        folded("Learning rate", [figure(path, "Learning rate over the steps done.")]),
    ]


def _evaluations(log: RunLog) -> list[str]:
    """Every evaluation at its step; of each task the first, best and last."""
    evals, how = log.evals, log.config.evaluation
    if not evals:
        return [paragraph("Nothing was evaluated: data.eval is empty.", quiet=True)]
    best = best_of(evals, how)
    word = "best" if how.metric == "eval_loss" else f"best by {how.metric}"
    rows = [
        [f"{done(e):,}" if done(e) else "0, before training", e["eval_loss"], word * (e is best)]
        for e in evals
    ]
    every = table(["after steps", "evaluation loss, nats per token", ""], rows)
    shown = {f"after {done(e):,} steps": e for e in (evals[0], best, evals[-1])}
    tasks = sorted(evals[-1]["eval_loss_by_task"])
    named = [
        [task or "(no task)", *(e["eval_loss_by_task"].get(task) for e in shown.values())]
        for task in tasks
    ]
    by_task = table(["task", *shown], [["all", *(e["eval_loss"] for e in shown.values())], *named])
    return [
        heading("Evaluation"),
        *_long(f"All {len(rows)} evaluations", every, len(rows)),
        paragraph("By task, nats per token: the first, the best and the last evaluation."),
        *_long(f"All {len(tasks)} tasks", by_task, len(tasks)),
        *_answers([e for e in evals if ANSWERS in e], best),
    ]


def _answers(evals: Sequence[Row], best: Row) -> list[str]:
    """The marks of greedy answers, of the first, best and last evaluation that had any."""
    if not evals:
        return []
    shown = [e for e in evals if e in (evals[0], best, evals[-1])]
    rows = [
        [task or "(no task)", marks["count"], name, *(e[ANSWERS][task].get(name) for e in shown)]
        for task, marks in evals[-1][ANSWERS].items()
        for name in marks
        if name != "count"
    ]
    heads = [f"after {done(e):,} steps" for e in shown]
    return [
        paragraph(
            "Greedy answers by task, as marked at evaluations: BLEU and chrF up to 100, others 1."
        ),
        *_long("All marks", table(["task", "answers", "", *heads], rows), len(rows)),
    ]


def _long(name: str, shown: str, rows: int) -> list[str]:
    return [shown] if rows <= MOST_ROWS else [folded(name, [shown])]


def _costs(log: RunLog, out: Path) -> list[str]:
    total, steps = log.total, [done(r) for r in log.train]
    seconds = {
        name: (steps, [r.get(f"{name}_s", 0.0) for r in log.train])
        for name in PHASES
        if any(f"{name}_s" in r for r in log.train)
    }
    path = figures.curves(out / "step_seconds.png", seconds, y="seconds", stacked=True)
    share = {
        "scoring": (steps, [100 * r.get("score_s", 0.0) / r["step_s"] for r in log.train]),
        "selection (gather, select, scatter)": (
            steps,
            [100 * r["selection_s"] / r["step_s"] for r in log.train],
        ),
    }
    shares = figures.curves(out / "selection_share.png", share, y="% of the step")
    caption = "Share of a step that goes into scoring and selection, over the steps done."
    rows = [
        ["samples", *_ratio(total["picked"], total["candidates"])],
        ["tokens", *_ratio(total["trained_tokens"], total["candidate_tokens"])],
        ["FLOPs, scoring included", *_ratio(total["flops"], total.get("full_flops"))],
    ]
    found = [
        heading("Cost"),
        table(["", "trained", "all candidates", "ratio"], rows),
        figure(path, "Seconds of each step, by phase."),
        figure(shares, caption),
    ]
    if "full_flops" in total:  # older runs have none
        path = figures.bars(
            out / "flops.png",
            {log.folder.resolve().name: flop_shares(total)},
            x="FLOPs / full training's",
            line=1,
        )
        caption = "Analytic FLOPs against training all candidates, scoring included."
        found.append(figure(path, caption))
    return found


def _coverage(out: Path, covered: Coverage, hungry: Sequence[Slice]) -> list[str]:
    kinds = dict.fromkeys(each.kind for each in covered.slices)
    groups = {}
    for kind in kinds:
        most = sorted((s for s in covered.slices if s.kind == kind), key=lambda s: -s.drawn)
        few = most[:MOST_ROWS]
        groups[kind] = [(s.name, s.share, s in hungry) for s in covered.slices if s in few]
    if covered.loss_deciles:
        groups["loss"] = [
            (f"decile {i}", share, False) for i, share in enumerate(covered.loss_deciles, 1)
        ]
    dots = figures.shares(out / "coverage.png", groups, covered.share, STARVED * covered.share)
    times = figures.counts(out / "times_trained.png", covered.drawn, covered.kept)
    seen = covered.drawn > 0
    never = int((seen & (covered.kept == 0)).sum())
    rows: list[list[object]] = []
    for kind in kinds:
        slices = [s for s in covered.slices if s.kind == kind]
        rows += [[kind], *([s.name, s.drawn, s.kept, f"{s.share:.1%}"] for s in slices)]
    return [
        heading("Coverage"),
        paragraph(RULE, quiet=True),
        figure(
            dots,
            "Share of the candidates that was trained, by slice; circles mark starved ones. Of a "
            f"kind with more than {MOST_ROWS} slices those with most candidates.",
        ),
        folded("The numbers", [table(["slice", "drawn", "trained", "share"], rows)]),
        figure(times, "How often samples were trained, of those that were candidates."),
        paragraph(f"{never:,} of {int(seen.sum()):,} candidates were never trained."),
    ]


def loss_spread(train: Sequence[Row]) -> tuple[list[list[float]], list[list[float]]] | None:
    """Loss deciles of candidates and of picks, each (steps, 11); None: nothing was scored."""
    found = [r for r in train if "picked_loss_deciles" in r]
    if not found:
        return None
    return (
        [r["candidate_loss_deciles"] for r in found],
        [r["picked_loss_deciles"] for r in found],
    )


def flop_shares(total: dict[str, Any]) -> dict[str, float]:
    """FLOPs of training and of scoring over those of training all candidates."""
    full = total["full_flops"]
    return {
        "training": (total["flops"] - total["scoring_flops"]) / full,
        "scoring": total["scoring_flops"] / full,
    }


def _ratio(part: float, whole: float | None) -> list[object]:
    if not whole:
        return [size_text(part), None, None]
    return [size_text(part), size_text(whole), f"{part / whole:.3f}"]
