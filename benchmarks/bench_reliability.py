"""What the safeguards of a step cost: stamps, hash of the picks, heartbeats and the watchdog.

    deepspeed --num_gpus 2 benchmarks/bench_reliability.py --json benchmarks/results/overhead.json

Two measurements in one process group. Steps with and without take turns, on one engine, on the same
candidate batch; the ratio is taken within each pair, and its median reported. "Without" replaces
the safeguards by nothing: no hash is exchanged, no stamp compared, no beat counted, and the
watchdog's thread rests. The exchanges whose values a step needs stay. The steps are the trainer's
own `train_step`. That ratio is as noisy as steps are; `parts` adds up what is too small for it:
the seconds of each safeguard alone, in long loops, times how often a step calls it, and the
processor time of the watchdog's thread, as a share of the median step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slap_ds.bench.environment import describe
from slap_ds.config.schema import Config
from slap_ds.data.batch import CandidateBatch
from slap_ds.distributed.comm import Comm
from slap_ds.distributed.heart import Heart
from slap_ds.distributed.watchdog import Watchdog, watch
from slap_ds.engine import start_ranks, stop_ranks
from slap_ds.launch.environment import rank_said
from slap_ds.selection import Selection
from slap_ds.train.record import train_step
from slap_ds.train.run import prepare


def main() -> None:
    options = arguments()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    folder = Path(options.folder or tempfile.mkdtemp()).absolute()
    with watch(folder, rank_said(os.environ), world, 600.0) as dog:
        config = base_config(options, folder)
        comm = start_ranks(config, dog)
        run = prepare(config, comm=comm)
        comm.heart.limit_s = 600.0
        pairs: list[dict[str, float]] = []
        for number in range(options.warmup + options.rounds):
            batch = CandidateBatch(run.inputs.train, next(run.stream))
            pair = {}
            # The order changes, so that neither always has the caches of the other.
            for name in ("with", "without") if number % 2 else ("without", "with"):
                comm.barrier(number, name)
                start = time.perf_counter()
                if name == "with":
                    train_step(run, number, batch)
                else:
                    with bare(dog):
                        train_step(run, number, batch)
                pair[name] = time.perf_counter() - start
            if number >= options.warmup:
                pairs.append(pair)
        step_s = statistics.median(pair["with"] for pair in pairs)
        shares = parts(run, dog, batch, step_s, options.calls)
        if comm.rank == 0:
            result = summary(pairs, shares, options, comm.world)
            print(json.dumps(result, indent=2))
            if options.json:
                Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
        dog.record(0)
        stop_ranks(comm)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--local_rank", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--candidates", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--calls", type=int, default=2000, help="of each safeguard alone")
    parser.add_argument("--folder", help="for heartbeats and the run (default: a temporary one)")
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds is {options.rounds}; quartiles need at least 2")
    return options


def base_config(options: argparse.Namespace, folder: Path) -> Config:
    """The compute-bound model of bench_step.py on the demo data."""
    return Config.model_validate(
        {
            "run_dir": str(folder),
            "steps": options.rounds + options.warmup,
            "model": {
                "config": {
                    "model_type": "llama",
                    "vocab_size": 2048,
                    "hidden_size": options.hidden,
                    "intermediate_size": options.hidden * 43 // 16,
                    "num_hidden_layers": options.layers,
                    "num_attention_heads": 8,
                    "num_key_value_heads": 8,
                    "pad_token_id": 0,
                    "eos_token_id": 2,
                    "bos_token_id": 0,
                },
                "tokenizer": "builtin:demo",
            },
            "data": {"train": ["builtin:demo/train"], "max_tokens": 256},
            "batch": {"candidates": options.candidates, "micro_batch_tokens": 512},
            "selection": {"method": "slap", "keep": 0.6},
        }
    )


@contextmanager
def bare(dog: Watchdog) -> Iterator[None]:
    """Steps without safeguards inside, for this measurement alone."""

    def exchange(self: Comm, step: int, phase: str, values: Any) -> np.ndarray:
        mine = np.asarray(values, dtype=np.int64)
        return self._all_gather(torch.from_numpy(mine), phase).numpy()

    replaced = [
        (Comm, "exchange", exchange),
        (Comm, "agree_picks", lambda self, step, selection: selection),
        (Heart, "beat", lambda self, phase, step=None: None),
        (Watchdog, "record", lambda self, code=None, cause="": None),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    limit_s, dog.heart.limit_s = dog.heart.limit_s, float("inf")
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
        dog.heart.limit_s = limit_s
        dog.heart.beat("benchmark")


def parts(
    run: Any, dog: Watchdog, batch: CandidateBatch, step_s: float, calls: int
) -> dict[str, float]:
    """Share of a step of `step_s` seconds that each safeguard takes, and their sum."""
    comm = run.comm
    counted = count_calls(run, batch)
    picks = Selection(torch.arange(len(batch)), torch.ones(len(batch)))
    took: dict[str, list[float]] = {"stamped": [], "plain": [], "hash": [], "beat": []}
    for _ in range(10):  # in turn, so that a slow second of the machine meets all of them
        took["stamped"].append(repeat(lambda: comm.exchange(0, "loop", [1]), calls // 10))
        with bare(dog):
            took["plain"].append(repeat(lambda: comm.exchange(0, "loop", [1]), calls // 10))
        took["hash"].append(repeat(lambda: comm.agree_picks(0, picks), calls // 10))
        took["beat"].append(repeat(lambda: comm.heart.beat("loop", 0), calls // 10))
    each = {name: statistics.median(values) for name, values in took.items()}
    shares = {
        "stamps": (each["stamped"] - each["plain"]) * counted["exchange"] / step_s,
        "hash_of_the_picks": each["hash"] * counted["agree_picks"] / step_s,
        "beats": each["beat"] * counted["beat"] / step_s,
        "watchdog_thread": thread_share("watchdog", 10.0),
    }
    return {**shares, "sum": sum(shares.values())}


def count_calls(run: Any, batch: CandidateBatch) -> dict[str, int]:
    """How often one step calls each safeguard."""
    counts = {"exchange": 0, "agree_picks": 0, "beat": 0}
    owners = {"exchange": Comm, "agree_picks": Comm, "beat": Heart}
    before = {name: getattr(owner, name) for name, owner in owners.items()}

    def counting(name: str) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            counts[name] += 1
            return before[name](*args, **more)

        return call

    for name, owner in owners.items():
        setattr(owner, name, counting(name))
    try:
        train_step(run, len(run.stream) - 1, batch)
    finally:
        for name, owner in owners.items():
            setattr(owner, name, before[name])
    # The hash is an exchange of its own, which has been timed with it.
    counts["exchange"] -= counts["agree_picks"]
    return counts


def repeat(call: Any, times: int) -> float:
    """Seconds a call."""
    started = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - started) / times


def thread_share(name: str, seconds: float) -> float:
    """Processor seconds a second of the thread called `name`."""
    (thread,) = [t for t in threading.enumerate() if t.name == name]
    assert thread.ident is not None
    clock = time.pthread_getcpuclockid(thread.ident)
    before = time.clock_gettime(clock)
    time.sleep(seconds)
    return (time.clock_gettime(clock) - before) / seconds


def summary(
    pairs: list[dict[str, float]], shares: dict[str, float], options: argparse.Namespace, world: int
) -> dict[str, Any]:
    ratios = [pair["with"] / pair["without"] for pair in pairs]
    settings = ("hidden", "layers", "candidates", "rounds")
    return {
        "ratio": round(statistics.median(ratios), 5),
        "ratio_quartiles": [round(q, 5) for q in statistics.quantiles(ratios, n=4)],
        "with_s": round(statistics.median(p["with"] for p in pairs), 4),
        "without_s": round(statistics.median(p["without"] for p in pairs), 4),
        "parts": {name: float(f"{share:.3g}") for name, share in shares.items()},
        "ranks": world,
        **{name: getattr(options, name) for name in settings},
        **describe(),
    }


if __name__ == "__main__":
    main()
