"""`slap-ds launch -- LAUNCHER ...`: one job, attempt after attempt, until it is done or hopeless.

    supervise(command, run_dir, options) -> exit code

A launcher's own exit code is not to be trusted: deepspeed's is 0 when its helper was killed,
torchrun's is 1 whatever happened. The ranks leave theirs in run_dir/heartbeat, and those decide.
Everything an attempt has started here ends with it: orphans are adopted (PR_SET_CHILD_SUBREAPER).
Ranks that sshd or a daemon started, here or on other machines, are no children of ours: they read
in run_dir/heartbeat/request.json what is asked of them, and are waited for by their files.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from slap_ds.config.file import read_config
from slap_ds.distributed.heart import (
    DONE,
    FAILED,
    LOST_PEER,
    PREEMPTED,
    REQUEST,
    USER_ERROR,
    heartbeat_s,
    read_heartbeat,
    write_json,
)
from slap_ds.launch.environment import free_port, read_hostfile

_PR_SET_CHILD_SUBREAPER, _PR_SET_PDEATHSIG = 36, 1
_TICK_S = 0.2
# How long a launcher gets to end the other ranks by itself once one has failed.
_AFTER_FAILURE_S = 4.0
# A rank whose file has not changed for so long does not run; at least three heartbeats.
_STALE_S = 10.0
_PORT_OPTION = {"deepspeed": "--master_port", "torchrun": "--master-port"}


@dataclass(frozen=True)
class Options:
    """How often to try, and how patiently."""

    restarts: int = 3
    backoff_s: float = 5.0  # before the first restart; doubled for each one after
    # From a request to stop, or the last sign of a growing checkpoint, until everything is killed.
    grace_s: float = 120.0


@dataclass
class _Attempt:
    """How it ended: `code` as in docs/reliability.md, `step` the furthest of any rank."""

    code: int
    step: int
    cause: str


@dataclass
class _Deadline:
    """When what is left of an attempt is killed; seconds of the monotonic clock.

    A request to stop and the end of the launcher leave the ranks `grace_s`, and so does each new
    piece of a growing checkpoint. A failed rank leaves the launcher _AFTER_FAILURE_S for the rest.
    """

    grace_s: float
    at: float = math.inf
    failed_at: float = math.inf
    pieces: int = 0  # of checkpoints, written by all ranks so far

    def asked(self, now: float) -> None:
        """Somebody has asked for a stop."""
        self.at = now + self.grace_s

    def orphaned(self, now: float) -> None:
        """The launcher has ended."""
        self.at = min(self.at, now + self.grace_s)

    def look_at(self, ranks: list[dict[str, Any]], now: float) -> None:
        """Take in what the ranks have written by now."""
        pieces = sum(facts["pieces"] for facts in ranks)
        if pieces != self.pieces and self.at < math.inf:
            self.at = max(self.at, now + self.grace_s)
        self.pieces = pieces
        if _failed(ranks):
            self.failed_at = min(self.failed_at, now)

    def passed(self, now: float) -> bool:
        return now > min(self.at, self.failed_at + _AFTER_FAILURE_S)


@dataclass
class _Job:
    command: list[str]
    run_dir: Path
    options: Options
    stop: int = 0  # the number of the signal that asked for it
    pressed: int = 0  # how often
    status: dict[int, int] = field(default_factory=dict)  # exit status of reaped children
    # By rank: the time in its file, and when that was first seen here. Clocks of hosts may differ.
    changed: dict[int, tuple[float, float]] = field(default_factory=dict)

    def attempt(self, number: int) -> _Attempt:
        """Start the launcher, wait for its end and for the end of all it left behind."""
        launcher = self._start(number)
        ranks = self._until_gone(number, launcher.pid)
        self._ask(number, "end")
        if running := self._running(ranks):
            _say(f"{_where(running)} did not end within {self.options.grace_s:g} s")
        launcher.returncode = code = self.status[launcher.pid]
        return self._verdict(code, ranks)

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        # Files of earlier attempts would be taken for this one's.
        for old in (self.run_dir / "heartbeat").glob("rank-*.json"):
            old.unlink()
        # There from the start: a shared file system may go on for a minute to say that it is not.
        self._ask(number, "")
        port = str(free_port())
        return subprocess.Popen(
            _with_port(self.command, port),
            env={**os.environ, "SLAP_ATTEMPT": str(number), "MASTER_PORT": port},
            start_new_session=True,
            preexec_fn=_die_with_supervisor,
        )

    def _until_gone(self, number: int, launcher: int) -> list[dict[str, Any]]:
        """What the ranks have written once the launcher and all of them have ended.

        Requests to stop are passed on; what outlives the deadline is killed, and ranks elsewhere
        are asked to end and given up after as long again.
        """
        grace_s = self.options.grace_s
        deadline = _Deadline(grace_s)
        forwarded, orphaned, killed_at = 0, False, math.inf
        while True:
            self._reap()
            launcher_gone = launcher in self.status
            left = psutil.Process().children(recursive=True)
            # After these, so that the files of ranks that have gone are their last.
            ranks, now = self._ranks(number), time.monotonic()
            given_up = now > killed_at + grace_s
            if launcher_gone and not left and (given_up or not self._running(ranks)):
                return ranks
            if self.pressed > forwarded:
                forwarded = self.pressed
                self._forward(number, launcher, left, ranks)
                deadline.asked(now)
            if launcher_gone and not orphaned:
                orphaned = True
                deadline.orphaned(now)
                if not _failed(ranks):
                    self._ask(number, "stop")
            deadline.look_at(ranks, now)
            if self.pressed > 1 or deadline.passed(now):
                _kill(left)
                if killed_at == math.inf:
                    killed_at = now
                    self._ask(number, "end")
            time.sleep(max(_TICK_S, len(ranks) / 500))  # a file is read for each of them

    def wait_for_earlier(self) -> None:
        """End what a supervisor that was killed has left on other hosts.

        Raises:
            ValueError: ranks go on in this folder.
        """
        self._ask(0, "end")
        until = time.monotonic() + self.options.grace_s
        while running := self._running(self._ranks()):
            if self.stop:
                return
            if time.monotonic() > until:
                raise ValueError(
                    f"{_where(running)} of another run still writes to {self.run_dir}: end it, or "
                    "choose another run_dir"
                )
            time.sleep(_TICK_S)

    def _ask(self, number: int, what: str) -> None:
        """Ask all ranks of an attempt to "stop" (save and leave), or to "end" at once."""
        folder = self.run_dir / "heartbeat"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / REQUEST, {"attempt": str(number), "ask": what})

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                self.status[pid] = os.waitstatus_to_exitcode(status)

    def _forward(
        self, number: int, launcher: int, left: list[psutil.Process], ranks: list[dict[str, Any]]
    ) -> None:
        """Ask the ranks to stop; one is enough, it tells the others at the end of the step.

        The launcher is told only if no rank can hear: most give the ranks 30 s or less to save."""
        self._ask(number, "stop")
        here = {process.pid for process in left}
        pids = [f["pid"] for f in ranks if f["host"] == socket.gethostname() and f["pid"] in here]
        if not any(facts["attempt"] for facts in ranks):
            pids = pids or [launcher]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def _ranks(self, number: int | None = None) -> list[dict[str, Any]]:
        """What the ranks of an attempt, or of any, have written; not every launcher passes
        SLAP_ATTEMPT on."""
        folder = self.run_dir / "heartbeat"
        found = (read_heartbeat(folder, int(p.stem[5:])) for p in folder.glob("rank-*.json"))
        ours = ("", str(number))
        return [f for f in found if f is not None and (number is None or f["attempt"] in ours)]

    def _running(self, ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of the ranks that have not ended, as far as can be told from here."""
        found, now = [], time.monotonic()
        for facts in ranks:
            if facts["exit"] is not None:
                continue
            if facts["host"] == socket.gethostname() and not psutil.pid_exists(facts["pid"]):
                continue
            if self.changed.get(facts["rank"], (None,))[0] != facts["time"]:
                self.changed[facts["rank"]] = (facts["time"], now)
            still_s = now - self.changed[facts["rank"]][1]
            if still_s < max(_STALE_S, 3 * heartbeat_s(facts["world"])):
                found.append(facts)
        return found

    def _verdict(self, launcher: int, ranks: list[dict[str, Any]]) -> _Attempt:
        ranks = sorted(ranks, key=lambda facts: float(facts["time"]))
        step = max((int(facts["step"]) for facts in ranks), default=-1)
        codes = [facts["exit"] for facts in ranks]
        if not ranks:
            code = PREEMPTED if self.stop else USER_ERROR if launcher >= 0 else FAILED
            return _Attempt(code, step, f"no rank came up, the launcher ended with {launcher}")
        if codes.count(DONE) == ranks[0]["world"] == len(ranks):
            return _Attempt(DONE, step, "")
        own = [facts for facts in ranks if facts["exit"] not in (None, DONE, LOST_PEER, PREEMPTED)]
        if own:
            return _Attempt(int(own[0]["exit"]), step, f"rank {own[0]['rank']}: {own[0]['cause']}")
        if PREEMPTED in codes and (self.stop or launcher > 0):
            return _Attempt(PREEMPTED, step, ranks[codes.index(PREEMPTED)]["cause"])
        silent = [facts["rank"] for facts in ranks if facts["exit"] is None]
        cause = f"rank {', '.join(map(str, silent))} died without a message" if silent else ""
        for facts in ranks:
            if facts["exit"] in (LOST_PEER, PREEMPTED):
                cause = cause or f"rank {facts['rank']}: {facts['cause']}"
        return _Attempt(LOST_PEER, step, cause or f"the launcher ended with {launcher}")


