"""Faults on purpose: SLAP_FAULT=KIND@RANK,STEP,SITE[,ATTEMPT] before a run.

    kill@1,3,forward    rank 1 is killed in the first training forward of step 3

Kinds: kill, stop (frozen), slow (half a second), term (SIGTERM), usr1, orphan (its launcher is
killed), raise, nan, oom, host_oom, skip (the collective is left out), picks (other picks than rank
0's). Sites: score, forward, backward, step, all_gather, scatter, agree (on the picks),
save, visible. Only the given attempt of a supervised run is hit, the first unless told; `*`: every
one.

`Job` installs them in the ranks it forks, site/sitecustomize.py in those of a launcher.
"""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch

from slap_ds.checkpoint.save import Saver
from slap_ds.distributed.comm import Comm
from slap_ds.engine import DeepSpeedEngine
from slap_ds.launch.environment import rank_said
from slap_ds.train import loop as trainer

SITES: dict[str, tuple[Any, str]] = {
    "score": (DeepSpeedEngine, "score"),
    "forward": (DeepSpeedEngine, "_forward"),
    "backward": (DeepSpeedEngine, "_backward"),
    "step": (DeepSpeedEngine, "_step"),
    "all_gather": (Comm, "_all_gather"),
    "scatter": (Comm, "broadcast_picks"),
    "agree": (Comm, "agree_picks"),
    "save": (DeepSpeedEngine, "save"),
    "visible": (Saver, "wait"),
}


def install(text: str) -> None:
    """Wrap the site's function, on the rank that is meant.

    Raises:
        ValueError: not of the form above.
    """
    kind, _, where = text.partition("@")
    fields = where.split(",")
    if kind not in _KINDS or len(fields) not in (3, 4) or fields[2] not in SITES:
        raise ValueError(f"SLAP_FAULT is {text!r}, expected KIND@RANK,STEP,SITE[,ATTEMPT]")
    rank, step, site = int(fields[0]), int(fields[1]), fields[2]
    attempt = fields[3] if len(fields) == 4 else "1"
    if rank != rank_said(os.environ) or attempt not in ("*", os.environ.get("SLAP_ATTEMPT", "1")):
        return
    now = {"step": -1, "left": 1}
    _wrap(trainer, "plan_step", functools.partial(_note, now))
    owner, name = SITES[site]
    _wrap(owner, name, functools.partial(_maybe, now, step, _KINDS[kind]))


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def outer(*args: Any, **kwargs: Any) -> Any:
        return around(inner, *args, **kwargs)

    setattr(owner, name, outer)


def _note(now: dict[str, int], inner: Callable[..., Any], run: Any, step: int) -> Any:
    now["step"] = step
    return inner(run, step)


def _maybe(
    now: dict[str, int],
    step: int,
    fault: Callable[..., Any],
    inner: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    scoring = inner.__name__ == "_forward" and args[2] != "train"
    if now["step"] != step or not now["left"] or scoring:
        return inner(*args, **kwargs)
    now["left"] -= 1
    return fault(inner, *args, **kwargs)


def _signal(number: int, whom: Callable[[], int] = os.getpid) -> Callable[..., Any]:
    def fault(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        os.kill(whom(), number)
        return inner(*args, **kwargs)

    return fault


def _slow(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    time.sleep(0.5)
    return inner(*args, **kwargs)


def _raise(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("a fault on purpose")


def _nan(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return inner(*args, **kwargs) * float("nan")


def _oom(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...")


def _host_oom(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    torch.empty(1 << 50, dtype=torch.uint8)  # a petabyte: refused by every machine


def _skip(inner: Callable[..., Any], comm: Comm, first: Any, *rest: Any) -> Any:
    if inner.__name__ == "agree_picks":
        return rest[0]
    return first.expand(comm.world, *first.shape).clone()


def _picks(inner: Callable[..., Any], comm: Comm, step: int, selection: Any) -> Any:
    agree = comm.agree_picks

    def other(step: int, selection: Any) -> Any:
        selection.picks[0] ^= 1
        return agree(step, selection)

    comm.agree_picks = other  # type: ignore[method-assign]
    return inner(comm, step, selection)


_KINDS: dict[str, Callable[..., Any]] = {
    "kill": _signal(signal.SIGKILL),
    "stop": _signal(signal.SIGSTOP),
    "term": _signal(signal.SIGTERM),
    "usr1": _signal(signal.SIGUSR1),
    "orphan": _signal(signal.SIGKILL, os.getppid),
    "slow": _slow,
    "raise": _raise,
    "nan": _nan,
    "oom": _oom,
    "host_oom": _host_oom,
    "skip": _skip,
    "picks": _picks,
}
