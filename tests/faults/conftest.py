"""What the tests of faults share: an undisturbed run, and the seconds each fault took."""

import json
import os
from pathlib import Path

import pytest

from tests.faults.harness import free_port, run_through, write_config

TABLE = pytest.StashKey[list]()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The run folder that disturbed runs are compared with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_through(write_config(folder, "run"))
    return folder / "run"


@pytest.fixture
def measured(request):
    """`measured(row, text, seconds, limit_s)`: into the table, and within what is promised."""

    def note(row, text, seconds, limit_s):
        found = request.config.stash.setdefault(TABLE, [])
        found.append({"row": row, "fault": text, "seconds": round(seconds, 2), "limit_s": limit_s})
        if limit_s is not None:
            assert seconds <= limit_s, f"{text}: {seconds:.1f} s, promised {limit_s} s"

    return note


@pytest.fixture
def port():
    return free_port()


def pytest_sessionfinish(session):
    """`make test-faults` names the file."""
    path = os.environ.get("SLAP_FAULT_TABLE")
    if path and TABLE in session.config.stash:
        rows = sorted(session.config.stash[TABLE], key=lambda r: (r["row"], r["fault"]))
        Path(path).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
