"""What the tests of faults share."""

import pytest

from slap_ds.launch.environment import free_port
from tests.faults.harness import run_through, write_config


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The run folder that disturbed runs are compared with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_through(write_config(folder, "run"))
    return folder / "run"


@pytest.fixture
def port():
    return free_port()
