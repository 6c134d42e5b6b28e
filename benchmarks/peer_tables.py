"""The tables of bench_peers.py, and their place in a page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

TITLES = {
    "bare": "a loop by hand",
    "trainer": "Trainer, padding",
    "trl-packed": "TRL SFTTrainer, packed",
    "trl-free": "TRL SFTTrainer, padding-free",
    "slap-full": "slap_ds, all data",
    "slap-20": "slap_ds, default, 20 % pruned",
    "slap-40": "slap_ds, default, 40 % pruned",
}


def tables(result: dict[str, Any], ranks: int) -> str:
    """What goes into the page."""
    where, settings = result["environment"], result["settings"]
    said = (
        f"{where['device']} ({where['cpu']}), {ranks} rank{'s' * (ranks > 1)}, torch "
        f"{where['torch']}, transformers {where['transformers']}, commit `{where['commit'][:10]}`; "
        f"width {settings['hidden']}, {settings['layers']} blocks, {settings['dtype']}, "
        f"{settings['candidates']} samples a step; medians of {settings['rounds']} rounds, in "
        "brackets the least and the largest.\n\n"
    )
    cost = [
        [
            TITLES[row["name"]],
            f"{row['cpu_s_per_1000_tokens']:.3f}",
            told(row["cpu_s_of_bare"]),
            told(row["wall_s_of_bare"]),
            f"{row['trained_token_share']:.2f}",
            f"{row['peak_gib']:.2f}",
        ]
        for row in result["throughput"]
    ]
    head = ["", "CPU s per 1,000 tokens", "of the loop", "wall, of the loop", "trained", "peak GiB"]
    start = [
        [
            TITLES[row["name"]],
            *(f"{row[clock]:.1f}" for clock in ("cpu_s", "wall_s")),
            *(told(row[f"{clock}_of_bare"]) for clock in ("cpu_s", "wall_s")),
        ]
        for row in result["start"]
    ]
    begun = ["first step done after", "CPU s", "wall s", "CPU, of the loop", "wall, of the loop"]
    rates = [
        [name, f"{row['rows'] / row['wall_s']:,.0f}", f"{1e3 * row['cpu_s'] / row['rows']:.2f}"]
        for name, row in result["tokenising"].items()
    ]
    parts = [table(head, cost), table(begun, start), table(["", "rows/s", "CPU ms a row"], rates)]
    return said + "\n".join(parts)


def told(ratio: list[float]) -> str:
    return f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]"


def table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def put(page: Path, text: str, ranks: int) -> None:
    """Replace what stands between the markers `peers: RANKS` and `/peers`."""
    place = re.compile(rf"(<!-- peers: {ranks} -->\n).*?(<!-- /peers -->)", re.DOTALL)
    filled, count = place.subn(lambda m: f"{m[1]}{text}{m[2]}", page.read_text("utf-8"))
    if not count:
        raise SystemExit(f"{page} has no place for the tables: <!-- peers: {ranks} -->")
    page.write_text(filled, "utf-8")
