"""A sweep over nodes (or ranks): one launch a point, as a world cannot change its size.

for n: LAUNCHER with {n} -> slap-ds bench throughput ... --json POINT.json -> its points, merged
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slap_ds.launch.environment import read_hostfile


def sweep_nodes(
    values: Sequence[int], launcher: str | None, hostfile: str | None, arguments: Sequence[str]
) -> list[dict[str, Any]]:
    """Run `slap-ds bench throughput` with `arguments` on each number of nodes.

    Without a host file `values` are ranks of this machine.

    Args:
        launcher: a command that starts `python -m slap_ds` everywhere, `{n}` for the number; the
            arguments are put after it. Default: deepspeed, with --num_nodes or --num_gpus.

    Raises:
        ValueError: a number the host file has no hosts for, no `{n}`, or a launch that failed.
    """
    if launcher is not None and "{n}" not in launcher:
        raise ValueError(f"--launcher is {launcher!r}, expected {{n}} where the number belongs")
    if hostfile is not None:
        hosts = len(read_hostfile(hostfile))
        if max(values) > hosts:
            raise ValueError(f"--values asks for {max(values)} nodes, {hostfile} has {hosts}")
    if min(values) < 1:
        raise ValueError(f"--values has {min(values)}, expected numbers of nodes from 1 on")
    points = []
    for n in values:
        start = (launcher or default_launcher(hostfile)).replace("{n}", str(n))
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "point.json")
            command = [*shlex.split(start), *arguments, "--json", str(out)]
            print(shlex.join(command), file=sys.stderr, flush=True)
            code = subprocess.run(command, check=False).returncode
            if code or not out.exists():
                raise ValueError(f"{n} nodes: the launch ended with {code}; its output is above")
            for point in json.loads(out.read_text(encoding="utf-8"))["points"]:
                points.append({**point, "sweep": "nodes" if hostfile or launcher else "ranks"})
                points[-1]["value"] = n
    return points


def default_launcher(hostfile: str | None) -> str:
    """The launcher's command line; `{n}` in it: number of nodes with a host file, else of ranks."""
    if hostfile is None:
        return "deepspeed --num_gpus {n} --module slap_ds"
    return (
        f"deepspeed --quiet --force_multi --hostfile {shlex.quote(hostfile)} --num_nodes {{n}} "
        "--module slap_ds"
    )
