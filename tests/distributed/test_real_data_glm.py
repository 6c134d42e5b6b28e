"""A small GLM on real Chinese and English conversations: all of it, then an adapter beside it."""

import gzip
import json
from pathlib import Path

import pytest

from slap_ds.checkpoint.export import export
from slap_ds.jsonl import read_lines
from tests.distributed.test_lora import train_and_hash
from tests.ranks import run_ranks
from tests.recipes import run_config, tiny_config
from tests.small_tokenizers import DATA_DIR, needs_data

GLM = {
    "model_type": "glm",
    "vocab_size": 8192,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "attention_bias": True,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": 0,
}


def chinese_and_english(folder: Path) -> dict[str, list[str]]:
    """Copies of the data files that hold only rows of these languages."""
    found: dict[str, list[str]] = {}
    for split in ("train", "eval"):
        (folder / split).mkdir(parents=True)
        for path in sorted(DATA_DIR.glob(f"*/*.{split}.jsonl.gz")):
            with gzip.open(path, "rt", encoding="utf-8") as lines:
                rows = [line for line in lines if json.loads(line)["lang"] in ("zh", "en")]
            if rows:
                target = folder / split / path.name
                with gzip.open(target, "wt", encoding="utf-8") as file:
                    file.writelines(rows)
                found.setdefault(split, []).append(str(target))
    return found


def evaluations(run_dir: Path) -> list[dict]:
    return [r for r in read_lines(run_dir / "metrics.jsonl") if r["event"] == "eval"]


def assert_every_task_is_lower(run_dir: Path) -> None:
    first, *_, last = evaluations(run_dir)
    before, after = first["eval_loss_by_task"], last["eval_loss_by_task"]
    assert set(before) == {"qa", "dialogue", "general", "translation"}
    for task in before:
        print(f"{run_dir.name} {task}: {before[task]:.3f} -> {after[task]:.3f} nats per token")
        assert after[task] < before[task], task


@needs_data
@pytest.mark.slow
def test_slap_lowers_every_task_and_so_does_lora_on_an_unchanged_base(tmp_path):
    data = chinese_and_english(tmp_path / "data")
    common = {
        "data": {**data, "template": "chatml", "max_tokens": 256},
        "batch": {"candidates": 32, "micro_batch_tokens": 2048},
        "evaluation": {"max_samples": 400},
    }
    model = {"tokenizer": str(DATA_DIR / "bpe8k.json"), "gradient_checkpointing": True}
    full = tiny_config(
        "",
        tmp_path / "full",
        **common,
        steps=120,
        model={**model, "path": None, "config": GLM},
        optimizer={"lr": 4e-3, "warmup_steps": 10},
    )
    run_ranks(run_config, 2, full, timeout_s=1200)
    assert_every_task_is_lower(tmp_path / "full")
    export(tmp_path / "full", tmp_path / "model")

    lora = tiny_config(
        str(tmp_path / "model"),
        tmp_path / "lora",
        **{**common, "batch": {"candidates": 64, "micro_batch_tokens": 2048}},
        steps=80,
        model={**model, "lora": {"r": 16}},
        optimizer={"lr": 3e-3, "warmup_steps": 5},
    )
    hashes = run_ranks(train_and_hash, 2, lora, timeout_s=1200)
    assert_every_task_is_lower(tmp_path / "lora")
    print(f"base weights before and after: {hashes}")
    assert len({h for pair in hashes for h in pair}) == 1
    steps = [r for r in read_lines(tmp_path / "lora" / "metrics.jsonl") if r["event"] == "train"]
    assert {r["forward"] for r in steps} == {"reuse"}
