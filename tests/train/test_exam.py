"""`evaluation.answers`: the marks of `slap-ds eval`, beside a training that does not notice."""

import json

import pytest
import torch

import slap_ds
from slap_ds.answers import text
from slap_ds.checkpoint.find import find
from slap_ds.cli import main
from slap_ds.engine.whole_state import whole_weights
from slap_ds.jsonl import read_lines
from slap_ds.report.build import report
from slap_ds.train.dry_run import dry_run
from slap_ds.train.evaluate import value_of
from slap_ds.train.exam import Exam
from slap_ds.train.loop import train
from slap_ds.train.run import prepare
from tests.recipes import losses, run_config, tiny_config, tiny_model

pytestmark = pytest.mark.lane

ANSWERS = {"samples": 3, "max_new_tokens": 8, "batch_tokens": 200}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny_model(folder / kind, kind) for kind in ("llama", "glm", "mixtral")}


def config(path, run_dir, answers=ANSWERS, **sections):
    how = {"max_samples": 4, "every": 2, "answers": answers, **sections.pop("evaluation", {})}
    common = {"steps": 4, "engine": {"kind": "torch"}, "optimizer": {"lr": 1e-2}}
    return tiny_config(path, run_dir, evaluation=how, **{**common, **sections})


def evaluations(run_dir):
    return [r for r in read_lines(run_dir / "metrics.jsonl") if r["event"] == "eval"]


def marks(run_dir):
    return [r.get("answers_by_task") for r in evaluations(run_dir)]


def bits(run_dir):
    return whole_weights(find(run_dir)[-1].folder)


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("llama", {"gradient_checkpointing": True}),
        ("glm", {"lora": {"r": 4, "dropout": 0.1}}),
        ("mixtral", {"attention": "sdpa"}),
    ],
)
def test_training_is_the_same_with_and_without_and_marks_are_those_of_eval(
    kind, model, models, tmp_path
):
    drawn = []
    for name, answers in (("with", ANSWERS), ("without", None)):
        torch.manual_seed(5)
        train(prepare(config(models[kind], tmp_path / name, answers, model=model)))
        drawn.append(torch.rand(1))
    assert drawn[0] == drawn[1]
    curves = [losses(read_lines(tmp_path / n / "metrics.jsonl")) for n in ("with", "without")]
    assert curves[0] == curves[1]
    ours, theirs = bits(tmp_path / "with"), bits(tmp_path / "without")
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert marks(tmp_path / "without") == [None] * 3

    limits = ["--samples", "3", "--max-new-tokens", "8", "--batch-tokens", "200"]
    main(["eval", str(tmp_path / "with"), "--out", str(tmp_path / "eval"), *limits])
    wanted = json.loads((tmp_path / "eval" / "eval.json").read_text("utf-8"))["answers"]["by_task"]
    found = marks(tmp_path / "with")[-1]
    assert found.keys() == wanted.keys()
    for task, entry in wanted.items():
        values = {name: metric["value"] for name, metric in entry["metrics"].items()}
        assert found[task] == {"count": 3, "stopped": entry["stopped"], **values}


def test_every_second_evaluation_the_first_and_the_last(models, tmp_path):
    path, often = models["llama"], {**ANSWERS, "samples": 1, "every": 2}
    run_config(config(path, tmp_path / "run", often, steps=10))  # after 0, 2, 4, 6, 8 and 10 steps
    assert [each is not None for each in marks(tmp_path / "run")] == [1, 0, 1, 0, 1, 1]
    run_config(config(path, tmp_path / "ends", often, steps=3, evaluation={"every": 0}))
    assert [each is not None for each in marks(tmp_path / "ends")] == [1, 1]


