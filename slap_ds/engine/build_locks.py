"""The folder in which DeepSpeed compiles its operators, and the locks that killed builds leave.

torch waits for such a lock for ever, without a word.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

from slap_ds.compat import build_locks_outlive_their_holder

# torch holds the lock for about a second where there is nothing to compile.
_PATIENCE_S = 10.0


def locks(environ: Mapping[str, str]) -> tuple[Path, list[Path]]:
    """The extension cache, and the locks in it that a killed build leaves behind."""
    if given := environ.get("TORCH_EXTENSIONS_DIR"):
        folder = Path(given)
    else:
        cache = environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = Path(cache) / "torch_extensions"
    if not folder.is_dir() or not build_locks_outlive_their_holder():
        return folder, []
    return folder, sorted(folder.glob("**/lock"))


def built(environ: Mapping[str, str]) -> bool:
    """Whether what DeepSpeed compiles at a start on this machine is there; a GPU needs nothing."""
    if torch.cuda.is_available():
        return True
    folder = locks(environ)[0]
    return any(folder.glob("**/deepspeed_shm_comm/*.so"))


def refuse_stale_locks(environ: Mapping[str, str], patience_s: float = _PATIENCE_S) -> None:
    """Wait while builds come and go; a lock under which nothing is built here is an error.

    Raises:
        ValueError: a lock has been there for `patience_s`, and no process of this machine works
            in its folder.
    """
    since: dict[tuple[Path, float], float] = {}
    while found := _stamps(locks(environ)[1]):
        now = time.monotonic()
        for lock in found:
            if lock not in since or _is_building(lock[0].parent):
                since[lock] = now
            elif now - since[lock] > patience_s:
                raise ValueError(
                    f"{lock[0]} is {time.time() - lock[1]:.0f} s old and no process of this "
                    "machine builds there: a build was killed, and every start would wait for "
                    "ever; remove the file (builds of other machines: give each its own "
                    "TORCH_EXTENSIONS_DIR)"
                )
        time.sleep(0.2)


def _stamps(found: list[Path]) -> list[tuple[Path, float]]:
    stamps = []
    for lock in found:
        with contextlib.suppress(FileNotFoundError):
            stamps.append((lock, lock.stat().st_mtime))
    return stamps


def _is_building(folder: Path) -> bool:
    """Whether a process has `folder` as its working directory, as compilers and ninja do."""
    for process in psutil.process_iter(["cwd"]):
        with contextlib.suppress(OSError):
            if process.info["cwd"] and os.path.samefile(process.info["cwd"], folder):
                return True
    return False
