"""The command line: one clear line and a non-zero exit for every mistake; whole short runs."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml

from slap_ds.checkpoint import find as checkpoint
from slap_ds.cli import main
from slap_ds.config.file import _ELSEWHERE, config_keys, read_config
from slap_ds.config.schema import Config
from slap_ds.jsonl import read_lines
from slap_ds.train.inputs import read_inputs
from tests.recipes import tiny_config, tiny_model

pytestmark = pytest.mark.lane
GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def write(model, tmp_path):
    """Writes a config file of a tiny one-process run with changes by dotted key."""

    def write(**changes) -> str:
        config = tiny_config(
            model, tmp_path / "run", steps=2, engine={"kind": "torch"}, evaluation={}
        )
        raw = config.model_dump(mode="json")
        for key, value in changes.items():
            section, _, name = key.partition("__")
            if name:
                raw[section][name] = value
            else:
                raw[section] = value
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(raw))
        return str(path)

    return write


def fails(capsys, *arguments: str) -> str:
    """Run the command; it must exit with 1 and say one thing on stderr. Returns that."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert caught.value.code == 1
    text = capsys.readouterr().err
    assert text.count("slap-ds: error") == 1
    assert "Traceback" not in text
    return text[text.index("slap-ds: error") :]


def rows(tmp_path, *rows) -> list[str]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(path)]


def test_names_of_other_trainers_and_a_text_for_a_list(capsys, write):
    told = fails(capsys, "train", write(), "--learning_rate", "1e-4", "--output_dir", "x")
    assert "learning_rate: unknown key; did you mean optimizer.lr?" in told
    assert "output_dir: unknown key; did you mean run_dir?" in told
    told = fails(capsys, "train", write(), "--data.train", "a.jsonl")
    assert "data.train: expected a list, found one text: write [a.jsonl]" in told


def test_every_name_of_others_leads_to_a_setting():
    assert set(_ELSEWHERE.values()) <= {key for key, _ in config_keys()}
    assert not set(_ELSEWHERE) & set(Config.model_fields)


def test_mistakes_in_the_file(capsys, write):
    assert "did you mean 'keep'" in fails(capsys, "train", write(selection__kep=0.5))
    assert "selection.keep" in fails(capsys, "train", write(selection__keep=0))
    assert "selection.keep" in fails(capsys, "train", write(selection__keep=1.01))
    assert "optimizer.lr" in fails(capsys, "train", write(optimizer__lr="fast"))
    assert "slapp" in fails(capsys, "train", write(selection__method="slapp"))
    assert "no config file" in fails(capsys, "train", "nowhere.yaml")


@pytest.mark.parametrize("command", [["train"], ["train", "--dry-run"], ["preview"]])
def test_mistakes_in_what_the_file_names(capsys, write, tmp_path, command):
    def told(**changes):
        return fails(capsys, *command, write(**changes))

    assert "nowhere.jsonl" in told(data__train=["./nowhere.jsonl"])
    assert "no model folder" in told(model__path="./nowhere")
    assert "nowhere" in told(model__tokenizer="./nowhere/tokenizer.json")
    assert "nonsense" in told(data__template="nonsense")
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty" in told(data__train=[str(tmp_path / "empty.jsonl")]).lower()
    silent = {"messages": [{"role": "user", "content": "hi"}]}
    text = told(data__train=rows(tmp_path, GOOD, silent, silent))
    assert "assistant" in text
    long = {"messages": [{"role": "user", "content": "word " * 500}, GOOD["messages"][1]]}
    assert "supervised" in told(data__train=rows(tmp_path, long)).lower()


def test_a_tokenizer_larger_than_the_vocabulary(capsys, write, tmp_path):
    small = tiny_model(tmp_path / "small", vocab_size=1000)
    assert "ids up to 2047" in fails(capsys, "train", write(model__path=small))
    assert "512 positions" in fails(
        capsys, "train", write(data__max_tokens=600, batch__micro_batch_tokens=600)
    )


def test_a_checkpoint_of_another_world_or_other_data(capsys, write, tmp_path):
    main(["train", write()])
    manifest = next((tmp_path / "run" / "checkpoints").glob("*/manifest.json"))
    saved = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(checkpoint.sealed({**saved, "world_size": 2})))
    assert "saved by 2 ranks, this run has 1" in fails(capsys, "train", write(steps=3))
    manifest.write_text(json.dumps(saved))
    text = fails(capsys, "train", write(data__train=rows(tmp_path, GOOD), steps=3))
    assert "was saved on other training data" in text
    assert "checkpoint.resume is never" in fails(capsys, "train", write(checkpoint__resume="never"))
    assert "must" in fails(
        capsys, "train", write(checkpoint__resume="must", run_dir=str(tmp_path / "fresh"))
    )


