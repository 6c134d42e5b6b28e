"""launch, doctor, estimate: the machines a run will have."""

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
    launch.add_argument("--restarts", type=int, default=3, help="at most (default 3)")
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

    doctor = commands.add_parser("doctor", help="what this machine gives slap_ds")
    doctor.add_argument("--hostfile", help="check its hosts too, over ssh")
    doctor.add_argument("--run-dir", default=".", help="where the run will write (default: here)")
    doctor.add_argument(
        "--network", action="store_true", help="time an all-reduce between the hosts, too"
    )
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(run=_doctor)

    guess = commands.add_parser("estimate", help="memory and step time by formula")
    guess.add_argument("config")
    guess.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512, 4096])
    guess.add_argument("--sample-tokens", type=float, default=512, help="mean tokens per sample")
    guess.add_argument("--candidates-per-gpu", type=float, help="default: the config's on --gpus 1")
    guess.add_argument("--flops-per-s", type=float, default=400e12, help="reached by one GPU")
    guess.add_argument("--bytes-per-s", type=float, default=40e9, help="all-gather, per GPU")
    guess.set_defaults(run=_estimate, takes_overrides=True)


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


def _estimate(options: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    from slap_ds.config.file import read_config
    from slap_ds.estimate import Hardware, Shape, estimate
    from slap_ds.models.load import load_config

    config = read_config(options.config, rest)
    shape = Shape.of(load_config(config.model.path, config.model.config), config.model.lora)
    hardware = Hardware(options.flops_per_s, options.bytes_per_s)
    per_gpu = options.candidates_per_gpu or config.batch.candidates / options.gpus[0]
    found = [
        estimate(config, shape, options.sample_tokens, 0.5, gpus, per_gpu, hardware)
        for gpus in options.gpus
    ]
    keep = config.selection.keep
    table = Table(title=f"{shape.parameters / 1e9:.2f} B parameters, keep ratio {keep:g}")
    table.add_column("GPUs")
    for e in found:
        table.add_column(str(e.gpus), justify="right")
    for part in found[0].memory_gib:
        table.add_row(f"GiB: {part}", *(f"{e.memory_gib[part]:.2f}" for e in found))
    table.add_row("GiB per GPU", *(f"{e.total_gib:.1f}" for e in found), style="bold")
    for part in found[0].host_gib:
        table.add_row(f"GiB on its host: {part}", *(f"{e.host_gib[part]:.2f}" for e in found))
    table.add_row("candidates per step", *(str(e.candidates) for e in found))
    for part in found[0].step_s:
        table.add_row(f"seconds: {part}", *(f"{e.step_s[part]:.3f}" for e in found))
    table.add_row("step / full training", *(f"{e.ratio_to_full:.3f}" for e in found), style="bold")
    table.add_row("selection share", *(f"{e.selection_share:.2%}" for e in found))
    Console(markup=False).print(table)
