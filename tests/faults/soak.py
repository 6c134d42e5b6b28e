"""`make soak`: a ZeRO-3 run on two ranks under the supervisor, hurt at random about once a minute.

    python -m tests.faults.soak --minutes 20 --json FILE

At the end the run is asked to stop, an undisturbed run is made to the same step, and the two must
have the same losses, weights and ledger. Prints goodput (seconds of steps that count, over wall
time), the time from a fault to the first step that had not been done before, and the seconds
training stood still for a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from slap_ds.bench.environment import describe
from slap_ds.distributed.heart import PREEMPTED
from slap_ds.jsonl import read_lines
from tests.faults.harness import (
    assert_same,
    heartbeats,
    left_over,
    losses,
    with_fault,
    write_config,
)

FAULTS = ["rank killed", "rank frozen", "helper killed", "launcher killed", "SIGTERM", "slow rank"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--every-s", type=float, default=60, help="seconds between faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        result = soak(Path(folder), options.minutes * 60, options.every_s, options.seed)
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def soak(folder: Path, seconds: float, every_s: float, seed: int) -> dict:
    draw = random.Random(seed)
    config = write_config(
        folder, "soak", steps=100_000, checkpoint={"every": 20}, engine={"timeout_s": 20.0}
    )
    run_dir, log = folder / "soak", folder / "soak.log"
    start = time.monotonic()
    job = launch(config, log)
    faults, next_fault = [], start + every_s / 2
    pending = None
    while time.monotonic() - start < seconds or pending:
        time.sleep(0.25)
        now = time.monotonic()
        if job.poll() is not None:
            assert job.returncode == PREEMPTED, log.read_text()[-3000:]
            job = launch(config, log)  # as Slurm's requeue would
        if pending and pending["pid"] and psutil.pid_exists(pending["pid"]):
            pending["step"] = newest_step(run_dir)  # its attempt still goes on
        elif pending and newest_step(run_dir) > pending["step"]:
            pending["recovered_s"] = round(now - pending.pop("at"), 2)
            del pending["pid"]
            print(f"{now - start:6.0f} s  {pending}", file=sys.stderr, flush=True)
            faults.append(pending)
            pending, next_fault = None, max(next_fault, now + draw.uniform(2, 15))
        assert pending is None or now - pending["at"] < 300, log.read_text()[-3000:]
        if pending is None and now > next_fault and now - start < seconds:
            pending = hurt(draw, run_dir)
            next_fault = now + every_s
    job.send_signal(signal.SIGTERM)
    assert job.wait(120) == PREEMPTED, log.read_text()[-3000:]
    wall_s = time.monotonic() - start
    assert not left_over(str(config)), "processes are left"
    done = losses(run_dir)
    compare(folder, run_dir, len(done))
    records = read_lines(run_dir / "metrics.jsonl")
    stalls = [r["checkpoint_stall_s"] for r in records if r["event"] == "checkpoint"]
    useful_s = sum(r["step_s"] for r in records if r["event"] == "train")
    recovered = [f["recovered_s"] for f in faults if f["fault"] != "slow rank"]
    return {
        "wall_s": round(wall_s, 1),
        "steps": len(done),
        "faults": len(faults),
        "attempts": log.read_text().count("ended with") + 1,
        "goodput": round(useful_s / wall_s, 3),
        "recovery_p50_s": percentile(recovered, 50),
        "recovery_p95_s": percentile(recovered, 95),
        "checkpoint_stall_p50_s": percentile(stalls, 50),
        "checkpoint_stall_p95_s": percentile(stalls, 95),
        "checkpoints": len(stalls),
        "same_as_undisturbed": True,
        "by_fault": faults,
        **describe(),
    }


def launch(config: Path, log: Path) -> subprocess.Popen:
    command = ["slap-ds", "launch", "--restarts", "1000", "--backoff-s", "0.1", "--"]
    command += ["deepspeed", "--quiet", "--num_gpus", "2", "--module", "slap_ds", "train"]
    with log.open("ab") as file:
        return subprocess.Popen([*command, str(config)], stdout=file, stderr=file)


def hurt(draw: random.Random, run_dir: Path) -> dict | None:
    """One fault; None where the ranks are between two attempts."""
    try:
        rank = psutil.Process(draw.choice(heartbeats(run_dir))["pid"])
        helper = rank.parent()
        if newest_step(run_dir) < 0 or "launch" not in " ".join(helper.cmdline()):
            return None
        fault = draw.choice(FAULTS)
        at, pid = time.monotonic(), rank.pid
        if fault == "rank killed":
            rank.kill()
        elif fault == "rank frozen":
            rank.suspend()
        elif fault == "helper killed":
            helper.kill()
        elif fault == "launcher killed":
            helper.parent().kill()
        elif fault == "SIGTERM":
            rank.terminate()
        else:
            rank.suspend()
            time.sleep(2)
            rank.resume()
            pid = 0  # nobody ends
    except (psutil.NoSuchProcess, IndexError, AttributeError):
        return None
    return {"fault": fault, "step": newest_step(run_dir), "at": at, "pid": pid}


def compare(folder: Path, run_dir: Path, steps: int) -> None:
    """Make the undisturbed run, asked to stop at the same step; raises where they differ."""
    config = write_config(
        folder, "undisturbed", steps=100_000, checkpoint={"every": 20}, engine={"timeout_s": 60.0}
    )
    command = ["deepspeed", "--quiet", "--num_gpus", "2", "--master_port", "23979"]
    command += ["--module", "slap_ds", "train", str(config)]
    environ = {**os.environ, **with_fault(f"term@0,{steps - 1},forward")}
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == PREEMPTED, done.stderr[-3000:]
    assert_same(run_dir, folder / "undisturbed")


def newest_step(run_dir: Path) -> int:
    """The last step in metrics.jsonl, of which a restarted run cuts off what it repeats."""
    try:
        lines = (run_dir / "metrics.jsonl").read_bytes()[-20_000:].splitlines()
        steps = [json.loads(line)["step"] for line in lines[1:] if line.startswith(b'{"event": "t')]
        return max(steps, default=-1)
    except (OSError, ValueError):
        return -1


def percentile(values: list[float], share: int) -> float | None:
    if len(values) < 2:
        return values[0] if values else None
    return round(statistics.quantiles(values, n=100, method="inclusive")[share - 1], 2)


if __name__ == "__main__":
    main()
