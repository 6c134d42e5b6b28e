"""Every launcher's variables give the same place; contradictions and gaps are one clear error."""

import sys
import types

import pytest

from slap_ds.launch.environment import (
    Place,
    discover,
    first_host,
    rank_said,
    ranks_said,
    read_hostfile,
)

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29411",
    "TORCHELASTIC_RUN_ID": "none",
}
DEEPSPEED = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29411",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "3",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29411",
}
MPICH = {
    "PMI_RANK": "3",
    "PMI_SIZE": "4",
    "MPI_LOCALRANKID": "1",
    "MPI_LOCALNRANKS": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29411",
}
MVAPICH = {
    "MV2_COMM_WORLD_RANK": "3",
    "MV2_COMM_WORLD_SIZE": "4",
    "MV2_COMM_WORLD_LOCAL_RANK": "1",
    "MV2_COMM_WORLD_LOCAL_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29411",
}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_JOB_ID": "9411",
}
# DeepSpeed's MPICH runner and its launcher_helper set these beside hydra's own.
DEEPSPEED_MPICH = {**MPICH, "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2"}
OUTER = {
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_ID": "0",
}


@pytest.mark.parametrize(
    ("launcher", "environ"),
    [
        ("torch", TORCHRUN),
        ("deepspeed", DEEPSPEED),
        ("OpenMPI", OPENMPI),
        ("MPICH", MPICH),
        ("MVAPICH", MVAPICH),
        ("Slurm", SLURM),
        ("torch", DEEPSPEED_MPICH),
        ("torch", {**TORCHRUN, **OUTER}),
        ("deepspeed", {**DEEPSPEED, **OUTER}),
        ("OpenMPI", {**OPENMPI, **OUTER}),
        ("torch", {**TORCHRUN, "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}),
        ("MPICH", {**SLURM, "PMI_RANK": "3", "PMI_SIZE": "4"}),
        ("deepspeed", {**DEEPSPEED, "LOCAL_WORLD_SIZE": "1"}),
    ],
)
def test_every_launcher_gives_the_same_place(launcher, environ):
    place = discover(environ)
    assert place.launcher == launcher
    assert (place.rank, place.world, place.local_rank) == (3, 4, 1)
    assert place.address == "node1"
    assert place.port == 29411
    assert rank_said(environ) == 3
    if "LOCAL_SIZE" not in environ or launcher == "deepspeed":
        expected = None if launcher == "MPICH" and "SLURM_STEP_ID" in environ else 2
        assert place.local_world == expected


def test_torch_and_deepspeed_find_the_place_under_their_names():
    assert discover(SLURM).variables() == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "29411",
    }


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"PATH": "/bin", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_ID": "4"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_alone(environ):
    place = discover(environ)
    assert (place.rank, place.world, place.local_rank) == (0, 1, 0)
    assert place.address == "127.0.0.1"
    assert place.port > 0
    assert "LOCAL_WORLD_SIZE" not in place.variables()
    assert rank_said(environ) == 0


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


ONE_NODE = {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}


def test_mpi_on_one_node_needs_no_address():
    place = discover(without({**OPENMPI, **ONE_NODE}, "MASTER_ADDR", "MASTER_PORT"))
    assert (place.address, place.port) == ("127.0.0.1", 29500)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (without(TORCHRUN, "WORLD_SIZE"), "found RANK=3, LOCAL_RANK=1, but WORLD_SIZE is not set"),
        (without(TORCHRUN, "LOCAL_RANK"), "LOCAL_RANK is not set: start with one of the scripts"),
        (without(TORCHRUN, "RANK"), "WORLD_SIZE is 4 and RANK is not set"),
        (without(TORCHRUN, "MASTER_ADDR"), "no MASTER_ADDR: .* export MASTER_ADDR=HOST"),
        (without(OPENMPI, "MASTER_ADDR"), "OpenMPI: 4 ranks .* mpirun -x MASTER_ADDR=HOST"),
        (without(OPENMPI, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE is not set"),
        (without(MPICH, "MASTER_ADDR"), "mpiexec -genv MASTER_ADDR HOST"),
        (without(MPICH, "MPI_LOCALRANKID"), "MPI_LOCALRANKID or PMI_LOCAL_RANK or SLURM_LOCALID"),
        (without(MPICH, "PMI_RANK"), "PMI_SIZE=4.* PMI_RANK is not set"),
        (without(SLURM, "SLURM_STEP_ID"), "srun did not start it .*: put srun before the command"),
        (without(SLURM, "SLURM_STEP_NODELIST"), "Slurm: 4 ranks on several nodes"),
        ({**TORCHRUN, "RANK": "4"}, "RANK is 4 of 4 ranks, expected 0 to 3"),
        ({**TORCHRUN, "RANK": "three"}, "RANK is 'three', expected a whole number"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK is '-1', expected a whole number"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "local rank 2 of 2 on this node"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "8"}, "local rank 1 of 8 on this node of 4 ranks"),
        (
            {**OPENMPI, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
            "RANK=0 contradicts OMPI_COMM_WORLD_RANK=3 of OpenMPI",
        ),
        (
            {**SLURM, "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"},
            "WORLD_SIZE=8 contradicts SLURM_STEP_NUM_TASKS=4 of Slurm",
        ),
        (
            {**OPENMPI, "PMI_RANK": "1", "PMI_SIZE": "4"},
            "OMPI_COMM_WORLD_RANK=3 contradicts PMI_RANK=1 of MPICH",
        ),
    ],
)
def test_gaps_and_contradictions_are_one_line(environ, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ValueError, match=words) as error:
        discover(environ)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[07-09,12],x1", "gpu07"),
        ("rack-a[3,5]-ib,rack-b1", "rack-a3-ib"),
    ],
)
def test_first_host_of_a_slurm_list(nodes, first):
    assert first_host(nodes) == first


def test_an_unreadable_slurm_list_says_what_to_do():
    with pytest.raises(ValueError, match="export MASTER_ADDR"):
        first_host("[1-2]")


def test_mpi_is_asked_only_where_variables_tell_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ValueError, match=r'pip install "slap_ds\[mpi\]"'):
        discover({"PMIX_RANK": "1"})
    assert discover(OPENMPI).rank == 3

    class Ranks:
        def __init__(self, rank, size):
            self.Get_rank, self.Get_size = lambda: rank, lambda: size

        def Split_type(self, kind):
            return Ranks(1, 2)

        def bcast(self, value, root):
            return "node1", 29411

    mpi = types.SimpleNamespace(COMM_WORLD=Ranks(3, 4), COMM_TYPE_SHARED=0)
    monkeypatch.setitem(sys.modules, "mpi4py", types.SimpleNamespace(MPI=mpi))
    assert discover({"PMIX_RANK": "3"}) == Place("mpi4py", 3, 4, 1, 2, "node1", 29411)
    # Rank and size are in variables, the first node is not: only that is asked for.
    mpi.COMM_WORLD.bcast = lambda value, root: "node1"
    assert discover(without(OPENMPI, "MASTER_ADDR")).address == "node1"


@pytest.mark.parametrize(
    "name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "PMI_RANK"]
)
@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_variable_is_an_unset_one(name, value):
    place = discover({name: value})
    assert (place.rank, place.world, place.local_rank) == (0, 1, 0)


@pytest.mark.parametrize(
    ("value", "ranks"), [("", 3), ("0", 3), ("x", 3), ("-1", 3), ("2", 2), (None, 3)]
)
def test_ranks_for_estimates_are_at_least_one(value, ranks):
    environ = {} if value is None else {"LOCAL_WORLD_SIZE": value}
    assert ranks_said(environ, "LOCAL_WORLD_SIZE", 3) == ranks


def test_a_byte_order_mark_is_no_part_of_a_host(tmp_path):
    path = tmp_path / "hosts"
    path.write_bytes(b"\xef\xbb\xbfnode1 slots=2\n")
    assert read_hostfile(str(path)) == {"node1": 2}
