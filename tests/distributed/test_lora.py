"""LoRA under ZeRO-3: as in one process, on a frozen base; reuse, resume, export and merging."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from slap_ds.checkpoint import find as checkpoint
from slap_ds.checkpoint.export import export
from slap_ds.cli import main
from slap_ds.config.file import config_keys
from slap_ds.config.schema import Config
from slap_ds.engine.whole_state import whole_weights
from slap_ds.evaluation.answers import Answerer
from slap_ds.jsonl import read_lines
from slap_ds.models.load import load_config, load_model
from slap_ds.models.lora import add_adapter
from tests.ranks import run_ranks
from tests.recipes import losses, picks, run_config, tiny_config, tiny_model

pytestmark = pytest.mark.lane

KINDS = {
    "lora": {"r": 4},
    "dora": {"r": 4, "use_dora": True},
    "rslora": {"r": 4, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "llama": tiny_model(folder / "llama"),
        "glm": tiny_model(folder / "glm", "glm"),
        "tied": tiny_model(folder / "tied", tie_word_embeddings=True),
    }


def config(base: str, run_dir: Path, kind: str = "lora", **sections) -> Config:
    defaults = {
        "steps": 4,
        "optimizer": {"lr": 1e-2},
        "step": {"balance": "none"},
        "evaluation": {"max_samples": 4},
    }
    own = sections.pop("model", {})
    chosen = {"lora": KINDS[kind], "gradient_checkpointing": True, **own}
    return tiny_config(base, run_dir, **{**defaults, **sections}, model=chosen)


def base_hash(lm) -> str:
    """sha256 of every frozen weight, whole, in the order of their names."""
    from contextlib import nullcontext

    from deepspeed.runtime.zero import GatheredParameters

    digest = hashlib.sha256()
    for name, weight in sorted(lm.named_parameters()):
        if not weight.requires_grad:
            with GatheredParameters([weight]) if hasattr(weight, "ds_id") else nullcontext():
                digest.update(name.replace(".base_layer", "").encode())
                digest.update(weight.detach().numpy().tobytes())
    return digest.hexdigest()


def train_and_hash(config: Config) -> tuple[str, str]:
    from slap_ds.train.loop import train
    from slap_ds.train.run import prepare

    run = prepare(config)
    before = base_hash(run.engine.model.lm)
    train(run)
    return before, base_hash(run.engine.model.lm)


def adapter(run_dir: Path) -> dict[str, torch.Tensor]:
    return whole_weights(checkpoint.find(run_dir)[-1].folder)


def metrics(run_dir: Path):
    return read_lines(run_dir / "metrics.jsonl")


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("lora", "llama"),
        ("dora", "glm"),
        pytest.param("lora", "tied", marks=pytest.mark.slow),
        pytest.param("rslora", "glm", marks=pytest.mark.slow),
    ],
)
def test_two_zero3_ranks_are_one_process_on_an_unchanged_base(kind, model, models, tmp_path):
    run_config(config(models[model], tmp_path / "torch", kind, engine={"kind": "torch"}))
    hashes = run_ranks(train_and_hash, 2, config(models[model], tmp_path / "ranks", kind))
    expected, found = metrics(tmp_path / "torch"), metrics(tmp_path / "ranks")
    assert picks(tmp_path / "ranks") == picks(tmp_path / "torch")
    pairs = list(zip(losses(found), losses(expected), strict=True))
    assert max(abs(a - b) for a, b in pairs) <= 1e-5
    assert losses(found)[-1] < losses(found)[0] - 0.05
    assert {r["forward"] for r in found if r["event"] == "train"} == {"reuse"}
    original = AutoModelForCausalLM.from_pretrained(models[model])
    for parameter in original.parameters():
        parameter.requires_grad_(False)
    assert {h for pair in hashes for h in pair} == {base_hash(original)}
    # Only the adapter is in the checkpoint, and the same on both.
    ours, theirs = adapter(tmp_path / "ranks"), adapter(tmp_path / "torch")
    trained = {name for name in theirs if ".lora_" in name}
    assert trained == {name for name in ours if ".lora_" in name}
    assert len(trained) == len(ours)
    for name in trained:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_in_bfloat16(kind, models, tmp_path):
    run = config(models["llama"], tmp_path / "run", kind, model={"dtype": "bfloat16"})
    run_ranks(run_config, 2, run)
    found = losses(metrics(tmp_path / "run"))
    assert found[-1] < found[0] - 0.05
    export(tmp_path / "run", tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {weight.dtype for weight in merged.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("world", [0, 2])
@pytest.mark.parametrize("kind", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_reuse_trains_the_same_bits_as_separate(kind, world, models, tmp_path):
    for forward in ("separate", "reuse"):
        c = config(
            models["llama"],
            tmp_path / forward,
            kind,
            step={"forward": forward, "balance": "quota"},
            batch={"micro_batch_tokens": 256},
            engine={"kind": "deepspeed" if world else "torch"},
        )
        run_ranks(run_config, world, c) if world else run_config(c)
    assert picks(tmp_path / "reuse") == picks(tmp_path / "separate")
    assert losses(metrics(tmp_path / "reuse")) == losses(metrics(tmp_path / "separate"))
    other = adapter(tmp_path / "separate")
    for name, value in adapter(tmp_path / "reuse").items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("world", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_stop_and_resume_equals_no_stop_bit_for_bit(world, models, tmp_path):
    def go(name):
        c = config(
            models["llama"],
            tmp_path / name,
            checkpoint={"every": 2, "keep_last": 9},
            engine={"kind": "deepspeed" if world else "torch"},
        )
        run_ranks(run_config, world, c) if world else run_config(c)

    go("whole")
    # What a crash after step 2 leaves: no later checkpoint, later lines still in the files.
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "step-000004")
    go("broken")
    assert losses(metrics(tmp_path / "broken")) == losses(metrics(tmp_path / "whole"))
    other = adapter(tmp_path / "whole")
    for name, value in adapter(tmp_path / "broken").items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_export_and_merge_answer_as_the_trained_model(kind, models, tmp_path):
    """peft loads the adapter; the merged model gives its logits; training goes on from it."""
    peft = pytest.importorskip("peft")
    run = config(models["glm"], tmp_path / "run", kind, engine={"kind": "torch"})
    run_config(run)
    export(tmp_path / "run", tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= names
    assert not any(name.startswith("model") for name in names)
    export(tmp_path / "run", tmp_path / "merged", merge=True)

    base = AutoModelForCausalLM.from_pretrained(models["glm"])
    ids = torch.arange(100, 160)[None]
    with torch.no_grad():
        untrained = base(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")(ids).logits
        by_itself = Answerer(tmp_path / "adapter").model(ids).logits
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    assert (adapted - untrained).abs().max() > 0.01
    assert (whole - adapted).abs().max() <= 1e-5
    assert torch.equal(by_itself, adapted)
    lm = load_model(
        models["glm"],
        load_config(models["glm"], None),
        dtype="float32",
        attention="sdpa",
        seed=0,
    )
    on = {"start": str(tmp_path / "adapter")}
    add_adapter(lm, run.model.lora.model_validate(on), seed=5)
    with torch.no_grad():
        assert torch.equal(lm.eval()(ids).logits, adapted)


def test_the_commands(models, tmp_path, capsys):
    run_config(config(models["llama"], tmp_path / "run", engine={"kind": "torch"}, steps=1))
    for out in (["--out", str(tmp_path / "a")], ["--out", str(tmp_path / "m"), "--merge"]):
        main(["export", str(tmp_path / "run"), *out])
        main(["generate", out[1], "Hello", "--max-new-tokens", "2"])
    assert capsys.readouterr().out.count("assistant:") == 2
    full = config(models["llama"], tmp_path / "full", engine={"kind": "torch"}, steps=1)
    raw = full.model_dump(mode="json")
    raw["model"]["lora"] = None
    run_config(Config.model_validate(raw))
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "full"), "--merge"])
    assert "trained no adapter: export it without --merge" in capsys.readouterr().err
    assert "model.lora.use_dora" in dict(config_keys())


def test_dropout_refuses_reuse_and_auto_goes_on(models, tmp_path, capsys):
    noisy = {"lora": {"r": 4, "dropout": 0.1}}
    sections = {"engine": {"kind": "torch"}, "model": noisy, "steps": 2}
    with pytest.raises(ValueError, match=r"without dropout, found model\.lora\.dropout = 0\.1: "):
        run_config(config(models["llama"], tmp_path / "no", step={"forward": "reuse"}, **sections))
    found = run_config(config(models["llama"], tmp_path / "auto", **sections))
    assert {r["forward"] for r in found if r["event"] == "train"} == {"separate"}
    assert "step.forward: separate, because" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lora", "told"),
    [
        ({"target_modules": ["wq"]}, r"no layer of the model is named \['wq'\], expected .*q_proj"),
        ({"target_modules": ["lm_head"]}, "adapts the output embedding"),
        ({"start": "./nowhere"}, "no adapter_config.json in './nowhere'"),
    ],
)
def test_mistakes(lora, told, models, tmp_path):
    c = config(models["llama"], tmp_path / "x", engine={"kind": "torch"}, model={"lora": lora})
    with pytest.raises((ValueError, FileNotFoundError), match=told) as caught:
        run_config(c)
    assert "\n" not in str(caught.value)


def test_another_adapter_does_not_resume(models, tmp_path):
    sections = {"engine": {"kind": "torch"}, "steps": 1}
    run_config(config(models["llama"], tmp_path / "run", **sections))
    other = {"lora": {"r": 8}}
    with pytest.raises(ValueError, match=r"saved with model\.lora = .*'r': 4"):
        run_config(config(models["llama"], tmp_path / "run", model=other, **sections))


def test_an_adapter_of_another_model_is_refused(models, tmp_path):
    run_config(config(models["llama"], tmp_path / "run", engine={"kind": "torch"}, steps=1))
    export(tmp_path / "run", tmp_path / "adapter")
    start = {"lora": {"start": str(tmp_path / "adapter")}}
    c = config(models["glm"], tmp_path / "x", engine={"kind": "torch"}, model=start)
    with pytest.raises(ValueError, match=r"model\.lora\.start"):
        run_config(c)
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == models["llama"]
