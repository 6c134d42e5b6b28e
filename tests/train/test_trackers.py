"""`report_to`: what each tracker is given, by stand-ins for their clients and by the real ones."""

import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from slap_ds.jsonl import read_lines
from slap_ds.train import trackers
from slap_ds.train.dry_run import dry_run
from slap_ds.train.loop import train
from slap_ds.train.run import prepare
from tests.recipes import run_config, tiny_config, tiny_model

DOCS = Path(__file__).parents[2] / "docs" / "trackers.md"
SECRET = "s3cr3t-of-this-test"
STEPS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(autouse=True)
def secrets(monkeypatch):
    """What a user's environment may hold; nothing goes to a server."""
    for name in ("WANDB_API_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.delenv(name, raising=False)


def config(model, folder, *names, **sections):
    own = {"engine": {"kind": "torch"}, "steps": STEPS, "report_to": list(names)}
    return tiny_config(model, folder, **{**own, **sections})


class Told:
    """Stand-ins for the clients: what was told to each, as (step, values)."""

    def __init__(self, monkeypatch):
        self.logs = {"wandb": [], "mlflow": [], "trackio": []}
        self.begun, self.ended = [], []
        modules = {"wandb": {"init": self.wandb}, "trackio": {"init": self.trackio}}
        modules["mlflow"] = {"MlflowClient": self.mlflow}
        modules["mlflow.entities"] = {
            "Metric": lambda key, value, time, step: (step, key, value),
            "Param": lambda key, value: (key, value),
        }
        for name, values in modules.items():
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            vars(module).update(values)
            monkeypatch.setitem(sys.modules, name, module)

    def _run(self, client, /, **named):
        self.begun.append((client, named))
        return SimpleNamespace(
            id="w1",
            name=named["name"],
            log=lambda values, step: self.logs[client].append((step, values)),
            finish=lambda: self.ended.append(client),
        )

    def wandb(self, **named):
        return self._run("wandb", **named)

    def trackio(self, **named):
        return self._run("trackio", **named)

    def mlflow(self, uri):
        def create_run(home, run_name):
            self.begun.append(("mlflow", {"uri": uri, "config": {}}))
            return SimpleNamespace(info=SimpleNamespace(run_id="m1"))

        def log_batch(run_id, metrics=(), params=()):
            assert len(params) <= 100
            if params:
                self.begun[-1][1]["config"].update(dict(params))
            if metrics:
                values = {key: value for _, key, value in metrics}
                self.logs["mlflow"].append((metrics[0][0], values))

        return SimpleNamespace(
            get_experiment_by_name=lambda name: None,
            create_experiment=lambda name: f"experiment {name}",
            create_run=create_run,
            log_batch=log_batch,
            set_terminated=lambda run_id: self.ended.append("mlflow"),
        )


def documented():
    """Keys of the page, `<...>` standing for any name."""
    rows = re.findall(r"^\| `([a-z]+/[^`]+)` \|", DOCS.read_text(), re.MULTILINE)
    return {row: re.compile(re.sub("<[a-z ]+>", ".+", row)) for row in rows}


def test_every_tracker_gets_the_documented_keys(model, tmp_path, monkeypatch):
    told = Told(monkeypatch)
    how = {"max_samples": 8, "answers": {"samples": 1, "max_new_tokens": 4}}
    names = ("wandb", "mlflow", "trackio")
    run = config(model, tmp_path / "run", *names, tracking={"name": "it"}, evaluation=how)
    run_config(run)
    patterns = documented()
    assert len(patterns) > 15
    for name, log in told.logs.items():
        assert [step for step, _ in log] == [0, 1, 2, 3, 3], name
        keys = {key for _, values in log for key in values}
        # MLflow's files have the keys as paths.
        assert not [key for key in keys for other in keys if other.startswith(f"{key}/")]
        for key in keys:
            assert any(pattern.fullmatch(key) for pattern in patterns.values()), key
        lacking = {row for row, known in patterns.items() if not any(map(known.fullmatch, keys))}
        # Of a GPU, and of a mixture of experts.
        assert lacking == {"memory/peak_gib", "speed/mfu", "train/balance_loss"}, name
    assert told.logs["wandb"] == told.logs["trackio"] == told.logs["mlflow"]
    assert sorted(told.ended) == ["mlflow", "trackio", "wandb"]
    named = dict(told.begun)
    assert named["wandb"]["project"] == named["trackio"]["project"] == "slap_ds"
    assert named["wandb"]["name"] == "it"
    for settings in (named["wandb"]["config"], named["trackio"]["config"]):
        assert settings["selection.method"] == "slap"
        assert settings["batch.candidates"] == 16


def test_the_numbers_are_those_of_the_files(model, tmp_path, monkeypatch):
    told = Told(monkeypatch)
    how = {"answers": {"samples": 1, "max_new_tokens": 4}}
    run_config(config(model, tmp_path / "run", "wandb", evaluation=how))
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    steps = [r for r in records if r["event"] == "train"]
    logs = [values for _, values in told.logs["wandb"] if "train/loss" in values]
    trained = set()
    picked = [line["ids"] for line in read_lines(tmp_path / "run" / "picks.jsonl")]
    samples = 3 * 16  # candidates, out of more
    for record, values, ids in zip(steps, logs, picked, strict=True):
        trained |= set(ids)
        assert values["train/loss"] == record["loss"]
        assert values["train/candidate_loss"] == record["candidate_loss"]
        assert values["selection/keep"] == 10 / 16
        budgets = [values[f"selection/budget/{k}"] for k in range(4)]
        assert budgets == record["strata_budgets"]
        speed = record["candidate_tokens"] / record["step_s"]
        assert values["speed/candidate_tokens_per_s"] == pytest.approx(speed)
        store = len(trained) / values["selection/coverage"]
        assert store == pytest.approx(round(store))
        assert store >= samples
    last = [r for r in records if r["event"] == "eval"][-1]
    assert told.logs["wandb"][-1][1]["eval/loss"] == last["eval_loss"]
    for task, loss in last["eval_loss_by_task"].items():
        assert told.logs["wandb"][-1][1][f"eval/task/{task}"] == loss
    marks = last["answers_by_task"]["general"]
    assert told.logs["wandb"][-1][1]["eval/answers/general/rouge_l"] == marks["rouge_l"]


def test_the_picked_loss_is_that_of_the_picks(model, tmp_path):
    """Of hard, whose picks are the largest losses."""
    records = run_config(config(model, tmp_path / "run", selection={"method": "hard"}))
    for record in [r for r in records if r["event"] == "train"]:
        assert record["picked_loss"] > record["candidate_loss"]
        low, *_, high = record["picked_loss_deciles"]
        assert low < record["picked_loss"] < high


def test_mfu_is_the_picks_work_over_the_peak():
    record = {
        "step_s": 2.0,
        "model_flops": 3e12,
        "loss": 1.0,
        "lr": 1.0,
        "grad_norm": 1.0,
        "picked": 1,
        "candidates": 2,
        "trained_tokens": 5,
        "candidate_tokens": 10,
        "selection_s": 0.5,
        "score_s": 0.5,
        "total": {"flops": 7.0},
    }
    numbers = trackers.numbers_of_step(record, world=4, peak=1e12)
    assert numbers["speed/mfu"] == 3e12 / (2.0 * 4 * 1e12)
    assert numbers["selection/share"] == 0.5
    assert numbers["total/flops"] == 7.0


def test_a_continued_run_goes_on_under_its_id(model, tmp_path, monkeypatch):
    told = Told(monkeypatch)
    names = ("wandb", "mlflow", "trackio")
    run = config(model, tmp_path / "run", *names, steps=6, checkpoint={"every": 2})
    broken = prepare(run)
    with pytest.raises(RuntimeError, match="planted"):
        train(broken, [lambda record: _fall(record, 4)])
    run_config(run)
    starts = [named for name, named in told.begun if name == "wandb"]
    assert [start["id"] for start in starts] == [None, "w1"]
    assert len([name for name, _ in told.begun if name == "mlflow"]) == 1
    whole = Told(monkeypatch)
    run_config(config(model, tmp_path / "whole", "wandb", steps=6))
    coverage = [
        [values["selection/coverage"] for _, values in log if "selection/coverage" in values]
        for log in (told.logs["wandb"], whole.logs["wandb"])
    ]
    # What is taken again after the checkpoint counts once.
    assert coverage[0][-2:] == coverage[1][-2:]


def _fall(record, step):
    if record["event"] == "train" and record["step"] == step:
        raise RuntimeError("planted")


def test_a_tracker_that_fails_is_told_of_and_left_out(model, tmp_path, monkeypatch, capfd):
    told = Told(monkeypatch)

    def log(values, step):
        raise ConnectionError("https://me:hunter2@host is away\nand more")

    fallen = SimpleNamespace(id="w", log=log, finish=lambda: None)
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **named: fallen)
    records = run_config(config(model, tmp_path / "run", "wandb", "trackio"))
    assert len([r for r in records if r["event"] == "train"]) == STEPS
    assert len(told.logs["trackio"]) == STEPS + 2
    said = capfd.readouterr().err
    assert said.count("report_to wandb: ConnectionError: https://***@host is away") == 1
    assert "hunter2" not in said


