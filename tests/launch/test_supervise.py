"""The supervisor believes the ranks' files, not the launcher; the launchers here are scripts."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from slap_ds.distributed.heart import read_heartbeat
from slap_ds.launch import supervise

# Writes what ranks would have written, then does `then`.
FAKE = """
import json, os, signal, socket, subprocess, sys, time
from pathlib import Path
folder = Path({folder!r}) / "heartbeat"
folder.mkdir(parents=True, exist_ok=True)
attempt = int(os.environ["SLAP_ATTEMPT"])
for rank, (code, step, cause) in enumerate({ranks}):
    facts = dict(rank=rank, world=2, exit=code, step=step, cause=cause, time=time.time())
    facts |= dict(pieces=0, host=socket.gethostname(), pid=0, attempt=str(attempt))
    (folder / f"rank-{{rank}}.json").write_text(json.dumps(facts))
with open(folder / "attempts", "a") as file:
    file.write(os.environ["MASTER_PORT"] + "\\n")
{then}
"""


@pytest.fixture
def launch(tmp_path):
    """`launch(ranks, then)` -> (exit code, what it said, ports of the attempts)."""

    def run(ranks, then="", *options, wait=True):
        code = FAKE.format(folder=str(tmp_path), ranks=ranks, then=then)
        command = [sys.executable, "-m", "slap_ds", "launch", "--run-dir", str(tmp_path)]
        command += ["--backoff-s", "0.01", *options, "--", sys.executable, "-c", code]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        if not wait:
            return process
        said = process.communicate(timeout=60)[1]
        attempts = tmp_path / "heartbeat/attempts"
        ports = attempts.read_text().split() if attempts.exists() else []
        return process.returncode, said, ports

    return run


def test_done_is_what_all_ranks_call_done(launch):
    assert launch("[(0, 9, ''), (0, 9, '')]")[0] == 0
    # torchrun's exit code is 1 for whatever.
    assert launch("[(0, 9, ''), (0, 9, '')]", "sys.exit(1)")[0] == 0


def test_exit_0_of_a_launcher_whose_ranks_did_not_finish_is_a_failure(launch):
    code, said, ports = launch("[(0, 4, ''), (None, 3 + attempt, '')]", "", "--restarts", "1")
    assert code == 69
    assert "rank 1 died without a message" in said
    assert len(set(ports)) == 2  # a port of its own for every attempt


def test_a_mistake_is_not_tried_again(launch):
    code, said, ports = launch("[(1, -1, 'no such file'), (None, -1, '')]", "sys.exit(1)")
    assert code == 1
    assert "rank 0: no such file" in said
    assert len(ports) == 1


def test_two_deaths_at_one_step_are_enough(launch):
    code, said, ports = launch("[(69, 7, 'no answer'), (70, 7, 'ValueError: x')]", "sys.exit(9)")
    assert code == 70
    assert "two attempts in a row died at step 7" in said
    assert "rank 1: ValueError: x" in said
    assert len(ports) == 2


def test_restarts_are_bounded(launch):
    code, said, ports = launch(
        "[(70, attempt, 'x'), (70, attempt, 'x')]", "sys.exit(1)", "--restarts", "2"
    )
    assert code == 70
    assert len(ports) == 3
    assert "2 restarts were not enough" in said


def test_stopped_and_saved_is_75_unless_the_launcher_was_killed(launch):
    saved = "[(75, 4 + attempt, 'SIGUSR1'), (75, 4, 'SIGUSR1')]"
    assert launch(saved, "sys.exit(1)")[0] == 75
    killed = "os.kill(os.getpid(), signal.SIGKILL)"
    then = f"if attempt == 1: {killed}"
    ranks = "[(75, 4, 'gone'), (75, 4, 'gone')] if attempt == 1 else [(0, 9, ''), (0, 9, '')]"
    code, _, ports = launch(ranks, then)
    assert (code, len(ports)) == (0, 3)


ORPHAN = """
sleep = "import time; time.sleep(600) # {mark}"
subprocess.Popen([sys.executable, "-c", sleep], start_new_session=True)
print("up", file=sys.stderr, flush=True)
{rest}
"""


def orphans(mark):
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if f"sleep(600) # {mark}" in line and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    # The launcher's own text holds the words too.
    return [
        p for p in found if "FAKE" not in p.info["cmdline"] and len(p.info["cmdline"][-1]) < 100
    ]


def test_nothing_is_left_of_an_attempt(launch, tmp_path):
    then = ORPHAN.format(mark=tmp_path.name, rest="sys.exit(3)")
    code, _, _ = launch("[(70, 4, 'x'), (70, 4, 'x')]", then, "--restarts", "0", "--grace-s", "30")
    assert code == 70
    assert not orphans(tmp_path.name)


def test_a_request_to_stop_ends_it_even_if_nobody_listens(launch, tmp_path):
    rest = "signal.signal(15, signal.SIG_IGN); time.sleep(600)"
    then = ORPHAN.format(mark=tmp_path.name, rest=rest)
    process = launch("[(None, 4, ''), (None, 4, '')]", then, "--grace-s", "1", wait=False)
    assert process.stderr.readline() == "up\n"
    start = time.monotonic()
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 69
    assert time.monotonic() - start < 10
    assert not orphans(tmp_path.name)


def test_a_checkpoint_that_grows_is_not_cut_off(launch, tmp_path):
    """The rank's file tells of pieces written for four times the grace, then that it is saved."""
    rest = """signal.signal(15, signal.SIG_IGN)
print("up", file=sys.stderr, flush=True)
for facts["pieces"] in range(40):
    (folder / "rank-1.new").write_text(json.dumps(facts))
    os.replace(folder / "rank-1.new", folder / "rank-1.json")
    time.sleep(0.1)
for rank in range(2):
    facts |= dict(rank=rank, exit=75)
    (folder / f"rank-{rank}.json").write_text(json.dumps(facts))
sys.exit(75)"""
    process = launch("[(None, 4, ''), (None, 4, '')]", rest, "--grace-s", "1", wait=False)
    assert process.stderr.readline() == "up\n"
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 75


