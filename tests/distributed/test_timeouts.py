"""No process group waits longer than engine.timeout_s, DeepSpeed's own included."""

import datetime

import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from tests.recipes import tiny_config, tiny_model


def group_timeouts(config):
    from slap_ds.run import prepare

    prepare(config)
    groups = dist.distributed_c10d._world.pg_map
    return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


def test_every_group_has_the_configured_timeout(tmp_path):
    engine = {"timeout_s": 77.0}
    config = tiny_config(tiny_model(tmp_path / "model"), tmp_path / "run", engine=engine)
    for timeouts in run_ranks(group_timeouts, 2, config):
        assert len(timeouts) >= 2
        assert set(timeouts) == {datetime.timedelta(seconds=77)}
