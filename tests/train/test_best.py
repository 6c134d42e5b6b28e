"""The best checkpoint and an early end, by an evaluation whose values the tests give."""

import pytest
from safetensors.torch import load_file

from slap_ds.checkpoint.export import export
from slap_ds.checkpoint.find import find
from slap_ds.cli import main
from slap_ds.config.file import write_config
from slap_ds.config.schema import Config
from slap_ds.engine.whole_state import whole_weights
from slap_ds.jsonl import read_lines
from slap_ds.report.run_head import read_log, state
from slap_ds.train import loop
from slap_ds.train.evaluate import value_of
from tests.recipes import picks, run_config, tiny_config, tiny_model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def curve(monkeypatch):
    """Evaluations give these losses one after the other: before the first step, then later."""
    left = []
    real = loop.evaluate_loss

    def evaluate(*args, **named):
        return {**real(*args, **named), "eval_loss": left.pop(0)}

    monkeypatch.setattr(loop, "evaluate_loss", evaluate)
    return left.extend


def config(path, run_dir, **sections) -> Config:
    return tiny_config(
        path,
        run_dir,
        engine={"kind": "torch"},
        evaluation={"every": 2, "max_samples": 2, **sections.pop("evaluation", {})},
        checkpoint={"keep_last": 1, **sections.pop("checkpoint", {})},
        **sections,
    )


def steps(run_dir):
    return [found.step for found in find(run_dir)]


def test_the_checkpoint_of_the_lowest_evaluation_is_kept_and_exported(path, tmp_path, curve):
    curve([1.0, 5.0, 3.0, 4.0, 3.5, 3.0])  # what came before training does not count
    run_config(config(path, tmp_path / "run", checkpoint={"best": True, "every": 5}))
    assert steps(tmp_path / "run") == [4, 10]
    export(tmp_path / "run", tmp_path / "best", best=True)
    export(tmp_path / "run", tmp_path / "last")
    for step, name in ((4, "best"), (10, "last")):
        weights = whole_weights(tmp_path / "run" / "checkpoints" / f"step-{step:06d}")
        exported = load_file(tmp_path / name / "model.safetensors")
        assert all((exported[key] == weights[key]).all() for key in exported)


def test_a_run_ends_after_so_many_evaluations_that_were_not_lower(path, tmp_path, curve, capfd):
    curve([9.0, 5.0, 3.0, 3.0, 4.0])
    run_config(config(path, tmp_path / "run", evaluation={"patience": 2}))
    assert steps(tmp_path / "run") == [8]
    told = "ends early: eval_loss was best after step 4 (3.0000), and not in 2 evaluations since"
    assert told in " ".join(capfd.readouterr().err.split())
    run_config(config(path, tmp_path / "run", evaluation={"patience": 2}))  # nothing is left to do
    assert len(picks(tmp_path / "run")) == 8
    assert told in " ".join(capfd.readouterr().err.split())
    curve([2.0])
    run_config(config(path, tmp_path / "run", evaluation={"patience": 3}))
    assert len(picks(tmp_path / "run")) == 10


def test_a_report_says_that_a_run_ended_early(path, tmp_path, curve):
    curve([9.0, 5.0, 6.0, 7.0])
    write_config(config(path, tmp_path / "run", evaluation={"patience": 2}), tmp_path / "run.yaml")
    main(["train", str(tmp_path / "run.yaml")])
    assert state(read_log(tmp_path / "run")) == "ended early (evaluation.patience), 6 of 10 steps"


def test_a_stopped_run_remembers_its_best(path, tmp_path, curve):
    """Evaluations after steps 2, 4 ... 10; the run is stopped in the sixth step and goes on."""
    import slap_ds

    def stop(record):
        return record["event"] == "train" and record["step"] == 4

    settings = config(path, tmp_path / "run", checkpoint={"best": True}, evaluation={"patience": 2})
    curve([9.0, 3.0, 4.0, 3.5])
    first = slap_ds.train(settings, callbacks=[stop])
    assert (first.finished, first.steps) == (False, 6)
    second = slap_ds.train(settings)  # the evaluation that the first one owed is the second miss
    assert (second.finished, second.steps) == (True, 6)
    assert steps(tmp_path / "run") == [2, 6]


def test_a_continued_run_does_not_let_its_best_checkpoint_go(path, tmp_path, curve):
    """It saves before it evaluates for the first time."""
    curve([9.0, 3.0, 4.0, 5.0])
    run_config(config(path, tmp_path / "run", steps=6, checkpoint={"best": True}))
    assert steps(tmp_path / "run") == [2, 6]
    curve([4.5])
    run_config(config(path, tmp_path / "run", steps=8, checkpoint={"best": True, "every": 7}))
    assert steps(tmp_path / "run") == [2, 8]


def test_a_run_whose_steps_are_all_done_has_not_ended_early(path, tmp_path, curve, capfd):
    curve([9.0, 3.0, 4.0, 5.0])
    run_config(config(path, tmp_path / "run", steps=6, evaluation={"patience": 2}))
    assert steps(tmp_path / "run") == [6]
    assert "ends early" not in capfd.readouterr().err


def test_what_the_metric_names(path, tmp_path):
    result = {"eval_loss": 2.0, "eval_loss_by_task": {"qa": 1.5}, "samples": {"ids": [3]}}
    assert value_of(result, "eval_loss") == 2.0
    assert value_of(result, "eval_loss_by_task.qa") == 1.5
    for wrong in ("eval_loss_by_task", "eval_loss_by_task.x", "eval_loss.x", "samples.ids", ""):
        with pytest.raises(
            ValueError, match=r"expected eval_loss or one of eval_loss_by_task\.qa$"
        ):
            value_of(result, wrong)
    with pytest.raises(ValueError, match=r"evaluation\.metric is 'bleu'"):
        run_config(config(path, tmp_path / "run", evaluation={"metric": "bleu"}))
    assert not read_lines(tmp_path / "run" / "metrics.jsonl")


def test_without_evaluations_there_is_no_best(path, tmp_path):
    with pytest.raises(
        ValueError, match=r"go by evaluations: set evaluation\.every and data\.eval"
    ):
        config(path, tmp_path, checkpoint={"best": True}, evaluation={"every": 0})
    never = {"engine": {"kind": "torch"}, "data": {"eval": []}}
    run_config(tiny_config(path, tmp_path / "run", steps=1, **never))
    with pytest.raises(FileNotFoundError, match="keeps no checkpoint of its best evaluation"):
        export(tmp_path / "run", tmp_path / "best", best=True)
