"""The gather and the choice on 1 to 4 ranks: bytes, messages, seconds; and a model of more ranks.

    python benchmarks/bench_selection_scale.py --json benchmarks/results/selection_scale.json

Every rank holds the scores of its share of N candidates; gather, choice and broadcast are those of
the trainer (`Comm.gather`, `Slap`, `Comm.broadcast_picks`), gloo on this machine. The model's
parameters are then measured one by one, its prediction for the measured points is put beside them,
and its table of sketch widths on more ranks is printed twice: with these parameters and with those
of `slap-ds estimate`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from slap_ds.bench.environment import describe
from slap_ds.distributed.comm import Comm
from slap_ds.estimate import Hardware
from slap_ds.ops import farthest_point
from slap_ds.scoring import Scores
from slap_ds.selection import ScoredBatch, select
from slap_ds.selection.slap import Slap

KEEP = 0.6
WIDTHS = (256, 512, 4096)  # of a sketch, as the model's table shows them
MESSAGES = 5  # sizes and scores, number and picks, the hash of the picks


def main() -> None:
    options = arguments()
    if "RANK" in os.environ:
        rank_main(options)
        return
    measured = [point for world in options.ranks for point in launch(world, options)]
    parameters = measure_parameters(measured, options)
    for point in measured:
        told = model(point["ranks"], point["candidates"], point["dimensions"], parameters)
        point |= {f"model_{key}": told[key] for key in ("seconds", "select_s", "bytes", "messages")}
    estimate = {
        "latency_s": Hardware().latency_s,
        "bytes_per_s": Hardware().gather_bytes_per_s,
        "pair_dims_per_s": Hardware().pair_dims_per_s,
    }
    tables = {
        name: [
            {"ranks": ranks, "dimensions": d, **model(ranks, 64 * ranks, d, chosen)}
            for d in WIDTHS
            for ranks in (8, 64, 512, 1024, 2048, 4096)
        ]
        for name, chosen in (("this machine", parameters), ("estimate", estimate))
    }
    result = {
        "measured": measured,
        "parameters": parameters,
        "estimate_parameters": estimate,
        "model": tables,
        "environment": describe(),
    }
    show(result)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--candidates", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--dimensions", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json")
    return parser.parse_args()


def launch(world: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One process a rank, each with one thread; rank 0 writes what was measured."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "points.json")
        jobs = []
        for rank in range(world):
            environ = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank)}
            environ |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            command = [sys.executable, *sys.argv, "--json", str(out)]
            jobs.append(subprocess.Popen(command, env=environ))
        codes = [job.wait() for job in jobs]
        assert codes == [0] * world, codes
        points: list[dict[str, Any]] = json.loads(out.read_text())
        return points


def rank_main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    comm = Comm(dist.get_rank(), dist.get_world_size())
    points = [
        measure(comm, n, d, options.rounds) for n in options.candidates for d in options.dimensions
    ]
    points[0]["latency_s"] = min(exchange_s(comm) for _ in range(200))
    size = 2**23
    times = comm.time_all_reduce(size, 15)
    points[0]["bytes_per_s"] = 2 * (comm.world - 1) / comm.world * size / min(times)
    if comm.rank == 0:
        Path(options.json).write_text(json.dumps(points))
    dist.destroy_process_group()


def exchange_s(comm: Comm) -> float:
    start = time.perf_counter()
    comm.exchange(-1, "latency", [1])
    return time.perf_counter() - start


def measure(comm: Comm, n: int, d: int, rounds: int) -> dict[str, Any]:
    """Gather and choice of n candidates; minima over rounds, those least disturbed."""
    generator = torch.Generator().manual_seed(n + d)
    loss = torch.rand(n, generator=generator) * 3
    # Sketches of models have few large dimensions; equal ones would make all distances alike.
    sketch = torch.randn(n, d, generator=generator) / torch.arange(1, d + 1) ** 0.5
    mine = torch.arange(comm.rank, n, comm.world)
    local = Scores(mine, loss[mine], torch.ones(len(mine), dtype=torch.int64), sketch[mine])
    found = []
    for number in range(rounds + 1):
        comm.barrier(number, "round")
        comm.traffic.clear()
        point = once(comm, number, local, n)
        if number:  # the first round warms up
            found.append(point)
    least = {key: min(point[key] for point in found) for key in found[0]}
    return {"ranks": comm.world, "candidates": n, "dimensions": d, **least}


def once(comm: Comm, step: int, local: Scores, n: int) -> dict[str, float]:
    """Gather, choose and broadcast, as a training step does."""
    generator = torch.Generator().manual_seed(step)
    start, cpu = time.perf_counter(), time.process_time()
    whole = comm.gather(step, local, n)
    seen = ScoredBatch(loss=whole.mean_loss(), sketch=whole.gradient)
    gathered = time.perf_counter()
    selection = None
    if comm.rank == 0:
        selection = select(Slap(), seen, round(KEEP * n), generator)
    chosen = time.perf_counter()
    comm.broadcast_picks(step, selection)
    end = time.perf_counter()
    return {
        "gather_s": gathered - start,
        "select_s": chosen - gathered,
        "agree_s": end - chosen,
        "seconds": end - start,
        # Of this rank: on a busy machine wall time is mostly the others'.
        "cpu_s": time.process_time() - cpu,
        "bytes": comm.bytes_sent,
        "messages": sum(count for count, _ in comm.traffic.values()),
    }


def measure_parameters(
    measured: list[dict[str, Any]], options: argparse.Namespace
) -> dict[str, float]:
    """What the model needs; latency and bandwidth are those of the largest number of ranks."""
    torch.set_num_threads(1)
    last = max(options.ranks)
    at = next(p for p in measured if p["ranks"] == last and "latency_s" in p)
    n, d = 4096, 512
    points = torch.randn(n, d)
    fps_s = least_s(lambda: farthest_point(points, torch.tensor([round(KEEP * n)]), first=0), 3)
    return {
        # Of one collective, per doubling of ranks.
        "latency_s": at["latency_s"] / max(1.0, math.log2(last)),
        "bytes_per_s": at["bytes_per_s"],
        "pair_dims_per_s": pairs(n) * d / fps_s,
    }


def least_s(work: Any, repeats: int) -> float:
    """CPU seconds, the least of some repeats."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def pairs(n: float) -> float:
    """Distances that farthest points need: every pick to every candidate not picked before it."""
    picks = KEEP * n
    return picks * n - picks * picks / 2


