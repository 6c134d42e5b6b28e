"""Files of tensors: written hashed and forced to disk, read without running what they hold.

    writer = TensorWriter(background=True)
    writer.write(state, path)     # copies to host memory and returns; a thread writes
    writer.finish()               # {path: FileFact}, or the first error

A pickle can run any code. Files are read by torch's restricted unpickler, which builds tensors,
plain containers and the classes named to it, and refuses everything else.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, cast

import torch
from torch import Tensor

from slap_ds.files import BLOCK_BYTES, feed

# Written to the page cache before they are forced to disk: one fsync of a whole shard may take
# minutes in which nobody could tell whether it gets on.
SYNC_BYTES = 2**28


def _nothing() -> None:
    """For writers and readers whose progress nobody watches."""


@dataclass(frozen=True)
class FileFact:
    """What a file held when it was written."""

    bytes: int
    sha256: str


class TensorWriter:
    """Writes this rank's files of one checkpoint.

    Args:
        background: write in a thread, from a copy in host memory, while the caller goes on.
        progress: called whenever a part of a file is written.
    """

    def __init__(self, background: bool = False, progress: Callable[[], None] = _nothing) -> None:
        self._progress = progress
        self._facts: dict[Path, FileFact] = {}
        self._error: Exception | None = None
        self._queue: SimpleQueue[tuple[Any, Path] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self.write_s = 0.0  # seconds spent on files, whoever waited for them
        if background:
            self._thread = threading.Thread(target=self._work, name="checkpoint", daemon=True)
            self._thread.start()

    def write(self, state: Any, path: Path) -> None:
        """Write `state` to `path`. An error is kept for `finish`: a rank that left the saving half
        way would leave the others waiting for it."""
        if self._thread is not None:
            self._queue.put((to_host(state), path))
        else:
            self._write(state, path)

    def done(self) -> bool:
        """Whether `finish` would return at once, given that no more is written."""
        if self._thread is None:
            return True
        self._queue.put(None)
        return not self._thread.is_alive()

    def finish(self) -> dict[Path, FileFact]:
        """Wait for every file; what they hold, by path.

        Raises:
            Exception: the first error any of them met.
        """
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
        if self._error is not None:
            raise self._error
        return self._facts

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            self._write(*job)

    def _write(self, state: Any, path: Path) -> None:
        if self._error is not None:
            return
        started = time.perf_counter()
        try:
            self._facts[path] = write_tensors(state, path, self._progress)
        except Exception as error:
            self._error = error
        self.write_s += time.perf_counter() - started


def write_tensors(state: Any, path: Path, progress: Callable[[], None] = _nothing) -> FileFact:
    """Save, force to disk, and return size and hash of what was written.

    Raises:
        OSError: the file cannot be written, naming it.
    """
    hashed = _Hashed(progress)
    try:
        with path.open("wb") as file:
            hashed.file = file
            torch.save(state, cast("IO[bytes]", hashed))
            file.flush()
            os.fsync(file.fileno())
    except Exception as error:
        # torch reports a failed write in words of its own, without the reason.
        reason = error if isinstance(error, OSError) else hashed.error
        if reason is None:
            raise
        reason.filename = str(path)
        raise reason from None
    return FileFact(hashed.bytes, hashed.digest.hexdigest())


def read_tensors(path: Path, allowed: Sequence[Any] = (), map_file: bool = False) -> Any:
    """What `write_tensors` saved, on the CPU.

    Args:
        allowed: classes, or (class, its name in the file), that may be built beside tensors and
            plain containers.
        map_file: leave the tensors in the file until they are used.

    Raises:
        ValueError: the file is damaged, or asks for more than that; named, and nothing was run.
        FileNotFoundError: there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=map_file)
    except Exception as error:  # whatever the bytes of a damaged or hostile file lead to
        reason = str(error).strip().splitlines()
        told = next((line for line in reason if "Unsupported" in line or "GLOBAL" in line), "")
        told = (told or (reason[0] if reason else type(error).__name__)).strip()
        raise ValueError(
            f"{path} is refused, it is damaged or holds more than tensors: {told[:200]}"
        ) from None


def file_fact(path: Path, progress: Callable[[], None] = _nothing) -> FileFact:
    """Size and hash of a file as it is on disk; `progress` is called after each block of it."""
    digest = hashlib.sha256()
    size = feed(digest, path, progress)
    return FileFact(size, digest.hexdigest())


def to_host(state: Any) -> Any:
    """A copy of nested containers with every tensor copied to host memory, equal ones shared."""
    seen: dict[Any, Tensor] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            key = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
            if key not in seen:
                seen[key] = value.detach().to("cpu", copy=True)
            return seen[key]
        if isinstance(value, Mapping):
            pairs = [(key, copy(item)) for key, item in value.items()]
            return type(value)(pairs) if isinstance(value, dict) else dict(pairs)
        if type(value) in (list, tuple):
            return type(value)(copy(item) for item in value)
        return value

    return copy(state)


class _Hashed:
    """A binary file that hashes what goes through it and keeps the error that stopped it."""

    def __init__(self, progress: Callable[[], None]) -> None:
        self.progress = progress
        self.file: Any = None
        self.digest = hashlib.sha256()
        self.bytes = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        for start in range(0, len(data), BLOCK_BYTES):
            self._write(data[start : start + BLOCK_BYTES])
        return len(data)

    def _write(self, block: Any) -> None:
        synced = self.bytes // SYNC_BYTES
        try:
            self.file.write(block)
            if (self.bytes + len(block)) // SYNC_BYTES > synced:
                self.file.flush()
                os.fdatasync(self.file.fileno())
        except OSError as error:
            self.error = error
            raise
        self.digest.update(block)
        self.bytes += len(block)
        self.progress()

    def flush(self) -> None:
        try:
            self.file.flush()
        except OSError as error:
            self.error = error
            raise
