"""SHA-256 of data files, remembered, so that a start does not read all data again.

    file -> (path, device, inode, size, times) -> known: its hash
                                               -> else read and hashed, and noted in hashes.jsonl

A hash is noted only if the file had been left alone for a while when its reading began: a change
within the clock's granularity would leave size and times as they are (git's "racily clean" files).
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from slap_ds.compat import fingerprint_of
from slap_ds.data.sources import Source
from slap_ds.files import sha256

MEMORY = "hashes.jsonl"
QUIET_NS = 10 * 10**9  # coarser than any file system's clock, with room for two machines' clocks
THREADS = 8

Stamp = tuple[str, int, int, int, int, int]


def source_facts(sources: Sequence[Source], cache_dir: Path | None = None) -> list[list[Any]]:
    """What decides the rows of each source: its label (their default `source`), the SHA-256 of its
    files, and of a data set which part of them it is. Where the files lie does not count.

    Hashes are remembered in `cache_dir`.
    """
    files = {file for source in sources for file in source.files}
    known = hashes_of(sorted(files), None if cache_dir is None else cache_dir / MEMORY)
    return [
        [
            source.label,
            [known[file] for file in source.files],
            None if source.dataset is None else fingerprint_of(source.dataset),
        ]
        for source in sources
    ]


def hashes_of(files: Sequence[Path], memory: Path | None) -> dict[Path, str]:
    """SHA-256 (hex) of each file, from `memory` where the file is as it was."""
    remembered = {} if memory is None else dict(_read(memory))
    new: dict[Stamp, str] = {}

    def one(file: Path) -> str:
        stamp, now = _stamp(file), time.time_ns()
        if stamp in remembered:
            return remembered[stamp]
        found = sha256(file)
        # A time in the future is no proof of anything.
        if now - max(stamp[-2:]) > QUIET_NS and _stamp(file) == stamp:
            new[stamp] = found
        return found

    with ThreadPoolExecutor(min(THREADS, len(os.sched_getaffinity(0)))) as threads:
        hashes = dict(zip(files, threads.map(one, files), strict=True))
    if memory is not None and new:
        _note(memory, new)
    return hashes


def _stamp(file: Path) -> Stamp:
    found = file.stat()
    times = found.st_mtime_ns, found.st_ctime_ns
    return str(file.resolve()), found.st_dev, found.st_ino, found.st_size, *times


def _read(memory: Path) -> Iterator[tuple[Stamp, str]]:
    """What is noted there; a line that makes no sense is passed over."""
    try:
        lines = memory.read_bytes().split(b"\n")
    except OSError:
        return
    for line in lines:
        with contextlib.suppress(ValueError, TypeError):
            *stamp, digest = json.loads(line)
            if len(bytes.fromhex(digest)) == 32:
                path, *numbers = stamp
                device, inode, size, modified, changed = numbers
                yield (path, device, inode, size, modified, changed), digest


def _note(memory: Path, new: dict[Stamp, str]) -> None:
    """Append to the memory in one write, so that other processes' lines stay whole; each line
    begins with its own end, for one that was cut off may stand before it."""
    lines = "".join(f"\n{json.dumps([*stamp, digest])}\n" for stamp, digest in new.items())
    with contextlib.suppress(OSError):  # a full disk or a read-only folder: hashed again next time
        memory.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(memory, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(handle, lines.encode())
        finally:
            os.close(handle)
