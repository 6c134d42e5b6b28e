"""What is read from a checkpoint's shards is what the engine itself gathers."""

import json
from pathlib import Path

import pytest
import torch

from slap_ds.checkpoint import find as checkpoint
from slap_ds.checkpoint.export import export
from slap_ds.config.schema import Config
from slap_ds.engine.base import MOMENTS
from slap_ds.engine.whole_state import open_whole, whole_weights
from slap_ds.models.causal import trainable
from tests.ranks import run_ranks
from tests.recipes import tiny_config, tiny_model

STEPS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # An odd width of the blocks: parameters of odd sizes, so that ranks' parts end inside them.
    return tiny_model(tmp_path_factory.mktemp("model"), intermediate_size=61)


def zero1(tmp_path: Path, model: str) -> Config:
    """ZeRO-1 in bfloat16 whose gradients are accumulated in float32: DeepSpeed has an optimizer and
    a layout of its own for it."""
    settings = json.loads(Path("configs/deepspeed/zero2.json").read_text())
    settings["zero_optimization"]["stage"] = 1
    settings["data_types"] = {"grad_accum_dtype": "fp32"}
    path = tmp_path / "zero1.json"
    path.write_text(json.dumps(settings))
    return tiny_config(
        model,
        tmp_path / "run",
        steps=STEPS,
        model={"dtype": "bfloat16"},
        data={"eval": []},
        engine={"deepspeed": str(path)},
        checkpoint={"reshard": True},
    )


def _train_and_gather(config: Config) -> tuple[str, dict[str, dict[str, torch.Tensor]]]:
    from slap_ds.train.loop import train
    from slap_ds.train.run import prepare

    run = prepare(config)
    if run.state.step < STEPS:
        train(run)
    return _gathered(run.engine)


def _gathered(engine) -> tuple[str, dict[str, dict[str, torch.Tensor]]]:
    """By DeepSpeed's own collectives: name -> fp32, exp_avg, exp_avg_sq."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = {}
    for parameter in trainable(engine.model):
        name = engine.engine.param_names[parameter].removeprefix("lm.")
        state = {key: safe_get_full_optimizer_state(parameter, key).clone() for key in MOMENTS}
        found[name] = {"fp32": safe_get_full_fp32_param(parameter).clone(), **state}
    return type(engine.optimizer).__name__, found


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_zero_1_with_float32_gradients_is_read_exported_and_resharded(world, model, tmp_path):
    config = zero1(tmp_path, model)
    kind, expected = run_ranks(_train_and_gather, world, config)[0]
    assert kind == "BF16_Optimizer"
    folder = checkpoint.find(tmp_path / "run")[-1].folder
    whole = open_whole(folder)
    assert whole.step == STEPS
    assert set(whole.names) == set(expected)
    for name, state in expected.items():
        for key, value in state.items():
            assert torch.equal(whole.tensor(name, key), value), (name, key)
    assert all(torch.equal(w, expected[n]["fp32"]) for n, w in whole_weights(folder).items())

    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(export(tmp_path / "run", tmp_path / "out"))
    for name, weight in exported.named_parameters():
        assert torch.equal(weight, expected[name]["fp32"].to(weight.dtype)), name

    # On another number of ranks, loaded and not trained on.
    _, moved = run_ranks(_train_and_gather, 3 - world, config)[0]
    for name, state in expected.items():
        for key, value in state.items():
            assert torch.equal(moved[name][key], value), (name, key)
