"""Engines: where packed rows meet weights. DeepSpeed at the edge, plain PyTorch for tests.

    score(rows)  -> Scores          no graph, no dropout, the current weights
    train(rows)  -> TrainStats      forward and backward per row, one optimizer step

This is the only package that imports deepspeed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slap_ds.config.schema import Config
from slap_ds.distributed.comm import Comm
from slap_ds.engine.base import Engine, ScoringEngine, TrainStats
from slap_ds.engine.build_locks import built
from slap_ds.engine.deterministic import make_deterministic
from slap_ds.engine.plain import TorchEngine
from slap_ds.engine.process_group import (
    build_extensions,
    joined_ranks,
    limit_waiting,
    logged_collectives,
    start_ranks,
    stop_ranks,
)
from slap_ds.engine.zero import DeepSpeedEngine
from slap_ds.errors import PortTaken, RankError


def make_engine(config: Config, model_config: Any, comm: Comm) -> Engine:
    """The engine that `config.engine.kind` names, around a model of `model_config`."""
    if config.engine.deterministic:
        make_deterministic()
    if config.engine.kind == "torch":
        return TorchEngine(config, model_config)
    return DeepSpeedEngine(config, model_config, comm)


def write_deepspeed(engine: Engine, path: Path) -> None:
    """The DeepSpeed settings as they were used, beside the run's resolved config."""
    if isinstance(engine, DeepSpeedEngine):
        path.write_text(json.dumps(engine.settings, indent=2) + "\n", encoding="utf-8")


__all__ = [
    "DeepSpeedEngine",
    "Engine",
    "PortTaken",
    "RankError",
    "ScoringEngine",
    "TorchEngine",
    "TrainStats",
    "build_extensions",
    "built",
    "joined_ranks",
    "limit_waiting",
    "logged_collectives",
    "make_engine",
    "start_ranks",
    "stop_ranks",
    "write_deepspeed",
]
