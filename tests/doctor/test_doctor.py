"""Faults planted one at a time; `slap-ds doctor` finds each, and exits with 1."""

import collections
import importlib.metadata
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from slap_ds import cli
from slap_ds.doctor import checks as doctor

Usage = collections.namedtuple("Usage", "total used free")


def red(*arguments):
    """(exit code, {name: text} of the red findings) of one `slap-ds doctor`, in this process."""
    return judge(lambda: cli.main(["doctor", "--json", *arguments]))


def judge(call):
    import contextlib
    import io

    out, code = io.StringIO(), 0
    with contextlib.redirect_stdout(out):
        try:
            call()
        except SystemExit as stop:
            code = stop.code
    told = json.loads(out.getvalue())
    found = {each["name"]: each["text"] for each in told["findings"] if each["level"] == "red"}
    assert told["ok"] == (not found)
    assert code == (1 if found else 0)
    return found


@pytest.fixture(autouse=True)
def sound_machine(monkeypatch, tmp_path):
    """No faults but those a test plants."""
    # The name of a container may have the loopback's address alone.
    monkeypatch.setattr(doctor, "_choice", lambda host, told: doctor.Finding("green", host, ""))
    for name in list(os.environ):
        if name.startswith(("MASTER_", "NCCL_", "GLOO_", "SLURM_", "OMPI_", "PMI")):
            monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(2**40, 0, 2**40))
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")


def plant_ssh(tmp_path, script):
    """An ssh that runs `script`; what follows the host name is in $command."""
    ssh = tmp_path / "bin" / "ssh"
    ssh.write_text(f"#!/bin/bash\nhost=${{@: -2:1}} command=${{@: -1}}\n{script}\n")
    ssh.chmod(0o755)


def plant_hosts(tmp_path, text):
    (tmp_path / "hosts").write_text(text)
    return "--hostfile", str(tmp_path / "hosts")


def test_a_sound_machine_is_no_error(tmp_path):
    plant_ssh(tmp_path, 'eval "$command"')
    assert red() == {}
    assert red(*plant_hosts(tmp_path, "localhost slots=1\n")) == {}


def test_lines_for_people_carry_the_level(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", "--hostfile", str(tmp_path / "nowhere")])
    assert stop.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert all(line.split()[0] in ("green", "yellow", "red") for line in lines)
    assert sum(line.startswith("   red  hostfile: no hostfile at") for line in lines) == 1


def test_fault_package_too_old(monkeypatch):
    real = importlib.metadata.version
    planted = {"deepspeed": "0.9.1"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: planted.get(name) or real(name))
    found = red()
    assert list(found) == ["deepspeed"]
    assert found["deepspeed"].startswith("0.9.1 is too old, tested: >=0.")


def test_fault_package_missing(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "pyarrow":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = red()
    assert list(found) == ["pyarrow"]
    assert found["pyarrow"].startswith("not installed: pip install 'pyarrow")


@pytest.mark.parametrize(
    ("version", "level", "told"),
    [
        ("5.16.9", "red", "5.16.9 is too old, tested: >=5.17,<5.25: pip install 'transformers>="),
        ("5.17.0", "green", "5.17.0, tested: >=5.17,<5.25"),
        ("5.24.3+local", "green", "5.24.3+local, tested: >=5.17,<5.25"),
        (
            "5.25.0rc1",
            "yellow",
            "5.25.0rc1 is newer than what was tested, >=5.17,<5.25; if it fail",
        ),
        ("5.25.0", "yellow", "5.25.0 is newer than what was tested, >=5.17,<5.25; if it fails: pi"),
        ("6.0", "yellow", "6.0 is newer than what was tested"),
    ],
)
def test_versions_are_held_against_the_tested_ranges(version, level, told, monkeypatch):
    """An extra is looked at where it is installed, what only tests need is not."""

    def installed(name):
        if name == "mpi4py":
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    ranges = ["transformers<5.25,>=5.17"]
    ranges += [f'{name}<5.25,>=5.17; extra == "{name}"' for name in ("lora", "mpi4py", "test")]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ranges)
    monkeypatch.setattr(importlib.metadata, "version", installed)
    found = list(doctor.versions())[1:]
    assert [(one.name, one.level) for one in found] == [("transformers", level), ("lora", level)]
    assert found[0].text.startswith(told)


def test_fault_disk_full(monkeypatch):
    planted = {"/dev/shm": Usage(2**40, 0, 2**40)}
    full = Usage(2**40, 2**40, 2**28)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: planted.get(str(folder), full))
    found = red()
    assert list(found) == ["disk"]
    assert "0.2 GiB free" in found["disk"]


