"""The scripts in launch/ parse, refuse bad host files, and all come down to the same command."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from deepspeed.launcher.multinode_runner import PDSHRunner

from slap_ds.launch.environment import read_hostfile

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
MANIFESTS = sorted(LAUNCH.glob("kubernetes/*.yaml"))
ARGUMENTS = ["my run.yaml", "--selection.keep", "0.8"]
# Prints what it was called with, one argument a line, then the variables of interest.
FAKE = """#!/usr/bin/env bash
printf '%s\\n' "${0##*/}" "$@"
echo "--"
if [ -n "${DS_ENV_FILE:-}" ]; then cat "$DS_ENV_FILE"; fi
env | grep -E '^(MASTER_|GLOO_|NCCL_|PET_)' || true
if [ -n "${2:-}" ] && [ "${0##*/}" = srun ] && [ "$3" = bash ]; then exec "${@:3}"; fi
"""


@pytest.fixture
def start(tmp_path):
    """Start a script with fake launchers."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("deepspeed", "torchrun", "mpirun", "mpiexec", "srun"):
        (folder / name).write_text(FAKE)
        (folder / name).chmod(0o755)
    ssh = folder / "ssh"  # to a host, which is the last but one word
    ssh.write_text("#!/bin/bash\nhost=${*: -2:1}\n[[ ! $host =~ ^lost ]]\n")
    ssh.chmod(0o755)
    scontrol = folder / "scontrol"
    scontrol.write_text("#!/bin/sh\nprintf 'gpu1\\ngpu2\\n'\n")
    scontrol.chmod(0o755)
    (tmp_path / "hosts").write_text("# two nodes\ngpu1 slots=2\n\ngpu2 slots=3  # a bigger one\n")

    def run(script, arguments=ARGUMENTS, stdout=None, stderr=None, **variables):
        environ = {
            "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(LAUNCH.parent),
            **variables,
        }
        return subprocess.Popen(
            [LAUNCH / script, *arguments],
            cwd=tmp_path,
            env=environ,
            text=True,
            stdout=stdout,
            stderr=stderr,
        )

    return run


@pytest.fixture
def launch(start):
    """Run a script to its end; returns what the launchers were called with, and the exit code."""

    def run(script, arguments=ARGUMENTS, **variables):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with start(script, arguments, **pipes, **variables) as job:
            out, err = job.communicate(timeout=60)
        return subprocess.CompletedProcess(job.args, job.returncode, out, err)

    return run


SLURM = {
    "SLURM_JOB_ID": "41",
    "SLURM_JOB_NODELIST": "gpu[1-2]",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "1",
}


@pytest.mark.parametrize(
    ("script", "variables", "expected"),
    [
        (
            "single_node.sh",
            {},
            "deepspeed --quiet --num_gpus -1 --master_port 29500 --module slap_ds",
        ),
        ("single_node.sh", {"GPUS": "2", "MASTER_PORT": "7"}, "--num_gpus 2 --master_port 7"),
        (
            "multi_node.sh",
            {},
            "deepspeed --quiet --force_multi --hostfile hosts --launcher pdsh "
            "--master_addr gpu1 --master_port 29500 --module slap_ds",
        ),
        ("torchrun.sh", {}, "torchrun --nnodes 1 --node-rank 0 --nproc-per-node gpu"),
        (
            "torchrun.sh",
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "gpu1", "GPUS": "4"},
            "--nnodes 2 --node-rank 1 --nproc-per-node 4 --master-addr gpu1 --master-port 29500",
        ),
        ("openmpi.sh", {"IFNAME": "ib0"}, "mpirun -n 5 --hostfile hosts --bind-to none"),
        ("openmpi.sh", {"IFNAME": "ib0"}, "--mca oob_tcp_if_include ib0"),
        ("openmpi.sh", {"PASS": "MINE", "MINE": "a b"}, "-x MINE"),
        ("openmpi.sh", {"MPIRUN_ARGS": "--display-map -v"}, "--display-map -v"),
        ("mpich.sh", {}, "-genv MASTER_ADDR gpu1 -genv MASTER_PORT 29500"),
        (
            "slurm.sbatch",
            SLURM,
            "torchrun --nnodes 2 --node-rank 1 --nproc-per-node 8 --master-addr gpu1 "
            "--master-port 20041 -m slap_ds train",
        ),
        ("slurm.sbatch", {**SLURM, "STARTER": "python", "GPUS": "4"}, "srun --ntasks-per-node=4"),
    ],
)
def test_every_launcher_runs_the_same_command(launch, script, variables, expected):
    done = launch(script, **variables)
    assert done.returncode == 0, done.stderr
    called = done.stdout.split("\n--\n")
    last = called[-2] if script == "slurm.sbatch" and "STARTER" not in variables else called[0]
    lines = last.splitlines()
    assert lines[-5:] == ["slap_ds", "train", *ARGUMENTS]
    assert lines[-6] in ("-m", "--module")
    assert expected in done.stdout.replace("\n", " ")


