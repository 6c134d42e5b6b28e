"""What a pilot's numbers say: which regime the data look like, and what to set.

    numbers of advise.py -> a rule for each regime -> findings -> a terminal

The rules come from studies of small models (docs/experiments.md): they say what is worth trying.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

COPIES = 0.3  # share of rows with near-copies from which data count as redundant
DOMINANT, TIMES_NEXT = 0.5, 3.0  # share of the largest source, and its rows / those of the next
PASSES = 2.0  # passes over the rows from which they count as repeated
WRONG = 0.08  # share of badly fitting answers from which data count as noisy
UNSURE = 0.2  # share of them that cannot be excluded, from which that is said
TOLD = 0.2  # share of the rows in other sources, below which nothing is said
AHEAD = "the default was ahead of a random choice at equal cost in a study of a small model"
LEVEL = "a study of a small model could not tell the default from a random choice at equal cost"
RULE = (
    "Rule of thumb: to spend less, set selection.method sampled and selection.keep 0.6: a step "
    "then costs 0.6 of one on all data, and the same cost buys 1 / 0.6 of the steps. In five "
    "regimes on a small model runs that cost 0.7 ended below all data stopped at 0.7, mostly by "
    "more and smaller steps, and 0.01 to 0.08 nats above all data for their whole cost. Methods "
    "that score did not earn their cost (docs/experiments.md). What it is worth at your size is "
    "not known: compare two short runs at equal cost (docs/studies.md)."
)


@dataclass(frozen=True)
class Finding:
    """One thing that the pilot found."""

    regime: str  # duplicates, noise, epochs, dominated; fresh: none of them
    says: str  # what was measured
    do: str  # what the evidence supports


def findings(found: Mapping[str, Any]) -> list[Finding]:
    """What `measure`'s numbers say: a finding for each regime, or that the data look fresh; and one
    without a regime for what cannot be told."""
    rules = (_redundant, _noisy, _repeated, _dominated)
    out = [finding for rule in rules if (finding := rule(found)) is not None]
    if not any(finding.regime for finding in out):
        says = f"{found['passes']:.1f} passes over rows of which few have near-copies"
        do = f"no regime is certain. {AHEAD.capitalize()}"
        out.append(Finding("fresh", says, do))
    return out


def _redundant(found: Mapping[str, Any]) -> Finding | None:
    copies, partly = found["copies"], found["copies"]["rows"] < found["rows"]
    says = f"{copies['share']:.0%} of the rows have near-copies, {copies['each']:.1f} each"
    if partly:
        says += f" (at least: {copies['rows']:,} of {found['rows']:,} rows were searched)"
    if copies["share"] < COPIES:
        return Finding("", says, "") if partly else None
    do = "remove copies first if you can: the default does not look for them. As they are, " + LEVEL
    return Finding("duplicates", says, do)


def _noisy(found: Mapping[str, Any]) -> Finding | None:
    wrong = found["wrong"]
    if wrong is None:
        return Finding("", "wrong answers: not tried, too few rows of one source", "")
    share, error, told = wrong["share"], wrong["error"], wrong["told"]
    if told < TOLD:
        says = (
            f"wrong answers: at most {wrong['at_most']:.0%}, which this model cannot tell from "
            "right ones"
        )
        do = "ask again with data.eval of the same sources, and after some training on these data"
        return Finding("", says, do)
    if share < max(WRONG, 2 * error):
        if share + 2 * error < UNSURE:
            return None
        says = f"wrong answers: {share:.0%} (+- {2 * error:.0%}), which may be none or many"
        return Finding("", says, "ask again with more --rows, and more held-out rows")
    says = f"about {share:.0%} (+- {2 * error:.0%}) of the answers do not fit their prompts"
    if told < 1:
        says += f", in the sources where it can be told ({told:.0%} of the rows)"
    do = (
        "look at the rows below and mend or drop their like; methods that prefer high losses "
        f"prefer such rows. As they are, {AHEAD}"
    )
    return Finding("noise", says, do)


def _repeated(found: Mapping[str, Any]) -> Finding | None:
    if found["passes"] < PASSES:
        return None
    says = f"{found['passes']:.1f} passes over {found['rows']:,} rows"
    return Finding("epochs", says, f"over three passes, {LEVEL}")


def _dominated(found: Mapping[str, Any]) -> Finding | None:
    source = found["source"]
    if source["ahead"] is None or source["share"] < DOMINANT or source["ahead"] < TIMES_NEXT:
        return None
    says = (
        f"{source['name']!r} has {source['share']:.0%} of the rows and {source['tokens']:.0%} of "
        f"the response tokens, {source['ahead']:.1f} times the rows of the next source"
    )
    do = (
        "if all sources count the same to you, thin it out: the default does not balance sources. "
        "As they are, by the mean over sources, " + LEVEL
    )
    return Finding("dominated", says, do)


def show(found: Mapping[str, Any]) -> list[Table | str]:
    """The pilot and what follows from it, for a terminal."""
    table = Table("", "smallest", "tenth", "median", "nine tenths", "largest")
    for name, title in (
        ("loss", "loss, nats per response token"),
        ("answer", "response tokens of a row"),
        ("response_share", "response tokens / all tokens"),
    ):
        values = [found[name][i] for i in (0, 1, 5, 9, 10)]
        table.add_row(title, *(f"{v:.0f}" if name == "answer" else f"{v:.2f}" for v in values))
    costs = Table(f"a step, keep {found['keep']:g}", "cost / all data", "TFLOPs")
    for row in found["costs"]:
        costs.add_row(row["step"], f"{row['units']:.2f}", f"{row['flops'] / 1e12:.3g}")
    out: list[Table | str] = [f"pilot: {found['drawn']} of {found['rows']:,} rows", table, costs]
    if found["size_gain"] < 1:
        out.append(
            f"sampled's step has {found['size_gain']:.2f} of the variance of a random choice's at "
            "the same tokens, if tokens' gradients are nearly orthogonal"
        )
    named = findings(found)
    for finding in named:
        lines = [f"{finding.regime or '?'}: {finding.says}", finding.do]
        out.append("\n  ".join(line for line in lines if line))
    if any(finding.regime == "noise" for finding in named):
        out += ["rows whose answers fit worst:", *(f"  {text}" for text in found["suspects"])]
    return [*out, RULE]
