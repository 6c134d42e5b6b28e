"""While a rank waits, one that has gone is named at once; one that is slow is not named at all."""

import os
import signal
import subprocess
import sys
import time

import pytest

from slap_ds.distributed import lookout as lookout_module
from slap_ds.distributed.lookout import LONGEST_SILENCE_S, Lookout
from slap_ds.distributed.peers import Peers
from tests.distributed.test_watchdog import until

PEER = """
import json, sys, time
from slap_ds.distributed.heart import Heart
from slap_ds.distributed.peers import _answer
heart = Heart()
heart.beat("scoring a row", 1)
print(_answer(1, "127.0.0.1", heart), flush=True)
time.sleep(120)
"""

# Rank 0 of two, in a collective that never returns.
WAITING = """
import sys, time
from pathlib import Path
from slap_ds.distributed.peers import Peers
from slap_ds.distributed.watchdog import watch
with watch(Path(sys.argv[1]), 0, 2, 600.0) as dog:
    dog.heart.limit_s = 600.0
    for beat in range(5):
        dog.heart.beat("training a row", 4)
    addresses = [("127.0.0.1", 1), ("127.0.0.1", int(sys.argv[2]))]
    dog.peers = Peers(0, addresses, dog.heart, dog.folder)
    print("up", flush=True)
    time.sleep(120)
"""


def python(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def peer():
    process = python(PEER)
    process.port = int(process.stdout.readline())
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("killed", [True, False])
def test_a_rank_that_dies_in_a_collective_is_named_long_before_the_limit(tmp_path, peer, killed):
    """The limit is ten minutes; one that is far behind but answers is waited for."""
    waiting = python(WAITING, str(tmp_path), str(peer.port))
    try:
        assert waiting.stdout.readline() == "up\n"
        time.sleep(3.5)  # longer than a rank of which one may think that it waits
        assert waiting.poll() is None
        if killed:
            peer.kill()
            peer.wait()
            _, said = waiting.communicate(timeout=30)
            assert waiting.returncode == 69
            (line,) = said.splitlines()
            assert line.startswith(
                "slap-ds: error (rank 0): step 4, 'training a row': no answer from rank 1 "
                "(127.0.0.1): killed, frozen, or its network is down (no progress for "
            )
        else:
            time.sleep(3)
            assert waiting.poll() is None
    finally:
        waiting.kill()
        waiting.communicate()


class Told(Peers):
    """Peers whose answers are the test's: rank -> answers, refuses or is silent."""

    def ask(self):
        self.rounds = getattr(self, "rounds", 0) + 1
        return {rank: {"rank": rank} if how == "answers" else None for rank, how in HOW.items()}

    def refuses(self, rank):
        return HOW[rank] == "refuses"


HOW: dict[int, str] = {}


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only where a test says so."""
    now = [1000.0]
    monkeypatch.setattr(lookout_module.time, "monotonic", lambda: now[0])
    return now


def rounds(lookout, clock, count, waits=True, seconds=1.0):
    for _ in range(count):
        clock[0] += seconds
        lookout.look(waits)
        lookout._thread.join()


def test_who_ends_is_lost_after_two_refusals_and_who_is_silent_after_a_long_time(clock):
    HOW.clear()
    HOW.update({1: "answers", 2: "answers", 3: "silent"})
    lookout = Lookout(Told(), 1.0)
    lookout.peers.heart.limit_s = 1e6
    rounds(lookout, clock, 1, waits=False)
    HOW.update({1: "refuses", 2: "silent"})
    rounds(lookout, clock, 1)
    assert lookout.lost() == []
    rounds(lookout, clock, 1)
    assert lookout.lost() == [1]
    HOW[1] = "answers"
    rounds(lookout, clock, int(LONGEST_SILENCE_S) - 2)
    assert lookout.lost() == []
    rounds(lookout, clock, 3)
    assert lookout.lost() == [2]  # never rank 3, which has never been heard


def test_silence_counts_from_anew_after_an_answer_progress_or_a_pause_of_ones_own(clock):
    HOW.clear()
    HOW[1] = "answers"
    lookout = Lookout(Told(), 1.0)
    lookout.peers.heart.limit_s = 8.0  # three quarters of it are 6 s
    rounds(lookout, clock, 1, waits=False)
    for interruption in ("answer", "progress", "none"):
        HOW[1] = "silent"
        rounds(lookout, clock, 6)
        assert lookout.lost() == []
        if interruption == "answer":
            HOW[1] = "answers"
            rounds(lookout, clock, 1)
        elif interruption == "progress":
            lookout.look(False)
    rounds(lookout, clock, 2)
    assert lookout.lost() == [1]
    HOW[1] = "answers"
    rounds(lookout, clock, 1)
    HOW[1] = "silent"
    rounds(lookout, clock, 2, seconds=500.0)  # this process was stopped for so long
    assert lookout.lost() == []


def test_a_rank_that_gets_on_asks_nobody(clock):
    HOW.clear()
    HOW[1] = "answers"
    lookout = Lookout(Told(), 1.0)
    rounds(lookout, clock, 10, waits=False)
    assert lookout.peers.rounds == 1


def test_only_a_process_that_has_ended_refuses(peer):
    peers = Peers(0, [("127.0.0.1", 1), ("127.0.0.1", peer.port)])
    assert not peers.refuses(1)
    os.kill(peer.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, peer.pid, os.WSTOPPED)
    assert peers.silent() == [1]
    assert not peers.refuses(1)
    peer.kill()
    peer.wait()
    until(lambda: peers.refuses(1), 5)
