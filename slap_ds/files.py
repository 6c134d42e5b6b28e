"""Files that are whole or not there, and hashes of what files hold."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

BLOCK_BYTES = 2**22


class Digest(Protocol):
    """A hash that is being computed."""

    def update(self, data: bytes, /) -> None: ...


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside `path` to write a file to; the file gets its name once the block has ended.

    Where it ends with an error, or is killed, `path` is as it was.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """`text` in UTF-8 as the whole content of `path`, or none of it."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Force a file or folder to disk, so that a power cut cannot leave an empty one behind."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def feed(digest: Digest, path: Path, progress: Callable[[], None] = lambda: None) -> int:
    """Hash a file block by block; returns its bytes. `progress` is called after each block."""
    size = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            size += len(block)
            progress()
    return size


def sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    digest = hashlib.sha256()
    feed(digest, path)
    return digest.hexdigest()
