"""Which rows are answered, with which prompts, and what their answers are compared with.

The last assistant turn of a row is answered, given all messages before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slap_ds.answers.greedy import without_thought
from slap_ds.data.formats import Message
from slap_ds.data.packing import Positions
from slap_ds.data.reread import reread
from slap_ds.data.samples import Rules
from slap_ds.data.store import TokenStore


@dataclass(frozen=True)
class Answering:
    """How many rows are answered, and how."""

    samples: int | None = None  # answers per task, a fixed random subset; None: all rows, 0: none
    max_new_tokens: int = 256
    batch_tokens: int = 16384  # prompts, filling and answers of one batch
    seed: int = 0  # of the subset


@dataclass(frozen=True)
class Question:
    """A row to be answered."""

    index: int  # in the store
    prompt: list[int]  # token ids
    messages: tuple[Message, ...]  # what the prompt is made of
    references: tuple[str, ...]  # the row's `answers`, then its own answer


def read_questions(
    store: TokenStore,
    paths: Sequence[str],
    rules: Rules,
    how: Answering,
    positions: int | None,
) -> tuple[list[Question], int]:
    """The rows to be answered, and how many of the chosen ones are too long for that: their prompt
    exceeds max_tokens, or leaves no room in the model's `positions` for max_new_tokens.

    Raises:
        ValueError: all are too long, or `paths` do not give the store's samples any more.
    """
    chosen = set(_subset(store, how).tolist())
    template, found, too_long = rules.template, [], 0
    for origin in reread(store, paths, rules):
        if origin.position not in chosen:
            continue
        messages = origin.conversation.messages
        last = max(i for i, message in enumerate(messages) if message.role == "assistant")
        prompt = template.encode_prompt(messages[:last], origin.conversation.tools, messages[last])
        longest = rules.max_tokens if positions is None else positions - how.max_new_tokens
        if len(prompt) > min(longest, rules.max_tokens):
            too_long += 1
            continue
        references = (
            *_listed(origin.row.get("answers")),
            *_listed(origin.row.get("references")),
            without_thought(messages[last].content),
        )
        found.append(
            Question(origin.position, prompt, messages[:last], tuple(dict.fromkeys(references)))
        )
    if chosen and not found:
        raise ValueError(
            f"all {too_long} prompts are too long: longer than max_tokens {rules.max_tokens}, or "
            f"with max_new_tokens {how.max_new_tokens} longer than the model's {positions} "
            "positions"
        )
    return found, too_long


def _subset(store: TokenStore, how: Answering) -> Positions:
    """Indices to answer: of each task all, or `samples` drawn by the seed."""
    parts = []
    for code in range(len(store.names["task"])):
        rows = np.flatnonzero(store.task == code)
        if how.samples is not None and how.samples < len(rows):
            generator = np.random.Generator(np.random.Philox(key=[how.seed, code]))
            rows = np.sort(generator.choice(rows, how.samples, replace=False))
        parts.append(rows)
    return np.concatenate(parts)


def _listed(answers: object) -> list[str]:
    return [a for a in answers if isinstance(a, str) and a] if isinstance(answers, list) else []
