"""Faults of ranks, without a launcher that cleans up: the ranks end by themselves, and in time."""

import json
import os
import signal
import socket
import time

import pytest

from slap_ds.jsonl import read_lines
from tests.faults.harness import (
    Job,
    assert_same,
    at_step,
    heartbeats,
    ledger,
    run_through,
    write_config,
)

TIMEOUT_S = 6.0  # engine.timeout_s of these runs
faults = pytest.mark.faults


def seconds_of(job, condition):
    """Seconds until all ranks have gone, from when `condition` first holds."""
    start = job.until(condition)
    codes = job.wait()
    return codes, time.monotonic() - start


SITES = ["forward", "all_gather", "scatter", "step"]


@pytest.mark.fault_row(1)
@pytest.mark.parametrize(
    "site", [pytest.param(s, marks=() if s == "all_gather" else faults) for s in SITES]
)
def test_killed(tmp_path, undisturbed, measured, site):
    config = write_config(tmp_path, "run")
    with Job(config, fault=f"kill@1,4,{site}") as job:
        codes, took_s = seconds_of(job, lambda: not job.ranks[1].is_alive())
    assert codes == [69, -signal.SIGKILL]
    measured(f"a rank killed in {site}: all gone", took_s, 10)
    (line,) = job.lines(0)
    assert line.startswith("slap-ds: error (rank 0): step 4, ")
    assert "no answer from rank 1 (127.0.0.1): killed, frozen, or its network is down" in line
    run_through(config)
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.fault_row(2)
def test_exception_on_one_rank(tmp_path, undisturbed, measured):
    config = write_config(tmp_path, "run")
    with Job(config, fault="raise@1,4,backward") as job:
        codes, took_s = seconds_of(job, lambda: not job.ranks[1].is_alive())
    assert codes == [69, 70]
    said = job.said(1)
    where = said.index("Traceback (most recent call last)")
    line = "slap-ds: error (rank 1): step 4, 'training a row': RuntimeError: a fault on purpose"
    assert where < said.index(line)
    (other,) = job.lines(0)
    assert "error (rank 0): step 4, " in other
    assert "rank 1 (127.0.0.1) failed: RuntimeError: a fault on purpose" in other
    assert "Traceback" not in job.said(0)
    measured("an exception on one rank: all gone", took_s, 10)
    run_through(config)
    assert_same(tmp_path / "run", undisturbed)


@faults
@pytest.mark.fault_row(3)
@pytest.mark.parametrize("site", ["all_gather", "backward"])
def test_frozen(tmp_path, undisturbed, measured, site):
    """The others stop; whoever froze is ended from outside, by the supervisor or a launcher."""
    config = write_config(tmp_path, "run")
    with Job(config, fault=f"stop@1,4,{site}") as job:
        start = job.until(lambda: at_step(tmp_path / "run", 3))
        job.until(lambda: not job.ranks[0].is_alive(), 30)
        took_s = time.monotonic() - start
        assert job.ranks[0].exitcode == 69
        job.kill_stopped()
        job.wait()
    measured(f"a rank frozen in {site}: the others gone", took_s, TIMEOUT_S + 5)
    (line,) = job.lines(0)
    assert line.startswith("slap-ds: error (rank 0): step 4, ")
    assert "no answer from rank 1 (127.0.0.1)" in line
    assert "(no progress for 6 s)" in line
    (first, _) = heartbeats(tmp_path / "run")
    assert (first["exit"], first["step"]) == (69, 4)
    run_through(config)
    assert_same(tmp_path / "run", undisturbed)


@faults
@pytest.mark.fault_row(3)
def test_frozen_rank_0_is_named_by_the_others(tmp_path):
    config = write_config(tmp_path, "run")
    with Job(config, fault="stop@0,4,forward") as job:
        job.until(lambda: not job.ranks[1].is_alive(), 60)
    (line,) = job.lines(1)
    assert "error (rank 1): step 4, " in line
    assert "no answer from rank 0 (127.0.0.1)" in line


@faults
@pytest.mark.fault_row(3)
def test_slow_rank_is_reported_and_changes_nothing(tmp_path, undisturbed):
    config = write_config(tmp_path, "run")
    with Job(config, fault="slow@1,5,scatter") as job:
        assert job.wait() == [0, 0], job.said()
    steps = {
        r["step"]: r for r in read_lines(tmp_path / "run/metrics.jsonl") if r["event"] == "train"
    }
    assert steps[5]["slowest_rank"] == 1
    assert steps[5]["slowest_lag_s"] == pytest.approx(0.5, abs=0.3)
    assert steps[4]["slowest_lag_s"] < 0.3
    assert_same(tmp_path / "run", undisturbed)


@faults
@pytest.mark.fault_row(3)
def test_a_rank_stopped_for_a_while_goes_on(tmp_path, undisturbed):
    config = write_config(tmp_path, "run")
    with Job(config, fault="stop@1,5,forward") as job:
        job.until(lambda: at_step(tmp_path / "run", 4))
        time.sleep(3)
        os.kill(job.ranks[1].pid, signal.SIGCONT)
        assert job.wait() == [0, 0], job.said()
    record = read_lines(tmp_path / "run/metrics.jsonl")
    step = next(r for r in record if r["step"] == 5 and r["event"] == "train")
    assert step["slowest_rank"] == 1
    assert 1.5 < step["slowest_lag_s"] < 4
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.fault_row(5)
def test_skipped_collective_is_caught_in_its_step(tmp_path, undisturbed, measured):
    """The one that torch would pair with the next, of the same shape, for ever."""
    config = write_config(tmp_path, "run")
    with Job(config, fault="skip@1,4,agree") as job:
        codes, took_s = seconds_of(job, lambda: at_step(tmp_path / "run", 3))
    assert codes == [70, 70], job.said()
    assert (
        "rank 0 is at step 4, 'the hash of the picks', but rank 1 at step 4 or in another phase: a "
        "collective was skipped or reordered" in job.said(0)
    )
    assert max(step for step, _ in ledger(tmp_path / "run")) == 3
    measured("a skipped collective: all gone", took_s, TIMEOUT_S + 5)
    run_through(config)
    assert_same(tmp_path / "run", undisturbed)


