"""The files of a store, written part by part; what is finished outlives the process.

    Part -> end of tokens.bin, mask.bin, a file a column, rejects.jsonl
    now and then: all of them forced to disk -> a line in journal.jsonl

A line of the journal says how long each file is there and what it hashes to, so a later process
goes on from the last line that is true of the files, whatever stands behind it.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slap_ds.data.counts import Counts
from slap_ds.data.parts import Part
from slap_ds.data.store import COLUMNS, LABELS, ORIGIN, POSITION_BITS, STORE_VERSION
from slap_ds.files import BLOCK_BYTES, sync

JOURNAL = "journal.jsonl"
EVERY_S = 5.0  # between lines of the journal: what a killed build loses at most
HASHED = tuple(f"{name}.bin" for name in ("tokens", "mask", *COLUMNS))
FILES = (*HASHED, *(f"{name}.bin" for name in ORIGIN), "rejects.jsonl")


@dataclass
class Written:
    """What lies in the files: their sizes and running hashes, the counts of their rows, labels."""

    counts: Counts = field(default_factory=Counts)
    names: dict[str, dict[str, int]] = field(default_factory=lambda: {n: {} for n in LABELS})
    sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FILES, 0))
    hashes: dict[str, Any] = field(
        default_factory=lambda: {name: hashlib.sha256() for name in FILES}
    )

    def add(self, counts: Counts, names: dict[str, list[str]]) -> None:
        """Rows more; `names` may hold labels that were met before."""
        sums = map(operator.add, astuple(self.counts), astuple(counts))
        self.counts = Counts(*sums)
        for label, codes in self.names.items():
            for name in names[label]:
                codes.setdefault(name, len(codes))

    def digests(self) -> dict[str, str]:
        """SHA-256 (hex) of each file."""
        return {name: digest.hexdigest() for name, digest in self.hashes.items()}


class StoreWriter:
    """Writes the files of a store into a folder, going on from what a killed process left there."""

    def __init__(self, folder: Path, token_type: str) -> None:
        self.folder = folder
        self.token_type = token_type
        self.written = Written()
        journal = _resume(folder, self.written)
        self.kept = self.written.counts.rows  # rows that stay, however this ends
        self._journal = (folder / JOURNAL).open("ab")
        self._journal.truncate(journal)
        # How many names of each label the journal has.
        self._told = {label: len(codes) for label, codes in self.written.names.items()}
        self._files = {name: (folder / name).open("ab") for name in FILES}
        for name, file in self._files.items():
            file.truncate(self.written.sizes[name])
        self._threads = ThreadPoolExecutor(1)
        self._commit: Future[None] | None = None
        self._committed = time.monotonic()

    def add(self, part: Part) -> None:
        """Append a part.

        Raises:
            ValueError: more samples than sample ids have room for.
            OSError: the disk is full, or the like.
        """
        self.written.add(part.counts, part.names)
        for name, data in part.files.items():
            label = name.removesuffix(".bin")
            if label in LABELS:
                codes = [self.written.names[label][known] for known in part.names[label]]
                local = np.frombuffer(data, dtype=COLUMNS[label])
                data = np.array(codes, dtype=COLUMNS[label])[local].tobytes()
            self._files[name].write(data)
            self.written.hashes[name].update(data)
            self.written.sizes[name] += len(data)
        if self.written.sizes["lengths.bin"] // 8 > 2**POSITION_BITS:
            raise ValueError(
                f"more than {2**POSITION_BITS:,} samples: sample ids have no room for them"
            )
        if self._commit is not None and self._commit.done():
            self._settle()
        if self._commit is None and time.monotonic() - self._committed >= EVERY_S:
            self.commit()

    def commit(self) -> None:
        """Make what is written so far outlive this process; goes on in a thread."""
        self._settle()
        for file in self._files.values():
            file.flush()
        new = {label: list(c)[self._told[label] :] for label, c in self.written.names.items()}
        self._told = {label: len(codes) for label, codes in self.written.names.items()}
        facts = {
            "counts": asdict(self.written.counts),
            "names": new,
            "sizes": self.written.sizes,
            "sha256": self.written.digests(),
        }
        self._commit = self._threads.submit(self._note, json.dumps(facts), self.written.counts.rows)

    def _note(self, facts: str, rows: int) -> None:
        for file in self._files.values():
            os.fsync(file.fileno())
        check = hashlib.sha256(facts.encode()).hexdigest()
        self._journal.write(f"{check} {facts}\n".encode())
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self.kept = rows
        self._committed = time.monotonic()

    def _settle(self) -> None:
        if self._commit is not None:
            self._commit.result()
            self._commit = None

    def finish(self) -> None:
        """Force all to disk, and write the manifest that makes it a store."""
        self.commit()
        self._settle()
        names = {label: list(codes) for label, codes in self.written.names.items()}
        digests = self.written.digests()
        content = [[digests[name] for name in HASHED], names]
        manifest = {
            "version": STORE_VERSION,
            "fingerprint": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
            "token_type": self.token_type,
            "counts": asdict(self.written.counts),
            "names": names,
            "sizes": dict(sorted(self.written.sizes.items())),
        }
        path = self.folder / "manifest.json"
        path.write_text(json.dumps(manifest, indent=1), "utf-8")
        sync(path)
        sync(self.folder)

    def close(self) -> None:
        """Let go of the files."""
        self._threads.shutdown()
        for file in (self._journal, *self._files.values()):
            file.close()


def rows_kept(folder: Path) -> int:
    """Rows that the journal in a folder tells of; 0 without one."""
    return max((facts["counts"]["rows"] for _, facts in _lines(folder)), default=0)


def _lines(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Whole lines of the journal, each with where it ends."""
    try:
        lines = (folder / JOURNAL).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return
    place = 0
    for line in lines:
        check, _, facts = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n") or hashlib.sha256(facts).hexdigest().encode() != check:
            return
        place += len(line)
        yield place, json.loads(facts)


def _resume(folder: Path, written: Written) -> int:
    """Fill `written` with what the journal says and the files hold; returns the journal's bytes
    that are true."""
    good = 0
    for place, facts in _lines(folder):
        hashes = {name: digest.copy() for name, digest in written.hashes.items()}
        for name, size in facts["sizes"].items():
            _feed(hashes[name], folder / name, written.sizes[name], size)
        if {name: digest.hexdigest() for name, digest in hashes.items()} != facts["sha256"]:
            break
        good = place
        written.sizes, written.hashes = dict(facts["sizes"]), hashes
        written.counts = Counts()
        written.add(Counts(**facts["counts"]), facts["names"])
    return good


def _feed(digest: Any, path: Path, begin: int, end: int) -> None:
    try:
        with path.open("rb") as file:
            file.seek(begin)
            while begin < end and (block := file.read(min(BLOCK_BYTES, end - begin))):
                digest.update(block)
                begin += len(block)
    except FileNotFoundError:
        pass  # the hash will tell
