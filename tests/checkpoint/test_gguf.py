"""llama.cpp's own converter reads an export, and its file holds the same model.

LLAMA_CPP names a checkout of llama.cpp (the source of llama-cpp-python has one, vendor/llama.cpp).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from slap_ds.checkpoint.export import export
from tests.recipes import run_config, tiny_config, tiny_model
from tests.small_tokenizers import spaced_tokenizer

LLAMA_CPP = Path(os.environ.get("LLAMA_CPP", "no-checkout"))
CONVERTER = LLAMA_CPP / "convert_hf_to_gguf.py"
CHAT = (
    "{% for message in messages %}{{ message['role'] }}\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)


@pytest.mark.slow
@pytest.mark.skipif(not CONVERTER.is_file(), reason="LLAMA_CPP names no checkout of llama.cpp")
def test_the_converted_file_gives_the_same_logits(tmp_path):
    pytest.importorskip("gguf")  # transformers reads such files with it
    tokenizer = spaced_tokenizer()
    tokenizer.chat_template = CHAT
    base = tiny_model(tmp_path / "base", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(base)
    config = tiny_config(
        base,
        tmp_path / "run",
        steps=2,
        engine={"kind": "torch"},
        model={"tokenizer": None},
        data={"max_tokens": 500},
        batch={"micro_batch_tokens": 512},
    )
    run_config(config)
    folder = export(tmp_path / "run", tmp_path / "model")

    command = [sys.executable, str(CONVERTER), str(folder), "--outtype", "f32"]
    done = subprocess.run(
        [*command, "--outfile", str(tmp_path / "model.gguf")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ours = AutoModelForCausalLM.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    ids = torch.tensor([tokenizer("How do I cook rice?")["input_ids"]])
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=0, atol=1e-5)
