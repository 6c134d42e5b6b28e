"""One thread a rank: it tells the world how far the rank is, and ends it when it gets no further.

    with watch(run_dir, rank, world, ...) as heart:    heart.beat("phase", step) wherever it gets on

run_dir/heartbeat/rank-N.json   step, phase, time, pid, host; at the end the exit code and the cause
run_dir/heartbeat/request.json  what `slap-ds launch` asks of the ranks, on whatever host

- Neither a beat nor a piece of work for the limit: one line names rank, step, phase and who holds
  it up, and the process ends.
  The thread does it, since the main thread may be inside a collective that never returns.
- While the rank waits it asks whether the others are still there; one that has gone is named long
  before the limit (lookout.py).
- SIGTERM and SIGUSR1 only set `heart.stop`. A Python handler would not run inside a collective;
  the number of the signal arrives on a socket that this thread reads.
- The launcher gone: the kernel sends SIGTERM (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import math
import os
import re
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import psutil

from slap_ds.distributed.heart import (
    FAILED,
    GRACE_S,
    LOST_PEER,
    PREEMPTED,
    TICK_S,
    Heart,
    heartbeat_s,
    read_request,
    write_json,
)
from slap_ds.distributed.lookout import Lookout
from slap_ds.distributed.peers import Peers

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Launchers pass Ctrl-C on to ranks that the terminal has told already.
_ECHO_S = 1.0
# Without progress for so long a rank may be waiting for others.
_WAITS_S = 2.0
_PR_SET_PDEATHSIG = 1


@dataclass
class Watchdog:
    """What the thread knows."""

    folder: Path
    rank: int
    world: int
    stop_timeout_s: float
    heart: Heart = field(default_factory=Heart)
    peers: Peers | None = None  # once the ranks know each other
    stop_cause: str = ""
    attempt: str = field(default_factory=lambda: os.environ.get("SLAP_ATTEMPT", ""))
    _supervised: bool = False  # a supervisor has named this attempt
    _still_s: float = 0.0
    _stop_at: float | None = None
    _asked_at: float = 0.0
    _parents: tuple[int, int] = (0, 0)
    _ended: bool = False
    _leaving: bool = False
    _lookout: Lookout | None = None
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def record(self, code: int | None = None, cause: str = "") -> None:
        """Write this rank's file; with `code`, for the last time."""
        with self._lock:
            if not self._ended:
                self._ended = code is not None
                self._write(code, cause)

    def _write(self, code: int | None, cause: str) -> None:
        heart = self.heart
        facts = {
            "rank": self.rank,
            "world": self.world,
            "attempt": self.attempt,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "step": heart.step,
            "phase": heart.phase,
            "beats": heart.beats,
            "pieces": heart.pieces,
            "time": time.time(),
            "exit": code,
            "cause": cause,
        }
        write_json(self.folder / f"rank-{self.rank}.json", facts)

    def end(self, code: int, cause: str, say: str = "", answered_s: float = 0.0) -> NoReturn:
        """Leave from whatever thread, without what waits for other ranks at a normal exit.

        Args:
            answered_s: how long it has gone on answering others since it knew that it would leave.
        """
        with self._lock:
            first, self._leaving = not self._leaving, True
        if not first:  # another thread has said why, and ends the process
            threading.Event().wait()
        if say:
            print(say, file=sys.stderr, flush=True)
        self.record(code, cause)
        sys.stdout.flush()
        if code == LOST_PEER:
            # Goes on answering: it is not the one that has gone.
            time.sleep(max(0.0, GRACE_S - answered_s))
        os._exit(code)

    def line(self, text: str, kind: str = "error") -> str:
        """A line for users: rank, step and phase before `text`."""
        where = f" (rank {self.rank})" if self.world > 1 else ""
        at = f"step {self.heart.step}" if self.heart.step >= 0 else "before the first step"
        return f"slap-ds: {kind}{where}: {at}, {self.heart.phase!r}: {text}"

    def run(self, signals: socket.socket) -> None:
        """The thread."""
        written, seen = 0.0, (-1, -1)
        self.heart.woken = time.monotonic()
        every_s = heartbeat_s(self.world)
        while not self._ended:
            ready, _, _ = select.select([signals], [], [], TICK_S)
            slept, now = self.heart.wake(), self.heart.woken
            if ready:
                self._signalled(signals.recv(64))
            if self._is_orphan():
                self._stop("the launcher has gone")
            # Time in which this process did not run is not held against it.
            done = (self.heart.beats, self.heart.pieces)
            self._still_s = self._still_s + min(slept, 4 * TICK_S) if done == seen else 0.0
            if self._stop_at is not None and done[1] != seen[1]:  # the checkpoint asked for
                self._stop_at = max(self._stop_at, now + self.stop_timeout_s)
            seen = done
            if self._stop_at is not None and now > self._stop_at:
                why = f"not at the end of a step {self.stop_timeout_s:g} s after the request"
                self.end(FAILED, f"{why} to stop", self.line(f"{why} to stop: nothing saved"))
            if self._still_s > self.heart.limit_s:
                self._stuck()
            if now - written > every_s:
                written = now
                self.record()
                self._obey()
                self._look(every_s)
                # Against code that never lets a thread run: a timer that needs no interpreter.
                if self.heart.limit_s < math.inf:
                    faulthandler.dump_traceback_later(self.heart.limit_s + 30, exit=True)

    def _stuck(self) -> NoReturn:
        started = time.monotonic()
        why = self.peers.diagnose() if self.peers is not None else "the others did not join"
        why += f" (no progress for {self.heart.limit_s:g} s)"
        self.end(LOST_PEER, why, self.line(why), time.monotonic() - started)

    def _look(self, every_s: float) -> None:
        """End this rank if it waits for one that has gone."""
        if self.peers is None:
            return
        if self._lookout is None:
            self._lookout = Lookout(self.peers, every_s)
        waits = self._still_s > _WAITS_S
        lost = self._lookout.lost() if waits else []
        if lost and not self._ended:
            why = f"{self.peers.gone(lost)} (no progress for {self._still_s:.0f} s)"
            self.end(LOST_PEER, why, self.line(why))
        self._lookout.look(waits)

    def _signalled(self, numbers: bytes) -> None:
        for number in numbers:
            if number in STOP_SIGNALS:
                name = signal.Signals(number).name
                if number == signal.SIGINT:
                    self._interrupted()
                self._stop("the launcher has gone" if self._is_orphan() else name)

    def _interrupted(self) -> None:
        """Ctrl-C is a request like the others, and once more it ends at once."""
        if self._stop_at is None:
            if self.rank == 0 and self.heart.step >= 0:
                print(self.line("saving, then leaving; Ctrl-C again: at once", "stopping"))
        elif time.monotonic() > self._asked_at + _ECHO_S:
            why = "interrupted twice"
            self.end(FAILED, why, self.line(f"{why}: not saved"))

    def _obey(self) -> None:
        """Do what the supervisor asks of this attempt; the number of another: this one is over."""
        request = read_request(self.folder) if self.attempt else None
        if request is None:
            return
        mine = request["attempt"] == self.attempt
        self._supervised |= mine
        if mine and request["ask"] == "stop":
            self._stop("asked by slap-ds launch")
        elif self._supervised and (not mine or request["ask"] == "end"):
            time.sleep(GRACE_S)  # as in `end`, but the next attempt starts after the last words
            self.end(LOST_PEER, "slap-ds launch has ended this attempt", answered_s=GRACE_S)

    def _is_orphan(self) -> bool:
        parent, grandparent = self._parents
        if parent and os.getppid() != parent:
            return True
        return bool(grandparent) and _parent(parent) != grandparent

    def _stop(self, cause: str) -> None:
        if self._stop_at is not None:
            return
        self.stop_cause = cause
        self._asked_at = time.monotonic()
        self._stop_at = self._asked_at + self.stop_timeout_s
        if self.heart.step < 0:
            self.end(PREEMPTED, cause, self.line(f"{cause}: nothing to save yet", "stopped"))
        self.heart.stop = True


