"""What tests of several files choose from."""

import json

import pytest

BIG = 2**53 + 1  # sample ids that no float holds


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A file of reference losses for the ids BIG + 0..199, in falling order."""
    path = tmp_path_factory.mktemp("rho") / "losses.jsonl"
    rows = [{"id": BIG + i, "loss": (i * 7919 % 100) / 40} for i in reversed(range(200))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
