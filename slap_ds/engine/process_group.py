"""Joining the other ranks, how long to wait for them, and leaving together."""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from slap_ds.compat import all_to_all, collectives_log, limit_groups
from slap_ds.config.schema import Config
from slap_ds.distributed.comm import Comm
from slap_ds.distributed.heart import Heart
from slap_ds.distributed.watchdog import Watchdog
from slap_ds.engine.build_locks import refuse_stale_locks
from slap_ds.errors import PortTaken, RankError
from slap_ds.launch.environment import discover
from slap_ds.models.split import ALONE, Split

# How much longer torch waits than the watchdog, seconds.
_MARGIN_S = 3.0


def start_ranks(config: Config, dog: Watchdog | None = None) -> Comm:
    """Join the process group that the launcher set up (see `launch.environment`); alone: one rank.

    Args:
        dog: is told of the other ranks, and ends this one if they leave it waiting.

    Raises:
        ValueError: several ranks with the one-process engine, or none that can share rows evenly; a
            launcher's variables are wrong; the master port is taken; a killed build left a lock.
    """
    place = discover(os.environ)
    config.engine.groups(place.world)
    heart = Heart() if dog is None else dog.heart
    if config.engine.kind == "torch":
        if place.world > 1:
            raise ValueError(
                f"engine.kind torch runs on one rank, the launcher started {place.world}"
            )
        return Comm(heart=heart)
    if place.world > 1:
        heart.limit_s = config.engine.start_timeout_s
    heart.beat("looking for locks of builds")
    refuse_stale_locks(os.environ)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    os.environ.update(place.variables())
    heart.beat("joining the ranks")
    if get_accelerator().device_name() == "cuda":
        take_gpu(place.local_rank)
    # NCCL's own watchdog would end the process before ours can say who has gone.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    waiting = datetime.timedelta(seconds=config.engine.start_timeout_s + _MARGIN_S)
    try:
        # It prints that it has built an operator, whether it had to or not.
        with _no_shared_buffers(), contextlib.redirect_stdout(io.StringIO()):
            deepspeed.init_distributed(timeout=waiting, verbose=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise PortTaken(
            f"MASTER_PORT {place.port} is taken on {place.address}: another run, or one that has "
            "not ended yet; choose another port"
        ) from error
    backend = dist.get_backend()
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in backend else "cpu"
    comm = Comm(
        dist.get_rank(),
        dist.get_world_size(),
        torch.device(device),
        sharing=config.engine.sequence_parallel,
        heart=heart,
    )
    if comm.world > 1:
        comm.watch(os.environ["MASTER_ADDR"])
    if dog is not None:
        comm.peers.folder = dog.folder
        dog.peers = comm.peers
    return comm


def take_gpu(local_rank: int) -> None:
    """Make the GPU of this rank's own number the current one, which DeepSpeed expects too.

    Raises:
        RankError: this process does not see as many; others may.
    """
    seen = torch.cuda.device_count()
    if local_rank >= seen:
        raise RankError(
            f"local rank {local_rank} sees {seen} GPU{'s' * (seen != 1)} (CUDA_VISIBLE_DEVICES is "
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}): let every rank see all GPUs of "
            "its node (Slurm: --gpus-per-node, not --gpus-per-task or --gpu-bind), and start no "
            "more ranks on a node than it has GPUs"
        )
    torch.cuda.set_device(local_rank)


@contextlib.contextmanager
def _no_shared_buffers() -> Iterator[None]:
    """Keep DeepSpeed from making 66 MiB of shared memory a rank, which it never removes.

    Only its tensor-parallel inference on CPUs would use them. It makes them where LOCAL_SIZE equals
    the number of ranks. They outlive the run: a hundred runs of two ranks hold 13 GiB of /dev/shm,
    which is memory, and where it is full the next one ends in a segmentation fault.
    """
    size = os.environ.pop("LOCAL_SIZE", None)
    try:
        yield
    finally:
        if size is not None:
            os.environ["LOCAL_SIZE"] = size


def limit_waiting(seconds: float) -> None:
    """Let no process group wait longer; those DeepSpeed makes have torch's 10 or 30 minutes.

    A little longer than the watchdog waits: it can say who is missing, torch's own cannot.
    """
    limit_groups(seconds + _MARGIN_S)


def stop_ranks(comm: Comm, code: int = 0) -> None:
    """End a finished run: with several ranks all processes exit here, together, with this status.

    Not through the interpreter's own exit: a thread of the communication libraries that wakes up
    while it is torn down aborts the process now and then ("terminate called without an active
    exception"), and the launcher takes the finished run for a failed one.
    """
    if comm.world > 1:
        comm.barrier(-1, "the end of the run")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def logged_collectives() -> Iterator[dict[str, tuple[int, int]]]:
    """Count DeepSpeed's own collectives; after the block: {operation: (calls, bytes)}, this rank's.

    Every one of them is timed meanwhile, so that steps take longer.
    """
    found: dict[str, tuple[int, int]] = {}
    if not dist.is_initialized():
        yield found
        return
    from deepspeed import comm as ds_comm

    log = collectives_log(ds_comm)
    ds_comm.configure(enabled=True, prof_all=True, verbose=False)
    log.clear()
    try:
        yield found
    finally:
        ds_comm.configure(enabled=False)
    for operation, by_size in log.items():
        calls = sum(int(entry[0]) for entry in by_size.values())
        found[operation] = calls, sum(int(size) * int(e[0]) for size, e in by_size.items())


def split_rows(comm: Comm) -> Split:
    """This rank's line to those that share its rows, in process groups that all ranks make."""
    if comm.sharing == 1:
        return ALONE
    from deepspeed.sequence import layer

    groups = [
        dist.new_group(list(range(first, first + comm.sharing)))
        for first in range(0, comm.world, comm.sharing)
    ]
    mine = groups[comm.group]

    def total(x: Tensor) -> Tensor:
        dist.all_reduce(x, group=mine)
        return x

    return Split(comm.rank % comm.sharing, comm.sharing, all_to_all(layer, mine), total)


def build_extensions() -> None:
    """Compile what DeepSpeed needs on this accelerator, once, before several ranks want it."""
    if not torch.cuda.is_available():
        from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder

        ShareMemCommBuilder().load(verbose=False)


def joined_ranks() -> Comm:
    """This rank's line to the others in a process group that somebody else has set up, or alone."""
    if not dist.is_initialized():
        return Comm()
    cuda = "nccl" in dist.get_backend()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return Comm(dist.get_rank(), dist.get_world_size(), device)
