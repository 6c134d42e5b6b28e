"""Four nodes train what four ranks of one node train, bit for bit."""

import pytest

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(200)]
STEPS = 3


def config(lab, name, **sections):
    return lab.config(name, steps=STEPS, **sections)


@pytest.fixture(scope="module")
def four_ranks(lab):
    """Four ranks on one node."""
    job = lab.start(0, "single_node.sh", config(lab, "four-ranks"), "four-ranks.log", GPUS="4")
    assert lab.wait([job]) == [0], lab.logs()
    result = lab.result("four-ranks")
    assert len(result[0]) == STEPS
    assert [len(ids) for ids in result[1]] == [10] * STEPS
    return result


@pytest.mark.parametrize("script", ["multi_node.sh", "openmpi.sh"])
def test_started_from_the_first_node(script, lab, four_ranks):
    name = f"four-{script.removesuffix('.sh')}"
    hosts = str(lab.folder / "hosts-4")
    job = lab.start(0, script, config(lab, name), f"{name}.log", HOSTFILE=hosts)
    assert lab.wait([job]) == [0], lab.logs()
    assert lab.result(name) == four_ranks


def test_torchrun_on_every_node_and_sharded_selection(lab, four_ranks):
    path = config(lab, "four-torchrun", selection={"where": "sharded"})
    jobs = lab.start_torchrun(path, "four-torchrun", nodes=4)
    assert lab.wait(jobs) == [0] * 4, lab.logs()
    assert lab.result("four-torchrun") == four_ranks