def test_fault_run_dir_is_a_file(tmp_path):
    (tmp_path / "taken").write_text("")
    found = red("--run-dir", str(tmp_path / "taken"))
    assert list(found) == ["disk"]
    assert "taken is not a folder that can be written" in found["disk"]


def test_fault_few_open_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (500, hard))
    try:
        found = red()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert list(found) == ["file limit"]
    assert found["file limit"].startswith("500 open files allowed: ulimit -n ")


def test_fault_small_shared_memory(monkeypatch):
    planted = {"/dev/shm": Usage(2**26, 0, 2**26)}
    roomy = Usage(2**40, 0, 2**40)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: planted.get(str(folder), roomy))
    found = red()
    assert list(found) == ["shared memory"]
    assert "0.06 of 0.06 GiB free" in found["shared memory"]


def test_fault_stale_build_lock(tmp_path):
    lock = tmp_path / "extensions" / "py311_cpu" / "shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.write_text("")
    assert red() == {}  # a build may be going on
    os.utime(lock, (time.time() - 3600, time.time() - 3600))
    assert red() == {
        "extension cache": f"{lock} is 60 minutes old: a build was killed; remove the file"
    }


def test_fault_contradicting_launchers(monkeypatch):
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_SIZE": "4",
    }.items():
        monkeypatch.setenv(name, value)
    assert "RANK=0 contradicts OMPI_COMM_WORLD_RANK=3" in red()["launcher"]


def test_fault_unknown_interface(monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^docker0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib77")
    found = red()
    assert list(found) == ["network"]
    assert found["network"].startswith("GLOO_SOCKET_IFNAME=ib77, but this machine has lo")


def test_fault_port_taken(monkeypatch):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        assert red()["port"].startswith(f"MASTER_PORT {port} cannot be used here")
    assert red() == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("node1 slots=2\nnode1 slots=2\n", "line 2: node1 is listed twice"),
        ("node1 slots=0\n", "line 1: node1 has 0 slots"),
        ("node1 slots=two\n", "expected `HOST slots=GPUS`"),
        ("", "names no host"),
    ],
)
def test_fault_bad_hostfile(text, words, tmp_path):
    found = red(*plant_hosts(tmp_path, text))
    assert list(found) == ["hostfile"]
    assert words in found["hostfile"]


def test_fault_hosts_that_cannot_serve(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    plant_ssh(
        tmp_path,
        """case $host in
  far) echo 'ssh: connect to host far port 22: No route to host' >&2; exit 255 ;;
  bare) eval "${command//test -x*echo no;/echo no;}" ;;
  *) eval "$command" ;;
esac""",
    )
    text = f"near slots=1\nfar slots=1\nbare slots=1\nsmall slots={os.cpu_count() + 1}\n"
    assert red(*plant_hosts(tmp_path, text)) == {
        "far": "unreachable by ssh without a password: ssh: connect to host far port 22: "
        "No route to host",
        "bare": f"no {sys.executable} there: the same path is needed everywhere",
        "small": f"slots={os.cpu_count() + 1}, but {os.cpu_count()} cores there: lower slots",
    }


def test_a_wrong_clock_is_seen(tmp_path):
    plant_ssh(tmp_path, 'eval "${command/date +%s.%N/date -d -2min +%s.%N}"')
    _, hosts = plant_hosts(tmp_path, "late slots=1\n")
    (late,) = [finding for finding in doctor.hosts(hosts) if finding.name == "late"]
    assert late.level == "yellow"
    assert late.text.startswith("its clock is 120 s off")


def test_a_machine_without_tools_is_yellow(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    (finding,) = doctor.compiler()
    assert (finding.level, finding.text.split(":")[0]) == ("yellow", "c++ and ninja not found")


def test_it_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "slap_ds", "doctor", "--json", "--hostfile", "/nowhere"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert {"level": "red", "name": "hostfile"}.items() <= json.loads(done.stdout)["findings"][
        -1
    ].items()