def test_reuse_where_it_cannot_be(capsys, write, tmp_path, monkeypatch):
    noisy = tiny_model(tmp_path / "noisy", attention_dropout=0.1)
    changes = {"model__path": noisy, "model__gradient_checkpointing": True}
    text = fails(capsys, "train", write(step__forward="reuse", **changes))
    assert "attention_dropout = 0.1" in text
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    text = fails(capsys, "train", write(model__gradient_checkpointing=True))
    assert "GiB are free for them on the host" in text
    text = fails(capsys, "train", write(step__forward="reuse", step__balance="deal"))
    assert "choose quota or none" in text


def test_train_export_generate_compare(capsys, write, tmp_path):
    main(["train", write()])
    capsys.readouterr()
    main(["export", str(tmp_path / "run")])
    assert f"wrote {tmp_path / 'run' / 'model'}: step 2 of 2\n" in capsys.readouterr().out
    main(["generate", str(tmp_path / "run" / "model"), "Hello", "--max-new-tokens", "4"])
    assert "assistant:" in capsys.readouterr().out
    main(["compare", str(tmp_path / "run"), str(tmp_path / "run")])
    text = capsys.readouterr().out
    assert "samples trained" in text
    assert "translation" in text
    assert "no exported model" in fails(capsys, "generate", str(tmp_path), "Hello")
    assert "no whole checkpoint" in fails(capsys, "export", str(tmp_path))
    assert "no metrics.jsonl" in fails(capsys, "compare", str(tmp_path))
    with (tmp_path / "run" / "model" / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    text = fails(capsys, "generate", str(tmp_path / "run" / "model"), "Hello")
    assert "is cut off or damaged" in text
    assert text.count("\n") == 1


@pytest.mark.parametrize("length", [{"steps": 5}, {"steps": None, "epochs": 0.1}])
def test_an_export_tells_where_the_run_stands(write, tmp_path, capsys, monkeypatch, length):
    from slap_ds.train import loop as trainer

    def preempted(run, step):
        save(run, step)
        run.saver.wait()
        raise KeyboardInterrupt

    save = trainer.save
    monkeypatch.setattr(trainer, "save", preempted)
    fails(capsys, "train", write(**length, checkpoint__every=2))
    main(["export", str(tmp_path / "run")])
    assert capsys.readouterr().out.endswith("model: step 2 of 5\n")


def test_the_exported_model_is_the_trained_one(write, tmp_path):
    """transformers alone loads it, with the run's weights, tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from slap_ds.checkpoint import find as checkpoint
    from slap_ds.engine.whole_state import whole_weights

    main(["train", write()])
    main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    readable = (tmp_path / "run" / "metrics.jsonl").stat().st_mode
    assert {f.stat().st_mode for f in (tmp_path / "out").iterdir() if f.is_file()} == {readable}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    trained = whole_weights(checkpoint.find(tmp_path / "run")[-1].folder)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, trained[name]), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.apply_chat_template(GOOD["messages"], tokenize=False)
    assert "<|im_start|>assistant\nho<|im_end|>" in text


def test_a_finished_run_has_nothing_left_to_do(write, tmp_path):
    main(["train", write()])
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    main(["train", write()])
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_dry_run_trains_nothing(capsys, write, tmp_path):
    main(["train", write(), "--dry-run"])
    assert "candidates per step  16" in capsys.readouterr().out
    assert not (tmp_path / "run" / "checkpoints").exists()


def noted(capsys, *arguments: str) -> str:
    """What `train --dry-run` prints."""
    capsys.readouterr()
    main(["train", *arguments, "--dry-run"])
    return capsys.readouterr().out


def test_dry_run_says_what_is_odd(capsys, write, tmp_path):
    plain = noted(capsys, write(steps=3))
    assert "note:" not in plain
    assert re.search(r"memory +2.\d of \d+ GiB a GPU", plain)
    assert "for 3 checkpoints" in plain
    assert re.search(r"on 8 \S+ .*by formula", noted(capsys, write(steps=3), "--gpus", "8"))
    told = noted(capsys, write(steps=3), "--optimizer.warmup_steps", "3")
    assert "note: optimizer.warmup_steps is 3 and the run has 3 steps" in told
    told = noted(capsys, write(steps=3), "--batch.candidates", "5000")
    assert re.search(r"note: batch.candidates is 5000 and there are \d+ samples", told)
    told = noted(capsys, write(data__eval=["builtin:demo/train"]))
    assert re.search(r"note: (\d+) of \1 evaluation samples are trained on", told)
    told = noted(capsys, write(data__over_length="truncate"), "--data.max_tokens", "24")
    cut, lost = re.search(r"cut to max_tokens +(\d+)\n +left out .* (\d+) without", told).groups()
    assert int(cut) > 0
    assert int(lost) > 0
    data = rows(tmp_path, *[GOOD] * 30, {"messages": []}, {"other": 1})
    told = noted(capsys, write(data__train=data, data__max_reject_share=0.5))
    assert f"rejected rows  2 ({tmp_path / 'run' / 'rejects.jsonl'})" in told
    assert "rows.jsonl, line 31: " in told
    assert "rows.jsonl, line 32: " in told


def test_dry_run_knows_a_run_that_is_there(capsys, write, tmp_path):
    main(["train", write(checkpoint__every=1)])
    assert "has done 2 of 2 steps: it is finished" in noted(capsys, write())
    assert "continues after step 2" in noted(capsys, write(steps=5))


@pytest.mark.parametrize("command", [["--dry-run"], []])
def test_weights_that_are_not_there(capsys, write, model, tmp_path, command):
    """Found without reading them; `train` says so too."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    weights = folder / "model.safetensors"
    path = write(steps=3, model__path=str(folder))
    assert "note:" not in noted(capsys, path)
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-5])
    assert "is cut off or damaged" in fails(capsys, "train", path, *command)
    weights.unlink()
    told = fails(capsys, "train", path, *command)
    assert str(folder) in told
    assert "safetensors" in told


