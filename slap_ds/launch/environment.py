"""Which rank this process is, from the variables its launcher set.

    discover(os.environ) -> Place      or one ValueError: found, expected, what to do

deepspeed and torchrun write RANK and its relatives; MPI and Slurm write their own names for the
same numbers. The innermost launcher counts: torchrun under srun is torchrun. RANK from anywhere
else must agree with what MPI or Slurm says, or every process might take itself for rank 0.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DEFAULT_PORT = 29500


@dataclass(frozen=True)
class Place:
    """This process among the ranks; `launcher` is who said so."""

    launcher: str
    rank: int
    world: int
    local_rank: int  # on this node
    local_world: int | None  # ranks on this node, where the launcher tells
    address: str  # where rank 0 can be reached by the others
    port: int

    def variables(self) -> dict[str, str]:
        """The same in the names that torch and DeepSpeed read."""
        named = {
            "RANK": self.rank,
            "WORLD_SIZE": self.world,
            "LOCAL_RANK": self.local_rank,
            "MASTER_ADDR": self.address,
            "MASTER_PORT": self.port,
        }
        if self.local_world is not None and self.world > 1:
            named["LOCAL_WORLD_SIZE"] = self.local_world
        return {name: str(value) for name, value in named.items()}


@dataclass(frozen=True)
class _Names:
    """What a launcher calls rank, world, local rank and local world; the first one set counts."""

    launcher: str
    rank: tuple[str, ...]
    world: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_world: tuple[str, ...]


_TORCH = _Names("torch", ("RANK",), ("WORLD_SIZE",), ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE",))
_DEEPSPEED = _Names("deepspeed", ("RANK",), ("WORLD_SIZE",), ("LOCAL_RANK",), ("LOCAL_SIZE",))
_MPI = (
    _Names(
        "OpenMPI",
        ("OMPI_COMM_WORLD_RANK",),
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    _Names(
        "MVAPICH",
        ("MV2_COMM_WORLD_RANK",),
        ("MV2_COMM_WORLD_SIZE",),
        ("MV2_COMM_WORLD_LOCAL_RANK",),
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    # MPICH's hydra and Intel MPI; Slurm's --mpi=pmi2 gives the first two.
    _Names(
        "MPICH",
        ("PMI_RANK",),
        ("PMI_SIZE",),
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "SLURM_LOCALID"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
    ),
)
_SLURM = _Names(
    "Slurm", ("SLURM_PROCID",), ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), ("SLURM_LOCALID",), ()
)


def discover(environ: Mapping[str, str]) -> Place:
    """This process's place; alone, where no launcher left a trace.

    Raises:
        ValueError: variables are missing, are no numbers, or contradict each other.
    """
    # Schedulers and wrappers set what they do not know to nothing.
    environ = {name: value for name, value in environ.items() if value.strip()}
    outer = _outer(environ)
    if "RANK" not in environ:
        if outer is not None:
            return _checked(environ, outer)
        if _number(environ, "WORLD_SIZE", 1) > 1:
            raise ValueError(
                f"WORLD_SIZE is {environ['WORLD_SIZE']} and RANK is not set: start with deepspeed "
                "or torchrun, which set both, or unset WORLD_SIZE to run alone"
            )
        if "MPI_LOCALRANKID" in environ or "PMIX_RANK" in environ:
            return ask_mpi()
        return Place("none", 0, 1, 0, 1, "127.0.0.1", free_port())
    if "CROSS_SIZE" in environ and "LOCAL_SIZE" in environ:
        return _checked(environ, _DEEPSPEED)
    if not any(name.startswith("TORCHELASTIC_") for name in environ) and outer is not None:
        _compare(environ, _TORCH, outer)
    return _checked(environ, _TORCH)


def rank_said(environ: Mapping[str, str]) -> int:
    """The rank for messages: whoever names one first, unchecked; 0 where nobody does."""
    for names in (_TORCH, *_MPI, _SLURM):
        if environ.get(names.rank[0], "").isdecimal():
            return int(environ[names.rank[0]])
    return 0


def ranks_said(environ: Mapping[str, str], name: str, fallback: int) -> int:
    """A number of ranks, `name` being WORLD_SIZE or LOCAL_WORLD_SIZE; `fallback` where it is unset,
    empty, 0 or no number, for messages and estimates."""
    text = environ.get(name, "").strip()
    return int(text) if text.isdecimal() and int(text) > 0 else fallback


def ask_mpi() -> Place:
    """The place MPI itself gives, for MPI launchers that leave no variables.

    Raises:
        ValueError: mpi4py is not installed.
    """
    MPI = _mpi()
    if MPI is None:
        raise ValueError(
            "an MPI launcher started this process without telling its rank in variables that are "
            'known here: pip install "slap_ds[mpi]", so that MPI can be asked, or use launch/'
        )
    comm = MPI.COMM_WORLD
    here = comm.Split_type(MPI.COMM_TYPE_SHARED)
    host, port = socket.gethostname(), free_port()
    address, port = comm.bcast((host, port), root=0)
    if here.Get_size() == comm.Get_size():
        address = "127.0.0.1"
    ranks = comm.Get_rank(), comm.Get_size(), here.Get_rank(), here.Get_size()
    return Place("mpi4py", *ranks, address, port)


def _mpi() -> Any:
    """mpi4py's MPI; None where it is not installed."""
    try:
        from mpi4py import MPI
    except ImportError:
        return None
    return MPI