FAR = """
import socket, sys, time
from pathlib import Path
socket.gethostname = lambda: "elsewhere"
from slap_ds.distributed.watchdog import watch
with watch(Path(sys.argv[1]), 1, 1, 9.0) as dog:
    dog.heart.beat("training a row", 3)
    while not dog.heart.stop:
        time.sleep(0.02)
    dog.record(75, dog.stop_cause)
"""


@pytest.fixture
def far(tmp_path):
    """`far(attempt)`: rank 1 on another machine: not a process that the supervisor could kill."""
    started = []

    def start(attempt):
        environ = {**os.environ, "SLAP_ATTEMPT": attempt}
        started.append(subprocess.Popen([sys.executable, "-c", FAR, str(tmp_path)], env=environ))
        (tmp_path / "heartbeat").mkdir(exist_ok=True)
        (tmp_path / "heartbeat/far-pid").write_text(str(started[-1].pid))
        deadline = time.monotonic() + 20
        while (read_heartbeat(tmp_path / "heartbeat", 1) or {}).get("step") != 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


# What has become of the far rank when the launcher starts.
HOW_IS_FAR = """
import psutil
if (folder / "far-pid").exists():
    state = psutil.Process(int((folder / "far-pid").read_text())).status()
    (folder / "far-state").write_text(state)
"""


def test_ranks_on_other_machines_are_asked_to_save(launch, far, tmp_path):
    rest = """signal.signal(15, lambda *_: sys.exit(143))
print("up", file=sys.stderr, flush=True)
while json.loads((folder / "rank-1.json").read_text())["exit"] is None:
    time.sleep(0.05)
(folder / "rank-0.json").write_text(json.dumps({**facts, "rank": 0, "exit": 75}))
sys.exit(1)"""
    ranks = "[(None, 4, ''), (None, -1, '')]"
    process = launch(ranks, rest, "--grace-s", "20", wait=False)
    assert process.stderr.readline() == "up\n"
    far("1")
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert read_heartbeat(tmp_path / "heartbeat", 1)["cause"] == "asked by slap-ds launch"


