"""Requests to stop reach ranks on other nodes, with `slap-ds launch` and without."""

import os
import signal
import sys

import pytest

from slap_ds.checkpoint import find as checkpoint
from tests.faults.harness import with_fault

pytestmark = [
    pytest.mark.nodes,
    pytest.mark.faults,
    pytest.mark.fault_row(13),
    pytest.mark.timeout(200),
]
ENDLESS = {"steps": 100_000, "engine": {"timeout_s": 60}}
SCRIPTS = ["multi_node.sh", "openmpi.sh", "mpich.sh"]


def tell(node, word, number=signal.SIGTERM):
    """Send a signal to the one process on `node` whose command line begins with `word`."""
    found = [pid for pid, line in node.pids(word).items() if line.startswith(word)]
    assert len(found) == 1, node.processes(word)
    os.kill(found[0], number)


def saved_on_both(lab, name):
    found = lab.heartbeats(name)
    assert [facts["host"] for facts in found] == ["node1", "node2"]
    assert [facts["exit"] for facts in found] == [75, 75], lab.logs()
    assert checkpoint.find(lab.folder / name), lab.logs()


@pytest.mark.parametrize("script", SCRIPTS)
def test_under_slap_ds_launch(lab, script):
    name = f"supervised-{script.removesuffix('.sh')}"
    path = lab.config(name, **ENDLESS)
    job = lab.start(0, script, path, f"{name}.log", supervised=True, MPIEXEC="mpiexec.hydra")
    lab.until_step(name, 2, [job])
    tell(lab.cluster.nodes[0], f"{sys.executable} -m slap_ds launch")
    assert lab.wait([job], 60) == [75], lab.logs()
    saved_on_both(lab, name)
    lab.until_gone(10)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_script_alone(lab, script):
    name = f"asked-{script.removesuffix('.sh')}"
    job = lab.start(0, script, lab.config(name, **ENDLESS), f"{name}.log", MPIEXEC="mpiexec.hydra")
    lab.until_step(name, 2, [job])
    tell(lab.cluster.nodes[0], "python -m slap_ds.launch.forward_signal")
    lab.wait([job], 60)
    lab.until_gone()
    if script != "multi_node.sh":  # deepspeed cuts the ranks' output off before it asks them
        saved_on_both(lab, name)


def test_a_fault_on_the_other_node(lab, one_node):
    """The number of the attempt reaches the other node: it is not hurt again."""
    name = "restarted"
    path = lab.config(name, checkpoint={"every": 1}, engine={"timeout_s": 8})
    variables = {"PASS": "SLAP_FAULT", **with_fault("raise@1,3,forward")}
    job = lab.start(0, "multi_node.sh", path, f"{name}.log", supervised=True, **variables)
    assert lab.wait([job], 120) == [0], lab.logs()
    said = (lab.folder / f"{name}.log").read_text()
    assert "attempt 1 ended with 70 at step 3: rank 1: RuntimeError: a fault on purpose" in said
    assert [facts["attempt"] for facts in lab.heartbeats(name)] == ["2", "2"]
    assert lab.result(name)[:2] == one_node[:2]
