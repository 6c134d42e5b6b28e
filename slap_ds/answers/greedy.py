"""Greedy answers of a transformers model, in batches that are filled up on the left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig

from slap_ds.data.encoding import Template


class Generated(NamedTuple):
    """An answer of a model."""

    text: str  # after its thought, if it had one
    stopped: bool  # whether the model ended the answer itself


@contextmanager
def greedy(lm: Any, template: Template) -> Iterator[None]:
    """Inside, `lm` generates greedily, up to a stop token of the template: its own settings
    (penalties, sampling) would change the answers."""
    own, routed = lm.generation_config, getattr(lm.config, "output_router_logits", None)
    lm.generation_config = GenerationConfig(
        do_sample=False,
        use_cache=True,
        eos_token_id=list(template.stop_ids),
        pad_token_id=template.stop_ids[0],
    )
    if routed:  # transformers would make a balance loss, and mistakes a padded mask for tokens
        lm.config.output_router_logits = False
    try:
        yield
    finally:
        lm.generation_config = own
        if routed:
            lm.config.output_router_logits = True


def answer_batch(
    lm: Any,
    tokenizer: Any,
    template: Template,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    device: torch.device,
    together: bool = False,
) -> list[Generated]:
    """Answers of a `greedy` model to prompts of token ids, all in one batch.

    Args:
        together: other ranks generate too, and each goes on with forwards until all have ended:
            under ZeRO-3 a forward needs them all.
    """
    width = max(len(ids) for ids in prompts)
    rows = torch.full((len(prompts), width), template.stop_ids[0])
    mask = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, ids in enumerate(prompts):
        rows[row, width - len(ids) :] = torch.tensor(ids)
        mask[row, width - len(ids) :] = 1
    with torch.no_grad():
        out = lm.generate(
            rows.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            synced_gpus=together,
        )
    return [_read(tokenizer, template, ids) for ids in out[:, width:].tolist()]


def _read(tokenizer: Any, template: Template, ids: list[int]) -> Generated:
    stops = set(template.stop_ids)
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    text: str = tokenizer.decode(ids[:end], skip_special_tokens=True)
    return Generated(without_thought(text), end < len(ids))


def without_thought(text: str) -> str:
    """What an answer says after it has thought, `<think>...</think>`."""
    return text.rpartition("</think>")[2].strip()


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
