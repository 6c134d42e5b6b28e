"""A small tokenizer made from the rows of a study's base model.

A model of a few million parameters with the vocabulary of a large one spends its time in the head,
where a large model spends a few per cent, so its costs say nothing about a large model's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

# Their order gives their ids: 0, 1 and 2, as the configs of base models name them.
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ROLES = ("system\n", "user\n", "assistant\n")


def make_vocabulary(rows: Path, pieces: int, out: Path) -> None:
    """Train a byte-level BPE of exactly `pieces` pieces on a JSONL file of conversations, and write
    it to `out` as a tokenizer.json; the same rows give the same bytes.

    Raises:
        ValueError: the rows hold too little text for so many pieces.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=pieces,
        special_tokens=list(SPECIAL),
        # All bytes, so that no text is unknown; sorted, because their order would vary.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*ROLES, *_contents(rows)], trainer)
    if tokenizer.get_vocab_size() != pieces:
        raise ValueError(
            f"base.vocabulary is {pieces}, the base model's rows give "
            f"{tokenizer.get_vocab_size()} pieces: take fewer pieces or more rows"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False), "utf-8")
    temporary.replace(out)


def _contents(rows: Path) -> Iterator[str]:
    with rows.open(encoding="utf-8") as file:
        for line in file:
            for message in json.loads(line)["messages"]:
                yield message["content"]
