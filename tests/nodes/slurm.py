"""Debian's Slurm on the nodes of a cluster, without a database or munge."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

from tests.nodes.cluster import Cluster

CONFIG = """\
ClusterName=slap
SlurmctldHost={first.name}({first.address})
AuthType=auth/none
CredType=cred/none
SlurmUser=root
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.daemon.log
SlurmdLogFile={folder}/slurmd.%n.daemon.log
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    missing = [tool for tool in ("salloc", "slurmctld", "slurmd") if shutil.which(tool) is None]
    return f"not installed: {', '.join(missing)} (tests/nodes/install.sh)" if missing else None


def start(cluster: Cluster, folder: Path, environ: dict[str, str]) -> dict[str, str]:
    """Bring Slurm up; returns the variables its commands need. It ends with the nodes."""
    folder.mkdir()
    for name in ("state", *(f"spool.{node.name}" for node in cluster.nodes)):
        (folder / name).mkdir()
    nodes = "\n".join(
        f"NodeName={node.name} NodeAddr={node.address} CPUs=2 State=UNKNOWN"
        for node in cluster.nodes
    )
    config = CONFIG.format(first=cluster.nodes[0], folder=folder, nodes=nodes)
    (folder / "slurm.conf").write_text(config)
    # Inside a namespace no cgroup file system is mounted.
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    environ = {**environ, "SLURM_CONF": str(folder / "slurm.conf")}
    first = cluster.nodes[0]
    first.start(["slurmctld", "-D"], environ, folder, folder / "slurmctld.log")
    for node in cluster.nodes:
        command = ["slurmd", "-D", "-N", node.name]
        node.start(command, environ, folder, folder / f"slurmd.{node.name}.log")
    deadline = time.monotonic() + 30
    while True:
        log = folder / "sinfo.log"
        first.start(["sinfo", "-h", "-N", "-o", "%T"], environ, folder, log).wait(10)
        if log.read_text().split() == ["idle"] * len(cluster.nodes):
            return environ
        assert time.monotonic() < deadline, _logs(folder)
        time.sleep(0.5)


def _logs(folder: Path) -> str:
    done = subprocess.run(
        ["tail", "-n", "15", *sorted(folder.glob("*.log"))], capture_output=True, text=True
    )
    return done.stdout
