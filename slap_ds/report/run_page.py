"""What the report of one run shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slap_ds.jsonl import read_lines
from slap_ds.report import figures
from slap_ds.report.coverage import RULE, STARVED, Coverage, Slice, cover, said_starved, starved
from slap_ds.report.page import figure, heading, paragraph, table, warnings

Row = dict[str, Any]
PHASES = ("score", "gather", "select", "scatter", "forward", "backward", "optimizer")


def run_page(folder: Path, out: Path) -> list[str]:
    """The page's parts, in order; figures are written into `out`.

    Raises:
        ValueError: no training step is finished.
    """
    records = read_lines(folder / "metrics.jsonl")
    train = [r for r in records if r["event"] == "train"]
    evals = [r for r in records if r["event"] == "eval"]
    if not train:
        raise ValueError(f"{str(folder)!r} holds no training step yet")
    covered = cover(folder)
    hungry = starved(covered.slices, covered.share)
    total = {key: sum(r.get(key, 0.0) for r in train) for key in train[0] if _number(train[0][key])}
    parts = warnings([f"{said_starved(s)} of all {covered.share:.1%}" for s in hungry])
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
            {folder.resolve().name: flop_shares(total)},
            x="FLOPs / full training's",
            line=1,
        )
        caption = "Analytic FLOPs against training all candidates, scoring included."
        parts += [heading("FLOPs"), figure(path, caption)]
    spread = loss_spread(train)
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


def loss_spread(train: Sequence[Row]) -> tuple[list[list[float]], list[list[float]]] | None:
    """Loss deciles of candidates and of picks, each (steps, 11); None: nothing was scored."""
    found = [r for r in train if "picked_loss_deciles" in r]
    if not found:
        return None
    return (
        [r["candidate_loss_deciles"] for r in found],
        [r["picked_loss_deciles"] for r in found],
    )


def flop_shares(total: Row) -> dict[str, float]:
    """FLOPs of training and of scoring over those of training all candidates."""
    full = total["full_flops"]
    return {
        "training": (total["flops"] - total["scoring_flops"]) / full,
        "scoring": total["scoring_flops"] / full,
    }


def _ratio(part: float, whole: float | None) -> list[str]:
    if not whole:
        return [f"{part:,.0f}", "", ""]
    return [f"{part:.4g}", f"{whole:.4g}", f"{part / whole:.3f}"]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
