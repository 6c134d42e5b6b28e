"""The tables of docs/experiments.md, one for each regime, from the comparisons that studies wrote.

python benchmarks/study_tables.py benchmarks/results/regimes --into docs/experiments.md

Replaces what stands between `<!-- regime: NAME -->` and `<!-- /regime -->` for every folder NAME
that holds a comparisons.csv; `overview` is the table of all regimes.
"""

import argparse
import csv
import math
import re
from pathlib import Path

REFUSED = "no verdict"
NAMES = {"full": "all data"}
Rows = list[dict[str, str]]
# Study -> what its tables lead with, where that is not the mean over all response tokens.
MEASURE = {"dominated": "sources"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="a folder of folders with comparisons.csv")
    parser.add_argument("--into", type=Path, required=True)
    options = parser.parse_args()
    text = options.into.read_text("utf-8")
    found = {path.parent.name: read(path) for path in options.results.glob("*/comparisons.csv")}
    names = [name for name in re.findall(r"<!-- regime: ([\w-]+) -->", text) if name in found]
    for name in names:
        parts = [regime(found[name], MEASURE.get(name, "all"))]
        best = options.results / name / "comparisons-best.csv"
        if best.is_file():
            parts += ["At the best evaluation of each run instead of its last:\n"]
            parts += [methods(read(best), MEASURE.get(name, "all"))]
        text = replaced(text, name, "\n".join(parts))
    if names:
        table = overview({name: found[name] for name in names})
        text = replaced(text, "overview", table)
    options.into.write_text(text, "utf-8")


def read(path: Path) -> Rows:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def replaced(text: str, name: str, table: str) -> str:
    """The text with what stands between a regime's markers replaced."""
    place = re.search(rf"<!-- regime: {name} -->\n(.*?)<!-- /regime -->", text, re.DOTALL)
    if not place:
        raise SystemExit(f"no place for the table {name!r}")
    return text[: place.start(1)] + table + text[place.end(1) :]


def overview(found: dict[str, Rows]) -> str:
    """A line a regime: the default at 40 % against all data and random at equal cost."""
    body = []
    for name, rows in found.items():
        on = MEASURE.get(name, "all")
        wanted = {"method": "default", "keep": "0.6", "basis": "cost", "on": on}
        full, random = (one(rows, against=a, **wanted) for a in ("full", "random"))
        if full is None:
            continue
        gain = f"{float(full['gain']):.2f}" if full["gain"] else ""
        body.append([f"[{name}](#{name})", gain, difference(full), difference(random), cost(full)])
    head = ["regime", "all data gain", "default − all data", "default − random"]
    return table([*head, "cost of its loss"], body)


def regime(rows: Rows, on: str) -> str:
    """The verdict in a sentence, the methods at equal cost, the default by task, equal amounts."""
    parts = [verdict(rows, on), methods(rows, on), tasks(rows), amounts(rows, on)]
    return "\n".join(part for part in parts if part)


def verdict(rows: Rows, on: str) -> str:
    """What a reader takes home, of the default and of the best other method."""
    mine = [row for row in rows if row["on"] == on and row["basis"] == "cost"]
    full = one(mine, method="default", keep="0.6", against="full")
    if full is None:
        return ""
    if full["verdict"] == REFUSED:
        gain = float(full["gain"])
        return f"**No verdict**: all data gain {gain:.3f} over the base, too little to rank by.\n"
    random = one(mine, method="default", keep="0.6", against="random")
    said = f"**The default at 40 % is {full['verdict']} against all data"
    said += f", {random['verdict']} against random, at equal cost.**" if random else ".**"
    rivals = [row for row in mine if row["against"] == "full" and row["method"] != "default"]
    if rivals:
        best = min(rivals, key=lambda row: float(row["loss"]))
        said += f" Of the others {label(best)} ends lowest: {difference(best)} against all data."
    return f"{said}\n"


def methods(rows: Rows, on: str) -> str:
    """Every method at equal cost, best first; all data lead in the header's opponent."""
    mine = [row for row in rows if row["on"] == on]
    body = []
    for full in mine:
        if full["basis"] != "cost" or full["against"] != "full":
            continue
        key = {name: full[name] for name in ("method", "keep", "strata", "cost", "variant")}
        random = one(mine, **key, basis="cost", against="random")
        whole = one(mine, **key, basis="all")
        line = [label(full), full["cost"], f"{float(full['steps']):.0f}", full["seeds"]]
        line += [f"{float(full['loss']):.3f}", difference(full), difference(random)]
        body.append((float(full["loss"]), [*line, difference(whole), cost(full)]))
    if not body:
        return ""

    head = ["method", "cost", "steps", "seeds", "loss", "− all data at that cost"]
    head += ["− random at that cost", "− all data, whole run", "cost of its loss"]

    return table(head, [line for _, line in sorted(body, key=lambda each: each[0])])


def tasks(rows: Rows) -> str:
    """The default at 40 %, task by task: what all data gain, and the headline."""
    body = []
    for row in rows:
        if (
            all(
                row[key] == value
                for key, value in {"method": "default", "keep": "0.6", "against": "full"}.items()
            )
            and row["basis"] == "cost"
        ):
            gain = f"{float(row['gain']):.3f}" if row["gain"] else ""
            body.append([row["on"], gain, f"{float(row['loss']):.3f}", difference(row), cost(row)])
    head = ["default at 40 %, on", "all data gain", "loss", "− all data at equal cost"]
    return table([*head, "cost of its loss"], body) if body else ""


def amounts(rows: Rows, on: str) -> str:
    """The default and random against all data at equal samples, response tokens and seconds."""
    body = []
    for name in ("default", "random"):
        for basis in ("samples", "response_tokens", "seconds"):
            row = one(rows, method=name, keep="0.6", on=on, basis=basis, against="full")
            if row is not None:
                ratio = f"{float(row['flops_ratio']):.2f}"
                body.append([name, basis.replace("_", " "), ratio, difference(row)])
    return table(["method", "equal", "FLOPs / all data's", "− all data"], body) if body else ""


def one(rows: Rows, **wanted: str) -> dict[str, str] | None:
    return next((row for row in rows if all(row[k] == v for k, v in wanted.items())), None)


def label(row: dict[str, str]) -> str:
    return f"{NAMES.get(row['method'], row['method'])} {1 - float(row['keep']):.0%}"


def difference(row: dict[str, str] | None) -> str:
    """Mean, interval and verdict."""
    if row is None:
        return ""
    mean, low, high = (float(row[key] or math.nan) for key in ("difference", "low", "high"))
    if math.isnan(low):
        return f"{mean:+.3f} (one seed)"
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}] {row['verdict']}"


def cost(row: dict[str, str]) -> str:
    """The method's cost / all data's for the same loss; beyond all data's runs only a bound."""
    if not row["share"]:
        return ""

    def said(text: str) -> str:
        value = float(text or math.nan)
        if value == 0:  # all data's whole run, of cost 1, does not reach that loss for sure
            return f"< {float(row['cost']):.2f}"
        return "?" if math.isnan(value) else "∞" if math.isinf(value) else f"{value:.2f}"

    return f"{said(row['share'])} [{said(row['share_low'])}, {said(row['share_high'])}]"


def table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


if __name__ == "__main__":
    main()
