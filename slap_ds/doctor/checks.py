"""`slap-ds doctor`: what this machine, and the hosts of a host file, give a run.

    examine(hostfile, run_dir) -> [Finding]     green: fine; yellow: works, but; red: will not work

Nothing is started or changed, unless the network is to be measured: that starts one process on each
host for some seconds. Without arguments it looks at this machine alone.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import random
import re
import resource
import shlex
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
from packaging.requirements import Requirement
from packaging.version import Version

from slap_ds.doctor.interfaces import Interface
from slap_ds.engine.build_locks import locks
from slap_ds.errors import counted
from slap_ds.launch.environment import discover, read_hostfile
from slap_ds.ops import active_path

Level = Literal["green", "yellow", "red"]
GIB = 2**30
# A build of DeepSpeed's takes a minute or two; a lock this old has lost its owner.
STALE_LOCK_S = 600
SKEW_S = 5
# Between nodes a 10 Gb/s port reaches this; whatever is slower is hardly the one that was meant.
SLOW_BYTES_PER_S, SLOW_LATENCY_S = 1e9, 2e-3
# What a host is asked over ssh: its clock, whether our Python is there, GPUs, cores, interfaces.
_ASK = (
    "date +%s.%N; test -x {python} && echo yes || echo no; "
    "nvidia-smi -L 2>/dev/null | wc -l; getconf _NPROCESSORS_ONLN; "
    "{variables} {python} -m slap_ds.doctor.interfaces 2>/dev/null || echo unknown"
)
_NETWORK_S = 45
_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5")
# What the processes of the network test need from here, beside NCCL's and gloo's variables.
_PASSED = ("PATH", "LD_LIBRARY_PATH", "DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class Finding:
    """One line: `name` is what was looked at, `text` what was found and, if red, what to do."""

    level: Level
    name: str
    text: str


def examine(
    hostfile: str | None = None,
    run_dir: str = ".",
    environ: Mapping[str, str] = os.environ,
    measure: bool = False,
) -> list[Finding]:
    """All findings, in the order of the functions below.

    Args:
        measure: time an all-reduce between the hosts, if nothing else is red.
    """
    found = [*versions(), *devices(), *operator(), *compiler()]
    found += [*disk(run_dir), *files(), *shared_memory(), *build_locks(environ)]
    found += [*launch(environ), *interfaces(environ), *master_port(environ)]
    if hostfile is not None:
        found += hosts(hostfile, environ)
        if measure and all(finding.level != "red" for finding in found):
            found += network(hostfile, environ)
    return found


def report(found: list[Finding]) -> str:
    """The findings as JSON: `ok`, and `findings` with level, name and text."""
    ok = all(finding.level != "red" for finding in found)
    lines = [asdict(finding) for finding in found]
    return json.dumps({"ok": ok, "findings": lines}, indent=2, ensure_ascii=False)


def versions() -> Iterator[Finding]:
    """What is installed against the ranges that were tested, as the package's metadata has them."""
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding("green", "python", f"{python}, {sys.executable}")
    for text in importlib.metadata.requires("slap_ds") or []:
        wanted = Requirement(text)
        extra = re.search(r"extra == .([\w-]+)", str(wanted.marker or ""))
        if extra and extra[1] == "test":
            continue
        range_ = ",".join(sorted(map(str, wanted.specifier), reverse=True))
        install = f"pip install '{wanted.name}{range_}'"
        try:
            version = Version(importlib.metadata.version(wanted.name))
        except importlib.metadata.PackageNotFoundError:
            if extra is None:
                yield Finding("red", wanted.name, f"not installed: {install}")
            continue
        lowest = [Version(one.version) for one in wanted.specifier if one.operator == ">="]
        if wanted.specifier.contains(version, prereleases=True):
            yield Finding("green", wanted.name, f"{version}, tested: {range_}")
        elif lowest and version < lowest[0]:
            yield Finding("red", wanted.name, f"{version} is too old, tested: {range_}: {install}")
        else:
            told = f"{version} is newer than what was tested, {range_}; if it fails: {install}"
            yield Finding("yellow", wanted.name, told)


def devices() -> Iterator[Finding]:
    """GPUs and NCCL as torch sees them."""
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
            text = f"{lock} is {age_s:.0f} s old: a build is running, or was just killed"
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


