"""launch/slurm.sbatch inside a real Slurm allocation of two nodes, all of its ways."""

import pytest

from slap_ds.checkpoint import find as checkpoint
from tests.nodes import slurm
from tests.nodes.conftest import REPO

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(150)]


@pytest.fixture(scope="module")
def environ(lab):
    reason = slurm.why_not()
    if reason is not None:
        pytest.skip(reason)
    return slurm.start(lab.cluster, lab.folder / "slurm", lab.environ())


def start(lab, environ, starter, name, **sections):
    # salloc runs the script with the variables sbatch would give it; these nodes have no GPUs.
    path = lab.config(name, **sections)
    command = ["salloc", "--nodes=2", str(REPO / "launch/slurm.sbatch"), path]
    variables = {**environ, "STARTER": starter, "GPUS": "1"}
    del variables["MASTER_PORT"]
    return lab.cluster.nodes[0].start(command, variables, REPO, lab.folder / f"{name}.log")


@pytest.mark.parametrize("starter", ["torchrun", "python", "deepspeed"])
def test_two_nodes_equal_one(starter, environ, lab, one_node):
    name = f"slurm-{starter}"
    job = start(lab, environ, starter, name)
    assert lab.wait([job]) == [0], lab.logs()
    assert lab.result(name) == one_node


@pytest.mark.faults
@pytest.mark.fault_row(13)
@pytest.mark.parametrize("starter", ["torchrun", "python", "deepspeed"])
def test_usr1_before_the_time_is_up(starter, environ, lab):
    """What `--signal=USR1@300` does."""
    name = f"slurm-usr1-{starter}"
    job = start(lab, environ, starter, name, steps=100_000)
    lab.until_step(name, 2, [job])
    ask = ["bash", "-c", "scancel --signal=USR1 $(squeue -h -o %i)"]
    log = lab.folder / f"{name}-scancel.log"
    assert lab.wait([lab.cluster.nodes[0].start(ask, environ, REPO, log)]) == [0], lab.logs()
    assert lab.wait([job], 60) != [0], lab.logs()
    assert [facts["exit"] for facts in lab.heartbeats(name)] == [75, 75], lab.logs()
    assert checkpoint.find(lab.folder / name)
