"""What a study says first: loss against cost, and what the same loss costs all data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slap_ds.report import figures
from slap_ds.report.numbers import interval_text
from slap_ds.report.page import figure, heading, paragraph, table, verdict
from slap_ds.report.study_groups import Groups, Row, interval_of, label_of, metrics_of
from slap_ds.study.comparisons import REFUSED
from slap_ds.study.plan import PLAIN, Study


def cost_parts(out: Path, study: Study, groups: Groups, compared: Sequence[Row]) -> list[str]:
    """The page's parts about cells that were given a share of the cost; none without such cells."""
    if not any(group[4] is not None for group in groups):
        return []
    parts = [heading("Loss against cost")]
    refused = {row["on"] for row in compared if row["verdict"] == REFUSED}
    for variant in dict.fromkeys(group[3] for group in groups):
        panels: dict[str, dict[str, list[figures.Point]]] = {}
        for name, column in metrics_of(next(iter(groups.values()))).items():
            lines: dict[str, list[figures.Point]] = {}
            for group, rows in groups.items():
                if group[3] == variant and (group[4] or group[0] == study.reference):
                    line = label_of((*group[:3], PLAIN, None))
                    cost = 1.0 if group[4] is None else group[4]
                    lines.setdefault(line, []).append((cost, *interval_of(rows, column)))
            said = f"{name} (no verdict)" if name in refused else name
            panels[said] = {line: sorted(points) for line, points in lines.items()}
        if not any(panels.values()):
            continue
        path = figures.lines_with_intervals(
            out / f"cost-{variant}.png",
            panels,
            {},
            x="cost / that of the whole run on all data",
            y="evaluation loss, nats per token",
        )
        caption = (
            "Evaluation loss against analytic FLOPs, scoring and selection included: mean over "
            "seeds, 95 % t interval over seeds. Each point is a run with a learning rate that "
            "ends with it."
        )
        parts.append(figure(path, caption if variant == PLAIN else f"Variant {variant}. {caption}"))
    return [*parts, *_same_loss(study, compared)]


def _same_loss(study: Study, compared: Sequence[Row]) -> list[str]:
    found = [row for row in compared if row.get("share") is not None]
    if not found:
        return []
    body = [
        [
            label_of((row["method"], row["keep"], row["strata"], row["variant"], row["cost"])),
            row["on"],
            f"{row['steps']:g}",
            *(row[key] for key in ("loss", "gain")),
            interval_text(row["share"], row["share_low"], row["share_high"]),
            verdict(row["verdict"]),
        ]
        for row in found
    ]
    header = [
        "method", "on", "steps", "loss", f"gain of {study.reference}",
        "cost of its loss, 95 % interval", f"against {study.reference} at equal cost",
    ]  # fmt: skip
    note = (
        f"Cost of its loss: the method's cost / what {study.reference} costs for the same loss, "
        "interpolated between its runs of several lengths; below 1 the selection pays. 0 and "
        "infinite: beyond those runs."
    )
    return [paragraph(note), table(header, body)]