def test_a_stopped_run_answers_as_one_that_was_not(models, tmp_path):
    def stop(record):
        return record["event"] == "train" and record["step"] == 2

    whole, broken = (config(models["llama"], tmp_path / n, steps=6) for n in ("whole", "broken"))
    slap_ds.train(whole)
    assert not slap_ds.train(broken, callbacks=[stop]).finished  # it owes an evaluation
    slap_ds.train(broken)
    assert len(marks(tmp_path / "whole")) == 4
    assert marks(tmp_path / "broken") == marks(tmp_path / "whole")
    ours, theirs = bits(tmp_path / "broken"), bits(tmp_path / "whole")
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.fixture
def curve(monkeypatch):
    """Evaluations give these marks one after the other: before the first step, then later."""
    left = []
    monkeypatch.setattr(
        Exam, "take", lambda *_: {"answers_by_task": {"qa": {"count": 3, "f1": left.pop(0)}}}
    )
    return left.extend


BY_F1 = {"metric": "answers_by_task.qa.f1"}


def test_more_is_better_of_answers(models, tmp_path, curve, capfd):
    curve([0.9, 0.1, 0.3, 0.2, 0.3])  # what came before training does not count
    how, kept = {**BY_F1, "patience": 2}, {"best": True, "keep_last": 1}
    run_config(config(models["llama"], tmp_path / "run", steps=20, evaluation=how, checkpoint=kept))
    assert [found.step for found in find(tmp_path / "run")] == [4, 8]
    told = "answers_by_task.qa.f1 was best after step 4 (0.3000), and not in 2 evaluations since"
    assert told in " ".join(capfd.readouterr().err.split())
    page = report([tmp_path / "run"], tmp_path / "report").read_text("utf-8")
    assert "best by answers_by_task.qa.f1" in page
    (row,) = [line for line in page.split("<tr>") if ">f1<" in line]
    assert [mark in row for mark in ("qa", "0.9", "0.3")] == [True] * 3


def test_evaluations_without_answers_are_no_misses(models, tmp_path, curve):
    curve([0.9, 0.3, 0.2, 0.1])
    how, rare = {**BY_F1, "patience": 2}, {**ANSWERS, "every": 2}
    run_config(config(models["llama"], tmp_path / "run", rare, steps=20, evaluation=how))
    assert [found.step for found in find(tmp_path / "run")] == [12]


def test_the_best_by_another_metric_is_forgotten(models, tmp_path, curve):
    path, kept = models["llama"], {"best": True, "keep_last": 1}
    run_config(config(path, tmp_path / "run", None, checkpoint=kept))  # losses, far above 1
    curve([0.2, 0.1])
    run_config(config(path, tmp_path / "run", steps=8, evaluation=BY_F1, checkpoint=kept))
    assert [found.step for found in find(tmp_path / "run")] == [6, 8]


def test_mistakes(models, tmp_path, monkeypatch):
    path = models["llama"]
    with pytest.raises(ValueError, match=r"set evaluation\.answers\.samples"):
        config(path, tmp_path / "run", None, evaluation=BY_F1)
    with pytest.raises(ValueError, match=r"evaluation\.answers .* set data\.eval"):
        config(path, tmp_path / "run", data={"eval": []})
    result = {"eval_loss": 2.0, "answers_by_task": {"": {"count": 2, "f1": 1}}}
    assert value_of(result, "answers_by_task..f1") == 1
    with pytest.raises(ValueError, match=r"expected eval_loss or one of answers_by_task\.\.f1$"):
        value_of(result, "answers_by_task.qa.f1")
    long = config(path, tmp_path / "run", {**ANSWERS, "max_new_tokens": 512})
    missing = config(path, tmp_path / "run")
    for check in (run_config, dry_run):
        with pytest.raises(ValueError, match=r"all 12 prompts are too long"):
            check(long)

    def gone(name):
        raise ValueError("evaluation needs rouge_score: pip install 'slap_ds[eval]'")

    for name in ("_rouge", "_bleu", "_chrf"):
        getattr(slap_ds.answers.metrics, name).cache_clear()
    monkeypatch.setattr(slap_ds.answers.metrics, "needed", gone)
    monkeypatch.setattr(text, "needed", gone)
    for check in (run_config, dry_run):
        with pytest.raises(ValueError, match=r"pip install 'slap_ds\[eval\]'"):
            check(missing)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
