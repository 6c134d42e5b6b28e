"""Runs that are hurt: ranks started as a launcher would, a fault in one, what is left of it all.

baseline(folder)                   an undisturbed run, once a session
Job(config, fault).wait()          -> what the ranks said, their exit codes, how long it took
assert_same(run_dir, baseline)     invariant I: the same losses, weights and ledger, bit by bit
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import runpy
import sys
import time
from pathlib import Path

import psutil
import yaml

from slap_ds.checkpoint import find as checkpoints
from slap_ds.jsonl import read_lines
from slap_ds.launch.environment import free_port
from tests.faults import planted
from tests.recipes import SIZES

STEPS = 8
ROOT = Path(__file__).parents[2]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.faults.preload"])


def write_config(folder: Path, name: str, **sections) -> Path:
    """A tiny ZeRO-3 run with a checkpoint every third step."""
    raw = {
        "run_dir": str(folder / name),
        "steps": STEPS,
        "seed": 3,
        "model": {
            "config": {"model_type": "llama", **SIZES},
            "tokenizer": "builtin:demo",
        },
        "data": {"train": ["builtin:demo/train"], "max_tokens": 256},
        "batch": {"candidates": 16, "micro_batch_tokens": 384},
        "selection": {"method": "slap", "keep": 0.6},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2},
        "checkpoint": {"every": 3},
        "engine": {"timeout_s": 6.0, "start_timeout_s": 200.0},
    }
    for section, values in sections.items():
        raw[section] = {**raw[section], **values} if isinstance(values, dict) else values
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def with_fault(fault: str) -> dict[str, str]:
    """Variables that plant a fault in the ranks of a launcher."""
    path = [str(Path(__file__).parent / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {"SLAP_FAULT": fault, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def _rank(arguments, environ, log):
    """A rank as a launcher starts it, from a process that has imported torch already."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environ)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = ["slap_ds", *arguments]
    if environ.get("SLAP_FAULT"):
        planted.install(environ["SLAP_FAULT"])
    runpy.run_module("slap_ds", run_name="__main__", alter_sys=True)
    os._exit(0)


class Job:
    """The ranks of a run, without a launcher that could end them: they have to do it themselves."""

    def __init__(self, *configs: Path, fault: str = "", port: int | None = None, **environ: str):
        configs = configs if len(configs) > 1 else configs * 2
        world = len(configs)
        port = port or free_port()
        self.logs = [Path(f"{config}.{rank}.log") for rank, config in enumerate(configs)]
        self.start = time.monotonic()
        self.ranks = []
        for rank, config in enumerate(configs):
            self.logs[rank].unlink(missing_ok=True)
            variables = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "SLAP_FAULT": fault,
                **environ,
            }
            arguments = ["train", str(config)]
            process = _context.Process(target=_rank, args=(arguments, variables, self.logs[rank]))
            process.start()
            self.ranks.append(process)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.ranks:
            if process.is_alive():
                process.kill()
                process.join()

    def until(self, condition, timeout_s=200.0):
        """Wait for `condition()`, and say what the ranks said if it never comes."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)
        return time.monotonic()

    def wait(self, timeout_s=200.0) -> list[int]:
        """Exit codes, once all ranks have ended."""
        self.until(lambda: not any(p.is_alive() for p in self.ranks), timeout_s)
        return [process.exitcode for process in self.ranks]

    def kill_stopped(self):
        """What a launcher or the machine's owner does with a frozen process in the end."""
        for process in self.ranks:
            if process.is_alive() and psutil.Process(process.pid).status() == psutil.STATUS_STOPPED:
                process.kill()

    def said(self, rank: int | None = None) -> str:
        logs = self.logs if rank is None else [self.logs[rank]]
        return "\n".join(log.read_text(errors="replace") for log in logs if log.exists())

    def lines(self, rank: int) -> list[str]:
        """The errors that the rank reported."""
        return [line for line in self.said(rank).splitlines() if line.startswith("slap-ds: error")]


def run_through(config: Path, **environ: str) -> Job:
    """A run that has to finish."""
    with Job(config, **environ) as job:
        assert job.wait() == [0, 0], job.said()
    return job


def ledger(run_dir: Path) -> list[tuple[int, int]]:
    return sorted(
        (record["step"], sample)
        for record in read_lines(run_dir / "picks.jsonl")
        for sample in record["ids"]
    )


def losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_lines(run_dir / "metrics.jsonl") if "loss" in r]


def weights_hash(run_dir: Path) -> str:
    """Of the float32 weights in the newest checkpoint."""
    from slap_ds.engine.whole_state import whole_weights

    digest = hashlib.sha256()
    for name, value in sorted(whole_weights(checkpoints.find(run_dir)[-1].folder).items()):
        digest.update(name.encode() + value.detach().numpy().tobytes())
    return digest.hexdigest()


def assert_same(run_dir: Path, other: Path) -> None:
    """Invariant I between a disturbed run and an undisturbed one."""
    assert [step for step, _ in losses(run_dir)] == [step for step, _ in losses(other)]
    assert losses(run_dir) == losses(other)
    assert ledger(run_dir) == ledger(other)
    assert weights_hash(run_dir) == weights_hash(other)


def heartbeats(run_dir: Path) -> list[dict]:
    return [json.loads(p.read_text()) for p in sorted((run_dir / "heartbeat").glob("rank-*.json"))]


def left_over(word: str) -> list[psutil.Process]:
    """Processes whose command line holds `word`."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if word in line and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def at_step(run_dir: Path, step: int) -> bool:
    path = run_dir / "metrics.jsonl"
    return path.exists() and any(r["step"] >= step for r in read_lines(path))