def model(ranks: int, n: int, d: int, p: dict[str, float]) -> dict[str, float]:
    """Seconds, bytes received by one rank, messages, and bytes of sketches one rank holds."""
    several = float(ranks > 1)
    received = n * (4 * d + 20.0) * several
    hop_s = p["latency_s"] * math.log2(ranks)
    network_s = MESSAGES * hop_s + (received / p["bytes_per_s"] if several else 0.0)
    select_s = pairs(n) * d / p["pair_dims_per_s"]
    return {
        "candidates": n,
        "seconds": network_s + select_s,
        "network_s": network_s,
        "select_s": select_s,
        "bytes": received,
        "messages": MESSAGES * several,
        "held_bytes": 2 * 4.0 * n * d,  # as gathered, and in candidate order
    }


def show(result: dict[str, Any]) -> None:
    names = ("ranks", "N", "D", "wall s", "CPU s", "model: choice s", "KiB sent", "messages")
    print("| " + " | ".join(names) + " |\n|" + " --- |" * len(names))
    for p in result["measured"]:
        print(
            f"| {p['ranks']} | {p['candidates']:,} | {p['dimensions']:,} "
            f"| {p['seconds']:.4f} | {p['cpu_s']:.4f} | {p['model_select_s']:.4f} "
            f"| {p['bytes'] / 1024:,.0f} | {p['messages']:.0f} |"
        )
    for name, rows in result["model"].items():
        print(f"\n{name}\n| ranks | N | D | seconds | network s | select s | GiB held |")
        print("|" + " --- |" * 7)
        for r in rows:
            print(
                f"| {r['ranks']:,} | {r['candidates']:,} | {r['dimensions']:,} "
                f"| {r['seconds']:.4f} | {r['network_s']:.4f} | {r['select_s']:.4f} "
                f"| {r['held_bytes'] / 2**30:.3f} |"
            )
    print(json.dumps(result["parameters"], indent=1))


if __name__ == "__main__":
    main()
