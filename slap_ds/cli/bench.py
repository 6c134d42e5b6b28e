"""bench: what these machines reach."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from slap_ds.cli.common import OVERRIDES, Commands
from slap_ds.errors import counted


def add(commands: Commands) -> None:
    bench = commands.add_parser("bench", help="measure: throughput, network")
    parts = bench.add_subparsers(required=True, metavar="WHAT")
    through = parts.add_parser(
        "throughput", help="tokens per second of the trainer's own steps", epilog=OVERRIDES
    )
    through.add_argument("config")
    through.add_argument("--steps", type=int, default=10, help="measured steps (default 10)")
    through.add_argument("--warmup", type=int, default=2, help="steps before them (default 2)")
    through.add_argument(
        "--data",
        choices=("random", "config"),
        default="random",
        help="random tokens (default; no tokenizer, no files), or the configuration's own data",
    )
    through.add_argument(
        "--sample-tokens",
        type=float,
        help="mean of random samples (default 512, or data.max_tokens if less)",
    )
    through.add_argument(
        "--spread", type=float, default=0.0, help="deviation of their log-lengths (default 0)"
    )
    through.add_argument(
        "--response-share", type=float, default=0.5, help="share of the tokens that is trained"
    )
    through.add_argument("--peak-flops", type=float, help="FLOP/s of one GPU, for MFU")
    through.add_argument("--sweep", choices=("nodes", "micro_batch_tokens", "keep"))
    through.add_argument("--values", type=float, nargs="+", default=[], help="values of the sweep")
    through.add_argument("--hostfile", help="sweep nodes over its hosts (default: ranks here)")
    through.add_argument("--launcher", help='sweep nodes: such as "srun -N {n} python -m slap_ds"')
    through.add_argument("--json", help="write the points there")
    through.add_argument("--plot", help="write a PNG there")
    through.set_defaults(run=_throughput, takes_overrides=True)

    network = parts.add_parser("network", help="latency and bandwidth between the ranks")
    network.add_argument(
        "--mib", type=float, default=64, help="MiB of the large message (default 64)"
    )
    network.add_argument(
        "--timeout-s", type=float, default=60, help="seconds to wait for other ranks"
    )
    network.add_argument("--json", help="write the result there; -: a line of the output")
    network.set_defaults(run=_network)


def _throughput(options: argparse.Namespace, rest: list[str]) -> None:
    if bool(options.sweep) != bool(options.values):
        raise ValueError("--sweep and --values go together: --sweep keep --values 1 0.8 0.6")
    if options.sweep == "nodes":
        _sweep_nodes(options, rest)
        return
    if options.hostfile or options.launcher:
        raise ValueError("--hostfile and --launcher are for --sweep nodes")
    from slap_ds.bench.environment import describe
    from slap_ds.bench.throughput import Data, throughput
    from slap_ds.cli.announce import tell
    from slap_ds.config.file import read_config
    from slap_ds.engine import stop_ranks

    config = read_config(options.config, rest)
    random = options.data == "random"
    run, points = throughput(
        config,
        options.steps,
        options.warmup,
        Data(random, options.sample_tokens, options.spread, options.response_share),
        options.sweep,
        options.values,
        options.peak_flops,
        tell,
    )
    if run.comm.rank == 0:
        _show(points, options, describe(run.engine.device))
    stop_ranks(run.comm)


def _sweep_nodes(options: argparse.Namespace, rest: list[str]) -> None:
    from slap_ds.bench.environment import describe
    from slap_ds.bench.nodes import sweep_nodes

    if "RANK" in os.environ:
        raise ValueError("--sweep nodes starts the launcher itself: run it without one")
    if any(value != int(value) for value in options.values):
        raise ValueError(f"--values is {options.values}, expected whole numbers of nodes")
    given = ["bench", "throughput", options.config]
    names = ("steps", "warmup", "data", "sample_tokens", "spread", "response_share", "peak_flops")
    for name in names:
        if getattr(options, name) is not None:
            given += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    values = [int(value) for value in options.values]
    points = sweep_nodes(values, options.launcher, options.hostfile, [*given, *rest])
    _show(points, options, describe())


def _show(points: list[dict[str, Any]], options: argparse.Namespace, machine: Any) -> None:
    from rich.console import Console

    from slap_ds.bench.show import plot, table

    # A launcher's pipe has no width; a table cut to 80 columns would lose its numbers.
    Console(width=max(100, 40 + 12 * len(points)), markup=False).print(table(points))
    if options.json:
        text = json.dumps({"points": points, "environment": machine}, indent=2)
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    if options.plot:
        plot(points, Path(options.plot))


def _network(options: argparse.Namespace, rest: list[str]) -> None:
    from slap_ds.bench.network import measure
    from slap_ds.engine import stop_ranks

    comm, result = measure(options.mib, options.timeout_s)
    if comm.rank == 0:
        if comm.world == 1:
            print(
                "a single rank has no peer, so nothing was measured: start this with a launcher, "
                "such as torchrun --nproc-per-node 2 -m slap_ds bench network",
                flush=True,
            )
        else:
            print(
                f"{counted(result['ranks'], 'rank')} on {counted(result['hosts'], 'host')}, "
                f"{result['device']}: a small message takes {result['latency_s'] * 1e6:.0f} us, "
                f"a large one {result['bus_bytes_per_s'] / 1e9:.2f} GB/s",
                flush=True,
            )
        if options.json == "-":
            print(json.dumps(result), flush=True)
        elif options.json:
            Path(options.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    stop_ranks(comm)
