"""Which network interface gloo and NCCL would take on this machine.

    python -m slap_ds.doctor.interfaces  ->  {"gloo": ["eth0", "10.0.0.7"], "nccl": ..., ...}

Their rules as of torch 2.13 and NCCL 2.2x. Without GLOO_SOCKET_IFNAME gloo binds the address that
the host's own name has, else the loopback. Without NCCL_SOCKET_IFNAME NCCL takes the first
interface whose name begins with ib, else any but docker* and lo, else docker*, else lo.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from typing import NamedTuple

import psutil


class Interface(NamedTuple):
    """An interface that is up, with its IPv4 address."""

    name: str
    address: str

    @property
    def loopback(self) -> bool:
        """Whether it reaches this machine alone."""
        return self.address.startswith("127.")

    @property
    def virtual(self) -> bool:
        """Whether its name is that of a container's or virtual machine's network on the host."""
        return self.name.startswith(("docker", "br-", "virbr", "veth", "cni", "flannel", "cali"))


def present() -> list[Interface]:
    """The interfaces that are up and have an IPv4 address, in the system's order."""
    stats, found = psutil.net_if_stats(), []
    for name, addresses in psutil.net_if_addrs().items():
        ipv4 = [one.address for one in addresses if one.family == socket.AF_INET]
        # Not `isup`, which asks for a carrier as well.
        if ipv4 and name in stats and "up" in stats[name].flags.split(","):
            found.append(Interface(name, ipv4[0]))
    return found


def gloo(environ: Mapping[str, str], there: list[Interface]) -> Interface | None:
    """The interface gloo takes; None: it has none."""
    if wanted := environ.get("GLOO_SOCKET_IFNAME"):
        return next((one for one in there if one.name == wanted.split(",")[0]), None)
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = ""
    own = next((one for one in there if one.address == address), None)
    if own is None and address.startswith("127."):  # the whole block is the loopback's
        own = Interface("lo", address)
    return own or next((one for one in there if one.loopback), None)


def nccl(environ: Mapping[str, str], there: list[Interface]) -> Interface | None:
    """The interface NCCL's sockets take; None: it has none."""
    wanted = environ.get("NCCL_SOCKET_IFNAME", "")
    if wanted:
        names = wanted.lstrip("^=").split(",")

        def fits(one: Interface) -> bool:
            if "=" in wanted[:2]:
                return one.name in names
            return one.name.startswith(tuple(names))

        return next((one for one in there if fits(one) != wanted.startswith("^")), None)
    ranked = sorted(there, key=lambda one: _nccl_rank(one.name))  # stable: the first of equals
    return ranked[0] if ranked else None


def _nccl_rank(name: str) -> int:
    if name.startswith("ib"):
        return 0
    return 3 if name.startswith("lo") else 2 if name.startswith("docker") else 1


if __name__ == "__main__":
    there = present()
    chosen = {"gloo": gloo(os.environ, there), "nccl": nccl(os.environ, there), "there": there}
    print(json.dumps(chosen, separators=(",", ":")))
