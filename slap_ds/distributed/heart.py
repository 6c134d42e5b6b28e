"""How far a rank has come, how it ended, and the files by which others learn of it."""

from __future__ import annotations

import contextlib
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slap_ds.files import write_text

# How long a failed rank goes on answering, so that the others do not take it for the cause.
GRACE_S = 1.5


REQUEST = "request.json"  # beside the heartbeats


# How often the watchdog's thread wakes, seconds.
TICK_S = 0.25


# How a rank ends, in the terms of sysexits.h; docs/reliability.md has the list.
DONE, USER_ERROR, LOST_PEER, FAILED, NO_MEMORY, PREEMPTED = 0, 1, 69, 70, 71, 75


@dataclass
class Heart:
    """How far this rank has come. Whoever makes progress beats; all ranks beat equally often.

    Between two beats a rank may work on its own for long, on files; it then counts pieces of work.
    """

    step: int = -1  # -1: the steps have not begun
    phase: str = "start"
    beats: int = 0
    pieces: int = 0
    at: float = field(default_factory=time.monotonic)  # of the last beat or piece of work, seconds
    limit_s: float = math.inf  # the longest time without either
    stop: bool = False  # somebody wants this run to save and end
    frozen_s: float = 0.0  # this process was not given any time, since the last `take_frozen`
    woken: float = math.inf  # when the watchdog's thread last woke; inf: there is none

    def beat(self, phase: str, step: int | None = None) -> None:
        """Progress: `phase` of `step` begins (default: of the same step)."""
        if step is not None:
            self.step = max(self.step, step)
        self.phase = phase
        self.beats += 1
        self.at = time.monotonic()

    def work(self) -> None:
        """A piece of what this rank does alone is done; from any thread."""
        self.pieces += 1
        self.at = time.monotonic()

    def wake(self) -> float:
        """Seconds since the watchdog's thread last woke; far beyond its tick, they are a pause."""
        now = time.monotonic()
        slept, self.woken = now - self.woken, now
        if slept > 4 * TICK_S:
            self.frozen_s += slept - TICK_S
        return slept

    def take_frozen(self) -> float:
        """Seconds this process was stopped or starved since the last call."""
        if time.monotonic() - self.woken > 4 * TICK_S:
            self.wake()  # after a pause this thread may run before the watchdog's
        seconds, self.frozen_s = self.frozen_s, 0.0
        return seconds


def read_heartbeat(folder: Path, rank: int) -> dict[str, Any] | None:
    """What `watchdog` wrote for a rank; None: nothing."""
    return _read(folder / f"rank-{rank}.json")


def read_request(folder: Path) -> dict[str, Any] | None:
    """What `supervise` asks of the ranks: "stop" or "end" an attempt, or ""; None: nothing."""
    return _read(folder / REQUEST)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return facts


def write_json(path: Path, facts: dict[str, Any]) -> None:
    """Whole or not at all; not at all where the disk is full, which must end no run."""
    with contextlib.suppress(OSError):
        write_text(path, json.dumps(facts))


def heartbeat_s(world: int) -> float:
    """Seconds between two heartbeats of a rank: a shared file system has other things to do."""
    return max(1.0, world / 64)


def last_words(folder: Path | None, rank: int) -> str:
    """The error that ended a rank, and was its own; "": none is known."""
    facts = read_heartbeat(folder, rank) if folder is not None else None
    if facts is None or facts["exit"] in (None, DONE, LOST_PEER, PREEMPTED):
        return ""
    return str(facts["cause"])