def test_mpich_gets_its_own_kind_of_host_file(launch, tmp_path):
    (tmp_path / "bin" / "mpiexec").write_text('#!/bin/bash\necho "$1 $2 $3"; cat "$4"\n')
    assert launch("mpich.sh").stdout == "-n 5 -f\ngpu1:2\ngpu2:3\n"


def test_pdsh_hosts_get_the_variables_and_nothing_is_left_behind(launch, tmp_path):
    values = {"MINE": """a b$c"d'e`f\\g""", "NCCL_IB_HCA": "mlx5_0,mlx5_1"}
    done = launch("multi_node.sh", IFNAME="eth0", PASS="MINE", TMPDIR=str(tmp_path), **values)
    assert "GLOO_SOCKET_IFNAME=eth0\n" in done.stdout
    assert "NCCL_SOCKET_IFNAME=eth0\n" in done.stdout
    exported = Runner()
    for line in done.stdout.split("--\n")[1].splitlines(keepends=True):
        exported.add_export(*line.split("=", maxsplit=1))
    for name, value in values.items():
        shell = f'export {name}={exported.exports[name]}; printf %s "${name}"'
        assert subprocess.check_output(["bash", "-c", shell], text=True) == value
    assert "5 ranks, rank 0 on gpu1" in done.stderr
    assert not list(tmp_path.glob("tmp.*"))


class Runner(PDSHRunner):
    """What deepspeed makes of the lines of DS_ENV_FILE."""

    def __init__(self):
        self.exports = {}


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("multi_node.sh", "SLAP_ATTEMPT=2\n"),
        ("openmpi.sh", "-x\nSLAP_ATTEMPT\n"),
        ("mpich.sh", "-genv\nSLAP_ATTEMPT\n2\n"),
    ],
)
def test_every_host_learns_the_number_of_the_attempt(launch, script, expected):
    assert expected in launch(script, SLAP_ATTEMPT="2").stdout