def _outer(environ: Mapping[str, str]) -> _Names | None:
    """Whose variables, other than RANK and its relatives, describe this process."""
    found = [names for names in _MPI if any(n in environ for n in names.rank + names.world)]
    for other in found[1:]:
        _compare(environ, found[0], other)
    if found:
        return found[0]
    # mpirun inside a Slurm job inherits the variables of the daemon srun started, so MPI is first.
    if "SLURM_PROCID" not in environ:
        return None
    # A batch script has SLURM_PROCID=0 too, and the number of tasks of the whole job.
    if "SLURM_STEP_ID" in environ or _number(environ, "SLURM_NTASKS", 1) == 1:
        return _SLURM
    if "RANK" in environ:
        return None
    raise ValueError(
        f"this process is in a Slurm job of {environ['SLURM_NTASKS']} tasks, but srun did not start"
        " it (no SLURM_STEP_ID): put srun before the command, as launch/slurm.sbatch does"
    )


def _checked(environ: Mapping[str, str], names: _Names) -> Place:
    rank, world = _required(environ, names, "rank"), _required(environ, names, "world")
    local_rank = _required(environ, names, "local_rank") if world > 1 else 0
    local_world = _local_world(environ, names)
    who = names.launcher
    if not 0 <= rank < world:
        raise ValueError(
            f"{who}: {names.rank[0]} is {rank} of {world} ranks, expected 0 to {world - 1}: "
            "the variables are of two different jobs; start again from a clean shell"
        )
    if local_world is not None and not (0 <= local_rank < local_world <= world):
        raise ValueError(
            f"{who}: local rank {local_rank} of {local_world} on this node of {world} ranks, "
            "expected local rank < ranks of the node <= all ranks: start again from a clean shell"
        )
    if names is _MPI[2] and "SLURM_STEP_ID" in environ:
        names = _SLURM
    address = environ.get("MASTER_ADDR") or _address(environ, names, world, local_world)
    fallback = free_port() if world == 1 else _port(environ, names)
    return Place(
        who,
        rank,
        world,
        local_rank,
        local_world,
        address,
        _number(environ, "MASTER_PORT", fallback),
    )


def _required(environ: Mapping[str, str], names: _Names, field: str) -> int:
    choices: tuple[str, ...] = getattr(names, field)
    for name in choices:
        if name in environ:
            return _number(environ, name, 0)
    there = [n for n in names.rank + names.world + names.local_rank if n in environ]
    raise ValueError(
        f"{names.launcher} launch: found {', '.join(f'{n}={environ[n]}' for n in there)}, but "
        f"{' or '.join(choices)} is not set: start with one of the scripts in launch/"
    )


def _local_world(environ: Mapping[str, str], names: _Names) -> int | None:
    for name in names.local_world:
        if name in environ:
            return _number(environ, name, 1)
    if names is _SLURM:
        text = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
        counts = _expand_counts(text)
        node = _number(environ, "SLURM_NODEID", 0)
        return counts[node] if node < len(counts) else None
    return None


