"""Checkpoints: written aside, hashed, renamed; checked file by file before they are believed.

run_dir/checkpoints/step-000100/manifest.json   what it is, size and SHA-256 of every file
                               /state.json      stream cursor, scorer and selector state
                               /engine/...      weights and optimizer, one shard a rank
                   /latest                      a hint for people; loading looks for itself

save:  .tmp-N -> every rank writes, forces to disk, tells size and hash -> manifest -> rename
load:  newest first, every rank checks its share of the files, the first whole one is taken
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from slap_ds import __version__, strict_json
from slap_ds.comm import Comm
from slap_ds.engine import Engine
from slap_ds.tensor_files import FileFact, TensorWriter, file_fact, sync

FOLDER = re.compile(r"step-(\d{6,12})")
TAG = re.compile(r"[A-Za-z0-9._-]+")


class CheckpointDamaged(ValueError):
    """A checkpoint, or all there are, cannot be used; says which file and why."""


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint: `run_dir/checkpoints/step-NNNNNN` and its manifest."""

    folder: Path
    step: int
    manifest: dict[str, Any]

    @property
    def files(self) -> dict[str, FileFact]:
        """Size and hash of each of its files, by path inside `folder`."""
        return {name: FileFact(**fact) for name, fact in self.manifest["files"].items()}


@dataclass
class _Pending:
    """A checkpoint whose files are being written."""

    step: int
    writer: TensorWriter
    state: str  # as it was when saved; the trainer goes on changing it
    facts: Mapping[str, Any]
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
        self, step: int, engine: Engine, state: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> None:
        """Write the checkpoint after `step` steps.

        Args:
            state: what the trainer needs to continue, JSON values; rank 0's is written.
            facts: what must match on resume (data fingerprint and the like).

        Raises:
            ValueError: no room, or a file cannot be written; the last good one is as it was.
        """
        self.wait()
        started = time.perf_counter()
        temporary = self.root / f".tmp-{step:06d}"
        text = self._together(
            step, "checkpoint folder", lambda: self._prepare(temporary, engine, state)
        )
        writer = TensorWriter(self.background, self._progress)
        engine.save(temporary, writer)
        self._pending = _Pending(step, writer, text, facts, time.perf_counter() - started)
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

    def _prepare(self, temporary: Path, engine: Engine, state: Mapping[str, Any]) -> str:
        text = strict_json.dumps(state)
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
        return text

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
            strict_json.loads(text)
            for text in self.comm.texts(
                pending.step, "checkpoint written", strict_json.dumps([problem, mine])
            )
        ]
        self._raise_first(pending.step, [problem for problem, _ in told])
        return {name: FileFact(**fact) for _, files in told for name, fact in files.items()}

    def _publish(self, pending: _Pending, temporary: Path, files: Mapping[str, FileFact]) -> str:
        final = self.root / f"step-{pending.step:06d}"
        state = _write_text(temporary / "state.json", pending.state)
        manifest = {
            "step": pending.step,
            "world_size": self.comm.world,
            "version": __version__,
            "torch": str(torch.__version__),
            **pending.facts,
            "files": {name: asdict(f) for name, f in {**files, "state.json": state}.items()},
        }
        for name, fact in files.items():  # as rank 0 finds them, before anything bears the name
            if (temporary / name).stat().st_size != fact.bytes:
                raise OSError(errno.EIO, "is not what its rank wrote", str(temporary / name))
        _write_text(temporary / "manifest.json", strict_json.dumps(_sealed(manifest)))
        for folder in sorted({path.parent for path in temporary.rglob("*")} | {temporary}):
            sync(folder)
        if final.exists():  # one that was refused, or we would not be here again
            os.rename(final, temporary.with_name(f".tmp-old-{pending.step:06d}"))
        os.rename(temporary, final)
        sync(self.root)
        hint = self.root / ".tmp-latest"
        _write_text(hint, final.name)
        os.replace(hint, self.root / "latest")
        sync(self.root)
        # What is older goes once the new one is there, as a reader finds it.
        read(final)
        older = [found for found in find(self.run_dir) if found.step < pending.step]
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

    def _together(self, step: int, phase: str, work: Callable[[], str]) -> str:
        """Run `work` on rank 0; every rank raises if it failed there."""
        problem, result = "", ""
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
        good = f"{found[-1].folder} is as it was" if found else "there is none before it"
        rank, problem = told[0]
        raise ValueError(f"no checkpoint after step {step}: rank {rank}: {problem}; {good}")


def find(run_dir: Path) -> list[Checkpoint]:
    """The checkpoints of a run whose manifests are whole, oldest first; `check` looks at files."""
    found = []
    for folder in _folders(run_dir):
        try:
            found.append(read(folder))
        except ValueError:
            continue
    return found