def hosts(hostfile: str, environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """The host file, and every host in it over ssh."""
    try:
        slots = read_hostfile(hostfile)
    except (ValueError, OSError) as error:
        yield Finding("red", "hostfile", str(error))
        return
    yield Finding(
        "green",
        "hostfile",
        f"{counted(len(slots), 'host')}, {counted(sum(slots.values()), 'rank')}",
    )
    if shutil.which("pdsh") is None:
        yield Finding("yellow", "pdsh", "not found: launch/multi_node.sh needs it; others do not")
    if shutil.which("ssh") is None:
        yield Finding("red", "ssh", "not found: hosts cannot be reached")
        return
    with ThreadPoolExecutor(32) as pool:
        asked = _ASK.format(python=sys.executable, variables=_assignments(_interfaces(environ)))
        for finding, interfaces in pool.map(lambda n: _host(n, slots[n], asked), slots):
            yield finding
            if len(slots) > 1 and interfaces:
                yield _choice(finding.name, json.loads(interfaces))


def network(hostfile: str, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Latency and bandwidth of an all-reduce over one rank of each host, started over ssh."""
    names = list(read_hostfile(hostfile))
    if len(names) == 1:
        yield Finding("green", "bandwidth", "one host: there is no network to measure")
        return
    passed = {name: environ[name] for name in _PASSED if name in environ}
    port = environ.get("MASTER_PORT") or str(random.randint(20000, 29999))
    jobs = []
    for rank, name in enumerate(names):
        variables = {**passed, **_interfaces(environ), "RANK": str(rank), "LOCAL_RANK": "0"}
        variables |= {"WORLD_SIZE": str(len(names)), "LOCAL_WORLD_SIZE": "1"}
        variables |= {"MASTER_ADDR": names[0], "MASTER_PORT": port}
        task = f"{shlex.quote(sys.executable)} -m slap_ds bench network --json - --timeout-s 30"
        command = f"cd {shlex.quote(os.getcwd())} && {_assignments(variables)} {task}"
        jobs.append(
            subprocess.Popen(
                [*_SSH, name, command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    failed, result, deadline = [], None, time.monotonic() + _NETWORK_S
    for name, job in zip(names, jobs, strict=True):
        try:
            out, said = job.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            job.kill()
            job.communicate()
            failed.append(f"{name}: no answer in {_NETWORK_S} s")
            continue
        if job.returncode:
            last = (said.strip().splitlines() or [f"exit code {job.returncode}"])[-1]
            failed.append(f"{name}: {last[:300]}")
        elif name == names[0]:
            result = next((line for line in out.splitlines() if line.startswith("{")), None)
    if failed or result is None:
        text = f"an all-reduce over {len(names)} hosts failed: {'; '.join(failed) or 'no result'}"
        yield Finding("red", "bandwidth", f"{text}; is port {port} blocked, or IFNAME wrong?")
        return
    told = json.loads(result)
    speed, latency = told["bus_bytes_per_s"], told["latency_s"]
    text = f"{speed / 1e9:.2f} GB/s, {latency * 1e6:.0f} us a small message ({told['device']})"
    if speed < SLOW_BYTES_PER_S or latency > SLOW_LATENCY_S:
        text += ": slower than a 10 Gb/s port; name the fast interface with IFNAME, if there is one"
        yield Finding("yellow", "bandwidth", text)
    else:
        yield Finding("green", "bandwidth", text)


def _interfaces(environ: Mapping[str, str]) -> dict[str, str]:
    return {n: v for n, v in environ.items() if n.startswith(("NCCL_", "GLOO_"))}


def _assignments(variables: Mapping[str, str]) -> str:
    return "env " + " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())


def _choice(host: str, told: dict[str, list[str] | None]) -> Finding:
    """Whether the interface that the ranks of a host will take leads to other hosts."""
    there = [Interface(*one) for one in told["there"] or []]
    library = "nccl" if torch.cuda.is_available() else "gloo"
    name = f"{host} network"
    others = [f"{i.name} {i.address}" for i in there if not i.loopback and not i.virtual]
    advice = f"export IFNAME, one of {', '.join(others)}" if others else "it has no other"
    if told[library] is None:
        return Finding("red", name, f"no interface of the name {library} was given: {advice}")
    chosen = Interface(*told[library] or ())
    text = f"{library} takes {chosen.name}, {chosen.address}"
    if chosen.loopback:
        text += f": no other host can reach that; {advice}, or correct its name in /etc/hosts"
        return Finding("red", name, text)
    if chosen.virtual:
        return Finding("yellow", name, f"{text}: a network of containers on that host; {advice}")
    return Finding("green", name, text)


def _host(name: str, slots: int, asked: str) -> tuple[Finding, str]:
    """What the host answered, and its interfaces as JSON; "": not told."""
    command = [*_SSH, name, asked]
    before = time.time()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return Finding("red", name, "unreachable: ssh gave no answer in 20 s"), ""
    after = time.time()
    answer = done.stdout.split()
    if done.returncode or len(answer) < 4:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Finding("red", name, f"unreachable by ssh without a password: {said}"), ""
    clock, python, gpus, cores = float(answer[0]), answer[1], int(answer[2]), int(answer[3])
    if python != "yes":
        text = f"no {sys.executable} there: the same path is needed everywhere"
        return Finding("red", name, text), ""
    interfaces = answer[4] if answer[4:] and answer[4] != "unknown" else ""
    there, what = (gpus, "GPUs") if gpus or torch.cuda.is_available() else (cores, "cores")
    if slots > there:
        text = f"slots={slots}, but {there} {what} there: lower slots"
        return Finding("red", name, text), interfaces
    # The clock was read somewhere between the two times here.
    skew_s = max(before - clock, clock - after, 0.0)
    if skew_s > SKEW_S:
        text = f"its clock is {skew_s:.0f} s off: logs will not line up"
        return Finding("yellow", name, text), interfaces
    return Finding("green", name, f"{there} {what} for {slots} slots"), interfaces