@contextmanager
def watch(
    run_dir: Path, rank: int, world: int, stop_timeout_s: float, nested: bool = False
) -> Iterator[Watchdog]:
    """A watched rank inside; afterwards signals are as they were.

    Args:
        stop_timeout_s: seconds from the request to stop, and then from the last sign that its
            checkpoint grows, until the process ends in any case.
        nested: the launcher's own parent belongs to it too, as with deepspeed.

    Raises:
        OSError: `run_dir` cannot be written.
    """
    folder = run_dir / "heartbeat"
    folder.mkdir(parents=True, exist_ok=True)
    parent = os.getppid()
    dog = Watchdog(folder, rank, world, stop_timeout_s)
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
    wakeup = signal.set_wakeup_fd(theirs.fileno())
    if world > 1:
        dog._parents = (parent, _parent(parent) if nested else 0)
        die_with_parent(parent)
    dog.record()
    thread = threading.Thread(target=dog.run, args=(ours,), name="watchdog", daemon=True)
    thread.start()
    try:
        yield dog
    finally:
        with dog._lock:
            dog._ended = True
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        thread.join()
        faulthandler.cancel_dump_traceback_later()
        ours.close()
        theirs.close()


def die_with_parent(parent: int) -> None:
    """SIGTERM for this process when its parent ends; `parent`: who that was a moment ago."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the kernel knew
        os.kill(os.getpid(), signal.SIGTERM)


def _parent(pid: int) -> int:
    """The parent of a process; 0: it has gone, or this system does not tell."""
    try:
        return int(psutil.Process(pid).ppid())
    except psutil.Error:
        return 0


def out_of_memory(error: BaseException) -> str | None:
    """What to say if `error` means that memory has run out, with the bytes asked for; else None."""
    text = " ".join(str(error).split())
    asked = re.search(r"(?:allocate|for an array)\D{0,20}([\d.]+ ?(?:bytes|[KMGTPE]i?B)?)", text)
    wanted = f"asked for {asked[1].strip()}" if asked else "no size is known"
    if type(error).__name__ == "OutOfMemoryError":
        import torch

        held = ""
        if torch.cuda.is_available():
            held = f", {torch.cuda.memory_allocated():,} bytes are held"
        return f"out of memory on the device: {wanted}{held}; lower batch.micro_batch_tokens"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        held_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return (
            f"out of memory on the host: {wanted}, this rank has held {held_kb * 1024:,} bytes at "
            "most; lower batch.candidates, or use fewer ranks on a machine"
        )
    return None
