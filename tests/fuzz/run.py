"""Fuzz every reader of foreign input with N inputs in all: make fuzz N=100000.

Prints the counts as JSON; exit status 1 with the smallest input found if something does not hold.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import traceback
import warnings
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.targets import TARGETS

LIMIT_S = 5


class TooSlow(Exception):
    """One input took longer than LIMIT_S seconds."""


def fuzz(name: str, examples: int, start: int = 0) -> int:
    """Run target `name` on about `examples` inputs; returns on how many it did.

    Raises:
        whatever the target raised on the smallest input that makes it fail.
    """
    target, strategy = TARGETS[name]
    count = 0

    @seed(start)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(strategy)
    def one(data: bytes) -> None:
        nonlocal count
        count += 1
        signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
        try:
            target(data)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    one()
    return count


def _stop(number: int, frame: Any) -> None:
    raise TooSlow(f"more than {LIMIT_S} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="over all targets")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, _stop)
    warnings.simplefilter("ignore")  # torch's about old pickles, one an input
    counts, failed = {}, []
    started = time.perf_counter()
    for name in TARGETS:
        done, part = 0, options.seed
        # Hypothesis ends early where it has seen all there is; another seed goes on.
        while done < options.inputs / len(TARGETS):
            try:
                done += fuzz(name, min(5000, -(-options.inputs // len(TARGETS)) - done), part)
            except Exception:
                traceback.print_exc()
                failed.append(name)
                break
            part += 1
        counts[name] = done
        print(f"{name}: {done:,} inputs", file=sys.stderr, flush=True)
    took = round(time.perf_counter() - started)
    total = {"inputs": sum(counts.values()), "failed": failed, "seconds": took}
    print(json.dumps({**total, "by_target": counts}))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
