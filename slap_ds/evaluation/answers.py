"""A Hugging Face folder that answers, one prompt at a time or in batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slap_ds.answers.greedy import Generated, answer_batch, greedy
from slap_ds.data.encoding import Template
from slap_ds.data.formats import Message
from slap_ds.data.templates import make_template
from slap_ds.models.lora import load_adapted


class Answerer:
    """Greedy answers from an exported folder; an adapter's finds its base by itself."""

    def __init__(self, folder: Path, template: str | None = None, dtype: Any = "auto") -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        name = template or template_of(folder)
        self.template: Template = make_template(name, self.tokenizer)
        if (folder / "adapter_config.json").is_file():
            self.model: Any = load_adapted(folder)
        else:
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, prompt: str, max_new_tokens: int = 64) -> str:
        ids = self.template.encode_prompt([Message("user", prompt)])
        return self.answer([ids], max_new_tokens)[0].text

    def answer(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Generated]:
        """Answers to prompts of token ids, all in one batch."""
        device = self.model.device
        with greedy(self.model, self.template):
            return answer_batch(
                self.model, self.tokenizer, self.template, prompts, max_new_tokens, device
            )


def template_of(folder: Path) -> str:
    """The conversation template an exported folder was trained with; auto for other folders."""
    note = folder / "slap_ds.json"
    if not note.is_file():
        return "auto"
    name: str = json.loads(note.read_text("utf-8"))["template"]
    return name
