"""Checkpoints: written aside, then renamed, so that a visible one is a whole one.

run_dir/checkpoints/step-000100/manifest.json   what it is and what it needs to continue
                               /state.json      stream cursor, scorer and selector state
                               /engine/...      weights and optimizer, one shard a rank
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slap_ds import __version__
from slap_ds.comm import Comm
from slap_ds.engine import Engine


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    step: int
    manifest: dict[str, Any]


def save(
    run_dir: Path,
    step: int,
    engine: Engine,
    comm: Comm,
    state: Mapping[str, Any],
    facts: Mapping[str, Any],
    keep_last: int,
) -> None:
    """Write the checkpoint after `step` steps; all ranks call this.

    Args:
        state: what the trainer needs to continue, JSON values; rank 0's is written.
        facts: what must match on resume (data fingerprint and the like).
    """
    root = run_dir / "checkpoints"
    temporary = root / f".tmp-{step:06d}"
    final = root / f"step-{step:06d}"
    if comm.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    comm.barrier(step, "checkpoint folder")
    engine.save(temporary)
    comm.barrier(step, "checkpoint written")
    if comm.rank == 0:
        manifest = {"step": step, "world_size": comm.world, "version": __version__, **facts}
        _write_json(temporary / "state.json", state)
        _write_json(temporary / "manifest.json", manifest)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        for old in find(run_dir)[:-keep_last]:
            shutil.rmtree(old.folder)
    comm.barrier(step, "checkpoint visible")


def find(run_dir: Path) -> list[Checkpoint]:
    """The whole checkpoints of a run, oldest first."""
    found = []
    for folder in sorted((run_dir / "checkpoints").glob("step-*")):
        path = folder / "manifest.json"
        if path.is_file():
            manifest = json.loads(path.read_text(encoding="utf-8"))
            found.append(Checkpoint(folder, int(manifest["step"]), manifest))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def load(
    checkpoint: Checkpoint, engine: Engine, comm: Comm, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Restore the engine and return the trainer's state; all ranks call this.

    Raises:
        ValueError: the checkpoint belongs to another number of ranks, or to other data.
    """
    check_matches(checkpoint, comm.world, facts)
    engine.load(checkpoint.folder)
    state: dict[str, Any] = json.loads((checkpoint.folder / "state.json").read_text("utf-8"))
    return state


def check_matches(checkpoint: Checkpoint, world: int, facts: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that this run cannot continue from, before any model is built.

    Raises:
        ValueError: naming what differs.
    """
    saved = checkpoint.manifest
    if saved["world_size"] != world:
        raise ValueError(
            f"{checkpoint.folder} was saved by {saved['world_size']} ranks, this run has {world}: "
            f"start {saved['world_size']} ranks, or a fresh run in another run_dir"
        )
    for name, value in facts.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{checkpoint.folder} was saved with {name} = {saved.get(name)}, this run has "
                f"{value}: resume with what it was saved with, or start in another run_dir"
            )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
