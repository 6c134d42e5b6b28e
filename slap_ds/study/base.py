"""The model that all cells of a study start from: rows -> vocabulary -> pre-training -> losses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from slap_ds.config.schema import SelectionConfig
from slap_ds.study.keys import Keys
from slap_ds.study.plan import (
    PLAIN,
    Cell,
    Study,
    base_config,
    cell_config,
    data_file,
    vocabulary_file,
)
from slap_ds.study.pool import Failure, run_tasks
from slap_ds.study.vocabulary import make_vocabulary
from slap_ds.study.work import LossesTask, TrainTask, evaluations, work, write_json

PRELOAD = "slap_ds.study.work"


def base_key(study: Study, folder: Path, keys: Keys) -> Any:
    """What stands for the base model in the keys of cells; makes its vocabulary, trains nothing."""
    if study.base.vocabulary is not None and not vocabulary_file(folder).is_file():
        rows = data_file(folder, "base")
        make_vocabulary(rows, study.base.vocabulary, vocabulary_file(folder))
    config = base_config(study, folder)
    if config is None:
        return keys.of_path(study.base.path)
    return keys.of(config, keys.of_path(config.model.path))


def train_base(study: Study, folder: Path, key: Any, console: Console) -> None:
    """Train and export the base model unless it is there, or in a study beside this one.

    Raises:
        ValueError: it could not be trained.
    """
    config = base_config(study, folder)
    model, note = folder / "base" / "model", folder / "base" / "model.json"
    if config is None or _noted(note) == key:
        return
    note.unlink(missing_ok=True)
    for other in sorted(folder.parent.glob("*/base/model.json")):
        if _noted(other) == key:  # a study beside this one has made the very same
            shutil.copytree(other.parent / "model", model, dirs_exist_ok=True)
            shutil.copyfile(other, note)
            return
    console.print("training the base model")
    for _, result in run_tasks(work, [TrainTask(config, key, str(model))], 1, PRELOAD):
        if isinstance(result, Failure):
            raise ValueError(f"the base model could not be trained: {result.error}\n{result.trace}")
        evals = evaluations(Path(config.run_dir))
        losses = f", evaluation loss {evals[0]:.4f} -> {evals[-1]:.4f}" if evals else ""
        console.print(f"base model: {result['wall_s']:.0f} s{losses}", highlight=False)
        write_json(note, result)


def write_base_losses(
    study: Study, folder: Path, any_cell: Cell, keys: Keys, base: Any, console: Console
) -> None:
    """The loss of each training row under the base model, unless it is there.

    Raises:
        ValueError: the rows could not be scored.
    """
    out, note = folder / "base" / "losses.jsonl", folder / "base" / "losses.json"
    config = cell_config(study, replace(any_cell, variant=PLAIN), folder)
    run_dir, every = str(folder / "base" / "scoring"), SelectionConfig(method="full")
    config = config.model_copy(update={"run_dir": run_dir, "selection": every})
    key = keys.of(config, base)
    if _noted(note) == key:
        return
    note.unlink(missing_ok=True)
    console.print("scoring the training rows with the base model")
    for _, result in run_tasks(work, [LossesTask(config, str(out))], 1, PRELOAD):
        if isinstance(result, Failure):
            raise ValueError(f"the rows could not be scored: {result.error}\n{result.trace}")
        write_json(note, {"key": key, **result})


def _noted(note: Path) -> Any:
    return json.loads(note.read_text("utf-8"))["key"] if note.is_file() else None
