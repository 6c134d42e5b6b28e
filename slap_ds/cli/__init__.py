"""The command line: slap-ds train | preview | export | convert | compare | estimate | ...

A mistake of the user's is one line on stderr and exit status 1, never a traceback.
"""

from __future__ import annotations

import argparse
import io
import locale
import os
import sys
from collections.abc import Callable, Sequence

from slap_ds import __version__
from slap_ds.cli import bench, cluster, estimate, evaluation, evidence, models, training
from slap_ds.cli.common import fail
from slap_ds.cli.quiet import quieten
from slap_ds.errors import mistake

VERBOSE = ("-v", "--verbose")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exits with 0, or 1 after an error, or 2 for wrong usage."""
    if arguments is None:
        _in_utf8()
    for stream in (sys.stdout, sys.stderr):
        # What a terminal's encoding lacks is written as \\u4e16.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # The deepspeed launcher puts --local_rank=N before the arguments; the environment has it too.
    given = [a for a in (sys.argv[1:] if arguments is None else arguments) if not _local_rank(a)]
    parser = _parser()
    options, rest = parser.parse_known_args([a for a in given if a not in VERBOSE])
    if not any(a in VERBOSE for a in given):
        quieten()
    if rest and not getattr(options, "takes_overrides", False):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    run: Callable[[argparse.Namespace, list[str]], None] = options.run
    try:
        run(options, rest)
    except KeyboardInterrupt:
        fail("interrupted")
    except Exception as error:
        if (text := mistake(error)) is not None:
            fail(text)
        from slap_ds.distributed.comm import RankDisagreement
        from slap_ds.errors import OtherRankFailed, RankError

        if isinstance(error, OtherRankFailed):
            sys.exit(1)
        if isinstance(error, (RankDisagreement, RankError)):
            fail(str(error), every_rank=True)
        raise


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="slap-ds", description=__doc__.split("\n")[0])
    # Wherever it stands: `main` looks for it. Here it is for the help alone.
    parser.add_argument(*VERBOSE, action="store_true", help="show libraries' notes and warnings")
    parser.add_argument("--version", action="version", version=f"slap-ds {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    for each in (training, models, evaluation, evidence, cluster, estimate, bench):
        each.add(commands)
    return parser


def _in_utf8() -> None:
    """Start this command again in Python's UTF-8 mode, where the locale has another encoding.

    Libraries read files of their own, and their users', in the locale's encoding.
    """
    encoding = locale.getpreferredencoding(False)
    if encoding.lower() in ("utf-8", "utf8") or os.environ.get("PYTHONUTF8") == "1":
        return
    os.environ["PYTHONUTF8"] = "1"
    # What the terminal shows stays in its own encoding.
    os.environ.setdefault("PYTHONIOENCODING", f"{encoding}:backslashreplace")
    os.execv(sys.executable, sys.orig_argv)


def _local_rank(argument: str) -> bool:
    return argument.startswith(("--local_rank=", "--local-rank="))
