"""The config: every error at once, dotted overrides, every committed file parses."""

import json
import re
from pathlib import Path

import pytest

from slap_ds.config.deepspeed import DEFAULT_DEEPSPEED, resolve_deepspeed
from slap_ds.config.file import config_keys, read_config
from slap_ds.selection import make_selector

pytestmark = pytest.mark.lane

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "configs" / "demo.yaml")


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def test_all_mistakes_are_told_at_once(tmp_path):
    path = write(
        tmp_path,
        """
run_dir: x
steps: 0
model: {path: m, dtyp: float32}
data: {train: [], max_tokens: 64}
selection: {keep: 1.5, slap: {strata_by: thirds}}
optimiser: {lr: 2e-5}
""",
    )
    with pytest.raises(ValueError, match="6 mistakes") as caught:
        read_config(path)
    text = str(caught.value)
    for part in (
        "steps: ",
        "model.dtyp: unknown key; did you mean 'dtype'?",
        "data.train: ",
        "selection.keep: ",
        "selection.slap.strata_by: ",
        "optimiser: unknown key; did you mean 'optimizer'?",
    ):
        assert part in text


def test_a_key_that_lies_further_down_is_named():
    for key, told in {
        "temperature": "did you mean selection.slap.temperature?",
        "strata": "did you mean selection.slap.strata or selection.ccs.strata?",
        "where": "known here: method, keep, ",
    }.items():
        with pytest.raises(ValueError, match=rf"selection\.{key}: unknown key; ") as caught:
            read_config(DEMO, [f"--selection.{key}", "2"])
        assert told in str(caught.value)


def test_overrides_are_dotted_and_typed():
    config = read_config(
        DEMO, ["--selection.keep=0.25", "--optimizer.lr", "2e-5", "--data.eval", "[]"]
    )
    assert config.selection.keep == 0.25
    assert config.optimizer.lr == 2e-5
    assert config.data.eval == []
    for bad, message in [
        (["--selection.keep"], "no value"),
        (["keep", "1"], "expected an override"),
        (["--steps.x", "1"], "single value"),
        (["--selection.kep", "1"], "did you mean 'keep'"),
        (["--selection.keep", "0"], "selection.keep"),
        (["--data.max_tokens", "4096"], "must fit into one row"),
        (["--epochs", "1"], "exactly one of steps and epochs"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_config(DEMO, bad)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        read_config("nowhere.yaml")
    with pytest.raises(ValueError, match="not valid YAML"):
        read_config(write(tmp_path, "a: [1"))
    with pytest.raises(ValueError, match="expected a mapping"):
        read_config(write(tmp_path, "- 1"))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_committed_config_parses(path):
    config = read_config(str(path))
    assert resolve_deepspeed(config, 2, 64)["zero_optimization"]["stage"] in (1, 2, 3)


def test_every_setting_is_explained():
    keys = dict(config_keys())
    assert len(keys) > 40
    for key, text in keys.items():
        assert len(text) > len("(default x)") + 5, key
    for key, allowed in {
        "selection.keep": "number > 0, <= 1; default 0.6",
        "step.forward": "auto | reuse | separate; default auto",
        "batch.rows_per_rank": "auto | whole number >= 1 | null; default null",
        "optimizer.betas": "[number, number]; default [0.9, 0.95]",
        "checkpoint.last": "true | false; default true",
        "report_to": "list of tensorboard | wandb | mlflow | trackio; default []",
        "data.train": "list of text; required",
        "model.config": "mapping | null; default null",
    }.items():
        assert keys[key].endswith(f"({allowed})")


def test_deepspeed_autos_are_filled_and_contradictions_listed(tmp_path):
    config = read_config(DEMO)
    settings = resolve_deepspeed(config, 4, 64)
    assert settings["train_batch_size"] == 4
    assert settings["zero_optimization"]["reduce_bucket_size"] == 64 * 64
    assert "auto" not in json.dumps(settings)

    broken = json.loads(DEFAULT_DEEPSPEED.read_text())
    broken.update(train_batch_size=17, optimizer={"type": "Adam"}, wat="auto")
    broken["bf16"]["enabled"] = True
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(broken))
    config = read_config(DEMO, ["--engine.deepspeed", str(path)])
    with pytest.raises(ValueError, match="train_batch_size is 17") as caught:
        resolve_deepspeed(config, 4, 64)
    for part in ("bf16.enabled is True", "optimizer and scheduler belong", 'wat is "auto"'):
        assert part in str(caught.value)


@pytest.mark.parametrize("key", ["offload_optimizer", "offload_param"])
@pytest.mark.parametrize("device", ["none", "cpu", "nvme", None])
def test_offload_to_disk_is_refused(key, device, tmp_path):
    settings = json.loads(DEFAULT_DEEPSPEED.read_text())
    settings["zero_optimization"][key] = device and {"device": device, "nvme_path": "/disk"}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(settings))
    config = read_config(DEMO, ["--engine.deepspeed", str(path)])
    if device != "nvme":
        resolve_deepspeed(config, 4, 64)
        return
    with pytest.raises(ValueError, match=rf"{key}.device is 'nvme', expected 'cpu'.*use 'cpu'"):
        resolve_deepspeed(config, 4, 64)


