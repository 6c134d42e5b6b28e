"""Who has gone, asked after a collective failed: its error names nobody.

    peers = Peers.open(rank, MASTER_ADDR, exchange, heart)   every rank answers on a port of its own
    peers.silent()                                           -> the ranks that do not
    peers.refuses(rank)                                      -> whether its process has ended
    peers.diagnose()                                         -> who holds the others up, in words

A thread answers, so a rank that waits in a collective does answer; one that was killed, frozen or
cut off does not. An answer says how far the rank has come. The first rank of a host asks the others
of its host and the first of every other host, the others ask the first of theirs: the number of
questions grows with hosts, not with ranks.
"""

from __future__ import annotations

import ipaddress
import json
import socket
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:  # every command imports this file, and few need numpy
    import numpy as np
    import numpy.typing as npt

from slap_ds.distributed.heart import Heart, last_words

Exchange: TypeAlias = "Callable[[Sequence[int]], npt.NDArray[np.int64]]"
_ASK_S = 1.0
_NOWHERE = "0.0.0.0"  # no IPv4 between the nodes


@dataclass
class Peers:
    """The addresses of all ranks, by rank; port 0: that rank cannot be asked."""

    rank: int = 0
    addresses: list[tuple[str, int]] = field(default_factory=list)
    heart: Heart = field(default_factory=Heart)
    folder: Path | None = None  # where the ranks leave their last words

    @classmethod
    def open(cls, rank: int, towards: str, exchange: Exchange, heart: Heart | None = None) -> Peers:
        """Start answering on the interface that leads `towards` rank 0, and learn who is where.

        Debian lets a host's own name lead to its loopback. There `towards` says nothing, and an
        address of another node shows the interface; an address that others would take for their
        own loopback is not told to them.

        Args:
            exchange: all-gathers a few integers, (world, count).
            heart: what the answers tell of.
        """
        heart = heart or Heart()
        host, node = _source(towards), zlib.crc32(socket.gethostname().encode())
        table = exchange([int(ipaddress.IPv4Address(host)), node])
        found = [(ipaddress.IPv4Address(int(a)), int(n)) for a, n in table]
        if len(set(found)) > 1 and ipaddress.IPv4Address(host).is_loopback:
            others = [str(a) for a, _ in found if not a.is_loopback and int(a)]
            host = _source(others[0]) if others else _NOWHERE
            if ipaddress.IPv4Address(host).is_loopback:
                host = _NOWHERE
        port = _answer(rank, host, heart)
        table = exchange([int(ipaddress.IPv4Address(host)), port])
        addresses = [(str(ipaddress.IPv4Address(int(a))), int(p)) for a, p in table]
        return cls(rank, addresses, heart)

    def ask(self) -> dict[int, dict[str, Any] | None]:
        """What the ranks this one has to ask say of themselves; None: nothing within a second."""
        asked = self._asked()
        if not asked:
            return {}
        with ThreadPoolExecutor(min(64, len(asked))) as pool:
            answers = {rank: pool.submit(_ask, *self.addresses[rank]) for rank in asked}
            done, _ = wait(answers.values(), timeout=1.5 * _ASK_S)
            pool.shutdown(wait=False, cancel_futures=True)
        said = {rank: a.result() if a in done else None for rank, a in answers.items()}
        return {rank: one if one and one["rank"] == rank else None for rank, one in said.items()}

    def silent(self) -> list[int]:
        """The ranks, of those this rank has to ask, that do not answer within a second."""
        return [rank for rank, said in self.ask().items() if said is None]

    def refuses(self, rank: int) -> bool:
        """Whether the host of that rank answers for it: nobody listens there any more."""
        try:
            socket.create_connection(self.addresses[rank], timeout=_ASK_S).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            pass
        return False

    def diagnose(self) -> str:
        """Why this rank does not get on, as far as it can find out."""
        said = self.ask()
        if not said:
            return "no other rank can be asked"
        if silent := [rank for rank, one in said.items() if one is None]:
            return self.gone(silent)
        alive = {rank: one for rank, one in said.items() if one is not None}
        last = min(alive, key=lambda rank: int(alive[rank]["beats"]))
        if alive[last]["beats"] == self.heart.beats:
            return "every rank it asked has come as far as this one"
        if alive[last]["beats"] > self.heart.beats:
            return "the ranks it asked are ahead of this one"
        one = alive[last]
        return (
            f"{self.where([last])} is behind: step {one['step']}, {one['phase']!r}, "
            f"for {one['still_s']:.0f} s"
        )

    def gone(self, silent: Sequence[int]) -> str:
        """What is known of ranks that do not answer: an error of their own, or nothing."""
        words = {rank: last_words(self.folder, rank) for rank in silent}
        if failed := [f"{self.where([r])} failed: {text}" for r, text in words.items() if text]:
            return "; ".join(failed)
        return f"no answer from {self.where(silent)}: killed, frozen, or its network is down"

    def where(self, ranks: Sequence[int]) -> str:
        """`rank 2 (10.0.0.7) and rank 3 (10.0.0.7)`."""
        return " and ".join(f"rank {rank} ({self.addresses[rank][0]})" for rank in ranks)

    def _asked(self) -> list[int]:
        first: dict[str, int] = {}
        for rank, (host, _) in enumerate(self.addresses):
            first.setdefault(host, rank)
        if self.rank >= len(self.addresses):
            return []
        mine = self.addresses[self.rank][0]
        if self.rank not in first.values():
            return [first[mine]] if self.addresses[first[mine]][1] else []
        return [
            rank
            for rank, (host, port) in enumerate(self.addresses)
            if port and rank != self.rank and (host == mine or rank in first.values())
        ]


def _source(towards: str) -> str:
    """The IPv4 address that this host takes on the way `towards` another; 0.0.0.0: none."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((towards, 9))  # sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return _NOWHERE


def _answer(rank: int, host: str, heart: Heart) -> int:
    """Tell whoever connects which rank this is and how far it is, from now on; the port, or 0."""
    if host == _NOWHERE:
        return 0
    try:
        server = socket.create_server((host, 0), backlog=128)
    except OSError:
        return 0

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
                still_s = time.monotonic() - heart.at
                said = {"rank": rank, "step": heart.step, "phase": heart.phase}
                said |= {"beats": heart.beats, "still_s": still_s}
                with connection:
                    connection.sendall(json.dumps(said).encode() + b"\n")
            except OSError:
                continue

    threading.Thread(target=serve, name="peers", daemon=True).start()
    return int(server.getsockname()[1])


def _ask(host: str, port: int) -> dict[str, Any] | None:
    """What the rank that answers there says; None: no rank does."""
    try:
        with socket.create_connection((host, port), timeout=_ASK_S) as connection:
            connection.settimeout(_ASK_S)
            said: dict[str, Any] = json.loads(connection.makefile().readline())
            return said
    except (OSError, ValueError):
        return None
