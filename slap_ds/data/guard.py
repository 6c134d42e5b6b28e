"""Work on untrusted data in a child process, so that what kills it does not kill the run.

Parsers and tokenizers are native code: a row can make one crash, or eat all memory. The child
writes down where it is before it touches a row; if it dies, the error names that place.
"""

from __future__ import annotations

import builtins
import ctypes
import json
import mmap
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

PLACE_BYTES = 4096


class Place:
    """Where the child is, in memory that outlives it."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, PLACE_BYTES)

    def set(self, text: str) -> None:
        """Say what is worked on now; cut off where it is too long."""
        data = text.encode("utf-8", "replace")[: PLACE_BYTES - 2]
        self._shared[: len(data) + 1] = data + b"\0"

    def get(self) -> str:
        """What was worked on last."""
        return self._shared[:].split(b"\0")[0].decode("utf-8", "replace")


def guarded(
    work: Callable[[Place, Callable[[int], None]], None],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Run `work(place, report)` in a forked child and wait; `report(n)` calls `progress(n)` here.

    Where processes cannot be forked, it runs here.

    Raises:
        ValueError: the child was killed, naming signal and place.
        Exception: what `work` raised, by type and message.
    """
    place = Place()
    report = progress or (lambda rows: None)
    if "fork" not in multiprocessing.get_all_start_methods():
        work(place, report)
        return
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    # Threads of the parent do not go along. Where it has tokenised with several, `tokenizers` goes
    # on with one in the child, but would wait for the others for ever if this variable is set.
    setting = {k: os.environ.pop(k) for k in ("TOKENIZERS_PARALLELISM",) if k in os.environ}
    child = context.Process(target=_child, args=(work, place, theirs, os.getpid(), setting))
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child.start()
    finally:
        os.environ.update(setting)
    theirs.close()
    failure: Exception | None = None
    try:
        while True:
            kind, value = json.loads(ours.recv_bytes())
            if kind == "progress":
                report(value)
            else:
                failure = _rebuilt(kind, value)
    except EOFError:
        pass
    finally:
        if sys.exc_info()[0] is not None:  # `report` raised, or Ctrl-C
            child.kill()
        child.join()
        ours.close()
    if failure is not None:
        raise failure
    if child.exitcode != 0:
        code = child.exitcode or 0
        cause = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        raise ValueError(
            f"the process that reads the data died ({cause}) at {place.get() or 'its start'}: "
            "take the row out, or lower data.max_row_bytes"
        )


def _child(
    work: Callable[[Place, Callable[[int], None]], None],
    place: Place,
    connection: Connection,
    parent: int,
    setting: dict[str, str],
) -> None:
    _die_with(parent)
    os.environ.update(setting)
    failed: list[Any] | None = None
    try:
        work(place, lambda rows: connection.send_bytes(json.dumps(["progress", rows]).encode()))
    except MemoryError:
        failed = ["ValueError", f"out of memory at {place.get()}"]
    except Exception as error:
        failed = [type(error).__name__, str(error)]
        if isinstance(error, OSError) and error.errno is not None:
            name = None if error.filename is None else os.fsdecode(error.filename)
            failed = ["OSError", [error.errno, error.strerror, name]]
    if failed is not None:
        connection.send_bytes(json.dumps(failed).encode())
    connection.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _die_with(parent: int) -> None:
    """Linux: be killed when the parent goes, so that no orphan goes on building."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


def _rebuilt(kind: str, message: Any) -> Exception:
    if isinstance(message, list):  # the number decides which kind of OSError it becomes
        return OSError(*message)
    made = getattr(builtins, kind, None)
    if isinstance(made, type) and issubclass(made, Exception):
        try:
            return made(message)
        except TypeError:
            pass
    return RuntimeError(f"{kind}: {message}")
