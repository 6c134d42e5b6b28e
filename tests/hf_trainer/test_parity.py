"""A Trainer with selection does what `slap-ds train` does on the same candidates."""

import pytest
import torch

from slap_ds.train.loop import train
from slap_ds.train.run import prepare
from tests.hf_trainer.recipes import (
    STEPS,
    apart,
    contents,
    packed,
    padded,
    plain_trainer,
    run_file,
    slap_trainer,
    weights_of,
)
from tests.recipes import tiny_model

pytestmark = pytest.mark.lane

# After four steps that move weights by up to 4e-3 each; both add float32 in other orders.
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=["llama", "glm"])
def path(request, tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp(request.param), request.param)


def trained(config):
    """Weights and losses of `slap-ds train`, by its plain PyTorch engine."""
    run = prepare(config)
    train(run)
    return weights_of(run.engine.model.lm)


@pytest.mark.parametrize("method", ["slap", "sampled", "hard"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_and_picks_are_those_of_slap_ds_train(path, tmp_path, method, checkpointing):
    """In one row or in two micro-batches, padded or packed; with checkpointing by forward reuse."""
    config = run_file(path, tmp_path / "run", selection={"method": method, "keep": 0.6})
    wanted = trained(config)
    start = weights_of(plain_trainer(config, tmp_path / "start").model)
    assert apart(start, wanted) > 100 * TOLERANCE
    half = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    ways = [(padded, {}), (packed, half)] if not checkpointing else [(padded, half)]
    for collate, batches in ways:
        trainer = slap_trainer(
            config, tmp_path / "hf", collate, gradient_checkpointing=checkpointing, **batches
        )
        trainer.train()
        assert apart(weights_of(trainer.model), wanted) <= TOLERANCE
        picked = [chosen.sample_ids.tolist() for chosen in trainer.history]
        assert picked == contents(config)
        assert trainer._slap_engine.can_reuse == (checkpointing and method != "sampled")


@pytest.mark.parametrize("way", ["full", "sampled"])
def test_at_keep_1_it_is_the_plain_trainer(path, tmp_path, way):
    config = run_file(path, tmp_path / "run", selection={"method": way, "keep": 1.0})
    half = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    plain = plain_trainer(config, tmp_path / "plain", **half)
    plain.train()
    ours = slap_trainer(config, tmp_path / "ours", **half)
    ours.train()
    assert apart(weights_of(ours.model), weights_of(plain.model)) <= TOLERANCE
    losses = [
        [record["loss"] for record in trainer.state.log_history if "loss" in record]
        for trainer in (plain, ours)
    ]
    assert len(losses[0]) == STEPS
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-5, atol=1e-5)
