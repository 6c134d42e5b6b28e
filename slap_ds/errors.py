"""Which errors are the user's to mend, and how they are told: in one line."""

from __future__ import annotations

import errno
import os

# Of the file system: what a wrong path or missing rights lead to, and no fault of a disk.
_PATHS = (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
# A place that takes no more, or nothing at all.
_FULL = {errno.ENOSPC: "free some", errno.EDQUOT: "free some", errno.EROFS: "it cannot be written"}


def mistake(error: BaseException) -> str | None:
    """What to tell whoever made the mistake; None: it is none."""
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, (FileNotFoundError, *_PATHS)):
        if error.errno is None or error.filename is None:  # one of ours, in words
            return str(error)
        return (
            f"{os.fsdecode(error.filename)}: {error.strerror}: give a path that exists and can be "
            "used (run_dir, data.train, data.cache_dir, --out), or change its permissions"
        )
    if isinstance(error, OSError) and error.errno in _FULL:
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return (
            f"{where}{error.strerror}: {_FULL[error.errno]}, or choose another place (run_dir, "
            "data.cache_dir or SLAP_CACHE_DIR, --out, TMPDIR)"
        )
    return None


def counted(number: int, what: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number:,} {what}{'s' * (number != 1)}"


class RankError(RuntimeError):
    """A mistake or fault that this rank has seen and others perhaps not, so this one reports it."""


class PortTaken(RankError):
    """Rank 0 cannot listen; on another port, or later, it may."""


class OtherRankFailed(RuntimeError):
    """Another rank has already said what is wrong; this one only leaves."""
