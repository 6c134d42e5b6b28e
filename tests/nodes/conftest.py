"""Four machines, and the runs on one of them that all the others must equal.

Most tests use the first two.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slap_ds.config.file import write_config
from slap_ds.jsonl import read_lines
from tests.nodes.cluster import Cluster, why_not
from tests.recipes import losses, picks, tiny_config, tiny_model

REPO = Path(__file__).parents[2]
STEPS = 6


class Lab:
    """A cluster and a small run to start on it."""

    def __init__(self, cluster, folder):
        self.cluster, self.folder = cluster, folder
        self.model = tiny_model(folder / "model")
        for count in (2, 4):
            names = [f"{node.name} slots=1\n" for node in cluster.nodes[:count]]
            (folder / f"hosts-{count}").write_text("".join(names))

    def config(self, name, **sections):
        settings = {"steps": STEPS, "model": {"gradient_checkpointing": True}, **sections}
        path = self.folder / f"{name}.yaml"
        write_config(tiny_config(self.model, self.folder / name, **settings), path)
        return str(path)

    def environ(self, **variables):
        return {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
            "HOME": str(self.folder),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore::FutureWarning",
            "TORCH_EXTENSIONS_DIR": os.environ.get(
                "TORCH_EXTENSIONS_DIR", str(REPO / ".venv/torch_extensions")
            ),
            "SLAP_CACHE_DIR": str(self.folder / "cache"),
            "HOSTFILE": str(self.folder / "hosts-2"),
            "IFNAME": "eth0",
            "MASTER_PORT": str(random.randint(20000, 29000)),
            **variables,
        }

    def start(self, node, script, config, log, supervised=False, **variables):
        command = [str(REPO / "launch" / script), config]
        if supervised:
            command = [
                sys.executable,
                "-m",
                "slap_ds",
                "launch",
                "--backoff-s",
                "1",
                "--",
                *command,
            ]
        environ = self.environ(**variables)
        return self.cluster.nodes[node].start(command, environ, REPO, self.folder / log)

    def start_torchrun(self, config, name, nodes=2):
        """One torchrun on each node, its output in `NAME-RANK.log`."""
        port = self.environ()["MASTER_PORT"]
        where = {"NNODES": str(nodes), "GPUS": "1", "MASTER_ADDR": "node1", "MASTER_PORT": port}
        return [
            self.start(
                rank, "torchrun.sh", config, f"{name}-{rank}.log", NODE_RANK=str(rank), **where
            )
            for rank in range(nodes)
        ]

    def wait(self, jobs, timeout_s=100):
        """Exit codes of the jobs; a job that hangs is killed and fails the test."""
        deadline = time.monotonic() + timeout_s
        try:
            return [job.wait(max(0.1, deadline - time.monotonic())) for job in jobs]
        finally:
            for job in jobs:
                if job.poll() is None:
                    job.kill()

    def until_step(self, name, steps, jobs):
        """Wait until a run has written so many lines of metrics."""
        metrics = self.folder / name / "metrics.jsonl"
        deadline = time.monotonic() + 90
        while not metrics.exists() or len(read_lines(metrics)) < steps:
            assert all(job.poll() is None for job in jobs), self.logs()
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.1)

    def until_gone(self, timeout_s=60):
        """Wait until nothing of a run is left on any node."""
        deadline = time.monotonic() + timeout_s
        while left := [line for node in self.cluster.nodes for line in node.processes("slap_ds")]:
            assert time.monotonic() < deadline, f"processes are left: {left}"
            time.sleep(0.05)

    def heartbeats(self, name):
        """What the ranks of a run have written last, by rank."""
        found = sorted((self.folder / name / "heartbeat").glob("rank-*.json"))
        return [json.loads(path.read_text()) for path in found]

    def result(self, name):
        """Every number that must not depend on the launcher: losses, picks, evaluations."""
        metrics = read_lines(self.folder / name / "metrics.jsonl")
        evaluations = [record["eval_loss"] for record in metrics if record["event"] == "eval"]
        return losses(metrics), picks(self.folder / name), evaluations

    def logs(self):
        return "\n".join(
            f"== {path.name}\n{path.read_text(errors='replace')[-4000:]}"
            for path in sorted(self.folder.glob("*.log"))
        )


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("cluster")
    with Cluster(folder, 4) as cluster:
        yield Lab(cluster, folder)
    left = subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout
    assert f"slap{os.getpid()}" not in left


@pytest.fixture(scope="session")
def one_node(lab):
    """Two ranks on one node."""
    job = lab.start(0, "single_node.sh", lab.config("one-node"), "one-node.log", GPUS="2")
    assert lab.wait([job]) == [0], lab.logs()
    return lab.result("one-node")