def _address(environ: Mapping[str, str], names: _Names, world: int, local_world: int | None) -> str:
    if world == 1 or local_world == world:
        return "127.0.0.1"
    if names is _SLURM:
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
        if nodes:
            return first_host(nodes)
    if names in _MPI:
        asked = _mpi()
        if asked is not None:
            host: str = asked.COMM_WORLD.bcast(socket.gethostname(), root=0)
            return host
    how = {
        "OpenMPI": "mpirun -x MASTER_ADDR=HOST",
        "MVAPICH": "mpirun -env MASTER_ADDR HOST",
        "MPICH": "mpiexec -genv MASTER_ADDR HOST",
    }.get(names.launcher, "export MASTER_ADDR=HOST on every node")
    raise ValueError(
        f"{names.launcher}: {world} ranks on several nodes and no MASTER_ADDR: say where rank 0 "
        f"runs, {how}, HOST being the first node"
    )


def _port(environ: Mapping[str, str], names: _Names) -> int:
    # Jobs that share a node must not share a port.
    if names is _SLURM:
        return 20000 + _number(environ, "SLURM_JOB_ID", 0) % 10000
    return DEFAULT_PORT


def first_host(nodes: str) -> str:
    """The first name of a Slurm node list: `gpu[07-09,12],x1` -> `gpu07`.

    Raises:
        ValueError: not such a list.
    """
    found = re.match(r"([^\[\],\s]+)(?:\[(\w+)[^\]]*\]([^\[\],\s]*))?(?:,|$)", nodes)
    if found is None:
        raise ValueError(
            f"cannot read the first host of the Slurm node list {nodes!r}: export MASTER_ADDR"
        )
    return found[1] + (found[2] or "") + (found[3] or "")


def _expand_counts(text: str) -> list[int]:
    """Slurm's tasks per node: `2(x3),1` -> [2, 2, 2, 1]; [] where it is something else."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            return []
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def _compare(environ: Mapping[str, str], one: _Names, other: _Names) -> None:
    for field in ("rank", "world"):
        a = next((n for n in getattr(one, field) if n in environ), None)
        b = next((n for n in getattr(other, field) if n in environ), None)
        if a and b and _number(environ, a, 0) != _number(environ, b, 0):
            raise ValueError(
                f"{a}={environ[a]} contradicts {b}={environ[b]} of {other.launcher}: expected the "
                f"same; one is left over from another job or shell, so unset {a} and its relatives "
                "or start without that launcher"
            )


def _number(environ: Mapping[str, str], name: str, fallback: int) -> int:
    text = environ.get(name, "")
    if not text.strip():
        return fallback
    if not text.strip().isdecimal():
        raise ValueError(f"{name} is {text!r}, expected a whole number: unset it or start again")
    return int(text)


def free_port() -> int:
    """Below those of outgoing connections, so that none takes it before rank 0 listens there."""
    while True:
        port = 20000 + secrets.randbelow(12000)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


def read_hostfile(path: str) -> dict[str, int]:
    """Ranks by host, in the file's order, which is the order of the ranks.

    Raises:
        ValueError: listing every bad line, or there is no host.
        FileNotFoundError: no such file.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:  # some editors put a BOM first
            lines = file.read().splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no hostfile at {path!r}: write one line `HOST slots=GPUS` for every node"
        ) from None
    hosts: dict[str, int] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        found = re.fullmatch(r"(\S+)\s+slots=(\d+)", text)
        if found is None:
            problems.append(f"line {number}: found {text!r}, expected `HOST slots=GPUS`")
        elif int(found[2]) == 0:
            problems.append(f"line {number}: {found[1]} has 0 slots: remove the line")
        elif found[1] in hosts:
            problems.append(f"line {number}: {found[1]} is listed twice: give each host one line")
        else:
            hosts[found[1]] = int(found[2])
    if problems:
        raise ValueError(f"hostfile {path}: {'; '.join(problems)}")
    if not hosts:
        raise ValueError(f"hostfile {path} names no host: one line `HOST slots=GPUS` for each")
    return hosts


def _main(path: str) -> None:
    """For the scripts in launch/: the number of ranks, and the hosts, rank 0's first."""
    try:
        hosts = read_hostfile(path)
    except (ValueError, OSError) as error:
        sys.exit(f"slap-ds: error: {error}")
    print(sum(hosts.values()), *hosts)


if __name__ == "__main__":
    _main(sys.argv[1])