def supervise(command: Sequence[str], run_dir: Path | None, options: Options) -> int:
    """Run `command` until it is done; again from the newest checkpoint where that may help.

    Returns: 0 done; 1 a mistake of the user's, not tried again; 75 stopped on request, saved; else
    how the last attempt ended (docs/reliability.md).

    Raises:
        ValueError, FileNotFoundError: nothing was started, because config or hostfile are wrong.
    """
    job = _Job(list(command), _check(command, run_dir), options)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def ask(number: int, frame: FrameType | None) -> None:
        job.stop, job.pressed = number, job.pressed + 1

    before = {n: signal.signal(n, ask) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        return _attempts(job)
    finally:
        _kill(psutil.Process().children(recursive=True))
        for number, handler in before.items():
            signal.signal(number, handler)


def _attempts(job: _Job) -> int:
    died_at = None
    job.wait_for_earlier()
    if job.stop:
        return PREEMPTED
    for number in range(1, job.options.restarts + 2):
        job.pressed = 0 if not job.stop else job.pressed
        ended = job.attempt(number)
        if ended.code == DONE:
            return DONE
        _say(f"attempt {number} ended with {ended.code} at step {ended.step}: {ended.cause}")
        if ended.code in (USER_ERROR, PREEMPTED) or job.stop:
            return ended.code
        if died_at == ended.step:
            _say(f"two attempts in a row died at step {ended.step}: not tried again")
            return ended.code
        died_at = ended.step
        if number <= job.options.restarts:
            pause_s = min(300.0, job.options.backoff_s * 2 ** (number - 1))
            _say(f"again in {pause_s:g} s, from the newest checkpoint")
            until = time.monotonic() + pause_s
            while time.monotonic() < until and not job.stop:
                time.sleep(_TICK_S)
            if job.stop:
                return PREEMPTED
    _say(f"{job.options.restarts} restarts were not enough")
    return ended.code


def _check(command: Sequence[str], run_dir: Path | None) -> Path:
    """Refuse what no attempt could mend; returns the run's folder."""
    for option, value in pairwise(command):
        if option in ("--hostfile", "-H"):
            read_hostfile(value)
    if "HOSTFILE" in os.environ:
        read_hostfile(os.environ["HOSTFILE"])
    for place, word in enumerate(command):
        if word.endswith((".yaml", ".yml")):
            config = read_config(word, command[place + 1 :])
            return run_dir or Path(config.run_dir)
    if run_dir is None:
        raise ValueError(
            "slap-ds launch found no CONFIG.yaml in the command after --: give it, or --run-dir"
        )
    return run_dir


def _with_port(command: Sequence[str], port: str) -> list[str]:
    """A port of its own for each attempt, where the launcher takes it as an option."""
    option = _PORT_OPTION.get(Path(command[0]).name)
    given = any(w.replace("_", "-").startswith("--master-port") for w in command)
    if option is None or given:
        return list(command)
    return [command[0], option, port, *command[1:]]


def _die_with_supervisor() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _failed(ranks: list[dict[str, Any]]) -> bool:
    return any(facts["exit"] not in (None, DONE, PREEMPTED) for facts in ranks)


def _where(ranks: list[dict[str, Any]]) -> str:
    return ", ".join(f"rank {facts['rank']} on {facts['host']}" for facts in ranks)


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _say(text: str) -> None:
    print(f"slap-ds launch: {text}", file=sys.stderr, flush=True)
