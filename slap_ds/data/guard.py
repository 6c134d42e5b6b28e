"""Work on untrusted data in child processes, so that what kills one does not kill the run.

Parsers and tokenizers are native code: a row can make one crash, or eat all memory. A child writes
down where it is before it touches a row; if it dies, the error names that place.

    Child(work)                        one child, and what it sends
    in_order(read, encode, workers)    a reader and workers; what these make, in the reader's order
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import gc
import json
import mmap
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

PLACE_BYTES = 4096
AHEAD = 4  # chunks a worker that may be read and not be yielded yet

Chunk = TypeVar("Chunk")
_DATA, _FAILURE = b"d", b"f"
_FORK = multiprocessing.get_context("fork")


class Place:
    """Where a child is, in memory that outlives it."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, PLACE_BYTES)

    def set(self, text: str) -> None:
        """Say what is worked on now; cut off where it is too long."""
        data = text.encode("utf-8", "replace")[: PLACE_BYTES - 2]
        self._shared[: len(data) + 1] = data + b"\0"

    def get(self) -> str:
        """What was worked on last."""
        return self._shared[:].split(b"\0")[0].decode("utf-8", "replace")


Send = Callable[[bytes], None]


class Child:
    """A forked process that runs `work(place, send)`; what it sends is received here.

    It tokenises without threads of its own: those of its parent do not go along when it is forked,
    and `tokenizers` would wait for them for ever.
    """

    def __init__(self, work: Callable[[Place, Send], None]) -> None:
        self.place = Place()
        self.connection, theirs = _FORK.Pipe(duplex=False)
        arguments = (work, self.place, theirs, os.getpid())
        self._process = _FORK.Process(target=_child, args=arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings(), _one_thread():
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()
        theirs.close()

    def receive(self) -> bytes | None:
        """The next that it sent; None once it has ended.

        Raises:
            ValueError: the child was killed, naming signal and place.
            Exception: what `work` raised, by type and message.
        """
        try:
            message = self.connection.recv_bytes()
        except EOFError:
            self._process.join()
            if code := self._process.exitcode:
                raise ValueError(_death(code, self.place.get())) from None
            return None
        if message[:1] == _FAILURE:
            raise _rebuilt(*json.loads(message[1:]))
        return message[1:]

    def stop(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.join()
        self.connection.close()


def in_order(
    read: Callable[[Place], Iterator[Chunk]],
    encode: Callable[[Chunk, Place], bytes],
    workers: int,
) -> Generator[bytes, None, None]:
    """`encode` of every chunk that `read` gives, in its order.

    One child reads and as many as `workers` encode; a single worker reads as well. Processes, not
    the tokenizer's own threads: more than half of a row's time is Python's. All of them are gone
    when this ends, is closed, or raises what `Child.receive` does.
    """
    queue, room = _FORK.SimpleQueue(), _FORK.Semaphore(AHEAD * workers)

    def alone(place: Place, send: Send) -> None:
        for number, chunk in enumerate(read(place)):
            send(_numbered(number, encode(chunk, place)))

    def reader(place: Place, send: Send) -> None:
        for item in enumerate(read(place)):
            room.acquire()
            queue.put(item)
        for _ in range(workers):
            queue.put(None)

    def worker(place: Place, send: Send) -> None:
        while (item := queue.get()) is not None:
            send(_numbered(item[0], encode(item[1], place)))

    children: dict[Any, Child] = {}
    early: dict[int, bytes] = {}
    following = 0
    try:
        for work in [alone] if workers == 1 else [reader, *[worker] * workers]:
            child = Child(work)
            children[child.connection] = child
        while children:
            for connection in wait(list(children)):
                message = children[connection].receive()
                if message is None:
                    children.pop(connection).stop()
                    continue
                early[int.from_bytes(message[:8], "little")] = message[8:]
                while following in early:
                    yield early.pop(following)
                    room.release()
                    following += 1
    finally:
        for child in children.values():
            child.stop()


def _numbered(number: int, data: bytes) -> bytes:
    return number.to_bytes(8, "little") + data


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _child(
    work: Callable[[Place, Send], None], place: Place, connection: Connection, parent: int
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this
    _die_with(parent)
    gc.freeze()  # what was there before the fork is no garbage, and stays shared
    failed: list[Any] | None = None
    try:
        work(place, lambda data: connection.send_bytes(_DATA + data))
    except MemoryError:
        failed = ["ValueError", f"out of memory at {place.get()}"]
    except Exception as error:
        failed = [type(error).__name__, str(error)]
        if isinstance(error, OSError) and error.errno is not None:
            name = None if error.filename is None else os.fsdecode(error.filename)
            failed = ["OSError", [error.errno, error.strerror, name]]
    if failed is not None:
        connection.send_bytes(_FAILURE + json.dumps(failed).encode())
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


def _death(code: int, place: str) -> str:
    cause = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    memory = "; the system kills so where memory runs out" if code == -signal.SIGKILL else ""
    return (
        f"the process that reads the data died ({cause}) at {place or 'its start'}: take the row"
        f" out, or lower data.max_row_bytes{memory}"
    )


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
