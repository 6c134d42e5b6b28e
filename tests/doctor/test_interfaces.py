"""Which interface gloo and NCCL take, and what doctor makes of it."""

import json
import socket
import subprocess
import sys

import pytest
import torch

from slap_ds.doctor import checks as doctor
from slap_ds.doctor.interfaces import Interface, gloo, nccl, present

LO = Interface("lo", "127.0.0.1")
DOCKER = Interface("docker0", "172.17.0.1")
ETH = Interface("eth0", "10.0.0.7")
IB = Interface("ib0", "10.1.0.7")


def test_interfaces_of_this_machine():
    there = present()
    assert LO in there
    names = {name for _, name in socket.if_nameindex()}
    assert {one.name for one in there} <= names


@pytest.mark.parametrize(
    ("there", "wanted", "expected"),
    [
        ([LO, DOCKER, ETH], "", ETH),
        ([LO, DOCKER, ETH, IB], "", IB),
        ([LO, DOCKER], "", DOCKER),
        ([LO], "", LO),
        ([], "", None),
        ([LO, DOCKER, ETH], "eth", ETH),
        ([LO, DOCKER, ETH], "=eth", None),
        ([LO, DOCKER, ETH], "=docker0", DOCKER),
        ([LO, DOCKER, ETH], "^lo,docker", ETH),
        ([LO, DOCKER, ETH], "ib7", None),
    ],
)
def test_nccl(there, wanted, expected):
    assert nccl({"NCCL_SOCKET_IFNAME": wanted} if wanted else {}, there) == expected


@pytest.mark.parametrize(
    ("address", "environ", "expected"),
    [
        ("10.0.0.7", {}, ETH),
        ("127.0.1.1", {}, Interface("lo", "127.0.1.1")),  # Debian's own line in /etc/hosts
        ("192.0.2.9", {}, LO),  # an address this machine has not
        (None, {}, LO),  # no address at all
        ("127.0.1.1", {"GLOO_SOCKET_IFNAME": "docker0"}, DOCKER),
        ("10.0.0.7", {"GLOO_SOCKET_IFNAME": "eth9"}, None),
    ],
)
def test_gloo(address, environ, expected, monkeypatch):
    def resolve(name):
        if address is None:
            raise socket.gaierror(-2, "unknown")
        return address

    monkeypatch.setattr(socket, "gethostbyname", resolve)
    assert gloo(environ, [LO, DOCKER, ETH]) == expected


@pytest.mark.parametrize(
    ("chosen", "level", "words"),
    [
        (ETH, "green", "gloo takes eth0, 10.0.0.7"),
        (LO, "red", "no other host can reach that; export IFNAME, one of eth0 10.0.0.7"),
        (DOCKER, "yellow", "a network of containers on that host; export IFNAME, one of eth0"),
        (None, "red", "no interface of the name gloo was given"),
    ],
)
def test_what_doctor_says(chosen, level, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = json.loads(json.dumps({"gloo": chosen, "nccl": ETH, "there": [LO, DOCKER, ETH]}))
    finding = doctor._choice("gpu2", told)
    assert (finding.level, finding.name) == (level, "gpu2 network")
    assert words in finding.text


def test_it_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "slap_ds.doctor.interfaces"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert " " not in done.stdout.strip()
    assert ["lo", "127.0.0.1"] in json.loads(done.stdout)["there"]
