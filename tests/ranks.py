"""Run a function on several gloo ranks: forked from a server that has imported torch already."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from slap_ds.launch.environment import free_port

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.ranks_preload"])


def run_ranks(
    work: Callable[..., Any], world: int, *args: Any, timeout_s: float = 240
) -> list[Any]:
    """`work(*args)` on `world` ranks; returns what each rank returned, in rank order.

    `work` must be a module-level function. A rank that raises, dies or hangs fails the test.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        processes = [
            _context.Process(target=_rank_main, args=(work, rank, world, folder, port, args))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        try:
            for process in processes:
                process.join(timeout_s)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
        errors = [p.read_text() for p in sorted(Path(folder).glob("error-*"))]
        assert not errors, "\n".join(errors)
        codes = [process.exitcode for process in processes]
        assert codes == [0] * world, f"exit codes {codes} (negative: killed after {timeout_s} s)"
        return [torch.load(f"{folder}/result-{r}", weights_only=False) for r in range(world)]


def _rank_main(
    work: Callable[..., Any], rank: int, world: int, folder: str, port: int, args: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
        )
        torch.save(work(*args), f"{folder}/result-{rank}")
        dist.barrier()
    except BaseException:
        Path(folder, f"error-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)
    # Not a clean interpreter exit: DeepSpeed's handlers wait for peers that may be gone.
    os._exit(0)
