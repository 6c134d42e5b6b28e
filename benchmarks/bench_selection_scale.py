"""The gather and the choice on 1 to 4 ranks: bytes, messages, seconds; and a model of more ranks.

    python benchmarks/bench_selection_scale.py --json benchmarks/results/selection_scale.json

Every rank holds the scores of its share of N candidates; gather, choice and agreement are those of
the trainer (`Comm.gather`, `Slap`, `Shard`), gloo on this machine. The model's parameters are then
measured one by one, its prediction for the measured points is put beside them, and its table for
more ranks is printed twice: with these parameters and with those of `slap-ds estimate`.
"""

from __future__ import annotations

import argparse
import dataclasses
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

import numpy as np
import torch
import torch.distributed as dist

from slap_ds.bench.environment import describe
from slap_ds.distributed.comm import Comm
from slap_ds.estimate import Hardware
from slap_ds.ops import farthest_point, nearest_squared
from slap_ds.scoring import Scores
from slap_ds.selection import ScoredBatch, select
from slap_ds.selection.sharded import hold
from slap_ds.selection.slap import Slap

MODES = ("one_rank", "every_rank", "sharded")
KEEP = 0.6


def main() -> None:
    options = arguments()
    if "RANK" in os.environ:
        rank_main(options)
        return
    measured = [point for world in options.ranks for point in launch(world, options)]
    parameters = measure_parameters(measured, options)
    for point in measured:
        told = model(
            point["mode"], point["ranks"], point["candidates"], point["dimensions"], parameters
        )
        point |= {f"model_{key}": told[key] for key in ("seconds", "select_s", "bytes", "messages")}
    estimate = {
        **parameters,
        "latency_s": Hardware().latency_s,
        "bytes_per_s": Hardware().gather_bytes_per_s,
        "pair_dims_per_s": Hardware().pair_dims_per_s,
    }
    tables = {
        name: [
            {"mode": mode, "ranks": ranks, "dimensions": d, **model(mode, ranks, n, d, chosen)}
            for d in (256, 4096)
            for ranks in (8, 64, 512, 1024, 2048, 4096)
            for n in [64 * ranks]
            for mode in MODES
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
    points = []
    for n in options.candidates:
        for d in options.dimensions:
            points += measure(comm, n, d, options.rounds)
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


def measure(comm: Comm, n: int, d: int, rounds: int) -> list[dict[str, Any]]:
    """The three modes in turn on the same scores; minima over rounds, those least disturbed."""
    generator = torch.Generator().manual_seed(n + d)
    loss = torch.rand(n, generator=generator) * 3
    # Sketches of models have few large dimensions; equal ones would make all distances alike.
    sketch = torch.randn(n, d, generator=generator) / torch.arange(1, d + 1) ** 0.5
    holder = torch.arange(n) % comm.world
    mine = (holder == comm.rank).nonzero()[:, 0]
    local = Scores(mine, loss[mine], torch.ones(len(mine), dtype=torch.int64), sketch[mine])
    found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    picks = {}
    for number in range(rounds + 1):
        for mode in MODES:
            comm.barrier(number, mode)
            comm.traffic.clear()
            picks[mode], point = once(comm, number, mode, local, n, holder)
            point["bytes"], point["messages"] = comm.bytes_sent, _messages(comm)
            if number:
                found[mode].append(point)
    assert picks["one_rank"] == picks["every_rank"] == picks["sharded"]
    return [
        {
            "mode": mode,
            "ranks": comm.world,
            "candidates": n,
            "dimensions": d,
            **{key: min(p[key] for p in points) for key in points[0]},
        }
        for mode, points in found.items()
    ]


def once(
    comm: Comm, step: int, mode: str, local: Scores, n: int, holder: torch.Tensor
) -> tuple[list[int], dict[str, float]]:
    """Gather, choose, agree, as `trainer.train_step` does."""
    selector, generator = Slap(), torch.Generator().manual_seed(step)
    start, cpu = time.perf_counter(), time.process_time()
    shard = None
    if mode == "sharded":
        rest = comm.gather(step, dataclasses.replace(local, gradient=None), n)
        assert local.gradient is not None
        shard = hold(comm, step, local.positions, local.gradient, torch.arange(n), holder)
        seen = shard.stand_in(ScoredBatch(loss=rest.mean_loss()))
        selector = dataclasses.replace(selector, farthest=shard.farthest_point)
    else:
        whole = comm.gather(step, local, n)
        seen = ScoredBatch(loss=whole.mean_loss(), sketch=whole.gradient)
    gathered = time.perf_counter()
    selection = None
    if mode != "one_rank" or comm.rank == 0:
        selection = select(selector, seen, round(KEEP * n), generator)
    chosen = time.perf_counter()
    if mode == "one_rank":
        selection = comm.broadcast_picks(step, selection)
    else:
        assert selection is not None
        comm.agree_picks(step, selection)
    end = time.perf_counter()
    return selection.picks.tolist(), {
        "gather_s": gathered - start,
        "select_s": chosen - gathered,
        "agree_s": end - chosen,
        "seconds": end - start,
        # Of this rank: on a busy machine wall time is mostly the others'.
        "cpu_s": time.process_time() - cpu,
        "rounds": float(shard.rounds) if shard is not None else 0.0,
    }


def _messages(comm: Comm) -> int:
    return sum(count for count, _ in comm.traffic.values())


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
    rows = torch.randn(128, 1024)
    row_s = least_s(lambda: nearest_squared(rows, rows[:1]), 30)
    small = torch.randn(128, 8)
    call_s = least_s(lambda: nearest_squared(small, small[:1]), 30)
    sizes = (1024, 4096, 16384)
    per_round = {size: picks_per_round(size) for size in sizes}
    slope = math.log(per_round[sizes[-1]] / per_round[sizes[0]]) / math.log(sizes[-1] / sizes[0])
    return {
        # Of one collective, per doubling of ranks.
        "latency_s": at["latency_s"] / max(1.0, math.log2(last)),
        "bytes_per_s": at["bytes_per_s"],
        "pair_dims_per_s": pairs(n) * d / fps_s,
        # Rows are copied and packed for one target alone: memory, not arithmetic.
        "row_dims_per_s": 128 * (1024 - 8) / max(row_s - call_s, 1e-9),
        "call_s": call_s,
        "picks_per_round_at_1024": per_round[1024],
        "picks_per_round_slope": slope,
        **{f"picks_per_round_at_{size}": value for size, value in per_round.items()},
        # Greedy inside the pool, in NumPy: per pick.
        "greedy_s": least_s(lambda: np.minimum(np.zeros(512), np.zeros(512)).argmax(), 200),
    }


def picks_per_round(n: int) -> float:
    sketch = torch.randn(n, 32) / torch.arange(1, 33) ** 0.5
    shard = hold(Comm(), 0, torch.arange(n), sketch, torch.arange(n), torch.zeros(n))
    features = torch.arange(n, dtype=torch.float32)[:, None]
    shard.farthest_point(features, torch.tensor([round(KEEP * n)]), first=0)
    return round(KEEP * n) / shard.rounds


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


def model(mode: str, ranks: int, n: int, d: int, p: dict[str, float]) -> dict[str, float]:
    """Seconds, bytes received by one rank, messages, and bytes of sketches one rank holds."""
    m, hop = KEEP * n, p["latency_s"] * math.log2(max(ranks, 2)) * (ranks > 1)
    if mode != "sharded":
        received = n * (4 * d + 20.0)
        messages = 5.0 if mode == "one_rank" else 3.0
        select_s = pairs(n) * d / p["pair_dims_per_s"]
        rounds = 0.0
        held = 2 * 4.0 * n * d  # as gathered, and in candidate order
    else:
        per_round = p["picks_per_round_at_1024"]
        per_round *= max(n / 1024, 1 / 8) ** p["picks_per_round_slope"]
        pool = min(1024.0, max(128.0, n / 32))
        per_round = min(per_round, pool / 2)
        rounds = max(1.0, m / per_round)
        offers = ranks * 16 * (3 + math.ceil(2 * pool / ranks))
        # Sums move twice the bytes; a pool keeps what the last one had and did not pick.
        received = 20.0 * n + rounds * (offers + 2 * 4 * pool * pool) + 2 * 4 * d * (m + pool)
        messages = 4 + 3 * rounds
        rows_of_one = math.ceil(pool / ranks)
        row_s = p["call_s"] + pool * d / p["row_dims_per_s"]
        shrink_s = p["call_s"] + per_round * (n / ranks) * d / p["pair_dims_per_s"]
        select_s = rounds * (rows_of_one * row_s + shrink_s + per_round * p["greedy_s"])
        held = 4.0 * d * (n / ranks + 2 * pool)
    network_s = messages * hop + received * (ranks > 1) / p["bytes_per_s"]
    return {
        "candidates": n,
        "seconds": network_s + select_s,
        "network_s": network_s,
        "select_s": select_s,
        "bytes": received * (ranks > 1),
        "messages": messages,
        "rounds": rounds,
        "held_bytes": held,
    }


def show(result: dict[str, Any]) -> None:
    names = ("mode", "ranks", "N", "D", "wall s", "CPU s", "model: choice s")
    names += ("KiB sent", "messages", "model: messages")
    print("| " + " | ".join(names) + " |\n|" + " --- |" * len(names))
    for p in result["measured"]:
        print(
            f"| {p['mode']} | {p['ranks']} | {p['candidates']} | {p['dimensions']} "
            f"| {p['seconds']:.4f} | {p['cpu_s']:.4f} | {p['model_select_s']:.4f} "
            f"| {p['bytes'] / 1024:,.0f} | {p['messages']:.0f} | {p['model_messages']:.0f} |"
        )
    for name, rows in result["model"].items():
        print(f"\n{name}\n| mode | ranks | N | D | seconds | network s | select s | GiB held |")
        print("|" + " --- |" * 8)
        for r in rows:
            print(
                f"| {r['mode']} | {r['ranks']} | {r['candidates']:,} | {r['dimensions']} "
                f"| {r['seconds']:.4f} | {r['network_s']:.4f} | {r['select_s']:.4f} "
                f"| {r['held_bytes'] / 2**30:.3f} |"
            )
    print(json.dumps(result["parameters"], indent=1))


if __name__ == "__main__":
    main()