@faults
@pytest.mark.fault_row(5)
def test_skipped_collective_before_one_of_another_size(tmp_path, measured):
    """gloo itself notices, by ending the process."""
    config = write_config(tmp_path, "run")
    with Job(config, fault="skip@1,4,all_gather") as job:
        codes, took_s = seconds_of(job, lambda: at_step(tmp_path / "run", 3))
    assert 0 not in codes
    assert "step 4" in job.said()
    assert max(step for step, _ in ledger(tmp_path / "run")) == 3
    measured("one before a collective of another size: all gone", took_s, TIMEOUT_S + 5)


@faults
@pytest.mark.fault_row(6)
def test_other_picks_are_not_trained(tmp_path, undisturbed, measured):
    config = write_config(tmp_path, "run")
    with Job(config, fault="picks@1,4,scatter") as job:
        codes, took_s = seconds_of(job, lambda: at_step(tmp_path / "run", 3))
    assert codes == [70, 70], job.said()
    words = "step 4: the hash of the picks differs between rank 0 and ranks [1]"
    assert words in job.said(0)
    assert words in job.said(1)
    assert all(facts["phase"] == "the hash of the picks" for facts in heartbeats(tmp_path / "run"))
    measured("other picks on one rank: all gone", took_s, 10)
    run_through(config)
    assert_same(tmp_path / "run", undisturbed)


@faults
@pytest.mark.fault_row(7)
def test_other_data_on_one_rank(tmp_path, measured):
    rows = [
        {"messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "yes"}]}
        for i in range(40)
    ]
    configs = []
    for name, count in [("one", 40), ("two", 30)]:
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
        configs.append(
            write_config(tmp_path, name, data={"train": [str(data)]}, run_dir=str(tmp_path / "run"))
        )
    with Job(*configs) as job:
        codes = job.wait()
    assert codes == [70, 70], job.said()
    said = job.said()
    assert "the training data differs between rank 0 and ranks [1]" in said
    measured("other data on one rank: all gone, from the start", time.monotonic() - job.start, 30)


@pytest.mark.fault_row(13)
@pytest.mark.parametrize("kind", ["term", pytest.param("usr1", marks=faults)])
def test_asked_to_stop(tmp_path, undisturbed, measured, kind):
    """One rank is asked, all save the same step and leave with 75; nothing is trained twice."""
    config = write_config(tmp_path, "run")
    with Job(config, fault=f"{kind}@1,3,forward") as job:
        codes, took_s = seconds_of(job, lambda: at_step(tmp_path / "run", 3))
    assert codes == [75, 75], job.said()
    assert "stopped and saved after 4 steps" in job.said(0)
    assert (tmp_path / "run/checkpoints/step-000004").is_dir()
    name = "SIGTERM" if kind == "term" else "SIGUSR1"
    assert heartbeats(tmp_path / "run")[1]["cause"] == name
    measured(f"{name} on one rank: saved, all gone", took_s, 20)
    run_through(config)
    assert_same(tmp_path / "run", undisturbed)


@faults
@pytest.mark.fault_row(16)
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("oom", "out of memory on the device: asked for 20.00 GiB"),
        ("host_oom", "out of memory on the host: asked for 1125899906842624"),
    ],
)
def test_out_of_memory(tmp_path, undisturbed, measured, kind, words):
    config = write_config(tmp_path, "run")
    with Job(config, fault=f"{kind}@1,4,forward") as job:
        codes, took_s = seconds_of(job, lambda: not job.ranks[1].is_alive())
    assert codes == [69, 71], job.said()
    line = job.lines(1)[-1]
    assert line.startswith("slap-ds: error (rank 1): step 4, 'training a row': ")
    assert words in line
    assert f"rank 1 (127.0.0.1) failed: {words}" in job.said(0)
    measured(f"out of memory ({kind}): all gone", took_s, 10)
    run_through(config)
    assert_same(tmp_path / "run", undisturbed)


@faults
@pytest.mark.fault_row(19)
def test_stale_build_lock(tmp_path, measured, monkeypatch):
    (tmp_path / "extensions/deepspeed_shm_comm").mkdir(parents=True)
    (tmp_path / "extensions/deepspeed_shm_comm/lock").touch()
    config = write_config(tmp_path, "run")
    with Job(config, TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions")) as job:
        codes = job.wait()
    assert codes == [1, 1], job.said()
    assert "deepspeed_shm_comm/lock is " in job.said(0)
    assert "a build was killed" in job.said(0)
    measured("stale build lock: named", time.monotonic() - job.start, 30)


@pytest.mark.fault_row(19)
def test_port_taken(tmp_path, measured, port):
    config = write_config(tmp_path, "run")
    with socket.create_server(("127.0.0.1", port)), Job(config, port=port) as job:
        job.until(lambda: not job.ranks[0].is_alive(), 40)
        took_s = time.monotonic() - job.start
        assert job.ranks[0].exitcode == 69  # worth another try, on another port
        job.ranks[1].terminate()  # as its launcher does
        job.ranks[1].join(10)
        assert job.ranks[1].exitcode == 75
    assert f"MASTER_PORT {port} is taken" in job.said(0)
    measured("master port taken: named", took_s, 30)
