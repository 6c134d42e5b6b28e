"""`slap-ds doctor` between two nodes: a sound network, and one that is set up wrongly."""

import json
import sys
from pathlib import Path

import pytest

from tests.nodes.conftest import REPO

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(150)]


def findings(lab, name, *arguments, **variables):
    """{name: (level, text)} of one doctor on node1."""
    hosts = str(lab.folder / "hosts-2")
    command = [sys.executable, "-m", "slap_ds", "doctor", "--json", "--hostfile", hosts, *arguments]
    environ = lab.environ(**variables)
    log = lab.folder / f"{name}.log"
    lab.wait([lab.cluster.nodes[0].start(command, environ, REPO, log)])
    told = log.read_text()
    return {
        each["name"]: (each["level"], each["text"])
        for each in json.loads(told[told.index("{") :])["findings"]
    }


def test_the_network_is_measured(lab):
    found = findings(lab, "doctor", "--network")
    for number in (1, 2):
        expected = ("green", f"gloo takes eth0, 10.77.0.{number}")
        assert found[f"node{number} network"] == expected
    level, text = found["bandwidth"]
    assert level in ("green", "yellow"), text
    assert float(text.split(" GB/s")[0]) > 0.001
    assert text.split(": ")[0].endswith("us a small message (cpu)")


def test_a_name_that_leads_to_the_loopback(lab):
    """What Debian writes at installation, and what makes gloo's ranks wait for each other."""
    path = Path("/etc/netns", lab.cluster.nodes[1].namespace, "hosts")
    sound = path.read_text()
    try:
        path.write_text("127.0.1.1 node2\n" + sound)
        found = findings(lab, "doctor-loopback", "--network")
    finally:
        path.write_text(sound)
    level, text = found["node2 network"]
    assert level == "red"
    assert text.startswith("gloo takes lo, 127.0.1.1: no other host can reach that; export IFNAME")
    assert "one of eth0 10.77.0.2" in text
    assert found["node1 network"][0] == "green"
    assert "bandwidth" not in found
