"""Shared settings: no hub, no accelerator look-up, one thread a process, private build folders.

With SLAP_FAULT_TABLE=FILE the tests marked `fault_row` are counted by row of the table of faults
(docs/reliability.md), and what they have measured is written down; `make test-faults` does so.
"""

import atexit
import gc
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from _pytest.mark.expression import Expression

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "SLAP_CACHE_DIR" not in os.environ:
    os.environ["SLAP_CACHE_DIR"] = tempfile.mkdtemp(prefix="slap-cache-")
    atexit.register(shutil.rmtree, os.environ["SLAP_CACHE_DIR"], ignore_errors=True)


def asks_for_gpu(markers):
    """Whether `-m markers` selects the tests marked `gpu`; all others are tests of the CPU."""
    if not markers:
        return False
    chosen = Expression.compile(markers).evaluate
    ours = ({"gpu"}, {"gpu", "multigpu"})  # what their tests are marked with
    return any(chosen(lambda name, /, marks=marks, **_: name in marks) for marks in ours)


def pytest_configure(config):
    if not asks_for_gpu(config.getoption("markexpr")):
        # Ranks of gloo, and DeepSpeed's CPU accelerator, on a machine that has GPUs too.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["DS_ACCELERATOR"] = "cpu"


@pytest.fixture(scope="module", autouse=True)
def _released():
    """Runs of this process hold models and open files until Python looks for cycles, seldom."""
    yield
    gc.collect()


FAULTS = pytest.StashKey[dict]()


def _row(config, number):
    rows = config.stash.setdefault(FAULTS, {})
    return rows.setdefault(number, {"passed": 0, "failed": 0, "skipped": 0, "measured": []})


@pytest.fixture
def measured(request):
    """`measured(what, seconds, limit_s)`: into the table, and within what is promised."""

    def note(what, seconds, limit_s):
        (number,) = request.node.get_closest_marker("fault_row").args
        fact = {"what": what, "seconds": round(seconds, 2), "limit_s": limit_s}
        _row(request.config, number)["measured"].append(fact)
        if limit_s is not None:
            assert seconds <= limit_s, f"{what}: {seconds:.1f} s, promised {limit_s} s"

    return note


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    mark = item.get_closest_marker("fault_row")
    if mark is not None and (call.when == "call" or report.outcome != "passed"):
        _row(item.config, *mark.args)[report.outcome] += 1
    return report


def pytest_sessionfinish(session):
    path = os.environ.get("SLAP_FAULT_TABLE")
    if path:
        from slap_ds.bench.environment import describe

        rows = [{"row": n, **row} for n, row in sorted(session.config.stash[FAULTS].items())]
        Path(path).write_text(json.dumps({"rows": rows, **describe()}, indent=2) + "\n")
