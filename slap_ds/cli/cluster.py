"""launch, doctor: the machines a run will have."""

from __future__ import annotations

import argparse
import sys

from slap_ds.cli.common import Commands


def add(commands: Commands) -> None:
    launch = commands.add_parser(
        "launch",
        help="start a launcher, and again after a fault: launch [options] -- deepspeed ...",
        epilog="Exit codes, and when to let torchrun, Slurm or Kubernetes do it: "
        "docs/reliability.md",
    )
    launch.add_argument("--restarts", type=int, default=3, help="restarts at most (default 3)")
    launch.add_argument(
        "--backoff-s", type=float, default=5.0, help="pause before the first; doubled each time"
    )
    launch.add_argument(
        "--grace-s",
        type=float,
        default=120.0,
        help="seconds from SIGTERM to the checkpoint, which may take longer while it grows (120)",
    )
    launch.add_argument("--run-dir", help="where no CONFIG.yaml in the command says it")
    launch.add_argument("launcher", nargs=argparse.REMAINDER, help="-- and the command to run")
    launch.set_defaults(run=_launch)

    doctor = commands.add_parser("doctor", help="check what this machine offers")
    doctor.add_argument("--hostfile", help="check its hosts too, over ssh")
    doctor.add_argument("--run-dir", default=".", help="where the run will write (default: here)")
    doctor.add_argument(
        "--network", action="store_true", help="time an all-reduce between the hosts, too"
    )
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(run=_doctor)


def _launch(options: argparse.Namespace, rest: list[str]) -> None:
    from pathlib import Path

    from slap_ds.launch.supervise import Options, supervise

    command = options.launcher[1:] if options.launcher[:1] == ["--"] else options.launcher
    if not command:
        raise ValueError(
            "nothing to launch: slap-ds launch -- deepspeed --module slap_ds train ..."
        )
    run_dir = Path(options.run_dir) if options.run_dir else None
    how = Options(options.restarts, options.backoff_s, options.grace_s)
    sys.exit(supervise(command, run_dir, how))


def _doctor(options: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console
    from rich.text import Text

    from slap_ds.doctor.checks import examine, report

    found = examine(options.hostfile, options.run_dir, measure=options.network)
    if options.json:
        print(report(found))
    else:
        console = Console(soft_wrap=True, markup=False)
        for finding in found:
            line = Text(f"{finding.level:>6}  {finding.name}: {finding.text}")
            line.stylize(finding.level, 0, 6)
            console.print(line)
    if any(finding.level == "red" for finding in found):
        sys.exit(1)
