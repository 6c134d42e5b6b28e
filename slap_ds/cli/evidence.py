"""compare, report, study: what runs have shown."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from slap_ds.cli.common import Commands, fail


def add(commands: Commands) -> None:
    compare = commands.add_parser("compare", help="runs side by side")
    compare.add_argument("run_dirs", nargs="+")
    compare.set_defaults(run=_compare)

    page = commands.add_parser("report", help="figures and tables of a run or study, as HTML")
    page.add_argument("folder", help="a run's folder or a study's")
    page.add_argument("--out", help="target folder (default FOLDER/report)")
    page.set_defaults(run=_report)

    study = commands.add_parser("study", help="a grid of runs from one base model, with intervals")
    study.add_argument("study", help="YAML file; docs/studies.md says what it may hold")
    study.add_argument("--data", help="the folder that {data} stands for (default $SLAP_DATA_DIR)")
    study.add_argument("--out", help="folder of the study (default runs/studies/NAME)")
    study.add_argument(
        "--results", help="a second folder of records, to continue from and to commit"
    )
    study.add_argument("--jobs", type=int, default=1, help="worker processes, a thread each")
    study.set_defaults(run=_study)


def _compare(options: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from slap_ds.report.compare import compare

    compare([Path(run_dir) for run_dir in options.run_dirs], Console())


def _report(options: argparse.Namespace, rest: list[str]) -> None:
    from slap_ds.report.build import report

    print(f"wrote {report(Path(options.folder), Path(options.out) if options.out else None)}")


def _study(options: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from slap_ds.study.plan import read_study

    study = read_study(options.study, options.data or os.environ.get("SLAP_DATA_DIR"))
    folder = Path(options.out or Path("runs", "studies", study.name))
    from slap_ds.study.comparisons import compare_cells
    from slap_ds.study.results import collect, write_rows
    from slap_ds.study.run import run_study

    # Its workers end with it: an exit unwinds, a signal would not.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    results = Path(options.results) if options.results else None
    outcome = run_study(study, folder, options.jobs, Console(), results)
    rows = collect(folder, outcome.cells)
    write_rows(rows, folder / "cells")
    for losses in ("last", "best"):
        if compared := compare_cells(study, folder, rows, losses):
            name = "comparisons" if losses == "last" else "comparisons-best"
            write_rows(compared, folder / name)
            if results is not None:
                write_rows(compared, results / name, kinds=("csv",))
    print(f"wrote cells and comparisons, .parquet and .csv, to {folder}")
    if outcome.failed:
        fail(
            f"{len(outcome.failed)} of {len(outcome.cells)} cells failed (error.txt in their "
            f"folders; start again to retry them): {', '.join(outcome.failed)}"
        )
