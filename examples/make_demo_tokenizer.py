"""Make the demo tokenizer again from slap_ds/data/demo/train.jsonl, byte for byte.

    python examples/make_demo_tokenizer.py              # rewrites the two shipped files
    python examples/make_demo_tokenizer.py --out DIR    # writes them to DIR instead

The result is a byte-level BPE of exactly 2,048 pieces. Every byte has a piece, so no text is
ever unknown. Running it twice gives the same bytes, and those are the bytes in the repository.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

DEMO = Path(__file__).resolve().parent.parent / "slap_ds" / "data" / "demo"
VOCAB_SIZE = 2048
# Their order gives their ids: 0, 1 and 2.
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# Plain ChatML. It adds no system message of its own.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def contents(path: Path) -> Iterator[str]:
    """Yield the text of every message in a conversation file, in order."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            for message in json.loads(line)["messages"]:
                yield message["content"]


def train_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """Train the byte-level BPE on the messages in `path`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        # All 256 bytes, seen in training or not: this is what rules out unknown text.
        # Sorted, because the library hands them over in an order that may change.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # The roles and the line break belong to every rendered conversation, so they are learned too.
    roles = ["system\n", "user\n", "assistant\n"]
    tokenizer.train_from_iterator([*roles, *contents(path)], trainer=trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise SystemExit(f"expected {vocab_size} pieces, got {tokenizer.get_vocab_size()}")
    return tokenizer


def write_files(train: Path, out: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """Write tokenizer.json and tokenizer_config.json for `train` into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    # Laid out by json here and not by the tokenizers library, whose layout may change.
    tokenizer = json.loads(train_tokenizer(train, vocab_size).to_str())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": END,
        "additional_special_tokens": [START],
        "padding_side": "right",
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    for name, value in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        text = json.dumps(value, ensure_ascii=False, indent=1) + "\n"
        (out / name).write_bytes(text.encode())


def main() -> None:
    """Read the command line and write the files."""
    parser = argparse.ArgumentParser(description="Make the demo tokenizer from the demo data.")
    parser.add_argument("--train", type=Path, default=DEMO / "train.jsonl")
    parser.add_argument("--out", type=Path, default=DEMO)
    args = parser.parse_args()
    write_files(args.train, args.out)


if __name__ == "__main__":
    main()