# Says which signal it gets, and ends with the second.
LISTENER = """#!/bin/bash
signals=0
told() {
  signals=$((signals + 1))  # before the echo: the second signal may come in the middle of this
  echo "$1"
  if [ $signals = 2 ]; then exit 75; fi
}
trap 'told USR1' USR1
trap 'told TERM' TERM
echo up
while true; do sleep 0.05; done
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize(
    ("script", "launcher", "passed"),
    [
        ("multi_node.sh", "deepspeed", "TERM"),
        ("openmpi.sh", "mpirun", "USR1"),
        ("mpich.sh", "mpiexec", "USR1"),
    ],
)
def test_a_launcher_is_asked_to_stop_by_the_signal_that_it_passes_on(
    start, tmp_path, script, launcher, passed, number
):
    (tmp_path / "bin" / launcher).write_text(LISTENER)
    with start(script, stdout=subprocess.PIPE) as job:
        assert job.stdout.readline() == "up\n"
        job.send_signal(number)
        assert job.stdout.readline() == f"{passed}\n"
        job.send_signal(number)
        assert job.stdout.readline() == "TERM\n"
        assert job.wait(10) == 75


def test_a_launcher_ends_with_its_script(start, tmp_path):
    (tmp_path / "bin" / "mpirun").write_text(LISTENER.replace("echo up", "signals=1; echo up"))
    with start("openmpi.sh", stdout=subprocess.PIPE) as job:
        assert job.stdout.readline() == "up\n"
        job.kill()
        assert job.stdout.read() == "TERM\n"  # to its end: no process holds the pipe


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch"])
def test_torchrun_passes_on_usr1_and_waits_for_the_checkpoint(launch, script):
    told = launch(script, **SLURM).stdout
    assert "PET_SHUTDOWN_TIMEOUT=600\n" in told
    assert "PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1\n" in told
    assert "PET_SHUTDOWN_TIMEOUT=9\n" in launch(script, PET_SHUTDOWN_TIMEOUT="9", **SLURM).stdout


@pytest.mark.fault_row(18)
@pytest.mark.parametrize("script", ["multi_node.sh", "openmpi.sh", "mpich.sh"])
def test_bad_host_files_start_nothing(launch, script, tmp_path):
    done = launch(script, HOSTFILE="nowhere")
    assert done.returncode != 0
    assert done.stdout == ""
    assert "no hostfile at 'nowhere'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_hosts_that_cannot_be_reached_are_named_and_nothing_starts(launch, tmp_path):
    hosts = "gpu1 slots=2\nlost1 slots=2\ngpu2 slots=2\nlost2 slots=2\n"
    (tmp_path / "hosts").write_text(hosts)
    done = launch("multi_node.sh")
    assert (done.returncode, done.stdout) == (1, "")
    _, error = done.stderr.splitlines()
    named = re.search("no ssh without a password to (.*) of hosts: mend", error)[1]
    assert sorted(named.split()) == ["lost1", "lost2"]


@pytest.mark.fault_row(18)
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no host"),
        ("gpu1 slots=2\ngpu1 slots=2", "line 2: gpu1 is listed twice"),
        ("gpu1 slots=0", "line 1: gpu1 has 0 slots"),
        ("gpu1", "line 1: found 'gpu1', expected `HOST slots=GPUS`"),
        ("gpu1 slots=8 max_slots=9", "line 1: found 'gpu1 slots=8 max_slots=9'"),
        ("gpu1 slots=0\ngpu2", "line 1: .*; line 2: "),
    ],
)
def test_host_file_mistakes_are_told_together(text, words, tmp_path):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_hostfile(str(tmp_path / "hosts"))


def test_slurm_and_torchrun_refuse_what_cannot_work(launch):
    done = launch("slurm.sbatch", **SLURM, STARTER="mpirun")
    assert (done.returncode, done.stderr) == (
        2,
        "STARTER is mpirun, expected torchrun, python or deepspeed\n",
    )
    done = launch("torchrun.sh", NNODES="2")
    assert done.returncode == 2
    assert "MASTER_ADDR is not set" in done.stderr


def test_slurm_through_deepspeed(launch):
    done = launch("slurm.sbatch", **SLURM, STARTER="deepspeed", GPUS="4")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n--\n")[0].splitlines()
    assert lines[0] == "deepspeed"
    assert "--launcher_args=--ntasks-per-node=4 --kill-on-bad-exit=1" in lines
    assert lines[-5:-3] == [str(Path(sys.executable).with_name("slap-ds")), "train"]
    assert lines[-3:] == ARGUMENTS


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_parses_and_explains_every_variable(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", path], check=True)
    text = path.read_text(encoding="utf-8")
    head = text.split("set -euo pipefail")[0]
    for name in re.findall(r'"\$\{(\w+):=', text):
        assert re.search(rf"^# {name} ", head, re.MULTILINE), f"{name} is not explained"


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_start_the_same_command(path):
    documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    assert all({"apiVersion", "kind", "metadata", "spec"} <= set(each) for each in documents)
    commands = list(_commands(documents))
    assert commands
    for command in commands:
        assert command in (["torchrun", "-m", "slap_ds", "train"], ["launch/openmpi.sh"])
        assert (LAUNCH.parent / command[0]).is_file() or command[0] == "torchrun"


@pytest.mark.parametrize("name", ["trainjob", "pytorchjob"])
def test_pods_may_take_longer_to_save_than_torchrun_gives_them(name):
    text = (LAUNCH / f"kubernetes/{name}.yaml").read_text(encoding="utf-8")
    pods = list(_pods(list(yaml.safe_load_all(text))))
    assert pods
    for pod in pods:
        variables = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
        assert 120 < int(variables["PET_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]


def _pods(part):
    if isinstance(part, dict):
        if "containers" in part:
            yield part
        part = list(part.values())
    if isinstance(part, list):
        for each in part:
            yield from _pods(each)


def _commands(part):
    if isinstance(part, dict):
        if "command" in part:
            assert part["args"][0].endswith(".yaml")
            yield part["command"]
        part = list(part.values())
    if isinstance(part, list):
        for each in part:
            yield from _commands(each)