def newest(run_dir: Path, comm: Comm, verify: bool = True) -> Checkpoint | None:
    """The newest whole checkpoint, the same on every rank; None if the run has none at all.

    Those that are refused on the way are told in one line each, on stderr.

    Args:
        verify: compare the SHA-256 of every file; without, only the sizes.

    Raises:
        CheckpointDamaged: there are some, and none of them is whole; or `latest` names one and
            there is none.
    """
    root = run_dir / "checkpoints"
    # Rank 0's list: a shared folder may show ranks different things for a moment.
    seen = strict_json.dumps([[folder.name for folder in _folders(run_dir)], _hint(root)])
    names, hint = strict_json.loads(comm.texts(-1, "checkpoints", seen)[0])
    refused: list[str] = []
    for name in reversed(names):
        problem, found = "", None
        try:
            found = read(root / name)
            check(found, verify, comm.rank, comm.world)
        except (ValueError, OSError) as error:
            problem = str(error)
        problems = [text for text in comm.texts(-1, "checkpoint check", problem) if text]
        if not problems:
            assert found is not None
            if comm.rank == 0:
                for told in refused:
                    print(f"slap-ds: {told}: going back to {found.folder}", file=sys.stderr)
                if hint is not None and hint not in names:
                    print(
                        f"slap-ds: {root / 'latest'} names {hint[:80]!r}, which is no checkpoint "
                        f"here: ignored, {found.folder} is the newest",
                        file=sys.stderr,
                    )
            return found
        refused.append(problems[0])
    if refused or hint is not None:
        told = "; ".join(refused) or f"{root / 'latest'} names {(hint or '')[:80]!r}, not here"
        raise CheckpointDamaged(
            f"no whole checkpoint in {root}: {told}; bring one back, or start in another run_dir"
        )
    return None


def read(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, by its manifest; its files are not looked at.

    Raises:
        CheckpointDamaged: it is not where it seems to be, or its manifest is missing or damaged.
    """
    path = folder / "manifest.json"
    if not TAG.fullmatch(folder.name) or folder.resolve().parent != folder.parent.resolve():
        raise CheckpointDamaged(f"{folder} is refused: it leads out of the run's folder")
    try:
        manifest = strict_json.loads(path.read_bytes())
        if not isinstance(manifest, dict) or _sealed(manifest) != manifest:
            raise ValueError("it is not what was written")
        checkpoint = Checkpoint(folder, int(manifest["step"]), manifest)
        files = checkpoint.files
        if any(type(f.bytes) is not int or type(f.sha256) is not str for f in files.values()):
            raise ValueError("a size or a hash is missing")
        if f"step-{checkpoint.step:06d}" != folder.name:
            raise ValueError(f"it belongs to step {checkpoint.step}")
        if "state.json" not in files or int(manifest["world_size"]) < 1:
            raise ValueError("it names no state")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointDamaged(f"{path} is refused: {reason}") from None
    return checkpoint


def check(checkpoint: Checkpoint, verify: bool = True, rank: int = 0, world: int = 1) -> None:
    """Compare this rank's share of the files with the manifest: every `world`-th, from `rank` on.

    Raises:
        CheckpointDamaged: naming the first file that differs, is missing or lies elsewhere.
    """
    for name, fact in sorted(checkpoint.files.items())[rank::world]:
        path = checkpoint.folder / name
        if not path.resolve().is_relative_to(checkpoint.folder.resolve()):
            raise CheckpointDamaged(f"{path} is refused: it leads out of the run's folder")
        if not path.is_file():
            raise CheckpointDamaged(f"{path} is refused: it is missing")
        size = path.stat().st_size
        if size != fact.bytes:
            raise CheckpointDamaged(
                f"{path} is refused: it has {size:,} bytes, the manifest says {fact.bytes:,}"
            )
        if verify and file_fact(path) != fact:
            raise CheckpointDamaged(f"{path} is refused: its SHA-256 is not the manifest's")


def load(checkpoint: Checkpoint, engine: Engine, comm: Comm) -> dict[str, Any]:
    """Restore the engine and return the trainer's state; all ranks call this.

    Raises:
        ValueError: a file is damaged or holds more than tensors, or ranks cannot be changed.
    """
    state: dict[str, Any] = strict_json.loads((checkpoint.folder / "state.json").read_bytes())
    if (
        checkpoint.manifest["world_size"] == comm.world
        and checkpoint.manifest.get("engine") == engine.kind
    ):
        engine.load(checkpoint.folder)
    else:
        engine.load_whole(checkpoint.folder)
    return state


def _folders(run_dir: Path) -> list[Path]:
    """Folders named as checkpoints, oldest first."""
    named = [(FOLDER.fullmatch(path.name), path) for path in (run_dir / "checkpoints").glob("*")]
    return [path for _, path in sorted((int(m[1]), path) for m, path in named if m is not None)]


def _hint(root: Path) -> str | None:
    """What `latest` says; None: there is none."""
    try:
        return (root / "latest").read_bytes()[:200].decode("utf-8", "replace").strip()
    except OSError:
        return None


def _sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """`manifest` with the hash of all its other entries."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return {**rest, "sha256": hashlib.sha256(strict_json.dumps(rest).encode()).hexdigest()}


def _write_text(path: Path, text: str) -> FileFact:
    data = text.encode()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileFact(len(data), hashlib.sha256(data).hexdigest())