def test_estimate_counts_the_runs_own_data(capsys, write):
    def told(*more):
        capsys.readouterr()
        main(["estimate", write(steps=None, epochs=3), "--gpus", "1", "8", *more])
        return capsys.readouterr().out

    out = told()
    store = read_inputs(read_config(write()), write_rejects=False).train
    assert f"{store.lengths.mean():.0f} tokens a sample" in out
    assert f"counted in {len(store):,} samples" in out
    assert "400 TFLOP/s a GPU, weights gathered at 200 GB/s" in out
    steps = math.ceil(3 * len(store) / 16)
    assert re.search(rf"│ steps +│ +{steps:,} │ +{steps:,} │", out)
    assert re.search(r"│ candidates a step +│ +16 │ +16 │", out)
    assert re.search(r"B200, 178 GiB free +│ +fits │ +fits │", out)
    out = told("--candidates-per-gpu", "16", "--sample-tokens", "700")
    assert "700 tokens a sample" in out
    assert re.search(r"│ candidates a step +│ +16 │ +128 │", out)
    assert re.search(r"hours, without evaluation +│ +data not read", out)
    out = told("--data.train", "[nowhere.jsonl]")
    assert "assumed, since the data cannot be read (" in out
    assert "nowhere.jsonl" in out


def test_rows_per_rank_takes_the_candidates_that_fill_them(write, tmp_path):
    main(["train", write(batch__rows_per_rank=2)])
    run = read_config(str(tmp_path / "run" / "config.yaml"))
    store = read_inputs(run, write_rejects=False).train
    filled = run.batch.candidates * store.lengths.mean() / run.batch.micro_batch_tokens
    assert filled == pytest.approx(0.9 * 2, rel=0.05)
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    trained = [r for r in records if r["event"] == "train"]
    assert {r["candidates"] for r in trained} == {run.batch.candidates}


def test_a_projection_that_narrows_nothing_is_refused(capsys, write):
    with pytest.raises(SystemExit):
        main(["train", write(), "--dry-run", "--scoring.sketch_dim", "512"])
    assert "scoring.sketch_dim is 512, not below the model's width" in capsys.readouterr().err


def test_settings_and_help_list_everything(capsys):
    main(["settings"])
    assert "selection.keep" in capsys.readouterr().out
    for command in ("train", "preview", "export", "compare", "generate", "doctor", "settings"):
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0


def test_the_process_itself_exits_clean(write):
    """As a user starts it: no traceback on stderr, exit status 1, and 0 for a dry run."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "slap_ds", "--local_rank=0", *arguments],
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
        )

    bad = run("train", write(), "--selection.keep", "2")
    assert bad.returncode == 1
    assert bad.stderr.count("\n") == 2
    assert "selection.keep" in bad.stderr
    assert run("train", write(), "--dry-run").returncode == 0


@pytest.mark.parametrize(
    ("rank", "world", "says"), [("0", "2", True), ("1", "2", False), ("2", "2", True)]
)
def test_one_rank_tells_of_a_mistake_and_one_beyond_the_last_does(
    rank, world, says, monkeypatch, capsys
):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(SystemExit) as ended:
        main(["train", "nowhere.yaml"])
    assert ended.value.code == 1
    assert capsys.readouterr().err.count("slap-ds: error") == says
