"""Put the seconds of `make test-faults` into docs/reliability.md: table.py RESULTS.json."""

import json
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/reliability.md"
START, END = "<!-- faults: made by tests/faults/table.py -->\n", "<!-- /faults -->"
FAULTS = {
    1: "rank killed",
    2: "exception on one rank",
    3: "hang, straggler",
    4: "network cut",
    5: "a skipped or reordered collective",
    6: "ranks disagree on the picks",
    7: "uneven data per rank",
    8: "NaN or Inf loss, all-masked row",
    9: "killed while saving",
    10: "disk full",
    11: "bit flip, truncation, swapped shard",
    12: "no, empty or hostile `latest`",
    13: "SIGTERM",
    14: "launcher killed",
    15: "resumed on 2, 1, 4 ranks",
    16: "out of memory",
    17: "bad rows",
    18: "host file mistakes",
    19: "stale build lock, port taken",
}


def table(rows: list[dict]) -> str:
    lines = ["| # | fault | done | s | limit |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        lines.append(
            f"| {row['row']} | {FAULTS[row['row']]} | {row['fault']} | {row['seconds']:.1f} | "
            f"{'' if row['limit_s'] is None else format(row['limit_s'], 'g')} |"
        )
    return "\n".join(lines) + "\n"


def main(path: str) -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(START)
    _, after = rest.split(END)
    rows = json.loads(Path(path).read_text(encoding="utf-8"))
    PAGE.write_text(f"{before}{START}\n{table(rows)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
