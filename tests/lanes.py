"""A fast part of the tests with the newest, or the lowest, versions of what the package needs.

    pyproject.toml -> requirements of the lane -> a fresh environment and a copy of the tree
    -> the tests marked `lane` -> a row in docs/versions.md

newest: the newest releases that fit together; upper bounds are lifted, for whether they can be
raised is the question. floor: the lowest version of every range. Usage: make test-newest,
make test-floor, or python -m tests.lanes floor --with pydantic==2.10.0 to try another version.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "versions.md"
HEAD = re.compile(r"^\| date \| lane \|.*\n\| --- .*\n", re.MULTILINE)
# These have columns of their own; the last column names the others.
COLUMNS = ["torch", "transformers", "deepspeed", "datasets", "peft"]
# They only look at the code; a lane runs it.
NOT_RUN = {"ruff", "mypy", "types-pyyaml"}
# trl needs newer versions of others than we do: on the floor its tests are skipped.
LEFT_OUT = {"newest": NOT_RUN, "floor": {*NOT_RUN, "trl"}}
TESTS_S = 1800


def main() -> None:
    """Exit code 1: a test failed; the row says so. 2: no versions could be installed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("lane", choices=["newest", "floor"])
    parser.add_argument("--with", dest="replaced", action="append", default=[], metavar="NAME==V")
    parser.add_argument("--keep", action="store_true", help="leave .lanes/LANE, or go on with it")
    parser.add_argument("--no-row", action="store_true", help="leave docs/versions.md as it is")
    args = parser.parse_args()
    folder = ROOT / ".lanes" / args.lane
    commit = git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    if not args.keep:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        wanted = requirements((ROOT / "pyproject.toml").read_text(), args.lane, args.replaced)
        environ = install(folder, wanted)
        found = run_tests(folder, environ)
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    line = row(args.lane, found, wanted, commit)
    print(line)
    if not args.no_row:
        TABLE.write_text(with_row(TABLE.read_text(), line))
    if found["failed"] or not found["passed"]:
        raise SystemExit(1)


def requirements(pyproject: str, lane: str, replaced: list[str] = ()) -> list[str]:
    """What a lane installs, for pip: the extras that tests use are in it, each package once.

    Raises:
        ValueError: a requirement has no lower bound, and so no lowest version.
    """
    project = tomllib.loads(pyproject)["project"]
    extras = project["optional-dependencies"]
    wanted: dict[str, str] = {}
    waiting = [*project["dependencies"], *extras["test"]]
    for text in waiting:
        one = Requirement(text)
        name = canonicalize_name(one.name)
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue  # not on this Python
        if name == canonicalize_name(project["name"]):
            waiting += [each for extra in sorted(one.extras) for each in extras[extra]]
        elif name not in LEFT_OUT[lane]:
            lowest = [part.version for part in one.specifier if part.operator == ">="]
            if len(lowest) != 1:
                raise ValueError(f"pyproject.toml: {text!r} has no lower bound: write NAME>=V,<W")
            wanted[name] = f"{name}{'==' if lane == 'floor' else '>='}{lowest[0]}"
    wanted |= {canonicalize_name(Requirement(each).name): each for each in replaced}
    return list(wanted.values())


def install(folder: Path, wanted: list[str]) -> dict[str, str]:
    """An environment with `wanted` and a copy of the tree in `folder`; the variables to use it."""
    bin_ = folder / "venv" / "bin"
    environ = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environ |= {
        "PATH": f"{bin_}{os.pathsep}{environ['PATH']}",
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
        "SLAP_CACHE_DIR": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        # A CUDA build on a machine without a GPU.
        **({} if os.path.exists("/dev/nvidiactl") else {"DS_ACCELERATOR": "cpu"}),
    }

    def run(*command: str, cwd: Path = ROOT) -> None:
        print("+", *command, flush=True)
        if subprocess.run(command, env=environ, cwd=cwd).returncode:
            sys.exit(2)

    pip = (str(bin_ / "python"), "-m", "pip", "install", "-qq")
    run(sys.executable, "-m", "venv", str(folder / "venv"))
    run(*pip, "--require-hashes", "-r", "requirements/build.txt")
    run(*pip, *wanted)
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    for name in git("ls-files", "--cached", "--others", "--exclude-standard").splitlines():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    # Its own bounds would not let the newest in.
    run(*pip, "--no-deps", "--no-build-isolation", "-e", ".", cwd=tree)
    build = "from slap_ds.engine import build_extensions; build_extensions()"
    run(str(bin_ / "python"), "-c", build, cwd=tree)
    return environ


def run_tests(folder: Path, environ: dict[str, str]) -> dict:
    """Counts of pytest, seconds, and the versions that were there: {name: version}."""
    python, results = str(folder / "venv" / "bin" / "python"), folder / "results.xml"
    results.unlink(missing_ok=True)
    command = [python, "-m", "pytest", "-q", "-m", "lane and not slow and not gpu"]
    begun = time.monotonic()
    subprocess.run(
        [*command, f"--junitxml={results}", "tests"],
        env=environ,
        cwd=folder / "tree",
        timeout=TESTS_S,
    )
    seconds = time.monotonic() - begun
    if not results.exists():
        sys.exit("pytest ended without a result")
    listed = subprocess.check_output(
        [python, "-m", "pip", "list", "--format=json"], env=environ, stderr=subprocess.DEVNULL
    )
    versions = {canonicalize_name(one["name"]): one["version"] for one in json.loads(listed)}
    return {**counts(results.read_text()), "seconds": seconds, "versions": versions}


def counts(junit: str) -> dict[str, int]:
    """Passed, failed (errors count as such) and skipped tests of a JUnit file."""
    suite = ET.fromstring(junit).find("testsuite")
    tests, skipped = int(suite.get("tests")), int(suite.get("skipped"))
    failed = int(suite.get("failures")) + int(suite.get("errors"))
    return {"passed": tests - failed - skipped, "failed": failed, "skipped": skipped}


def row(lane: str, found: dict, wanted: list[str], commit: str) -> str:
    """One line of the table: when, what passed, how long, on which commit, with what."""
    versions = found["versions"]
    names = [canonicalize_name(Requirement(each).name) for each in wanted]
    others = ", ".join(f"{n} {versions[n]}" for n in names if n not in COLUMNS)
    cells = [
        datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        lane,
        f"{found['passed']} / {found['failed']} / {found['skipped']}",
        f"{found['seconds']:.0f}",
        commit,
        ".".join(map(str, sys.version_info[:2])),
        *(versions[name] for name in COLUMNS),
        others,
    ]
    return f"| {' | '.join(cells)} |"


def with_row(page: str, line: str) -> str:
    """The page with `line` as the first row of its table."""
    head = HEAD.search(page)
    if head is None:
        raise ValueError(f"{TABLE.name}: no table to write into")
    return f"{page[: head.end()]}{line}\n{page[head.end() :]}"


def git(*arguments: str) -> str:
    """What git prints for the repository."""
    return subprocess.check_output(["git", *arguments], text=True, cwd=ROOT).strip()


if __name__ == "__main__":
    main()
