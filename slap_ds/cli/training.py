"""train, preview, settings: from a config file to a run."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from slap_ds.cli.announce import about, finished, tell
from slap_ds.cli.common import OVERRIDES, Commands
from slap_ds.distributed.heart import DONE, FAILED, LOST_PEER, NO_MEMORY, PREEMPTED, USER_ERROR
from slap_ds.distributed.watchdog import Watchdog, out_of_memory, watch
from slap_ds.errors import mistake
from slap_ds.launch.environment import discover

if TYPE_CHECKING:
    from slap_ds.config.schema import Config
    from slap_ds.distributed.comm import Comm


def add(commands: Commands) -> None:
    train = commands.add_parser("train", help="train a model", epilog=OVERRIDES)
    train.add_argument("config", help="YAML file; `slap-ds settings` lists what it may hold")
    train.add_argument("--dry-run", action="store_true", help="check everything, train nothing")
    train.add_argument(
        "--gpus", type=int, help="with --dry-run: how many the run will have (default: those here)"
    )
    train.set_defaults(run=_train, takes_overrides=True)

    preview = commands.add_parser("preview", help="show the first samples", epilog=OVERRIDES)
    preview.add_argument("config")
    preview.add_argument("--count", type=int, default=3, help="how many samples (default 3)")
    preview.set_defaults(run=_preview, takes_overrides=True)

    settings = commands.add_parser("settings", help="every setting of a config file, explained")
    settings.set_defaults(run=_settings)


def _train(options: argparse.Namespace, rest: list[str]) -> None:
    from slap_ds.config.file import read_config

    config = read_config(options.config, rest)
    if options.dry_run:
        _dry_run(config, options.gpus)
        return
    tell(f"starting {config.run_dir}")  # before anything that takes long to import
    from slap_ds.distributed.comm import Comm
    from slap_ds.distributed.startup import alone_in
    from slap_ds.engine import built, start_ranks, stop_ranks
    from slap_ds.train.loop import Preempted, train
    from slap_ds.train.run import prepare

    place = discover(os.environ)
    nested = place.launcher == "deepspeed"
    timeout_s = config.engine.stop_timeout_s
    with watch(Path(config.run_dir), place.rank, place.world, timeout_s, nested) as dog:
        code, comm = DONE, Comm()
        try:
            if config.engine.kind == "deepspeed" and not built(os.environ):
                tell("building DeepSpeed's operator, once per machine, about a minute")
            comm = start_ranks(config, dog)
            with alone_in(Path(config.run_dir), comm):
                run = prepare(config, comm, tell=tell)
                about(run, options.config)
                train(run)
            finished(run)
        except Preempted as error:
            code = PREEMPTED
            if place.rank == 0:
                print(dog.line(f"{dog.stop_cause or 'asked on another rank'}: {error}", "stopped"))
        except Exception as error:
            _fail(dog, comm, error)
        dog.record(code, dog.stop_cause)
        stop_ranks(comm, code)
    if code:
        sys.exit(code)


def _dry_run(config: Config, gpus: int | None) -> None:
    from rich.console import Console

    from slap_ds.train.dry_run import dry_run

    console = Console(markup=False, highlight=False, soft_wrap=True)
    found = dry_run(config, gpus)
    for name, value in found.facts.items():
        console.print(f"{name:>22}  {value}")
    for note in found.notes:
        console.print(f"note: {note}")


def _fail(dog: Watchdog, comm: Comm, error: Exception) -> NoReturn:
    """End this rank with a line that names rank, step and cause; a traceback if it is our fault."""
    from slap_ds.errors import OtherRankFailed, PortTaken, RankError

    alone = comm.world == 1
    if isinstance(error, OtherRankFailed):
        dog.end(LOST_PEER, str(error))
    if isinstance(error, PortTaken):
        dog.end(LOST_PEER, str(error), dog.line(str(error)))
    mine = str(error) if isinstance(error, RankError) else mistake(error)
    # Later on a path that worked before is a fault of the machine's.
    if mine is not None and (dog.heart.step < 0 or not isinstance(error, OSError)):
        dog.record(USER_ERROR, mine)
        if alone or dog.heart.step < 0:
            raise error
        dog.end(USER_ERROR, mine, dog.line(mine))
    if (blame := comm.blame(error)) is not None:
        dog.end(LOST_PEER, blame, dog.line(blame))
    code, text = FAILED, mine
    if text is None:
        traceback.print_exception(error)
        text = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
    if (memory := out_of_memory(error)) is not None:
        code, text = NO_MEMORY, memory
    dog.record(code, text)
    print(dog.line(text), file=sys.stderr, flush=True)
    if alone:
        sys.exit(code)
    dog.end(code, text)


def _preview(options: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from slap_ds.config.file import read_config
    from slap_ds.data.preview import preview
    from slap_ds.train.inputs import read_inputs

    config = read_config(options.config, rest)
    inputs = read_inputs(config)
    preview(inputs.train, inputs.tokenizer, options.count, Console(markup=False))


def _settings(options: argparse.Namespace, rest: list[str]) -> None:
    from slap_ds.config.file import config_keys

    for key, text in config_keys():
        print(f"{key}\n    {text}")
