"""A run as one call, for scripts and notebooks: `slap_ds.train(config, callbacks=[...])`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from slap_ds.config.file import read_config, validated
from slap_ds.config.schema import Config
from slap_ds.engine import start_ranks, stop_ranks
from slap_ds.train.loop import Preempted
from slap_ds.train.loop import train as train_run
from slap_ds.train.run import prepare

# Told of every record of metrics.jsonl; True asks for an early end.
Callback: TypeAlias = Callable[[Mapping[str, Any]], object]


@dataclass(frozen=True)
class TrainResult:
    """What `train` leaves behind."""

    run_dir: Path  # metrics.jsonl, picks.jsonl, checkpoints
    steps: int  # optimizer steps that the run has done, earlier ones of a continued run included
    finished: bool  # False: a callback asked for the end; call again to go on
    # Nats per trained token, on rank 0: of the last step and the last evaluation, if there were.
    loss: float | None
    eval_loss: float | None


def train(
    config: Config | Mapping[str, Any] | str | Path, callbacks: Sequence[Callback] = ()
) -> TrainResult:
    """Train as `slap-ds train` does, in this process, which may be a rank of a launcher's.

    Args:
        config: a YAML file, the mapping in one, or a `Config`.
        callbacks: each is called on rank 0 with every record that is written to metrics.jsonl
            (docs/api.md): `event` is train, eval, checkpoint or settings. One that
            returns True ends the run after the next step, with a checkpoint.

    Raises:
        ValueError, FileNotFoundError: a mistake in the configuration or the data, in one line.
    """
    if isinstance(config, (str, Path)):
        config = read_config(str(config))
    elif not isinstance(config, Config):
        config = validated(Config, config, "config")
    last: dict[str, Any] = {}

    def note(record: Mapping[str, Any]) -> None:
        last.update({record["event"]: record})

    comm = start_ranks(config)
    run = prepare(config, comm)
    run_dir, state = run.run_dir, run.state
    finished = True
    try:
        train_run(run, (note, *callbacks))
    except Preempted:
        finished = False
    if comm.world == 1:
        stop_ranks(comm)
    # The model and its hooks are a cycle: its memory and the open files of the data would wait
    # for Python to look, in a notebook perhaps beside the next model.
    del run
    gc.collect()
    return TrainResult(
        run_dir=run_dir,
        steps=state.step,
        finished=finished,
        loss=last.get("train", {}).get("loss"),
        eval_loss=last.get("eval", {}).get("eval_loss"),
    )
