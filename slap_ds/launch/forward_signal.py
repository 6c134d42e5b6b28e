"""`python -m slap_ds.launch.forward_signal SIGNAL COMMAND ...`: forwards requests to stop.

What asks a job to save is SIGTERM or SIGUSR1. mpirun and mpiexec kill the ranks on SIGTERM and pass
SIGUSR1 on to them; deepspeed dies of SIGUSR1 and passes SIGTERM on. So the first SIGTERM, SIGUSR1
or SIGINT becomes SIGNAL, and any later one SIGTERM. The command ends with this process.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from slap_ds.distributed.watchdog import die_with_parent

_REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def pass_on(number: signal.Signals, command: Sequence[str]) -> int:
    """Run `command`; returns its exit code, as a shell gives it.

    Raises:
        OSError: it cannot be started.
    """
    asked = False

    def ask(_: int, frame: FrameType | None) -> None:
        nonlocal asked
        child.send_signal(signal.SIGTERM if asked else number)
        asked = True

    # A request that comes before the handlers are there would end this process, and be lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, _REQUESTS)
    # What the script has opened for it stays open.
    child = subprocess.Popen(
        command, close_fds=False, preexec_fn=functools.partial(_prepare_child, os.getpid())
    )
    for each in _REQUESTS:
        signal.signal(each, ask)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _REQUESTS)
    code = child.wait()
    return code if code >= 0 else 128 - code


def _prepare_child(parent: int) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _REQUESTS)
    die_with_parent(parent)


if __name__ == "__main__":
    sys.exit(pass_on(signal.Signals[f"SIG{sys.argv[1]}"], sys.argv[2:]))
