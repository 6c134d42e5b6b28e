"""A rank that waits for others asks meanwhile whether they are still there.

    lookout.look(waits)    at every heartbeat, from the watchdog's thread; returns at once
    lookout.lost()         -> the ranks that have gone

A collective of NCCL says nothing of a peer that has died, and ends after the time-out, or the
process with it. A peer that is slow answers: another thread than the main one does. Two kinds do
not:

- A process that has ended. Its host refuses the connection; twice in a row is enough.
- One that is frozen, or cut off. It may come back, and a library may keep Python's threads from
  running for long: only silence that lasts counts.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from slap_ds.distributed.peers import Peers

# Shorter than NCCL's own monitor in torch, which ends a process after 480 s.
LONGEST_SILENCE_S = 300.0
_SHARE_OF_LIMIT = 0.75
_REFUSALS = 2


@dataclass
class Lookout:
    """Asks as `Peers` does, in a thread of its own, one round at a time."""

    peers: Peers
    every_s: float  # seconds between two calls of `look`
    _heard: set[int] = field(default_factory=set)  # who has ever answered
    _silent_s: dict[int, float] = field(default_factory=dict)
    _refusals: dict[int, int] = field(default_factory=dict)
    _asked_at: float = 0.0
    _thread: threading.Thread | None = None

    def look(self, waits: bool) -> None:
        """Begin a round of questions, if this rank waits and the last round is over.

        Args:
            waits: this rank has not got on for a while. If it does, all begins anew.
        """
        if not waits:
            self._silent_s.clear()
            self._refusals.clear()
        if self._thread is not None and self._thread.is_alive():
            return
        # The first round, of a rank that works, learns who can be asked at all.
        if waits or self._thread is None:
            self._thread = threading.Thread(target=self._ask, name="lookout", daemon=True)
            self._thread.start()

    def lost(self) -> list[int]:
        """The ranks that have gone. Of several, those that went first: the others left for them."""
        limit_s = min(LONGEST_SILENCE_S, _SHARE_OF_LIMIT * self.peers.heart.limit_s)
        ended = [rank for rank, count in [*self._refusals.items()] if count >= _REFUSALS]
        silent = [rank for rank, seconds in [*self._silent_s.items()] if seconds > limit_s]
        return sorted({*ended, *silent})

    def _ask(self) -> None:
        now = time.monotonic()
        # Time in which this process itself did not run counts as one round.
        since_s = min(now - self._asked_at, 2 * self.every_s)
        self._asked_at = now
        for rank, said in self.peers.ask().items():
            if said is not None:
                self._heard.add(rank)
                self._silent_s.pop(rank, None)
                self._refusals.pop(rank, None)
            elif rank in self._heard:  # who never answered stands behind a firewall, perhaps
                self._silent_s[rank] = self._silent_s.get(rank, -since_s) + since_s
                refused = self.peers.refuses(rank)
                self._refusals[rank] = self._refusals.get(rank, 0) + 1 if refused else 0
