"""launch/slurm.sbatch inside a real Slurm allocation of two nodes, all of its ways."""

import pytest

from tests.nodes import slurm
from tests.nodes.conftest import REPO

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(150)]


@pytest.fixture(scope="module")
def environ(lab):
    reason = slurm.why_not()
    if reason is not None:
        pytest.skip(reason)
    return slurm.start(lab.cluster, lab.folder / "slurm", lab.environ())


@pytest.mark.parametrize("starter", ["torchrun", "python", "deepspeed"])
def test_two_nodes_equal_one(starter, environ, lab, one_node):
    name = f"slurm-{starter}"
    # salloc runs the script with the variables sbatch would give it; these nodes have no GPUs.
    command = ["salloc", "--nodes=2", str(REPO / "launch/slurm.sbatch"), lab.config(name)]
    variables = {**environ, "STARTER": starter, "GPUS": "1"}
    del variables["MASTER_PORT"]
    job = lab.cluster.nodes[0].start(command, variables, REPO, lab.folder / f"{name}.log")
    assert lab.wait([job]) == [0], lab.logs()
    assert lab.result(name) == one_node
