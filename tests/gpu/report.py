"""Results of tests/gpu/check.py as tables, into the marked places of the documentation.

    python -m tests.gpu.report FOLDER [--into docs]

A place is what lies between `<!-- gpu:NAME -->` and `<!-- /gpu:NAME -->`; without --into the tables
are printed. Every table names the device, driver, versions and commit of its results.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

Results = dict[str, dict[str, Any]]
# What FLOPs and bytes say a step should take of full training (docs/performance.md).
THEORY = {"reuse": {"0.2": 0.85, "0.4": 0.70}, "separate": {"0.2": 1.05, "0.4": 0.85}}


def read(folder: Path) -> Results:
    """Part -> its result."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        found[result["part"]] = result
    if not found:
        raise SystemExit(f"{folder}: no results; run tests/gpu/check.py --out {folder}")
    return found


def provenance(results: Results) -> str:
    """One line: where and with what this was measured."""
    facts = results.get("rates", {}).get("facts", {})
    names = ("device", "driver", "torch", "deepspeed", "transformers", "python", "commit")
    return "; ".join(f"{name} {facts[name]}" for name in names if facts.get(name)) + "."


def checks(results: Results) -> str:
    """Every part, whether it passed, and its plain facts."""
    body = []
    for part, result in results.items():
        facts = {k: v for k, v in result["facts"].items() if isinstance(v, (int, float, str))}
        told = ", ".join(f"{k} {_show(v)}" for k, v in facts.items() if k not in ("commit", "cpu"))
        body.append([part, result["status"], f"{result['s']:.0f}", told[:300]])
    return _table(["part", "", "s", "found"], body)


def op(results: Results) -> str:
    """The farthest-point op against the floor of an exact method."""
    body = []
    for case in _facts(results, "timings")["cases"]:
        slowest = sorted(case["kernels"].items(), key=lambda item: -item[1]["ms"])[:4]
        body.append(
            [
                f"{case['n']:,}×{case['d']:,}",
                str(case["strata"]),
                f"{case['ms']:.2f}",
                f"{case['ratio']:.2f}",
                ", ".join(f"{name} {seen['ms']:.2f}" for name, seen in slowest),
            ]
        )
    return _table(["N×D", "strata", "ms", "of the floor", "ms by kernel"], body)


def step(results: Results) -> str:
    """A training step against full training."""
    body = []
    peak = results.get("rates", {}).get("facts", {}).get("bf16_tflop_s")
    for case in _facts(results, "step")["result"]["cases"]:
        forward, _, pruned = case["case"].partition(" ")
        rate = case["flops"] / case["step_s"] / 1e12
        body.append(
            [
                case["case"],
                f"{case['ratio_to_full']:.3f}",
                f"{THEORY.get(forward.partition('-')[0], {}).get(pruned, 1.0):.2f}",
                f"{case['tokens_per_s']:,.0f}",
                f"{rate:.3g}" + (f" ({rate / peak:.0%})" if peak else ""),
                f"{case['peak_gib']:.1f}",
                f"{case['syncs']:.0f}",
                f"{100 * case['selection_share']:.2f} %",
            ]
        )
    head = ["case", "of full training", "theory", "tokens/s", "TFLOP/s (of a matrix product's)"]
    return _table([*head, "peak GiB", "syncs", "selection"], body)


def peers(results: Results) -> str:
    """What users would take instead, in wall seconds a token of a loop written by hand."""
    body = [
        [row["name"], "{:.2f} [{:.2f}, {:.2f}]".format(*row["wall_s_of_bare"])]
        for row in _facts(results, "peers")["result"]["throughput"]
    ]
    return _table(["", "of the loop"], body)


def model(results: Results) -> str:
    """SmolLM2: evaluation losses before and after, at equal cost."""
    facts = _facts(results, "smollm2")
    ways = [key.removesuffix("_after") for key in facts if key.endswith("_after")]
    body = [[w, f"{facts[f'{w}_before']:.4f}", f"{facts[f'{w}_after']:.4f}"] for w in ways]
    return _table(["trained on", "loss before", "after"], body)


TABLES: dict[str, Callable[[Results], str]] = {
    "checks": checks,
    "op": op,
    "step": step,
    "peers": peers,
    "model": model,
}


def put(text: str, results: Results) -> str:
    """`text` with the places of the tables that there are results for filled anew."""
    for name, table in TABLES.items():
        place = re.compile(rf"(<!-- gpu:{name} -->\n).*?(<!-- /gpu:{name} -->)", re.S)
        if not place.search(text):
            continue
        try:
            filled = f"{provenance(results)}\n\n{table(results)}"
        except KeyError:  # this part was left out or has failed
            continue
        text = place.sub(lambda m, filled=filled: f"{m[1]}{filled}{m[2]}", text)
    return text


def _facts(results: Results, part: str) -> dict[str, Any]:
    if results[part]["status"] != "PASS":
        raise KeyError(part)
    facts: dict[str, Any] = results[part]["facts"]
    return facts


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--into", type=Path, help="folder of the documentation")
    options = parser.parse_args()
    results = read(options.folder)
    if options.into is None:
        places = "".join(f"{name}\n<!-- gpu:{name} -->\n<!-- /gpu:{name} -->\n" for name in TABLES)
        print(put(places, results))
        return
    for path in sorted(options.into.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if (filled := put(text, results)) != text:
            path.write_text(filled, encoding="utf-8")
            print(f"{path} has new tables")


if __name__ == "__main__":
    main()
