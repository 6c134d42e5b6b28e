"""Put what `make test-faults` saw into docs/reliability.md: table.py RESULTS.json.

Exit status 1 if a row has no test, or one that did not pass.
"""

import json
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/reliability.md"
START, END = "<!-- faults: made by tests/faults/table.py -->\n", "<!-- /faults -->"
FAULTS = {
    1: ("a rank is killed", "all gone in 10 s, going on ends the same"),
    2: ("an exception on one rank", "its traceback, rank and step; the others gone in 10 s"),
    3: ("a rank hangs or is slow", "named, stopped within time-out + 5 s; slow: the same result"),
    4: ("the network is cut", "both sides gone within time-out + 5 s"),
    5: ("a collective is skipped or reordered", "caught in its step"),
    6: ("ranks disagree on the picks", "stopped before they are trained"),
    7: ("other data on one rank", "all stop together"),
    8: ("NaN or Inf loss, nothing to learn", "not selected, told by id, weights finite"),
    9: ("killed while saving", "the newest checkpoint loads, going on ends the same"),
    10: ("the disk is full", "path, need and free bytes; the last good one stays"),
    11: ("bit flip, truncation, swapped shard", "refused by file name, the one before is taken"),
    12: ("no, empty or hostile `latest`", "never followed out of the run's folder"),
    13: ("SIGTERM, SIGUSR1", "one save, exit code 75, no orphans"),
    14: ("the launcher is killed", "the ranks save and exit, never with 0"),
    15: (
        "going on with 2, 1, 4 ranks",
        "the same batches and picks, losses within 1e-6 (ZeRO-2: 2e-6)",
    ),
    16: ("out of memory", "rank, phase and bytes; going on ends the same"),
    17: ("bad rows", "written down with file, line and reason"),
    18: ("mistakes in the host file", "refused before anything starts"),
    19: ("stale build lock, port taken", "named in 30 s"),
}


def table(results: dict) -> str:
    """One line a fault; seconds are those of its slowest case, where a limit is promised."""
    rows = {row["row"]: row for row in results["rows"]}
    lines = [
        "| # | fault | what must hold | tests passed | slowest, s | limit, s | next step, s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for number, (fault, promise) in FAULTS.items():
        row = rows.get(number, {"passed": 0, "failed": 0, "skipped": 0, "measured": []})
        tests = sum(row[outcome] for outcome in ("passed", "failed", "skipped"))
        limited = [m for m in row["measured"] if m["limit_s"] is not None]
        slowest = max(limited, key=lambda m: m["seconds"] / m["limit_s"], default=None)
        restarted = [m["seconds"] for m in row["measured"] if m["limit_s"] is None]
        cells = [
            f"{row['passed']} of {tests}",
            f"{slowest['seconds']:.1f}" if slowest else "",
            f"{slowest['limit_s']:g}" if slowest else "",
            f"{max(restarted):.0f}" if restarted else "",
        ]
        lines.append(f"| {number} | {fault} | {promise} | {' | '.join(cells)} |")
    machine = "Python {python}, torch {torch}, deepspeed {deepspeed}, {cores} cores".format(
        **results
    )
    revision = results["commit"][:7]
    return "\n".join(lines) + f"\n\n{machine}; revision `{revision}`.\n"


def main(path: str) -> None:
    results = json.loads(Path(path).read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(START)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{START}\n{table(results)}\n{END}{after}", encoding="utf-8")
    found = {row["row"]: row for row in results["rows"]}
    missing = [n for n in FAULTS if n not in found or found[n]["failed"] or not found[n]["passed"]]
    if missing:
        sys.exit(f"rows without a passing test, or with a failing one: {missing}")


if __name__ == "__main__":
    main(sys.argv[1])
