"""Runs leave nothing in shared memory, where what is left fills the machine's memory."""

import os
from pathlib import Path

from slap_ds.engine.process_group import start_ranks
from tests.ranks import run_ranks
from tests.recipes import tiny_config


def names_left(config):
    os.environ["LOCAL_SIZE"] = os.environ["WORLD_SIZE"]  # as the deepspeed launcher sets it
    comm = start_ranks(config)
    comm.barrier(0, "a test")
    port = os.environ["MASTER_PORT"]
    return os.environ["LOCAL_SIZE"], [p.name for p in Path("/dev/shm").glob(f"deepspeed*_{port}_*")]


def test_no_buffers_of_deepspeed_in_shared_memory(tmp_path):
    config = tiny_config("no model", tmp_path / "run")
    assert run_ranks(names_left, 2, config) == [("2", [])] * 2
