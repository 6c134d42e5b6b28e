"""`slap-ds bench network`: an all-reduce between all ranks, small for latency, large for bandwidth.

Run it as a run is started, `deepspeed --hostfile hosts --module slap_ds bench network`, so that it
takes the same interfaces; `slap-ds doctor --hostfile hosts --network` starts it over ssh.
"""

from __future__ import annotations

import socket
import statistics
from typing import Any

from slap_ds.config.schema import Config, EngineConfig
from slap_ds.distributed.comm import Comm
from slap_ds.engine import start_ranks

_SMALL, _REPEATS, _LARGE_REPEATS = 8, 50, 5


def measure(mib: float, timeout_s: float) -> tuple[Comm, dict[str, Any]]:
    """Join the ranks and time the two messages; every rank returns the same numbers.

    `latency_s` is the median of one small all-reduce. `bus_bytes_per_s` is the large one's
    payload times 2 (n - 1) / n over its median time: what each rank has to send, and so comparable
    between numbers of ranks.

    Raises:
        ValueError: nothing to send.
    """
    if mib <= 0:
        raise ValueError(f"--mib is {mib:g}, expected a size above 0")
    # Joining reads this section alone.
    engine: Any = {"engine": EngineConfig(timeout_s=timeout_s, start_timeout_s=timeout_s)}
    comm = start_ranks(Config.model_construct(**engine))
    large = max(_SMALL, round(mib * 2**20) // 4 * 4)
    times = [
        statistics.median(comm.time_all_reduce(size, repeats))
        for size, repeats in ((_SMALL, _REPEATS), (large, _LARGE_REPEATS))
    ]
    # The slowest rank's.
    table = comm.exchange(-1, "network", [round(1e9 * t) for t in times])
    small_s, large_s = (float(column.max()) / 1e9 for column in table.T)
    names = comm.texts(-1, "host names", socket.gethostname())
    sent = 2 * (comm.world - 1) / comm.world * large
    return comm, {
        "ranks": comm.world,
        "hosts": len(set(names)),
        "device": comm.device.type,
        "latency_s": small_s,
        "message_bytes": large,
        "all_reduce_s": large_s,
        "bus_bytes_per_s": sent / large_s if comm.world > 1 else 0.0,
    }
