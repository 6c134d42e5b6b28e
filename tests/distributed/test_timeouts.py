"""No process group waits much longer than the watchdog, DeepSpeed's own included."""

import datetime

import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from tests.recipes import tiny_config, tiny_model

MARGIN_S = 3  # the watchdog is first: it can say who is missing


def group_timeouts(config):
    from slap_ds.train.loop import train
    from slap_ds.train.run import prepare

    def timeouts():
        groups = dist.distributed_c10d._world.pg_map
        return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]

    run = prepare(config)
    starting = timeouts()
    train(run)
    return starting, timeouts(), run.comm.heart.limit_s


def test_every_group_has_the_configured_timeout(tmp_path):
    engine = {"timeout_s": 77.0, "start_timeout_s": 99.0}
    config = tiny_config(tiny_model(tmp_path / "model"), tmp_path / "run", engine=engine, steps=1)
    for starting, training, limit_s in run_ranks(group_timeouts, 2, config):
        assert len(starting) >= 2
        assert set(starting) == {datetime.timedelta(seconds=99 + MARGIN_S)}
        assert set(training) == {datetime.timedelta(seconds=77 + MARGIN_S)}
        assert limit_s == 77
