"""train, preview, settings: from a config file to a run."""

from __future__ import annotations

import argparse

from slap_ds.cli.common import OVERRIDES, Commands, leave


def add(commands: Commands) -> None:
    train = commands.add_parser("train", help="train a model", epilog=OVERRIDES)
    train.add_argument("config", help="YAML file; `slap-ds settings` lists what it may hold")
    train.add_argument("--dry-run", action="store_true", help="check everything, train nothing")
    train.set_defaults(run=_train, takes_overrides=True)

    preview = commands.add_parser("preview", help="show the first samples", epilog=OVERRIDES)
    preview.add_argument("config")
    preview.add_argument("--count", type=int, default=3, help="how many samples (default 3)")
    preview.set_defaults(run=_preview, takes_overrides=True)

    settings = commands.add_parser("settings", help="every setting of a config file, explained")
    settings.set_defaults(run=_settings)


def _train(options: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from slap_ds.config import read_config

    config = read_config(options.config, rest)
    from slap_ds.engine import stop_ranks
    from slap_ds.run import RankError, dry_run, prepare
    from slap_ds.trainer import train

    if options.dry_run:
        console = Console()
        for name, value in dry_run(config).items():
            console.print(f"{name:>22}  {value}", highlight=False)
        return
    run = prepare(config)
    try:
        train(run)
    except ValueError as error:
        raise RankError(f"step {run.step}: {error}") from error
    except Exception as error:
        blame = run.comm.blame(error)
        if blame is not None:
            leave(f"step {run.step}: {blame}")
        raise
    stop_ranks(run.comm)


def _preview(options: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from slap_ds.config import read_config
    from slap_ds.data.preview import preview
    from slap_ds.run import read_inputs

    config = read_config(options.config, rest)
    inputs = read_inputs(config)
    preview(inputs.train, inputs.tokenizer, options.count, Console())


def _settings(options: argparse.Namespace, rest: list[str]) -> None:
    from slap_ds.config import config_keys

    for key, text in config_keys():
        print(f"{key}\n    {text}")
