"""Who has gone, asked after a collective failed: its error names nobody.

    peers = Peers.open(rank, MASTER_ADDR, exchange)     every rank answers on a port of its own
    peers.silent()                                      -> the ranks that do not

A thread answers, so a rank that waits in a collective does answer; one that was killed, frozen or
cut off does not. The first rank of a host asks the others of its host and the first of every other
host: the number of questions grows with hosts, not with ranks.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np

Exchange = Callable[[Sequence[int]], np.ndarray]
# How long a failed rank goes on answering, so that the others do not take it for the cause.
GRACE_S = 1.5
_ASK_S = 1.0


@dataclass
class Peers:
    """The addresses of all ranks, by rank; port 0: that rank cannot be asked."""

    rank: int = 0
    addresses: list[tuple[str, int]] = field(default_factory=list)

    @classmethod
    def open(cls, rank: int, towards: str, exchange: Exchange) -> Peers:
        """Start answering on the interface that leads `towards` rank 0, and learn who is where.

        Args:
            exchange: all-gathers a few integers, (world, count).
        """
        host, port = _answer(rank, towards)
        table = exchange([int(ipaddress.IPv4Address(host)), port])
        return cls(rank, [(str(ipaddress.IPv4Address(int(a))), int(p)) for a, p in table])

    def silent(self) -> list[int]:
        """The ranks, of those this rank has to ask, that do not answer within a second."""
        asked = self._asked()
        if not asked:
            return []
        with ThreadPoolExecutor(min(64, len(asked))) as pool:
            answers = {rank: pool.submit(_ask, *self.addresses[rank]) for rank in asked}
            done, _ = wait(answers.values(), timeout=1.5 * _ASK_S)
            pool.shutdown(wait=False, cancel_futures=True)
        return [r for r, answer in answers.items() if answer not in done or answer.result() != r]

    def where(self, ranks: Sequence[int]) -> str:
        """`rank 2 (10.0.0.7) and rank 3 (10.0.0.7)`."""
        return " and ".join(f"rank {rank} ({self.addresses[rank][0]})" for rank in ranks)

    def _asked(self) -> list[int]:
        first: dict[str, int] = {}
        for rank, (host, _) in enumerate(self.addresses):
            first.setdefault(host, rank)
        if self.rank not in first.values():
            return []
        mine = self.addresses[self.rank][0]
        return [
            rank
            for rank, (host, port) in enumerate(self.addresses)
            if port and rank != self.rank and (host == mine or rank in first.values())
        ]


def _answer(rank: int, towards: str) -> tuple[str, int]:
    """Tell whoever connects which rank this is, from now on; where it listens."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((towards, 9))  # sends nothing
            host = str(probe.getsockname()[0])
        server = socket.create_server((host, 0), backlog=128)
    except OSError:  # no IPv4 between the nodes
        return "0.0.0.0", 0

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
                with connection:
                    connection.sendall(b"%d\n" % rank)
            except OSError:
                continue

    threading.Thread(target=serve, name="peers", daemon=True).start()
    return host, int(server.getsockname()[1])


def _ask(host: str, port: int) -> int:
    """The rank that answers there; -1: nobody does."""
    try:
        with socket.create_connection((host, port), timeout=_ASK_S) as connection:
            connection.settimeout(_ASK_S)
            return int(connection.makefile().readline() or -1)
    except (OSError, ValueError):
        return -1
