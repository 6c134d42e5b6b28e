"""A rank that has gone is named; one that is only busy, or failed a moment ago, is not."""

import ipaddress
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch.distributed as dist

from slap_ds.distributed import peers as peers_module
from slap_ds.distributed.comm import Comm
from slap_ds.distributed.heart import Heart
from slap_ds.distributed.peers import Peers, _answer

# Each process is a rank; the table of addresses is put together over pipes.
PEER = """
import sys, numpy as np
from slap_ds.distributed.peers import Heart, Peers, _answer
rank = int(sys.argv[1])
def exchange(values):
    print(*values, flush=True)
    return np.array(eval(sys.stdin.readline()))
peers = Peers.open(rank, "127.0.0.1", exchange)
for line in sys.stdin:
    print(peers.silent(), flush=True)
"""


@pytest.fixture
def ranks():
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PEER, str(rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    for _ in range(2):
        table = [[int(x) for x in p.stdout.readline().split()] for p in processes]
        for process in processes:
            process.stdin.write(f"{table}\n")
            process.stdin.flush()
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def ask(process):
    process.stdin.write("?\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def test_the_first_rank_of_a_host_names_those_that_have_gone(ranks):
    assert ask(ranks[0]) == "[]"
    ranks[1].kill()
    ranks[1].wait()
    os.kill(ranks[3].pid, signal.SIGSTOP)
    os.waitid(os.P_PID, ranks[3].pid, os.WSTOPPED)
    start = time.monotonic()
    assert ask(ranks[0]) == "[1, 3]"
    assert time.monotonic() - start < 4
    # Not the first rank of its host: it asks that one alone.
    assert ask(ranks[2]) == "[]"
    ranks[0].kill()
    ranks[0].wait()
    assert ask(ranks[2]) == "[0]"


def test_questions_grow_with_hosts_not_with_ranks():
    hosts = [(f"10.0.0.{rank // 8}", 1000 + rank) for rank in range(64)]
    assert Peers(8, hosts)._asked() == [0, *range(9, 16), *range(16, 64, 8)]
    assert Peers(9, hosts)._asked() == [8]
    assert Peers(0, [("10.0.0.1", 1), ("0.0.0.0", 0)])._asked() == []


def test_somebody_else_on_that_port_is_no_answer():
    peers = Peers.open(5, "127.0.0.1", lambda values: np.array([values, values]))
    # Rank 1 of this table is in truth rank 5's port.
    peers.rank = 0
    assert peers.silent() == [1]


HERE, NOWHERE = "127.0.0.1", "0.0.0.0"


@pytest.mark.parametrize(
    ("others", "sources", "expected"),
    [
        # Another node has an address, and the way there shows the one of this node.
        (["10.77.0.2"], {"10.77.0.2": "10.77.0.1"}, "10.77.0.1"),
        (["10.77.0.2"], {"10.77.0.2": HERE}, NOWHERE),
        (["10.77.0.2"], {"10.77.0.2": NOWHERE}, NOWHERE),
        ([NOWHERE], {}, NOWHERE),
        ([HERE], {}, NOWHERE),
    ],
)
def test_no_rank_is_told_an_address_that_is_its_own_loopback(
    monkeypatch, others, sources, expected
):
    """Rank 0 where /etc/hosts has `127.0.1.1 node1`, and MASTER_ADDR is node1."""
    sources = {"node1": HERE, **sources}
    monkeypatch.setattr(peers_module, "_source", lambda towards: sources[towards])
    monkeypatch.setattr(peers_module, "_answer", lambda rank, host, heart: 7 * (host != NOWHERE))
    told = []

    def exchange(values):
        told.append(values)
        rows = [[int(ipaddress.IPv4Address(other)), values[1] + 1] for other in others]
        return np.array([values, *rows], dtype=np.int64)

    peers = Peers.open(0, "node1", exchange)
    assert peers.addresses[0] == (expected, 7 if expected != NOWHERE else 0)
    assert len(told) == 2


def test_ranks_of_one_host_keep_the_loopback():
    peers = Peers.open(0, HERE, lambda values: np.array([values, values], dtype=np.int64))
    assert peers.addresses[0][0] == HERE
    assert peers.addresses[0][1] > 0


def two_peers(folder=None):
    """Rank 0 and rank 1, both answering in this process."""
    hearts = [Heart(), Heart()]
    addresses = [("127.0.0.1", _answer(rank, "127.0.0.1", hearts[rank])) for rank in (0, 1)]
    return [Peers(rank, addresses, hearts[rank], folder) for rank in (0, 1)]


def test_who_is_behind_is_named():
    first, second = two_peers()
    for _ in range(5):
        first.heart.beat("training a row", 3)
    second.heart.beat("scoring a row", 2)
    assert re.fullmatch(
        r"rank 1 \(127.0.0.1\) is behind: step 2, 'scoring a row', for \d+ s", first.diagnose()
    )
    assert second.diagnose() == "the ranks it asked are ahead of this one"
    for _ in range(4):
        second.heart.beat("training a row", 3)
    assert first.diagnose() == "every rank it asked has come as far as this one"


@pytest.mark.parametrize(("code", "told"), [(70, True), (71, True), (69, False), (None, False)])
def test_an_error_of_its_own_is_told_of_a_rank_that_has_gone(tmp_path, code, told):
    (tmp_path / "rank-1.json").write_text(json.dumps({"exit": code, "cause": "KeyError: 'x'"}))
    peers = Peers(0, [("127.0.0.1", 1), ("127.0.0.1", 1)], folder=tmp_path)
    if told:
        assert peers.diagnose() == "rank 1 (127.0.0.1) failed: KeyError: 'x'"
    else:
        assert peers.diagnose().startswith("no answer from rank 1 (127.0.0.1): killed, frozen, or")


def test_blame_is_for_failed_collectives_only(monkeypatch):
    comm = Comm(0, 2)
    comm.peers = Peers(0, [("127.0.0.1", 1), ("127.0.0.1", 1)])
    gloo = RuntimeError("[/x/gloo/transport/tcp/pair.cc:1] Timed out waiting 20000ms for recv")
    assert comm.blame(gloo) == (
        "no answer from rank 1 (127.0.0.1): killed, frozen, or its network is down "
        "(Timed out waiting 20000ms for recv)"
    )
    assert comm.blame(dist.DistBackendError("NCCL error\nmore")).endswith("(NCCL error)")
    assert comm.blame(RuntimeError("shape mismatch")) is None
    monkeypatch.setattr(Peers, "silent", lambda self: [])
    assert comm.blame(gloo) is None
