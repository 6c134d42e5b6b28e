"""Checkpoints found and checked: file by file, before they are believed.

load: newest first, every rank checks its share of the files, the first whole one is taken
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slap_ds import jsonl
from slap_ds.checkpoint.state import VALUES, unpacked
from slap_ds.distributed.comm import Comm
from slap_ds.engine import Engine
from slap_ds.engine.tensor_files import FileFact, file_fact

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
    seen = jsonl.dumps([[folder.name for folder in _folders(run_dir)], _hint(root)])
    names, hint = jsonl.loads(comm.texts(-1, "checkpoints", seen)[0])
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
        manifest = jsonl.loads(path.read_bytes())
        if not isinstance(manifest, dict) or sealed(manifest) != manifest:
            raise ValueError("it is not what was written")
        checkpoint = Checkpoint(folder, int(manifest["step"]), manifest)
        files = checkpoint.files
        if any(type(f.bytes) is not int or type(f.sha256) is not str for f in files.values()):
            raise ValueError("a size or a hash is missing")
        if f"step-{checkpoint.step:06d}" != folder.name:
            raise ValueError(f"it belongs to step {checkpoint.step}")
        if VALUES not in files or int(manifest["world_size"]) < 1:
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
    state = unpacked(checkpoint.folder)
    saved = checkpoint.manifest
    as_saved = saved["world_size"] == comm.world and saved.get("engine") == engine.kind
    # Whose AdamW it was: their states have the same moments and other fields beside them.
    if as_saved and saved.get("optimizer.kind", "torch") == engine.optimizer_kind:
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


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """`manifest` with the hash of all its other entries."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return {**rest, "sha256": hashlib.sha256(jsonl.dumps(rest).encode()).hexdigest()}
