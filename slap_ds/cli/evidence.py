"""compare: what runs have shown."""

from __future__ import annotations

import argparse
from pathlib import Path

from slap_ds.cli.common import Commands


def add(commands: Commands) -> None:
    compare = commands.add_parser("compare", help="runs side by side")
    compare.add_argument("run_dirs", nargs="+")
    compare.set_defaults(run=_compare)


def _compare(options: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from slap_ds.report import compare

    compare([Path(run_dir) for run_dir in options.run_dirs], Console())
