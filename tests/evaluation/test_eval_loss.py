"""Losses of samples and of turns equal a plain forward of the model, on any number of ranks."""

import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from slap_ds.distributed.comm import Comm
from slap_ds.engine import TorchEngine
from slap_ds.train import evaluate as loss_module
from slap_ds.train import score_pass as pass_
from slap_ds.train.evaluate import evaluate_loss
from slap_ds.train.inputs import read_inputs
from slap_ds.train.score_pass import score_pass, turn_pass
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


def test_many_labels_are_reported_together(monkeypatch, caplog):
    monkeypatch.setattr(loss_module, "MOST_LABELS", 2)
    names, codes = [f"source {i}" for i in range(6)], np.array([5, 0, 3, 5, 3, 1], np.int32)
    weights = np.array([1, 4, 3, 2, 3, 1])  # of source 3: 6, 0: 4, 5: 3, 1: 1
    for _ in range(2):
        found, new = loss_module.few_labels("source", names, codes, weights, say=True)
    assert found == ["source 0", "source 3", "(others)"]
    assert new.tolist() == [2, 0, 1, 2, 1, 2]
    assert caplog.text.count("rows name 4 different values of 'source'") == 1
    few = np.array([3, 3, 0, 0, 3, 3])
    assert loss_module.few_labels("source", names, few, weights, say=True) == (names, few)


def test_each_row_with_a_source_of_its_own(config, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_module, "MOST_LABELS", 3)
    rows = [
        {"prompt": f"{n} + 1 =", "completion": "one " * (n + 1), "source": f"page {n}"}
        for n in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = config.data.model_copy(update={"eval": [str(tmp_path / "rows.jsonl")]})
    inputs = read_inputs(config.model_copy(update={"data": data}))
    engine = TorchEngine(config, inputs.model_config)
    found = evaluate_loss(engine, Comm(), inputs.eval, step=0, row_tokens=384, keep_losses=True)
    each, by_source = found["samples"], found["eval_loss_by_source"]
    assert list(by_source) == ["page 5", "page 6", "page 7", "(others)"]
    assert by_source["page 6"] == each["loss"][6] / each["tokens"][6]
    assert by_source["(others)"] == pytest.approx(sum(each["loss"][:5]) / sum(each["tokens"][:5]))
    assert len(found["eval_loss_by_task"]) == 1


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
