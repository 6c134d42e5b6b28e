"""GLM-4-0414, GLM-4.5 and GLM-4.7-Flash, in transformers' own layout: trained, exported, asked."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slap_ds.checkpoint.export import export
from slap_ds.evaluation.answers import Answerer
from slap_ds.train.loop import train
from slap_ds.train.run import prepare
from tests.data.test_later_glm_templates import GLM_0414, GLM_45, GLM_47, tokenizer_of
from tests.recipes import run_config, tiny_config, tiny_model

pytestmark = pytest.mark.lane

KINDS = {"glm4": GLM_0414, "glm4_moe": GLM_45, "glm4_moe_lite": GLM_47}
ROWS = (("capital of France?", "Paris"), ("capital of Peru?", "Lima"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_learnt_by_heart_is_answered_and_stops(kind, tmp_path):
    path = tiny_model(tmp_path / "model", kind, initializer_range=0.05)
    tokenizer_of(KINDS[kind]).save_pretrained(path)
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in ROWS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = prepare(
        tiny_config(
            path,
            tmp_path / "run",
            steps=40,
            engine={"kind": "torch"},
            model={"tokenizer": None, "gradient_checkpointing": True},
            data={"train": [str(tmp_path / "rows.jsonl")], "eval": []},
            batch={"candidates": 2},
            selection={"method": "hard", "keep": 0.5, "warmup": 0.8},
            optimizer={"lr": 1e-2},
        )
    )
    train(run)
    folder = export(tmp_path / "run", tmp_path / "out")
    model, tokenizer = (
        kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    ids = torch.arange(5, 25)[None]
    ours = run.engine.model.lm.eval()
    ours.set_attn_implementation("sdpa")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, ours(ids).logits, rtol=0, atol=0)
    answerer = Answerer(folder)
    for prompt, answer in ROWS:
        assert answerer(prompt) == answer
        given = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            enable_thinking=False,
            return_tensors="pt",
        )
        out = model.generate(**given, do_sample=False, max_new_tokens=40)
        new = tokenizer.decode(out[0, given["input_ids"].shape[1] :])
        assert new.strip().removeprefix("<think></think>\n") in (
            f"{answer}<|user|>",
            f"{answer}<|endoftext|>",
        )


def test_glm_5_needs_a_mask(tmp_path):
    fields = {
        "model_type": "glm_moe_dsa",
        "vocab_size": 2048,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "max_position_embeddings": 512,
    }
    model = {"path": None, "config": fields, "attention": "packed"}
    with pytest.raises(ValueError, match=r"^glm_moe_dsa chooses .*: use model\.attention sdpa$"):
        run_config(tiny_config("", tmp_path / "run", model=model, engine={"kind": "torch"}))
