"""The watchdog: heartbeats, an end where nothing gets on, requests to stop, parents that go."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from slap_ds.checkpoint.find import newest
from slap_ds.checkpoint.save import Saver
from slap_ds.distributed import watchdog
from slap_ds.distributed.comm import Comm
from slap_ds.distributed.heart import read_heartbeat
from slap_ds.distributed.watchdog import Watchdog, out_of_memory, watch
from slap_ds.engine import build_locks, tensor_files
from tests.checkpoint.test_checkpoint import Numbers


def until(condition, timeout_s=20):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_heartbeat_tells_how_far_the_rank_is(tmp_path):
    with watch(tmp_path, 3, 1, 10.0) as dog:
        folder = tmp_path / "heartbeat"
        first = read_heartbeat(folder, 3)
        assert (first["step"], first["exit"], first["pid"]) == (-1, None, os.getpid())
        dog.heart.beat("training a row", 7)
        until(lambda: read_heartbeat(folder, 3)["step"] == 7)
        dog.record(70, "KeyError: x")
        dog.record(0)  # the first word counts
    last = read_heartbeat(folder, 3)
    assert (last["exit"], last["cause"], last["phase"]) == (70, "KeyError: x", "training a row")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_request_to_stop_is_a_flag_and_handlers_come_back(tmp_path, number):
    before = signal.getsignal(number)
    with watch(tmp_path, 0, 1, 10.0) as dog:
        dog.heart.beat("training a row", 0)
        os.kill(os.getpid(), number)
        until(lambda: dog.heart.stop)
        assert dog.stop_cause == number.name
    assert signal.getsignal(number) == before


RANK = """
import sys, time
from pathlib import Path
from slap_ds.distributed.watchdog import watch
with watch(Path(sys.argv[1]), 1, 2, {stop_s}) as dog:
    {before}
    print("up", flush=True)
    {then}
