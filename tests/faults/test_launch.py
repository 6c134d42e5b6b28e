"""Faults under the real deepspeed launcher, alone and under `slap-ds launch`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from slap_ds.jsonl import read_lines
from slap_ds.launch.environment import free_port
from tests.faults.harness import (
    Job,
    assert_same,
    at_step,
    heartbeats,
    left_over,
    run_through,
    with_fault,
    write_config,
)

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]
LONG = {"steps": 5000, "checkpoint": {"every": 1000}}


class Launched:
    """`command` in a session of its own, its words in a file."""

    def __init__(self, folder, command, **environ):
        self.log = folder / "launch.log"
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                stdout=file,
                stderr=file,
                env={**os.environ, **environ},
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in [*left_over(str(self.log.parent)), self.process]:
            process.kill()
        self.process.wait()

    def said(self):
        return self.log.read_text(errors="replace")

    def until(self, condition, timeout_s=240):
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)
        return time.monotonic()


def deepspeed(config, *options):
    return [
        *("deepspeed", "--quiet", "--num_gpus", "2", *options),
        *("--module", "slap_ds", "train", str(config)),
    ]


def supervised(config, *options):
    command = [sys.executable, "-m", "slap_ds", "launch", "--backoff-s", "0.1", *options, "--"]
    return [*command, *deepspeed(config)]


def finish_undisturbed(config, folder, steps):
    """Compare a run that was stopped after `steps` with one that nothing happened to."""
    raw = {"steps": LONG["steps"], "checkpoint": LONG["checkpoint"]}
    other = write_config(folder, "other", **raw)
    with Job(other, fault=f"term@0,{steps - 1},forward") as job:
        assert job.wait(240) == [75, 75], job.said()
    assert_same(folder / config.stem, folder / "other")


@pytest.mark.fault_row(14)
@pytest.mark.parametrize("whom", ["helper", "launcher"])
def test_a_killed_launcher_takes_its_ranks_along(tmp_path, measured, whom):
    """Without a supervisor: `deepspeed` itself, or the process it starts the ranks with."""
    config = write_config(tmp_path, "run", **LONG)
    with Launched(tmp_path, deepspeed(config, "--master_port", str(free_port()))) as job:
        job.until(lambda: at_step(tmp_path / "run", 2))
        helper = psutil.Process(heartbeats(tmp_path / "run")[0]["pid"]).parent()
        assert "launcher.launch" in " ".join(helper.cmdline())
        (helper if whom == "helper" else helper.parent()).kill()
        start = time.monotonic()
        job.process.wait()
        job.until(lambda: not left_over(str(config)), 60)
        took_s = time.monotonic() - start
    measured(f"deepspeed's {whom} killed: saved, all gone", took_s, 20)
    found = heartbeats(tmp_path / "run")
    assert [facts["exit"] for facts in found] == [75, 75], job.said()
    assert "the launcher has gone" in {facts["cause"] for facts in found}
    steps = len([r for r in read_lines(tmp_path / "run/metrics.jsonl") if r["event"] == "train"])
    finish_undisturbed(config, tmp_path, steps)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("kill@1,4,forward", marks=pytest.mark.fault_row(1)),
        pytest.param("stop@0,4,backward", marks=pytest.mark.fault_row(3)),
        pytest.param("orphan@1,4,forward", marks=pytest.mark.fault_row(14)),
    ],
)
def test_a_supervised_run_goes_on(tmp_path, undisturbed, measured, fault):
    config = write_config(tmp_path, "run")
    with Launched(tmp_path, supervised(config), **with_fault(fault)) as job:
        job.until(lambda: "attempt 1 ended" in job.said())
        first = job.said()
        start = job.until(lambda: at_step(tmp_path / "run", 3))
        job.until(lambda: at_step(tmp_path / "run", 5))
        took_s = time.monotonic() - start
        assert job.process.wait(240) == 0, job.said()
    assert "attempt 1 ended with " in first
    assert not left_over(str(config))
    measured(f"{fault} under slap-ds launch: the next new step", took_s, None)
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.fault_row(13)
def test_a_supervised_run_asked_to_stop(tmp_path, measured):
    config = write_config(tmp_path, "run", **LONG)
    with Launched(tmp_path, supervised(config)) as job:
        job.until(lambda: at_step(tmp_path / "run", 2))
        job.process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        assert job.process.wait(60) == 75, job.said()
        took_s = time.monotonic() - start
    assert not left_over(str(config))
    measured("SIGTERM to slap-ds launch: saved, all gone", took_s, 20)
    steps = len([r for r in read_lines(tmp_path / "run/metrics.jsonl") if r["event"] == "train"])
    finish_undisturbed(config, tmp_path, steps)


@pytest.mark.fault_row(13)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_torchrun_asked_to_stop(tmp_path, measured, number):
    """It ends after its ranks, and not of the signal itself."""
    config = write_config(tmp_path, "run", **LONG)
    script = Path(__file__).parents[2] / "launch/torchrun.sh"
    environ = {"GPUS": "2", "MASTER_PORT": str(free_port())}
    with Launched(tmp_path, [str(script), str(config)], **environ) as job:
        job.until(lambda: at_step(tmp_path / "run", 2))
        job.process.send_signal(number)
        start = time.monotonic()
        assert job.process.wait(60) == 1, job.said()
        assert not left_over(str(config))
        took_s = time.monotonic() - start
    measured(f"{number.name} to torchrun: saved, all gone", took_s, 20)
    found = heartbeats(tmp_path / "run")
    assert [facts["exit"] for facts in found] == [75, 75], job.said()
    assert number.name in {facts["cause"] for facts in found}


@pytest.mark.fault_row(14)
def test_a_killed_supervisor_leaves_nothing(tmp_path, measured):
    config = write_config(tmp_path, "run", **LONG)
    with Launched(tmp_path, supervised(config)) as job:
        job.until(lambda: at_step(tmp_path / "run", 2))
        job.process.kill()
        start = time.monotonic()
        job.until(lambda: not left_over(str(config)), 60)
    measured("slap-ds launch killed: saved, all gone", time.monotonic() - start, 20)
    assert [facts["exit"] for facts in heartbeats(tmp_path / "run")] == [75, 75]


@pytest.mark.fault_row(2)
def test_a_fault_that_comes_back_ends_it(tmp_path, undisturbed):
    config = write_config(tmp_path, "run")
    with Launched(tmp_path, supervised(config), **with_fault("raise@1,4,step,*")) as job:
        assert job.process.wait(240) == 70, job.said()
    assert "two attempts in a row died at step 4: not tried again" in job.said()
    assert "RuntimeError: a fault on purpose" in job.said()
    run_through(config)
    assert_same(tmp_path / "run", undisturbed)


def test_a_mistake_of_the_users_is_not_tried_again(tmp_path):
    config = write_config(tmp_path, "run", data={"train": [str(tmp_path / "nowhere.jsonl")]})
    with Launched(tmp_path, supervised(config)) as job:
        assert job.process.wait(240) == 1, job.said()
    assert "nowhere.jsonl" in job.said()
    assert "attempt 2" not in job.said()
