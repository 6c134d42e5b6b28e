"""What every command needs: its parsers' type, the help on overrides, how to fail."""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import NoReturn, TypeAlias

from slap_ds.launch.environment import rank_said, ranks_said

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
OVERRIDES = "then any setting of the file, such as --selection.keep 0.8"


def fail(message: str, every_rank: bool = False) -> NoReturn:
    """End with one line and exit code 1; rank 0 says it for all, unless `every_rank` is set."""
    rank = rank_said(os.environ)
    beyond = rank >= ranks_said(os.environ, "WORLD_SIZE", rank + 1)  # there may be no rank 0
    if rank == 0 or every_rank or beyond:
        where = f" (rank {rank})" if ranks_said(os.environ, "WORLD_SIZE", 1) > 1 else ""
        hidden = re.sub(r"://[^/@\s]+@", "://***@", message)  # a password in an address
        print(f"slap-ds: error{where}: {hidden}", file=sys.stderr, flush=True)
    sys.exit(1)
