"""Gradients of bfloat16 weights are summed over a step's rows in float32."""

import json
import os
from pathlib import Path

import torch

from slap_ds.train.record import train_step
from slap_ds.train.run import prepare
from tests.ranks import run_ranks
from tests.recipes import tiny_config, tiny_model

ZERO3 = {"zero_optimization": {"stage": 3}}


def gradients(model: str, folder: Path, dtype: str, **engine: str) -> torch.Tensor:
    """All gradients of a step on 40 rows, as the optimizer is given them."""
    from deepspeed.utils import safe_get_full_grad

    config = tiny_config(
        model,
        folder,
        steps=1,
        model={"dtype": dtype},
        data={"eval": [], "max_tokens": 64},
        batch={"candidates": 40, "micro_batch_tokens": 64},
        selection={"method": "full"},
        engine=engine,
    )
    run, seen = prepare(config), []
    take = run.engine._step

    def step() -> float:
        grads = [safe_get_full_grad(p) for p in run.engine.model.parameters()]
        seen.append(torch.cat([g.double().flatten() for g in grads]))
        return take()

    run.engine._step = step
    train_step(run, 0)
    return seen[0]


def work(model: str, folder: Path) -> list[float]:
    plain = folder / "bf16.json"
    plain.write_text(json.dumps(ZERO3 | {"data_types": {"grad_accum_dtype": "bf16"}}))
    exact = gradients(model, folder / "exact", "float32")
    wide = gradients(model, folder / "wide", "bfloat16")
    short = gradients(model, folder / "short", "bfloat16", deepspeed=str(plain))
    # NCCL's watchdog must leave the last word to ours: set before the ranks join.
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    return [float((g - exact).norm() / exact.norm()) for g in (wide, short)]


def test_they_err_less_than_bfloat16_sums(tmp_path):
    ((wide, short),) = run_ranks(work, 1, tiny_model(tmp_path / "model"), tmp_path)
    assert wide < 0.02
    assert short > 1.2 * wide, (wide, short)
