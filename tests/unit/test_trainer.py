"""The loop around the steps: what comes first when somebody asks it to stop."""

import pytest

from slap_ds import trainer
from slap_ds.metrics import read_lines
from slap_ds.run import prepare
from slap_ds.trainer import Preempted, train
from tests.recipes import run_config, tiny_config, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models") / "llama")


def evaluations(run_dir):
    records = read_lines(run_dir / "metrics.jsonl")
    return [(r["step"], r["eval_loss"]) for r in records if r["event"] == "eval"]


@pytest.mark.parametrize("step", [3, 5])
def test_a_stop_saves_before_it_evaluates(model, tmp_path, monkeypatch, step):
    """An evaluation may take longer than the process is given; it is made up for later."""
    done = []
    evaluate, save = trainer._evaluate, trainer.save

    def config(name):
        return tiny_config(
            model,
            tmp_path / name,
            engine={"kind": "torch"},
            steps=6,
            evaluation={"every": 2, "max_samples": 8},
        )

    run_config(config("whole"))
    run = prepare(config("run"))
    train_step = trainer.train_step

    def step_and_ask(run, number, batch):
        result = train_step(run, number, batch)
        if number == step:
            result[1]["stop"] = True
        return result

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", step_and_ask)
        patch.setattr(trainer, "_evaluate", lambda *a: done.append("evaluate") or evaluate(*a))
        patch.setattr(trainer, "save", lambda *a: done.append("save") or save(*a))
        if step == 5:  # the last one: nothing is left to do
            train(run)
            assert done[-2:] == ["save", "evaluate"]
        else:
            with pytest.raises(Preempted, match="after 4 steps"):
                train(run)
            assert done == ["evaluate", "evaluate", "save"]
    if step != 5:
        run_config(config("run"))
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "whole")