def test_what_is_not_installed_is_one_line(model, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    wanted = config(model, tmp_path / "run", "mlflow", "wandb")
    for start in (prepare, dry_run):
        with pytest.raises(ValueError, match=r"names mlflow, wandb.*'slap_ds\[mlflow,wandb\]'"):
            start(wanted)


def test_addresses_lose_their_passwords(model, tmp_path):
    wanted = config(model, tmp_path / "run")
    data = wanted.data.model_copy(update={"train": ["https://me:hunter2@host/rows.jsonl"]})
    flat = trackers.settings_of(wanted.model_copy(update={"data": data}))
    assert flat["data.train"] == ["https://***@host/rows.jsonl"]
    assert "hunter2" not in str(flat)
    assert flat["optimizer.betas"] == [0.9, 0.95]


def test_tensorboard_files_hold_the_keys(model, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_config(config(model, tmp_path / "run", "tensorboard"))
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    losses = [(event.step, event.value) for event in found.Scalars("train/loss")]
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    wanted = [(r["step"] + 1, r["loss"]) for r in records if r["event"] == "train"]
    assert [step for step, _ in losses] == [step for step, _ in wanted]
    assert [x for _, x in losses] == pytest.approx([x for _, x in wanted])
    assert {"eval/loss", "selection/coverage"} <= set(found.Tags()["scalars"])
    no_secret_in(tmp_path / "run")


def test_mlflow_files_hold_the_keys(model, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    run_config(config(model, tmp_path / "run", "mlflow"))
    client = mlflow.MlflowClient((tmp_path / "run" / "mlruns").resolve().as_uri())
    experiment = client.get_experiment_by_name("slap_ds")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["selection.method"] == "slap"
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [metric.step for metric in history] == [1, 2, 3]
    no_secret_in(tmp_path / "run")


def test_wandb_takes_a_run_offline(model, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    said = []
    monkeypatch.setattr(trackers.Trackers, "_failed", lambda self, *what: said.append(what))
    run_config(config(model, tmp_path / "run", "wandb"))
    assert not said
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    no_secret_in(tmp_path / "run")


def test_trackio_takes_a_run(model, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    said = []
    monkeypatch.setattr(trackers.Trackers, "_failed", lambda self, *what: said.append(what))
    run_config(config(model, tmp_path / "run", "trackio"))
    assert not said
    assert any((tmp_path / "trackio").rglob("*"))
    no_secret_in(tmp_path / "run")


def no_secret_in(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
