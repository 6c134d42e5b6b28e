"""What ranks settle together before the first step.

check_shared(run_dir, comm)              the run folder is one and the same on all nodes
alone_in(run_dir, comm)                  nobody else writes into it meanwhile
first_on_each_node(comm, phase, work)    data are read once a node, however long that takes
"""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

from slap_ds.distributed.comm import Comm
from slap_ds.errors import OtherRankFailed, RankError, mistake

T = TypeVar("T")
Tell = Callable[[int], None]

_DONE, _FAILED, _WORKING = 0, 1, 2
_TELL_EVERY_S = 5.0
_SEEN_WITHIN_S = 10.0
_FREED_WITHIN_S = 5.0


def check_shared(run_dir: Path, comm: Comm) -> None:
    """Refuse a run folder that is not the same one on every node, before it costs a training: ranks
    write their shares of a checkpoint side by side.

    Raises:
        ValueError: naming the ranks that do not see what rank 0 wrote.
        OSError: rank 0 cannot write there.
        OtherRankFailed: on the others, then.
    """
    if comm.world == 1:
        return
    mark, word, problem = run_dir / ".shared", "", None
    if comm.rank == 0:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            mark.write_text(secrets.token_hex(8), "ascii")
            word = mark.read_text("ascii")
        except OSError as error:
            problem = error
    word = comm.texts(-1, "the mark in the run folder", word)[0]
    if not word:
        raise problem or OtherRankFailed("rank 0 cannot write the run folder")
    # A network file system may show a new file late.
    until = time.monotonic() + _SEEN_WITHIN_S
    while not (seen := _holds(mark, word)) and time.monotonic() < until:
        time.sleep(0.2)
    told = comm.texts(-1, "the run folder", "" if seen else socket.gethostname())
    if comm.rank == 0:
        mark.unlink(missing_ok=True)
    if blind := [f"rank {rank} on {host}" for rank, host in enumerate(told) if host]:
        raise ValueError(
            f"run_dir {str(run_dir)!r} is another folder for {', '.join(blind[:4])} than for rank "
            "0: name one that all nodes share, by an absolute path"
        )


@contextmanager
def alone_in(run_dir: Path, comm: Comm) -> Iterator[None]:
    """Hold the run folder meanwhile, so that no second run writes into it; all ranks call this.

    Raises:
        ValueError: another process holds it, on this machine or one that shares the folder.
        OSError: rank 0 cannot write there.
        OtherRankFailed: on the others, then.
    """
    lock, problem = None, None
    if comm.rank == 0:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            lock = _locked(run_dir / ".lock")
        except (OSError, ValueError) as error:
            problem = error
    if comm.texts(-1, "the lock of the run folder", "" if problem is None else "held")[0]:
        raise problem or OtherRankFailed("rank 0 cannot have the run folder")
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def _locked(path: Path) -> IO[str]:
    """The file, open and locked until it is closed or its process ends."""
    file = path.open("a+", encoding="utf-8")
    until = time.monotonic() + _FREED_WITHIN_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < until:  # by an attempt that is ending
                time.sleep(0.2)
                continue
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(
                f"run_dir {str(path.parent)!r} is in use by {holder}: wait until it has ended, or "
                "choose another run_dir"
            ) from None
        except OSError:  # a file system without locks
            pass
        break
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text("ascii") == text
    except (OSError, ValueError):
        return False


def first_on_each_node(comm: Comm, phase: str, work: Callable[[Tell], T]) -> T:
    """Run `work(tell)` on a rank of each node, then on the others, which find its results on disk.

    Raises: as `while_others_wait`.
    """
    first = os.environ.get("LOCAL_RANK", "").strip() in ("", "0")
    before = while_others_wait(comm, phase, first, work)
    after = while_others_wait(comm, phase, not first, work)
    result = before if first else after
    assert result is not None
    return result


def while_others_wait(comm: Comm, phase: str, works: bool, work: Callable[[Tell], T]) -> T | None:
    """Run `work(tell)` on the ranks where `works`; the others wait for all of them, and get None.

    `work` calls `tell(rows)` as it gets on. Now and then all ranks exchange that: no time-out ends
    the waiting ones, however long the work takes, as long as it goes on.

    Raises:
        RankError: `work` met a mistake on this rank.
        OtherRankFailed: it did so on another one, which reports it.
    """
    result, failure = None, None
    told = time.monotonic()

    def tell(rows: int) -> None:
        nonlocal told
        if time.monotonic() - told > _TELL_EVERY_S:
            told = time.monotonic()
            if comm.rank == 0:
                print(f"slap-ds: {phase}: {rows:,} rows", file=sys.stderr, flush=True)
            if (comm.exchange(-1, phase, [_WORKING]) == _FAILED).any():
                raise OtherRankFailed(f"{phase}: another rank failed")

    if works:
        try:
            result = work(tell)
        except Exception as error:
            failure = error
    while True:
        states = comm.exchange(-1, phase, [_DONE if failure is None else _FAILED])[:, 0]
        if not (states == _WORKING).any():
            break
    if isinstance(failure, (ValueError, OSError)) and comm.world > 1:
        raise RankError(mistake(failure) or str(failure)) from failure
    if failure is not None:
        raise failure
    if (failed := (states == _FAILED).nonzero()[0]).size:
        raise OtherRankFailed(f"{phase}: ranks {failed.tolist()} failed")
    return result
