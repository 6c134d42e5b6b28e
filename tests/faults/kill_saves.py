"""Kill a run at random moments while it saves; whatever is left must load, and change nothing.

    python -m tests.faults.kill_saves --kills 200            # one process, plain PyTorch
    python -m tests.faults.kill_saves --kills 20 --ranks 2   # DeepSpeed ZeRO-3

A run is started, killed (SIGKILL, every rank) at a random moment of a random save, and started
again in the same folder, until it ends; then the next one. After every kill the newest checkpoint
must load, and be no older than the newest that was visible before it. After every whole run the
bits of the losses, the hash of the weights and the sorted (step, sample id) pairs must be those of
a run that nobody killed. Prints what it counted as JSON; exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from slap_ds.checkpoint import find as checkpoint
from slap_ds.distributed.comm import Comm
from slap_ds.engine.whole_state import whole_weights
from slap_ds.jsonl import read_lines
from tests.recipes import tiny_config, tiny_model

STEPS = 8
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.ranks_preload", "slap_ds.train.loop", "slap_ds.train.run"])


def kill_saves(kills: int, ranks: int, background: bool, seed: int, work: Path) -> dict[str, Any]:
    """Kill runs `kills` times; returns the counts.

    Raises:
        AssertionError: a checkpoint did not load, or a run that was killed differs from one that
            was not.
    """
    chance = random.Random(seed)
    model = tiny_model(work / "model", hidden_size=96, intermediate_size=384)

    def config(name: str) -> Any:
        return tiny_config(
            model,
            work / name,
            steps=STEPS,
            data={"eval": []},
            batch={"candidates": 8, "micro_batch_tokens": 512},
            engine={"kind": "torch" if ranks == 1 else "deepspeed"},
            checkpoint={"every": 1, "async": background},
        )

    started = time.perf_counter()
    whole = config("whole")
    assert _wait(_start(whole, ranks)) == [0] * ranks
    expected = evidence(Path(whole.run_dir))
    took = statistics.median(
        r["checkpoint_write_s"] + r["checkpoint_stall_s"]
        for r in read_lines(Path(whole.run_dir) / "metrics.jsonl")
        if r["event"] == "checkpoint"
    )
    counts = {"kills": 0, "while_saving": 0, "loadable": 0, "runs": 0, "runs_equal": 0}
    while counts["kills"] < kills:
        killed = config(f"killed-{counts['runs']}")
        run_dir = Path(killed.run_dir)
        while True:
            before = _newest_step(run_dir)
            processes = _start(killed, ranks)
            # Not the first save of a start, or a run would never get on.
            target = before + chance.randint(2, 4)
            if counts["kills"] >= kills or not _reached(run_dir, target, processes):
                break
            time.sleep(chance.uniform(0, took))
            for process in chance.sample(processes, ranks):
                if process.pid is not None and process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)
            codes = _wait(processes)
            if codes == [0] * ranks:
                break
            counts["kills"] += 1
            root = run_dir / "checkpoints"
            counts["while_saving"] += any(p.name.startswith(".tmp") for p in root.iterdir())
            found = checkpoint.newest(run_dir, Comm())
            assert found is not None, f"nothing to load in {root}"
            assert found.step >= target - 1, f"{found.step} after {target} was being saved"
            whole_weights(found.folder)
            counts["loadable"] += 1
            print(json.dumps(counts), file=sys.stderr, flush=True)
        codes = _wait(processes)
        assert codes == [0] * ranks, f"a resumed run ended with {codes}"
        counts["runs"] += 1
        assert evidence(run_dir) == expected, f"{run_dir} differs from the run nobody killed"
        counts["runs_equal"] += 1
    counts["seconds"] = round(time.perf_counter() - started)
    return counts


def evidence(run_dir: Path) -> dict[str, Any]:
    """What must not differ: the losses' bits, the weights' hash, the sorted ledger."""
    found = checkpoint.newest(run_dir, Comm())
    assert found is not None
    digest = hashlib.sha256()
    for name, value in sorted(whole_weights(found.folder).items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    records = read_lines(run_dir / "metrics.jsonl")
    ledger = [(r["step"], i) for r in read_lines(run_dir / "picks.jsonl") for i in r["ids"]]
    return {
        "losses": [r["loss"].hex() for r in records if r["event"] == "train"],
        "weights": digest.hexdigest(),
        "ledger": sorted(ledger),
    }


def _newest_step(run_dir: Path) -> int:
    found = checkpoint.find(run_dir)
    return found[-1].step if found else 0


def _reached(run_dir: Path, target: int, processes: list[Any]) -> bool:
    """Wait until step `target` is being saved; False: the run ended before."""
    root = run_dir / "checkpoints"
    signs = [root / f".tmp-{target:06d}", root / f"step-{target:06d}"]
    while not any(sign.exists() for sign in signs):
        if not all(process.is_alive() for process in processes):
            return False
        time.sleep(0.0005)
    return True


def _start(config: Any, ranks: int) -> list[Any]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [
        _context.Process(target=_rank, args=(config, rank, ranks, port)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def _wait(processes: list[Any]) -> list[int | None]:
    for process in processes:
        process.join(240)
    return [process.exitcode for process in processes]


def _rank(config: Any, rank: int, ranks: int, port: int) -> None:
    import torch

    from slap_ds.train.loop import train
    from slap_ds.train.run import prepare

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    train(prepare(config))
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=1, help="1: plain PyTorch; more: ZeRO-3")
    parser.add_argument("--async", action="store_true", dest="background")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            counts = kill_saves(
                options.kills, options.ranks, options.background, options.seed, Path(folder)
            )
        except AssertionError as error:
            sys.exit(f"kill-saves: {error}")
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
