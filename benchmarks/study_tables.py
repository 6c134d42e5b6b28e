"""The tables of docs/experiments.md, from the comparisons that a study wrote.

python benchmarks/study_tables.py COMPARISONS.csv --best hard --into docs/experiments.md

Replaces what stands between `<!-- study: ... -->` and `<!-- /study -->`.
"""

import argparse
import csv
import json
import re
from pathlib import Path

METHODS = {"full": "all data", "random": "random"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("comparisons", type=Path)
    parser.add_argument("--method", default="slap")
    parser.add_argument("--best", required=True, help="the baseline that gets a column of its own")
    parser.add_argument("--into", type=Path, required=True)
    options = parser.parse_args()
    with options.comparisons.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["seeds"] != "1"]
    # Of steps that took turns; the seconds of whole runs tell more about what else was running.
    seconds = json.loads(options.comparisons.with_name("seconds.json").read_text("utf-8"))
    tables = {
        "tasks": tasks(rows, options.method, options.best),
        "costs": costs(rows, options.method, seconds),
        "methods": methods(rows),
        "strata": strata(rows, options.method),
        "variants": variants(rows),
    }
    text = options.into.read_text("utf-8")
    for name, table in tables.items():
        found = re.search(rf"<!-- study: {name} -->\n(.*?)<!-- /study -->", text, re.DOTALL)
        if not found:
            raise SystemExit(f"{options.into} has no place for the table {name!r}")
        text = text[: found.start(1)] + table + text[found.end(1) :]
    options.into.write_text(text, "utf-8")


def tasks(rows: list[dict[str, str]], method: str, best: str) -> str:
    """A method at every keep ratio, task by task, against all data, random and a baseline."""
    opponents = ("full", "random", best)
    body = []
    for keep in ("0.8", "0.6", "0.4"):
        for on in ("all", *sorted({row["on"] for row in rows} - {"all"})):
            found = [
                _one(rows, method=method, keep=keep, against=o, basis="candidates", on=on)
                for o in opponents
            ]
            if any(found):
                loss = next(f"{float(row['loss']):.3f}" for row in found if row)
                pruned = f"{1 - float(keep):.0%}"
                body.append([pruned, on, loss, *(_difference(row) for row in found)])
    against = [f"against {METHODS.get(o, o)}" for o in opponents]
    return _table(["pruned", "task", f"{method}: loss", *against], body)


def costs(rows: list[dict[str, str]], method: str, seconds: dict[str, float]) -> str:
    """A method against all data at equal candidates, samples, FLOPs and seconds."""
    body = []
    for keep in ("0.8", "0.6", "0.4"):
        for basis in ("candidates", "samples", "flops", "seconds"):
            row = _one(rows, method=method, keep=keep, against="full", basis=basis, on="all")
            if row:
                ratios = [
                    f"{float(row[f'{cost}_ratio']):.2f}"
                    for cost in ("samples", "trained_tokens", "flops")
                ]
                took = f"{seconds[f'{method}-keep{keep}']:.2f}" if basis == "candidates" else ""
                pruned = f"{1 - float(keep):.0%}"
                body.append([pruned, basis, *ratios, took, row["seeds"], _difference(row)])
    head = ["pruned", "equal", "samples", "tokens", "FLOPs", "seconds", "seeds"]
    head.append("loss against all data")
    return _table(head, body)


def methods(rows: list[dict[str, str]]) -> str:
    """All methods at 40 % pruning, best first."""
    chosen = [
        row
        for row in rows
        if _is(row, keep="0.6", strata="", variant="plain", basis="candidates", on="all")
    ]
    body = []
    names = {row["method"]: float(row["loss"]) for row in chosen}
    for name in sorted(names, key=names.__getitem__):
        full = _one(chosen, method=name, against="full")
        random = _one(chosen, method=name, against="random")
        tokens = f"{float(full['trained_tokens_ratio']):.2f}" if full else ""
        flops = f"{float(full['flops_ratio']):.2f}" if full else ""
        body.append(
            [name, f"{names[name]:.3f}", _difference(full), _difference(random), tokens, flops]
        )
    head = ["method", "loss", "against all data", "against random", "tokens", "FLOPs"]
    return _table(head, body)


def strata(rows: list[dict[str, str]], method: str) -> str:
    """A method by its number of strata, at 40 % pruning."""
    body = []
    for row in rows:
        wanted = {"method": method, "keep": "0.6", "variant": "plain", "against": "full"}
        if _is(row, **wanted, basis="candidates", on="all"):
            k = int(float(row["strata"])) if row["strata"] else 4
            body.append((k, [f"{float(row['loss']):.3f}", _difference(row)]))
    return _table(["K", "loss", "against all data"], [[str(k), *rest] for k, rest in sorted(body)])


def variants(rows: list[dict[str, str]]) -> str:
    """Noise and duplicates, at 40 % pruning."""
    body = []
    for row in rows:
        if row["variant"] != "plain" and _is(row, keep="0.6", basis="candidates", on="all"):
            body.append(
                [
                    row["variant"],
                    row["method"],
                    METHODS.get(row["against"], row["against"]),
                    f"{float(row['loss']):.3f}",
                    _difference(row),
                ]
            )
    return _table(["data", "method", "against", "loss", "difference"], sorted(body))


def _is(row: dict[str, str], **wanted: str) -> bool:
    return all(row[key] == value for key, value in wanted.items())


def _one(rows: list[dict[str, str]], **wanted: str) -> dict[str, str] | None:
    plain = {"variant": "plain", "strata": "", **wanted}
    return next((row for row in rows if _is(row, **plain)), None)


def _difference(row: dict[str, str] | None) -> str:
    if row is None:
        return ""
    mean, low, high = (float(row[key]) for key in ("difference", "low", "high"))
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}] {row['verdict']}"


def _table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


if __name__ == "__main__":
    main()
