"""Four nodes train what four ranks of one node train, bit for bit."""

import pytest

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(300)]
WAIT_S = 200  # four ranks on two cores
STEPS = 3


def config(lab, name, **sections):
    return lab.config(name, steps=STEPS, **sections)


@pytest.fixture(scope="module")
def four_ranks(lab):
    """Four ranks on one node."""
    job = lab.start(0, "single_node.sh", config(lab, "four-ranks"), "four-ranks.log", GPUS="4")
    assert lab.wait([job], WAIT_S) == [0], lab.logs()
    result = lab.result("four-ranks")
    assert len(result[0]) == STEPS
    assert [len(ids) for ids in result[1]] == [10] * STEPS
    return result


def test_deepspeed_through_pdsh(lab, four_ranks):
    hosts = str(lab.folder / "hosts-4")
    path = config(lab, "four-pdsh")
    job = lab.start(0, "multi_node.sh", path, "four-pdsh.log", HOSTFILE=hosts)
    assert lab.wait([job], WAIT_S) == [0], lab.logs()
    assert lab.result("four-pdsh") == four_ranks


def test_torchrun_on_every_node(lab, four_ranks):
    path = config(lab, "four-torchrun")
    jobs = lab.start_torchrun(path, "four-torchrun", nodes=4)
    assert lab.wait(jobs, WAIT_S) == [0] * 4, lab.logs()
    assert lab.result("four-torchrun") == four_ranks
