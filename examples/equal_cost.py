"""How many steps of another method cost as many FLOPs as a run that is done.

    python examples/equal_cost.py runs/demo/slap random

The run's metrics.jsonl counts what each step cost, scoring included, and what training all of its
candidates would have cost. A step of `full` costs all of that, one of `random` the kept share.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slap_ds.jsonl import read_lines


def equal_cost_steps(steps: Sequence[dict[str, Any]], method: str) -> int:
    """Steps of `full` or `random` for the FLOPs that these steps' records add up to, at least 1."""
    spent = sum(step["flops"] for step in steps)
    of_all = sum(step["full_flops"] for step in steps) / len(steps)
    kept = sum(step["picked"] for step in steps) / sum(step["candidates"] for step in steps)
    shares = {"full": 1.0, "random": kept}
    if method not in shares:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(shares)}")
    return max(1, round(spent / (shares[method] * of_all)))


if __name__ == "__main__":
    run_dir, method = sys.argv[1:]
    records = read_lines(Path(run_dir) / "metrics.jsonl")
    print(equal_cost_steps([r for r in records if r["event"] == "train"], method))
