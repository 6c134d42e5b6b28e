"""Greedy answers of a Hugging Face folder, one at a time or in batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from slap_ds.data.encoding import Template
from slap_ds.data.formats import Message
from slap_ds.data.templates import make_template
from slap_ds.models.lora import load_adapted


class Generated(NamedTuple):
    """An answer of a model."""

    text: str
    stopped: bool  # whether the model ended the answer itself


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
        # A folder's own generation settings (penalties, sampling) would change greedy answers.
        self.model.generation_config = GenerationConfig(
            do_sample=False,
            use_cache=True,
            eos_token_id=list(self.template.stop_ids),
            pad_token_id=self.template.stop_ids[0],
        )

    def __call__(self, prompt: str, max_new_tokens: int = 64) -> str:
        ids = self.template.encode_prompt([Message("user", prompt)])
        return self.answer([ids], max_new_tokens)[0].text

    def answer(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Generated]:
        """Answers to prompts of token ids, all in one batch, filled up on the left."""
        width = max(len(ids) for ids in prompts)
        rows = torch.full((len(prompts), width), self.template.stop_ids[0])
        mask = torch.zeros(len(prompts), width, dtype=torch.int64)
        for row, ids in enumerate(prompts):
            rows[row, width - len(ids) :] = torch.tensor(ids)
            mask[row, width - len(ids) :] = 1
        device = self.model.device
        with torch.no_grad():
            out = self.model.generate(
                rows.to(device), attention_mask=mask.to(device), max_new_tokens=max_new_tokens
            )
        return [self._read(ids) for ids in out[:, width:].tolist()]

    def _read(self, ids: list[int]) -> Generated:
        stops = set(self.template.stop_ids)
        end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        text: str = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return Generated(text.strip(), end < len(ids))


def template_of(folder: Path) -> str:
    """The conversation template an exported folder was trained with; auto for other folders."""
    note = folder / "slap_ds.json"
    if not note.is_file():
        return "auto"
    name: str = json.loads(note.read_text("utf-8"))["template"]
    return name


def batches(lengths: Sequence[int], max_new_tokens: int, batch_tokens: int) -> list[list[int]]:
    """Positions of prompts that are answered together: of similar length, at most `batch_tokens`
    tokens of prompt, filling and answer (a longer one by itself)."""
    found: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lambda p: (lengths[p], p)):
        # Sorted by length, so the newest prompt sets the batch's width.
        width = lengths[position] + max_new_tokens
        if not found or (len(found[-1]) + 1) * width > batch_tokens:
            found.append([])
        found[-1].append(position)
    return found