def test_no_attempt_starts_before_the_ranks_of_the_last_have_ended(launch, far, tmp_path):
    """The launcher and rank 0 fail; rank 1 trains on, on another machine."""
    rest = f"""{HOW_IS_FAR}
if attempt == 1:
    print("up", file=sys.stderr, flush=True)
    while not (folder / "far-pid").exists():
        time.sleep(0.05)
    time.sleep(2)
    sys.exit(3)"""
    ranks = "[(70, 4, 'x'), (None, 4, '')] if attempt == 1 else [(0, 9, ''), (0, 9, '')]"
    process = launch(ranks, rest, wait=False)
    assert process.stderr.readline() == "up\n"
    rank = far("1")
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 0
    assert (tmp_path / "heartbeat/far-state").read_text() == "zombie"
    assert rank.wait(0) == 69
    assert "attempt 1 ended with 70 at step 4: rank 0: x" in said


def test_what_a_killed_supervisor_has_left_elsewhere_is_ended_first(launch, far, tmp_path):
    (tmp_path / "heartbeat").mkdir()
    (tmp_path / "heartbeat/request.json").write_text('{"attempt": "1", "ask": ""}')
    rank = far("1")
    code, _, _ = launch("[(0, 9, ''), (0, 9, '')]", HOW_IS_FAR)
    assert code == 0
    assert (tmp_path / "heartbeat/far-state").read_text() == "zombie"
    assert rank.wait(0) == 69


def test_another_run_in_the_same_folder_is_refused(launch, far):
    rank = far("")
    code, said, ports = launch("[(0, 9, ''), (0, 9, '')]", "", "--grace-s", "3")
    assert (code, ports) == (1, [])
    assert "rank 1 on elsewhere of another run still writes to" in said
    assert rank.poll() is None


def test_a_file_that_no_longer_changes_is_of_no_running_rank(tmp_path, monkeypatch):
    """Whatever the clock of the other host says."""
    monkeypatch.setattr(supervise, "_STALE_S", 0.5)
    monkeypatch.setattr(supervise, "heartbeat_s", lambda world: 0.1)
    job = supervise._Job([], tmp_path, supervise.Options())
    facts = {"rank": 1, "world": 2, "host": "elsewhere", "pid": 1, "exit": None, "time": 1e12}
    assert job._running([facts]) == [facts]
    time.sleep(0.6)
    assert job._running([facts]) == []
    assert job._running([{**facts, "time": 5.0}]) != []
    assert job._running([{**facts, "time": 6.0, "exit": 70}]) == []


def test_a_killed_supervisor_takes_its_launcher_along(launch, tmp_path):
    rest = "print(os.getpid(), file=sys.stderr, flush=True); time.sleep(600)"
    process = launch("[(None, 4, ''), (None, 4, '')]", rest, wait=False)
    pid = int(process.stderr.readline())
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.fault_row(18)
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no hostfile at"),
        ("a slots=2\na slots=2\n", "line 2: a is listed twice"),
        ("a slots=0\n", "a has 0 slots"),
        ("a slots=2 please\n", "found 'a slots=2 please'"),
        ("# nobody\n", "names no host"),
    ],
)
def test_hostfiles_are_read_before_anything_starts(tmp_path, capsys, text, words):
    from slap_ds.cli import main

    path = tmp_path / "hosts"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as exit:
        main(["launch", "--run-dir", str(tmp_path), "--", "deepspeed", "--hostfile", str(path)])
    assert exit.value.code == 1
    assert words in capsys.readouterr().err


def test_a_wrong_config_is_told_before_anything_starts(tmp_path, capsys):
    from slap_ds.cli import main

    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"run_dir": "x", "steps": 1, "modle": {}}))
    with pytest.raises(SystemExit) as exit:
        main(["launch", "--", "deepspeed", "--module", "slap_ds", "train", str(path)])
    assert exit.value.code == 1
    assert "modle: unknown key; did you mean 'model'?" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
