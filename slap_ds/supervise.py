"""`slap-ds launch -- LAUNCHER ...`: one job, attempt after attempt, until it is done or hopeless.

    supervise(command, run_dir, options) -> exit code

A launcher's own exit code is not to be trusted: deepspeed's is 0 when its helper was killed,
torchrun's is 1 whatever happened. The ranks leave theirs in run_dir/heartbeat, and those decide.
Everything an attempt has started here ends with it: orphans are adopted (PR_SET_CHILD_SUBREAPER).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
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

from slap_ds.config_file import read_config
from slap_ds.launch_env import read_hostfile
from slap_ds.peers import DONE, FAILED, LOST_PEER, PREEMPTED, USER_ERROR, read_heartbeat

_PR_SET_CHILD_SUBREAPER, _PR_SET_PDEATHSIG = 36, 1
_TICK_S = 0.2
# How long a launcher gets to end the other ranks by itself once one has failed.
_AFTER_FAILURE_S = 4.0
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
class _Job:
    command: list[str]
    run_dir: Path
    options: Options
    stop: int = 0  # the number of the signal that asked for it
    pressed: int = 0  # how often
    seen_failing: float | None = None
    status: dict[int, int] = field(default_factory=dict)  # exit status of reaped children

    def attempt(self, number: int) -> _Attempt:
        """Start the launcher, wait for its end and for the end of all it left behind."""
        # Files of earlier attempts would be taken for this one's.
        for old in (self.run_dir / "heartbeat").glob("rank-*.json"):
            old.unlink()
        port = str(_free_port())
        environ = {**os.environ, "SLAP_ATTEMPT": str(number), "MASTER_PORT": port}
        launcher = subprocess.Popen(
            _with_port(self.command, port),
            env=environ,
            start_new_session=True,
            preexec_fn=_die_with_supervisor,
        )
        forwarded, ended, self.seen_failing = 0, 0.0, None
        stop_at, pieces = None, 0
        while True:
            self._reap()
            launcher_gone = launcher.pid in self.status
            left = psutil.Process().children(recursive=True)
            if launcher_gone and not left:
                break
            if self.pressed > forwarded:
                forwarded = self.pressed
                self._forward(launcher.pid, left)
                stop_at = time.monotonic() + self.options.grace_s
            if launcher_gone and not ended:
                ended = time.monotonic()
                stop_at = min(stop_at or ended + self.options.grace_s, ended + self.options.grace_s)
            if (written := self._written()) != pieces:
                pieces = written
                if stop_at is not None:
                    stop_at = max(stop_at, time.monotonic() + self.options.grace_s)
            if self._failed() and not self.seen_failing:
                self.seen_failing = time.monotonic()
            if self.seen_failing:
                stop_at = min(stop_at or 1e18, self.seen_failing + _AFTER_FAILURE_S)
            if self.pressed > 1 or (stop_at is not None and time.monotonic() > stop_at):
                _kill(left)
            time.sleep(_TICK_S)
        launcher.returncode = code = self.status[launcher.pid]
        return self._verdict(code)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                self.status[pid] = os.waitstatus_to_exitcode(status)

    def _forward(self, launcher: int, left: list[psutil.Process]) -> None:
        """Ask one rank to stop: it tells the others at the end of the step. Ranks on other machines
        alone: their launcher has to pass the signal on."""
        here = {process.pid for process in left}
        ranks = [facts["pid"] for facts in self._ranks() if facts["host"] == socket.gethostname()]
        for pid in [pid for pid in ranks if pid in here] or [launcher]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def _ranks(self) -> list[dict[str, Any]]:
        folder = self.run_dir / "heartbeat"
        found = (read_heartbeat(folder, int(p.stem[5:])) for p in folder.glob("rank-*.json"))
        return [facts for facts in found if facts is not None]

    def _written(self) -> int:
        """Grows as long as the ranks get on with a checkpoint."""
        return sum(facts["pieces"] for facts in self._ranks())

    def _failed(self) -> bool:
        return any(facts["exit"] not in (None, DONE, PREEMPTED) for facts in self._ranks())

    def _verdict(self, launcher: int) -> _Attempt:
        ranks = sorted(self._ranks(), key=lambda facts: float(facts["time"]))
        step = max((int(facts["step"]) for facts in ranks), default=-1)
        codes = [facts["exit"] for facts in ranks]
        if not ranks:
            code = USER_ERROR if launcher >= 0 else FAILED
            return _Attempt(code, step, f"no rank came up, the launcher ended with {launcher}")
        if codes.count(DONE) == ranks[0]["world"] == len(ranks):
            return _Attempt(DONE, step, "")
        own = [facts for facts in ranks if facts["exit"] not in (None, DONE, LOST_PEER, PREEMPTED)]
        if own:
            return _Attempt(int(own[0]["exit"]), step, f"rank {own[0]['rank']}: {own[0]['cause']}")
        if PREEMPTED in codes and (self.stop or launcher > 0):
            return _Attempt(PREEMPTED, step, ranks[codes.index(PREEMPTED)]["cause"])
        silent = [facts["rank"] for facts in ranks if facts["exit"] is None]
        cause = f"rank {', '.join(map(str, silent))} died without a word" if silent else ""
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


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _free_port() -> int:
    """Below those of outgoing connections, so that none takes it before rank 0 listens there."""
    while True:
        port = random.randint(20000, 32000)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


def _say(text: str) -> None:
    print(f"slap-ds launch: {text}", file=sys.stderr, flush=True)
