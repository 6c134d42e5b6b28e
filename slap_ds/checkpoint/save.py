"""Checkpoints: written aside, hashed, renamed; checked file by file before they are believed.

run_dir/checkpoints/step-000100/manifest.json   what it is, size and SHA-256 of every file
                               /state.json      stream cursor, scorer and selector state
                               /state.safetensors   the tensors of that state
                               /engine/...      weights and optimizer, one shard a rank
                   /latest                      a hint for people; loading looks for itself

save:  .tmp-N -> every rank writes, forces to disk, tells size and hash -> manifest -> rename
load:  newest first, every rank checks its share of the files, the first whole one is taken
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from slap_ds import __version__, jsonl
from slap_ds.checkpoint.find import find, read, sealed
from slap_ds.checkpoint.state import packed
from slap_ds.distributed.comm import Comm
from slap_ds.engine import Engine
from slap_ds.engine.tensor_files import FileFact, TensorWriter, file_fact
from slap_ds.files import sync

T = TypeVar("T")


@dataclass
class _Pending:
    """A checkpoint whose files are being written."""

    step: int
    writer: TensorWriter
    state: (
        dict[str, bytes] | None
    )  # rank 0's, as it was when saved; the trainer goes on changing it
    facts: Mapping[str, Any]
    spared: int
    stall_s: float = 0.0


@dataclass
class Saver:
    """Saves the checkpoints of a run, at most one in flight; all ranks call each method together.

    With `background`, `save` returns once every tensor is copied to host memory, a thread writes,
    and `poll` at a later step's edge makes the checkpoint visible, or raises what went wrong.
    """

    run_dir: Path
    comm: Comm
    keep_last: int = 2
    background: bool = False
    _pending: _Pending | None = None
    records: list[dict[str, Any]] = field(default_factory=list)  # of checkpoints made visible

    @property
    def root(self) -> Path:
        """The folder of all checkpoints of the run."""
        return self.run_dir / "checkpoints"

    def save(
        self,
        step: int,
        engine: Engine,
        state: Mapping[str, Any],
        facts: Mapping[str, Any],
        spared: int = 0,
    ) -> None:
        """Write the checkpoint after `step` steps.

        Args:
            state: what the trainer needs to continue, nested mappings of JSON values and tensors;
                rank 0's is written.
            facts: what must match on resume (data fingerprint and the like).
            spared: the step of one that stays beside the `keep_last` newest.

        Raises:
            ValueError: no room, or a file cannot be written; the last good one is as it was.
        """
        self.wait()
        started = time.perf_counter()
        temporary = self.root / f".tmp-{step:06d}"
        files = self._together(
            step, "checkpoint folder", lambda: self._prepare(temporary, engine, state)
        )
        writer = TensorWriter(self.background, self._progress)
        engine.save(temporary, writer)
        self._pending = _Pending(step, writer, files, facts, spared, time.perf_counter() - started)
        if not self.background:
            self.wait()

    def poll(self) -> None:
        """At a step's edge: make the checkpoint in flight visible once every rank has written it.

        Raises:
            ValueError: as `save`.
        """
        if self._pending is None:
            return
        started = time.perf_counter()
        done = self._pending.writer.done()
        everyone = bool(self.comm.exchange(self._pending.step, "checkpoint done", [done]).all())
        self._pending.stall_s += time.perf_counter() - started
        if everyone:
            self.wait()

    def wait(self) -> None:
        """Finish the checkpoint in flight, if there is one.

        Raises:
            ValueError: as `save`.
        """
        if self._pending is None:
            return
        started = time.perf_counter()
        pending, self._pending = self._pending, None
        temporary = self.root / f".tmp-{pending.step:06d}"
        files = self._written(pending, temporary)
        self._together(
            pending.step, "checkpoint visible", lambda: self._publish(pending, temporary, files)
        )
        self.records.append(
            {
                "event": "checkpoint",
                "step": pending.step - 1,
                "checkpoint_stall_s": pending.stall_s + time.perf_counter() - started,
                "checkpoint_write_s": pending.writer.write_s,
                "checkpoint_bytes": sum(fact.bytes for fact in files.values()),
                "checkpoint_background": self.background,
            }
        )

    def _progress(self) -> None:
        """A block of a file is done. It counts as the rank's progress only while the rank waits for
        it: a thread that writes must not hide that training stands still."""
        if self._pending is None:
            self.comm.heart.work()

    def _prepare(
        self, temporary: Path, engine: Engine, state: Mapping[str, Any]
    ) -> dict[str, bytes]:
        files = packed(state)
        self.root.mkdir(parents=True, exist_ok=True)
        self._sweep()
        found = find(self.run_dir)
        need = engine.state_bytes()
        if found:
            need = max(need, sum(fact.bytes for fact in found[-1].files.values()))
        free = shutil.disk_usage(self.root).free
        if need > free:
            raise OSError(
                errno.ENOSPC, f"{need:,} bytes are needed, {free:,} are free", str(self.root)
            )
        temporary.mkdir()
        return files

    def _written(self, pending: _Pending, temporary: Path) -> dict[str, FileFact]:
        """Every rank's files, read back and compared with what was written."""
        mine: dict[str, Any] = {}
        problem = ""
        try:
            for path, fact in pending.writer.finish().items():
                if file_fact(path, self._progress) != fact:
                    raise OSError(errno.EIO, "reads back differently from what was written", path)
                mine[path.relative_to(temporary).as_posix()] = asdict(fact)
        except Exception as error:
            problem = self._explain(error)
        told = [
            jsonl.loads(text)
            for text in self.comm.texts(
                pending.step, "checkpoint written", jsonl.dumps([problem, mine])
            )
        ]
        self._raise_first(pending.step, [problem for problem, _ in told])
        return {name: FileFact(**fact) for _, files in told for name, fact in files.items()}

    def _publish(self, pending: _Pending, temporary: Path, files: Mapping[str, FileFact]) -> str:
        final = self.root / f"step-{pending.step:06d}"
        assert pending.state is not None
        state = {name: _write(temporary / name, data) for name, data in pending.state.items()}
        manifest = {
            "step": pending.step,
            "world_size": self.comm.world,
            "version": __version__,
            "torch": str(torch.__version__),
            **pending.facts,
            "files": {name: asdict(f) for name, f in {**files, **state}.items()},
        }
        for name, fact in files.items():  # as rank 0 finds them, before anything bears the name
            if (temporary / name).stat().st_size != fact.bytes:
                raise OSError(errno.EIO, "is not what its rank wrote", str(temporary / name))
        _write(temporary / "manifest.json", jsonl.dumps(sealed(manifest)).encode())
        for folder in sorted({path.parent for path in temporary.rglob("*")} | {temporary}):
            sync(folder)
        if final.exists():  # one that was refused, or we would not be here again
            os.rename(final, temporary.with_name(f".tmp-old-{pending.step:06d}"))
        os.rename(temporary, final)
        sync(self.root)
        hint = self.root / ".tmp-latest"
        _write(hint, final.name.encode())
        os.replace(hint, self.root / "latest")
        sync(self.root)
        # What is older goes once the new one is there, as a reader finds it.
        read(final)
        others = [c for c in find(self.run_dir) if c.step != pending.spared]
        older = [c for c in others if c.step < pending.step]
        for old in older[: max(0, len(older) + 1 - self.keep_last)]:
            gone = old.folder.with_name(f".tmp-{old.folder.name}")
            os.rename(old.folder, gone)
            shutil.rmtree(gone)
        self._sweep()
        return final.name

    def _sweep(self) -> None:
        """Remove what a save left that was killed at any moment: folders, and a half-made hint."""
        for left in self.root.glob(".tmp-*"):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink()

    def _together(self, step: int, phase: str, work: Callable[[], T]) -> T | None:
        """Run `work` on rank 0, which gets its result; every rank raises if it failed there."""
        problem, result = "", None
        if self.comm.rank == 0:
            try:
                result = work()
            except (OSError, ValueError) as error:
                problem = self._explain(error)
        self._raise_first(step, self.comm.texts(step, phase, problem))
        return result

    def _explain(self, error: Exception) -> str:
        if not isinstance(error, OSError):
            return f"{type(error).__name__}: {error}"
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        if error.errno == errno.ENOSPC and "needed" not in text:
            free = shutil.disk_usage(self.root).free
            text += f" ({free:,} bytes are free)"
        return text

    def _raise_first(self, step: int, problems: Sequence[str]) -> None:
        told = [(rank, problem) for rank, problem in enumerate(problems) if problem]
        if not told:
            return
        if self.comm.rank == 0:
            shutil.rmtree(self.root / f".tmp-{step:06d}", ignore_errors=True)
        found = find(self.run_dir)
        good = f"{found[-1].folder} is unchanged" if found else "there is no earlier one"
        rank, problem = told[0]
        raise ValueError(f"no checkpoint after step {step}: rank {rank}: {problem}; {good}")


def _write(path: Path, data: bytes) -> FileFact:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileFact(len(data), hashlib.sha256(data).hexdigest())
