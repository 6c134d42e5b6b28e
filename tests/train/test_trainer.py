"""The loop around the steps: what comes first when somebody asks it to stop."""

from dataclasses import replace

import pytest

from slap_ds.jsonl import read_lines
from slap_ds.train import loop as trainer
from slap_ds.train.loop import Preempted, train
from slap_ds.train.run import prepare
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
    evaluate, save = trainer.evaluate, trainer.save

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
    train_on = trainer.train_on

    def train_and_ask(run, plan, selection):
        return replace(train_on(run, plan, selection), stop=plan.step == step)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_on", train_and_ask)
        patch.setattr(trainer, "evaluate", lambda *a: done.append("evaluate") or evaluate(*a))
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


def small_run(path, run_dir, **sections):
    return tiny_config(path, run_dir, engine={"kind": "torch"}, **sections)


def test_what_was_changed_since_the_checkpoint_is_told_and_kept(model, tmp_path, capfd):
    """config.yaml holds the newest settings alone; metrics.jsonl says which steps had others."""
    run_config(small_run(model, tmp_path, steps=2, evaluation={"every": 1}))
    changes = {"selection": {"method": "random", "keep": 0.5}, "optimizer": {"lr": 5e-4}}
    run_config(small_run(model, tmp_path, steps=4, evaluation={"every": 2}, **changes))
    said = " ".join(capfd.readouterr().err.split())
    assert "continues from step 2 with selection.keep 0.5 (it was 0.6)" in said
    (record,) = [r for r in read_lines(tmp_path / "metrics.jsonl") if r["event"] == "settings"]
    assert record["step"] == 1
    assert record["changed"] == {
        "steps": [2, 4],
        "selection.method": ["slap", "random"],
        "selection.keep": [0.6, 0.5],
        "optimizer.lr": [1e-3, 5e-4],
    }
    run_config(small_run(model, tmp_path, steps=4, **changes))
    assert "has done 4 of 4 steps, nothing is left to do" in " ".join(
        capfd.readouterr().err.split()
    )


def test_another_model_is_refused_before_it_is_built(model, tmp_path):
    run_config(small_run(model, tmp_path / "run", steps=1))
    wider = tiny_model(tmp_path / "wider", hidden_size=64)
    with pytest.raises(
        ValueError, match=r"saved with model = .*'hidden_size': 32.*'hidden_size': 64"
    ):
        prepare(small_run(wider, tmp_path / "run", steps=2))
    with pytest.raises(
        ValueError, match=r"saved with model.dtype = float32, this run has bfloat16"
    ):
        prepare(small_run(model, tmp_path / "run", steps=2, model={"dtype": "bfloat16"}))
    other = {"data": {"train": ["builtin:demo/eval"]}}
    with pytest.raises(ValueError, match="was saved on other training data"):
        prepare(small_run(model, tmp_path / "run", steps=2, **other))
