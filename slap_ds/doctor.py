"""`slap-ds doctor`: what this machine, and the hosts of a host file, give a run.

    examine(hostfile, run_dir) -> [Finding]     green: fine; yellow: works, but; red: will not work

Nothing is started or changed; without arguments it looks at this machine alone.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from slap_ds.builds import locks
from slap_ds.launch_env import discover, read_hostfile
from slap_ds.ops import active_path

Level = Literal["green", "yellow", "red"]
GIB = 2**30
# A build of DeepSpeed's takes a minute or two; a lock this old has lost its owner.
STALE_LOCK_S = 600
SKEW_S = 5
# What a host is asked over ssh: its clock, whether our Python is there, GPUs, cores.
_ASK = (
    "date +%s.%N; test -x {python} && echo yes || echo no; "
    "nvidia-smi -L 2>/dev/null | wc -l; getconf _NPROCESSORS_ONLN"
)


@dataclass(frozen=True)
class Finding:
    """One line: `name` is what was looked at, `text` what was found and, if red, what to do."""

    level: Level
    name: str
    text: str


def examine(
    hostfile: str | None = None, run_dir: str = ".", environ: Mapping[str, str] = os.environ
) -> list[Finding]:
    """All findings, in the order of the functions below."""
    found = [*versions(), *devices(), *operator(), *compiler()]
    found += [*disk(run_dir), *files(), *shared_memory(), *build_locks(environ)]
    found += [*launch(environ), *interfaces(environ), *master_port(environ)]
    if hostfile is not None:
        found += hosts(hostfile)
    return found


def report(found: list[Finding]) -> str:
    """The findings as JSON: `ok`, and `findings` with level, name and text."""
    ok = all(finding.level != "red" for finding in found)
    lines = [asdict(finding) for finding in found]
    return json.dumps({"ok": ok, "findings": lines}, indent=2, ensure_ascii=False)


def versions() -> Iterator[Finding]:
    """What the package says it needs against what is installed."""
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding("green", "python", f"{python}, {sys.executable}")
    for requirement in importlib.metadata.requires("slap_ds") or []:
        found = re.match(r"([\w-]+)(?:>=([\d.]+))?$", requirement)
        if found is None:  # of an extra
            continue
        name, least = found[1], found[2]
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("red", name, f"not installed: pip install '{requirement}'")
            continue
        if least and _numbers(version) < _numbers(least):
            text = f"{version}, expected {least} or newer: pip install '{requirement}'"
            yield Finding("red", name, text)
        else:
            yield Finding("green", name, version)


def devices() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        built = (
            f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU torch"
        )
        yield Finding("yellow", "devices", f"no GPU that torch sees ({built}): training is slow")
        return
    for index in range(torch.cuda.device_count()):
        one = torch.cuda.get_device_properties(index)
        yield Finding("green", f"gpu {index}", f"{one.name}, {one.total_memory / GIB:.0f} GiB")
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield Finding("green", "nccl", f"{nccl}, CUDA {torch.version.cuda}")


def operator() -> Iterator[Finding]:
    """The farthest-point operator: native code, or the fallback, which is much slower."""
    path, why = active_path()
    fallback = path == "pytorch fallback"
    yield Finding("yellow" if fallback else "green", "farthest points", f"{path} ({why})")


def compiler() -> Iterator[Finding]:
    """DeepSpeed compiles its own operators at first use."""
    missing = [tool for tool in ("c++", "ninja") if shutil.which(tool) is None]
    if missing:
        text = f"{' and '.join(missing)} not found: DeepSpeed cannot build operators, and the CPU "
        yield Finding("yellow", "compiler", text + "collectives and CPU offload need them")
    else:
        yield Finding("green", "compiler", str(shutil.which("c++")))


def disk(run_dir: str) -> Iterator[Finding]:
    """Whether checkpoints can be written where the run's folder is or will be."""
    folder = Path(run_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        yield Finding(
            "red", "disk", f"{folder} is not a folder that can be written: change run_dir"
        )
        return
    free = shutil.disk_usage(folder).free / GIB
    level: Level = "red" if free < 1 else "yellow" if free < 50 else "green"
    text = f"{free:.1f} GiB free at {folder}"
    if level != "green":
        text += ": a checkpoint takes about 16 bytes a parameter, 112 GB for 7 B"
    yield Finding(level, "disk", text)


def files() -> Iterator[Finding]:
    """Open files: connections of every rank to every other count too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    level: Level = "red" if soft < 512 else "yellow" if soft < 4096 else "green"
    text = f"{soft} open files allowed"
    if level != "green":
        text += f": ulimit -n {min(hard, 65536)}"
    yield Finding(level, "file limit", text)


def shared_memory(folder: str = "/dev/shm") -> Iterator[Finding]:
    """NCCL, gloo and DeepSpeed's CPU collectives talk through it inside a node."""
    if not Path(folder).is_dir():
        yield Finding("red", "shared memory", f"no {folder}: mount a tmpfs there")
        return
    usage = shutil.disk_usage(folder)
    level: Level = "red" if usage.free < GIB / 8 else "yellow" if usage.free < GIB else "green"
    text = f"{usage.free / GIB:.2f} of {usage.total / GIB:.2f} GiB free at {folder}"
    if level != "green":
        text += ": give a container more, such as --shm-size 16g"
    yield Finding(level, "shared memory", text)


def build_locks(environ: Mapping[str, str]) -> Iterator[Finding]:
    """A build that was killed leaves a lock that every later start waits for, without a word."""
    folder, found = locks(environ)
    for lock in found:
        age_s = time.time() - lock.stat().st_mtime
        if age_s > STALE_LOCK_S:
            text = f"{lock} is {age_s / 60:.0f} minutes old: a build was killed; remove the file"
            yield Finding("red", "extension cache", text)
        else:
            text = f"{lock} is {age_s:.0f} s old: a build is going on, or was killed just now"
            yield Finding("yellow", "extension cache", text)
    if not found:
        yield Finding("green", "extension cache", f"no lock in {folder}")


def launch(environ: Mapping[str, str]) -> Iterator[Finding]:
    """The variables of the launcher that started this process."""
    try:
        place = discover(environ)
    except ValueError as error:
        yield Finding("red", "launcher", str(error))
        return
    yield Finding("green", "launcher", f"{place.launcher}: rank {place.rank} of {place.world}")


def interfaces(environ: Mapping[str, str]) -> Iterator[Finding]:
    """The network interfaces that NCCL and gloo are told to use."""
    there = [name for _, name in socket.if_nameindex()]
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        wanted = environ.get(variable)
        if not wanted:
            continue
        # NCCL takes a list of prefixes, `=` for exact names, `^` for all others.
        names = wanted.removeprefix("=").split(",")
        known = wanted.startswith("^") or any(one.startswith(n) for one in there for n in names)
        if known:
            yield Finding("green", "network", f"{variable}={wanted}")
        else:
            text = f"{variable}={wanted}, but this machine has {', '.join(there)}"
            yield Finding("red", "network", text)


def master_port(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Whether rank 0 could listen on MASTER_PORT here."""
    port = environ.get("MASTER_PORT", "")
    if not port.isdecimal() or "RANK" in environ:
        return
    try:
        socket.create_server(("", int(port))).close()
    except (OSError, OverflowError) as error:
        text = f"MASTER_PORT {port} cannot be used here ({error}): choose another"
        yield Finding("red", "port", text)
    else:
        yield Finding("green", "port", f"{port} is free here")


def hosts(hostfile: str) -> Iterator[Finding]:
    """The host file, and every host in it over ssh."""
    try:
        slots = read_hostfile(hostfile)
    except (ValueError, OSError) as error:
        yield Finding("red", "hostfile", str(error))
        return
    yield Finding("green", "hostfile", f"{len(slots)} hosts, {sum(slots.values())} ranks")
    if shutil.which("pdsh") is None:
        yield Finding("yellow", "pdsh", "not found: launch/multi_node.sh needs it; others do not")
    if shutil.which("ssh") is None:
        yield Finding("red", "ssh", "not found: hosts cannot be reached")
        return
    with ThreadPoolExecutor(32) as pool:
        yield from pool.map(_host, slots, slots.values())


def _host(name: str, slots: int) -> Finding:
    command = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", name]
    command.append(_ASK.format(python=sys.executable))
    before = time.time()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return Finding("red", name, "unreachable: ssh gave no answer in 20 s")
    after = time.time()
    answer = done.stdout.split()
    if done.returncode or len(answer) < 4:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Finding("red", name, f"unreachable by ssh without a password: {said}")
    clock, python, gpus, cores = float(answer[0]), answer[1], int(answer[2]), int(answer[3])
    if python != "yes":
        return Finding(
            "red", name, f"no {sys.executable} there: the same path is needed everywhere"
        )
    room, what = (gpus, "GPUs") if gpus or torch.cuda.is_available() else (cores, "cores")
    if slots > room:
        return Finding("red", name, f"slots={slots}, but {room} {what} there: lower slots")
    # The clock was read somewhere between the two times here.
    skew_s = max(before - clock, clock - after, 0.0)
    if skew_s > SKEW_S:
        return Finding("yellow", name, f"its clock is {skew_s:.0f} s off: logs will not line up")
    return Finding("green", name, f"{room} {what} for {slots} slots")


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version.split("+")[0])][:3]