"""


def start(tmp_path, before, then="time.sleep(60)", stop_s=1.0):
    code = RANK.format(before=before, then=then, stop_s=stop_s)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "up\n"
    return process


def test_no_progress_ends_the_process_with_one_line(tmp_path):
    process = start(tmp_path, "dog.heart.limit_s = 1.0; dog.heart.beat('optimizer step', 4)")
    _, said = process.communicate(timeout=30)
    assert process.returncode == 69
    assert said == (
        "slap-ds: error (rank 1): step 4, 'optimizer step': the others did not join "
        "(no progress for 1 s)\n"
    )
    assert read_heartbeat(tmp_path / "heartbeat", 1)["exit"] == 69


@pytest.mark.parametrize("asked_to_stop", [False, True])
def test_a_save_may_take_longer_than_any_limit_while_it_gets_on(
    tmp_path, monkeypatch, asked_to_stop
):
    ended = []

    def slow(self, block, write=tensor_files._Hashed._write):
        time.sleep(0.03)
        write(self, block)

    monkeypatch.setattr(Watchdog, "end", lambda dog, code, *said: ended.append(code))
    monkeypatch.setattr(tensor_files, "BLOCK_BYTES", 1024)
    monkeypatch.setattr(tensor_files._Hashed, "_write", slow)
    with watch(tmp_path, 0, 1, 1.0) as dog:
        dog.heart.beat("training a row", 0)
        if asked_to_stop:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            dog.heart.limit_s = 1.0
        started = time.monotonic()
        Saver(tmp_path, Comm(heart=dog.heart)).save(1, Numbers(1.0), {}, {})
        took = time.monotonic() - started
        assert not ended
        until(lambda: ended)  # and nothing after it
    assert took > 2.0
    assert ended[0] == (70 if asked_to_stop else 69)
    assert newest(tmp_path, Comm()).step == 1


@pytest.mark.slow
def test_a_frozen_process_is_not_ended_for_its_own_pause(tmp_path):
    """It gets the whole limit again once it runs."""
    beats = "dog.heart.limit_s = 2.0"
    process = start(
        tmp_path, beats, "[(time.sleep(0.1), dog.heart.beat('x', i)) for i in range(30)]"
    )
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(4)
    os.kill(process.pid, signal.SIGCONT)
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_a_request_before_the_first_step_ends_at_once(tmp_path):
    process = start(tmp_path, "pass")
    process.terminate()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "before the first step, 'start': SIGTERM: nothing to save yet" in said


def test_a_step_that_never_ends_does_not_hold_up_a_stop(tmp_path):
    process = start(tmp_path, "dog.heart.beat('training a row', 2)")
    process.terminate()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 70
    assert "not at the end of a step 1 s after the request to stop" in said


def test_ctrl_c_is_a_request_and_once_more_an_end(tmp_path):
    """What a launcher passes on of the same Ctrl-C is not a second one."""
    process = start(tmp_path, "dog.heart.beat('training a row', 2)", stop_s=60)
    for wait_s in (0.5, 1.5):
        process.send_signal(signal.SIGINT)
        time.sleep(wait_s)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 70
    assert "step 2, 'training a row': interrupted twice: not saved" in said


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a"),
            "on the device: asked for 1.50 GiB",
        ),
        (MemoryError(), "on the host: no size is known"),
        (ValueError("Tried to allocate 3 GiB"), None),
    ],
)
def test_out_of_memory_in_words(error, words):
    assert (out_of_memory(error) or "") == "" if words is None else words in out_of_memory(error)


def test_out_of_memory_as_the_libraries_say_it():
    with pytest.raises(RuntimeError) as real:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert "on the host: asked for 1125899906842624 bytes" in out_of_memory(real.value)
    with pytest.raises(MemoryError) as real:
        np.empty(1 << 50, dtype=np.uint8)
    assert "on the host: asked for 1.00 PiB" in out_of_memory(real.value)


def test_a_lock_under_which_somebody_builds_is_waited_for(tmp_path):
    lock = tmp_path / "deepspeed_cpu_adam/lock"
    lock.parent.mkdir()
    lock.touch()
    code = f"import os, time; time.sleep(2); os.unlink({str(lock)!r})"
    builder = subprocess.Popen([sys.executable, "-c", code], cwd=lock.parent)
    start = time.monotonic()
    build_locks.refuse_stale_locks({"TORCH_EXTENSIONS_DIR": str(tmp_path)}, patience_s=0.5)
    assert time.monotonic() - start > 1
    assert builder.wait() == 0
    lock.touch()
    with pytest.raises(ValueError, match=r"deepspeed_cpu_adam/lock is \d+ s old and no process"):
        build_locks.refuse_stale_locks({"TORCH_EXTENSIONS_DIR": str(tmp_path)}, patience_s=0.5)


@pytest.mark.parametrize(
    ("attempt", "requests", "expected"),
    [
        ("2", [("2", ""), ("2", "stop")], ["stop"]),
        ("2", [("2", ""), ("2", "end")], [69]),
        ("2", [("2", "")], []),
        ("2", [("2", ""), ("3", "")], [69]),
        ("2", [("2", ""), ("0", "end")], [69]),
        # What an earlier attempt was asked, before this one's request is seen.
        ("2", [("1", "stop"), ("1", "end"), ("2", "")], []),
        # Nobody supervises it.
        ("", [("", "stop"), ("", "end"), ("1", "end")], []),
    ],
)
def test_what_the_supervisor_asks(tmp_path, monkeypatch, attempt, requests, expected):
    done = []
    monkeypatch.setattr(Watchdog, "end", lambda dog, code, *said, **how: done.append(code))
    monkeypatch.setattr(watchdog, "GRACE_S", 0.0)
    monkeypatch.setattr(Watchdog, "_stop", lambda dog, cause: done.append("stop"))
    dog = Watchdog(tmp_path, 0, 2, 9.0, attempt=attempt)
    dog._obey()
    for number, ask in requests:
        (tmp_path / "request.json").write_text(json.dumps({"attempt": number, "ask": ask}))
        dog._obey()
    assert done == expected


def test_half_a_heartbeat_is_none(tmp_path):
    (tmp_path / "rank-0.json").write_text(json.dumps({"rank": 0})[:-2])
    assert read_heartbeat(tmp_path, 0) is None
    assert read_heartbeat(tmp_path, 1) is None
