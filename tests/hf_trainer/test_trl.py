"""TRL's SFTTrainer, with what it does to its data: padding, packing, padding-free batches."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.hf_trainer.recipes import apart, weights_of

trl = pytest.importorskip("trl")

ROOT = Path(__file__).parents[2]
LESSONS = ROOT / "slap_ds" / "data" / "lessons"
WAYS = {
    "padded": {},
    "packed": {"packing": True},
    "padding-free": {"padding_free": True, "max_length": None},
}


def run(folder, selection=None, **named):
    from datasets import Dataset

    from slap_ds.hf_trainer import SlapSFTTrainer

    rows = [json.loads(line) for line in (LESSONS / "train.jsonl").open()][:96]
    given = {"bf16": False, "max_length": 128, **named}
    args = trl.SFTConfig(
        str(folder),
        max_steps=3,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        learning_rate=1e-3,
        adam_epsilon=1e-6,  # at 1e-8 the rounding of a gradient near 0 is a step
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **given,
    )
    kind, more = (trl.SFTTrainer, {}) if selection is None else (SlapSFTTrainer, selection)
    model = AutoModelForCausalLM.from_pretrained(LESSONS, dtype=torch.float32)
    data = Dataset.from_list([{"messages": row["messages"]} for row in rows])
    trainer = kind(model, args, train_dataset=data, **({"selection": more} if more else {}))
    trainer.train()
    return trainer


@pytest.mark.parametrize("way", sorted(WAYS))
def test_at_keep_1_it_is_the_plain_sft_trainer_and_else_it_prunes(tmp_path, way):
    plain = run(tmp_path / "plain", **WAYS[way])
    full = run(tmp_path / "full", {"method": "full"}, **WAYS[way])
    assert apart(weights_of(full.model), weights_of(plain.model)) <= 1e-5
    some = run(tmp_path / "some", {"method": "slap", "keep": 0.5}, **WAYS[way])
    assert some._slap_engine.can_reuse
    assert apart(weights_of(some.model), weights_of(plain.model)) > 1e-3
    # A packed row holds more samples than one.
    least = 40 if way == "packed" else 16
    assert some.chosen.candidates >= least
    assert len(some.chosen.selection.picks) == round(some.chosen.candidates / 2)


def test_the_example_runs(tmp_path, monkeypatch):
    """examples/trl_sft.py on the package's small model, for two steps."""
    rows = (LESSONS / "train.jsonl").read_text().splitlines()[:64]
    (tmp_path / "train.jsonl").write_text(
        "\n".join(json.dumps({"messages": json.loads(row)["messages"]}) for row in rows)
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["trl_sft.py", str(LESSONS), "train.jsonl"])
    found = runpy.run_path(str(ROOT / "examples" / "trl_sft.py"))["trainer"]
    assert found.state.global_step == 6
    assert found.chosen.candidates == 32
    assert (tmp_path / "runs" / "trl" / "checkpoint-6" / "slap_state.pt").exists()
