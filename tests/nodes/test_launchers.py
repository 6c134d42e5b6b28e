"""Two nodes train what one node trains, bit for bit, whoever starts them."""

import math

import pytest

from tests.nodes.conftest import STEPS

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(150)]


def test_the_one_node_run_learns_and_picks(one_node):
    losses, picks, evaluations = one_node
    assert len(losses) == STEPS
    assert all(math.isfinite(loss) for loss in losses)
    assert len(set(losses)) == STEPS
    assert [len(ids) for ids in picks] == [10] * STEPS
    assert evaluations[-1] < evaluations[0]


@pytest.mark.parametrize("script", ["multi_node.sh", "openmpi.sh", "mpich.sh"])
def test_started_from_the_first_node(script, lab, one_node):
    name = script.removesuffix(".sh")
    # Beside OpenMPI's, MPICH's mpiexec goes by this name.
    job = lab.start(0, script, lab.config(name), f"{name}.log", MPIEXEC="mpiexec.hydra")
    assert lab.wait([job]) == [0], lab.logs()
    assert lab.result(name) == one_node


def test_torchrun_on_every_node(lab, one_node):
    jobs = lab.start_torchrun(lab.config("torchrun"), "torchrun")
    assert lab.wait(jobs) == [0, 0], lab.logs()
    assert lab.result("torchrun") == one_node
