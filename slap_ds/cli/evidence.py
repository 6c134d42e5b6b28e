"""compare, report, ledger, study, fidelity, advise: what runs have shown, what choices are like."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from slap_ds.cli.common import OVERRIDES, Commands, fail


def add(commands: Commands) -> None:
    compare = commands.add_parser("compare", help="runs side by side")
    compare.add_argument("run_dirs", nargs="+")
    compare.set_defaults(run=_compare)

    page = commands.add_parser("report", help="figures and tables of runs or a study, as HTML")
    page.add_argument("folders", nargs="+", metavar="folder", help="runs' folders, or a study's")
    page.add_argument("--out", help="target folder (default FOLDER/report; needed for several)")
    page.add_argument(
        "--watch",
        action="store_true",
        help="write the page again while the run trains; it shows the newest by itself",
    )
    page.add_argument("--every", type=int, default=30, help="seconds between (default 30)")
    page.set_defaults(run=_report)

    ledger = commands.add_parser("ledger", help="when a run trained which sample, and when not")
    ledger.add_argument("run_dir")
    ledger.add_argument("--sample", help="one of them: its id in picks.jsonl, or FILE:LINE")
    ledger.add_argument("--export", metavar="FILE", help="every sample's entry, as JSON Lines")
    ledger.set_defaults(run=_ledger)

    compass = commands.add_parser(
        "fidelity", help="how well selectors' gradients stand for all candidates'", epilog=OVERRIDES
    )
    compass.add_argument("config", help="run file; one process")
    compass.add_argument(
        "--method",
        action="append",
        default=[],
        metavar="LABEL:KEY=VALUE,...",
        help="a choice and its settings (default: the config's own, preset paper, all that need "
        "no further data); may be repeated",
    )
    compass.add_argument(
        "--states", type=int, nargs="+", default=[0, 60], help="training steps before measuring"
    )
    compass.add_argument("--batches", type=int, default=20, help="at each state (default 20)")
    compass.add_argument("--share", type=float, default=0.6, help="share of the tokens to train")
    compass.add_argument(
        "--blocks", type=int, default=0, help="sketch the last blocks and the head (default: all)"
    )
    compass.add_argument("--json", help="write the numbers there")
    compass.set_defaults(run=_fidelity, takes_overrides=True)

    pilot = commands.add_parser(
        "advise", help="which regime the data look like, and what to set", epilog=OVERRIDES
    )
    pilot.add_argument("config", help="run file; nothing is trained")
    pilot.add_argument(
        "--rows", type=int, default=256, help="rows drawn for the pilot (default 256)"
    )
    pilot.add_argument(
        "--prompts", type=int, default=4, help="prompts of other rows to score each answer with"
    )
    pilot.add_argument("--json", help="write the numbers and findings there")
    pilot.set_defaults(run=_advise, takes_overrides=True)

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

    compare([Path(run_dir) for run_dir in options.run_dirs], Console(markup=False))


def _report(options: argparse.Namespace, rest: list[str]) -> None:
    from slap_ds.report.build import report, watch

    if options.every < 1:
        raise ValueError(f"--every is {options.every}, expected one second or more")
    folders = [Path(folder) for folder in options.folders]
    out = Path(options.out) if options.out else None
    if options.watch:
        page = watch(folders, out, options.every, lambda text: print(text, flush=True))
    else:
        page = report(folders, out)
    print(f"wrote {page}")


def _ledger(options: argparse.Namespace, rest: list[str]) -> None:
    from slap_ds import jsonl
    from slap_ds.files import write_text
    from slap_ds.report.ledger import Ledger

    ledger = Ledger(Path(options.run_dir))
    told = ledger.lines(ledger.find(options.sample)) if options.sample else ledger.summary()
    for line in told:
        print(line)
    if options.export:
        rows = (jsonl.dumps(entry.record()) + "\n" for entry in ledger.entries)
        write_text(Path(options.export), "".join(rows))
        print(f"wrote {options.export}")


def _fidelity(options: argparse.Namespace, rest: list[str]) -> None:
    import json

    from rich.console import Console

    from slap_ds.bench.environment import describe
    from slap_ds.config.file import read_config
    from slap_ds.selection import SELECTORS
    from slap_ds.study.fidelity import ALL, RANDOM, Question, fidelity, show

    given = {"states": options.states, "batches": options.batches, "share": options.share}
    question = Question(**given, blocks=options.blocks)
    named = {"config": "", "paper": "selection.method=slap,selection.slap.preset=paper"}
    further_data = ("full", RANDOM, "slap", "greats", "rho_loss", "infobatch")
    named |= {name: f"selection.method={name}" for name in SELECTORS if name not in further_data}
    if options.method:
        named = dict(label_and_settings(text) for text in options.method)
    if taken := {ALL, RANDOM} & set(named):
        raise ValueError(f"--method: {', '.join(sorted(taken))} is measured always")
    methods = {
        label: read_config(
            options.config, [*rest, *(f"--{each}" for each in text.split(",") if each)]
        )
        for label, text in named.items()
    }
    rows = fidelity(read_config(options.config, rest), methods, question)
    Console(markup=False).print(show(rows))
    if options.json:
        found = {"environment": describe(), "question": {**given, "blocks": options.blocks}}
        Path(options.json).write_text(json.dumps({**found, "rows": rows}, indent=1) + "\n", "utf-8")


def _advise(options: argparse.Namespace, rest: list[str]) -> None:
    import json
    from dataclasses import asdict

    from rich.console import Console

    from slap_ds.bench.environment import describe
    from slap_ds.config.file import read_config
    from slap_ds.engine import start_ranks, stop_ranks
    from slap_ds.study.advise import Question, advise
    from slap_ds.study.findings import findings, show

    question = Question(options.rows, options.prompts)
    config = read_config(options.config, rest)
    comm = start_ranks(config)
    found = advise(config, question, comm)
    if comm.rank == 0:
        console = Console(markup=False, highlight=False)
        for part in show(found):
            console.print(part)
        if options.json:
            named = {"findings": [asdict(finding) for finding in findings(found)]}
            whole = {"environment": describe(), **found, **named}
            Path(options.json).write_text(json.dumps(whole, indent=1) + "\n", "utf-8")
    stop_ranks(comm)


def label_and_settings(text: str) -> tuple[str, str]:
    """`LABEL:KEY=VALUE,...` in two.

    Raises:
        ValueError: it is not of that form.
    """
    label, colon, settings = text.partition(":")
    if not label or not colon or any("=" not in each for each in settings.split(",") if each):
        raise ValueError(
            f"--method is {text!r}, expected LABEL:KEY=VALUE,... such as a:selection.method=hard"
        )
    return label, settings


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
    outcome = run_study(study, folder, options.jobs, Console(markup=False), results)
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
