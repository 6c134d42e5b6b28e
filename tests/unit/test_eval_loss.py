"""Losses of samples and of turns equal a plain forward of the model, on any number of ranks."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from slap_ds.comm import Comm
from slap_ds.engine import TorchEngine
from slap_ds.evaluation import pass_
from slap_ds.evaluation.loss import evaluate_loss
from slap_ds.evaluation.pass_ import score_pass, turn_pass
from slap_ds.run import read_inputs
from tests.ranks import run_ranks
from tests.recipes import tiny_config, tiny_model


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval-loss")
    return tiny_config(tiny_model(folder / "model"), folder / "run", engine={"kind": "torch"})


def plain_turns(config, store) -> list[tuple[int, int, float, int]]:
    """(sample, turn, nats, tokens) of every assistant turn, one sample at a time."""
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    found = []
    for index in range(len(store)):
        ids = torch.from_numpy(store[index].ids.astype("int64"))
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        nats = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").tolist()
        turn, before = -1, False
        for position, trained in enumerate(store[index].mask.tolist()):
            if trained and not before:
                turn += 1
                found.append((index, turn, 0.0, 0))
            if trained:
                *where, loss, tokens = found[-1]
                found[-1] = (*where, loss + nats[position - 1], tokens + 1)
            before = trained
    return found


def test_turns_and_samples_equal_a_plain_forward(config, monkeypatch):
    monkeypatch.setattr(pass_, "CHUNK", 13)  # several chunks, the last one smaller
    inputs = read_inputs(config)
    engine, store = TorchEngine(config, inputs.model_config), inputs.eval
    expected = plain_turns(config, store)
    found = turn_pass(engine, Comm(), store, np.arange(len(store)), 384)
    assert max(found.turn) > 0
    assert list(zip(found.sample, found.turn, strict=True)) == [e[:2] for e in expected]
    assert found.tokens.tolist() == [e[3] for e in expected]
    np.testing.assert_allclose(found.loss, [e[2] for e in expected], rtol=1e-5)

    ids, losses = score_pass(engine, Comm(), store, 384)
    assert ids.tolist() == store.sample_ids.tolist()
    sums = np.bincount(found.sample, [e[2] for e in expected])
    np.testing.assert_allclose(losses, sums / store.trained_tokens, rtol=1e-5)

    result = evaluate_loss(engine, Comm(), store, step=0, row_tokens=384)
    assert result["eval_loss"] == pytest.approx(sums.sum() / store.trained_tokens.sum(), rel=1e-5)
    of_qa = store.task == store.names["task"].index("qa")
    assert result["eval_loss_by_task"]["qa"] == pytest.approx(
        sums[of_qa].sum() / store.trained_tokens[of_qa].sum(), rel=1e-5
    )


def on_a_rank(config):
    inputs = read_inputs(config)
    engine, comm = TorchEngine(config, inputs.model_config), Comm(dist.get_rank(), 2)
    pass_.CHUNK = 30
    turns = turn_pass(engine, comm, inputs.eval, np.arange(len(inputs.eval)), 384)
    return [*score_pass(engine, comm, inputs.eval, 384), *turns]


def test_two_ranks_give_the_same(config):
    read_inputs(config)
    inputs = read_inputs(config)
    engine = TorchEngine(config, inputs.model_config)
    one = [*score_pass(engine, Comm(), inputs.eval, 384)]
    one += turn_pass(engine, Comm(), inputs.eval, np.arange(len(inputs.eval)), 384)
    for rank in run_ranks(on_a_rank, 2, config):
        for mine, alone in zip(rank, one, strict=True):
            np.testing.assert_allclose(mine, alone, rtol=1e-5)