def test_slap_alone_takes_unit_sketches_unless_told_otherwise():
    def norm(*overrides):
        config = read_config(DEMO, overrides)
        selector = make_selector(config.selection.model_dump())
        return config.scoring.resolved(selector.unit_sketches).sketch_norm

    assert norm() == "unit"
    assert norm("--selection.slap.preset", "paper") == "none"
    assert norm("--selection.method", "grand") == "none"
    assert norm("--selection.slap.preset", "paper", "--scoring.sketch_norm", "unit") == "unit"


def test_a_gpu_takes_longer_chunks_of_the_head_unless_told_otherwise():
    scoring = read_config(DEMO, []).scoring
    assert (scoring.chunk_on("cpu"), scoring.chunk_on("cuda")) == (512, 2048)
    scoring = read_config(DEMO, ["--scoring.chunk_tokens", "96"]).scoring
    assert (scoring.chunk_on("cpu"), scoring.chunk_on("cuda")) == (96, 96)


ZERO = {"zero_optimization": {"stage": 3}}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "has no zero_optimization.stage, expected 0, 1, 2 or 3"),
        ({"zero_optimisation": {"stage": 3}}, "did you mean 'zero_optimization'?"),
        (
            {**ZERO, "amp": {"enabled": True}},
            "amp is not a section that this trainer can use; take",
        ),
        ({**ZERO, "curriculum_learning": {}}, "curriculum_learning is not a section"),
        ({**ZERO, "zero_force_ds_cpu_optimizer": True}, "True, this run needs False"),
        ({"zero_optimization": {"stage": 4}}, "stage is 4, expected 0, 1, 2 or 3"),
    ],
)
def test_what_deepspeed_would_ignore_or_fail_at_is_refused(settings, words, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(settings))
    config = read_config(DEMO, ["--engine.deepspeed", str(path)])
    with pytest.raises(ValueError, match=re.escape(words)):
        resolve_deepspeed(config, 4, 64)


def test_a_short_deepspeed_file_is_enough(tmp_path):
    path = tmp_path / "ds.json"
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    path.write_text(json.dumps({"zero_optimization": zero, "amp": {"enabled": False}}))
    settings = resolve_deepspeed(read_config(DEMO, ["--engine.deepspeed", str(path)]), 4, 64)
    assert settings["zero_force_ds_cpu_optimizer"] is False
    assert settings["zero_allow_untested_optimizer"] is True


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("zero", "summed"),
    [
        ({"stage": 3}, "fp32"),
        ({"stage": 2}, "fp32"),
        ({"stage": 1}, None),
        ({"stage": 3, "offload_optimizer": {"device": "none"}}, "fp32"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, None),
    ],
)
def test_bfloat16_gradients_are_summed_in_float32(tmp_path, dtype, zero, summed):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    options = ["--engine.deepspeed", str(path), "--model.dtype", dtype]
    settings = resolve_deepspeed(read_config(DEMO, options), 2, 64)
    found = settings.get("data_types", {}).get("grad_accum_dtype")
    assert found == (summed if dtype == "bfloat16" else None)
    mine = {"zero_optimization": zero, "data_types": {"grad_accum_dtype": "bf16"}}
    path.write_text(json.dumps(mine))
    kept = resolve_deepspeed(read_config(DEMO, options), 2, 64)["data_types"]
    assert kept == {"grad_accum_dtype": "bf16"}


@pytest.mark.parametrize(
    "text",
    [
        "optimizer: {lr: 1.0e-3}\nrun_dir: x\noptimizer: {warmup_steps: 1}\n",
        "optimizer: {lr: 1.0e-3, warmup_steps: 1, lr: 2.0e-3}\n",
        "data:\n  train: [a]\n  cache_dir: x\n  train: [b]\n",
        "selection:\n  slap: {a: [{b: 1, b: 2}]}\n",
    ],
)
def test_a_key_that_stands_twice_is_refused_at_every_depth(tmp_path, text):
    with pytest.raises(ValueError, match=r"is in line \d+ and again in line \d+") as error:
        read_config(write(tmp_path, text))
    assert str(error.value).count("\n") == 0


def test_a_merged_mapping_may_be_overridden(tmp_path):
    text = (
        "a: &a {lr: 1.0e-3}\nrun_dir: x\nmodel: {path: m}\ndata: {train: [d]}\nsteps: 1\n"
        "optimizer: {<<: *a, lr: 2.0e-3}\n"
    )
    with pytest.raises(ValueError, match="1 mistake\n  a: unknown key"):
        read_config(write(tmp_path, text))


def test_the_home_folder_stands_for_a_tilde_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    text = """
run_dir: ~/run
steps: 1
model: {path: ~/model, tokenizer: ~/tokenizer, lora: {start: ~/adapter}}
data: {train: [~/a, ~/b], eval: [~/c], cache_dir: ~/cache}
engine: {deepspeed: ~/ds.json}
selection: {validation: [~/v], reference_losses: ~/l}
"""
    found = read_config(write(tmp_path, text)).model_dump_json()
    assert "~" not in found
    assert found.count("/home/someone/") == 11
