"""Tokenizers small enough to read, made on the spot: one byte-level, one like SentencePiece."""

import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
LLAMA2 = ("<unk>", "<s>", "</s>")
DATA_DIR = Path(os.environ.get("SLAP_DATA_DIR", Path(__file__).parents[2] / "shared" / "data"))

needs_data = pytest.mark.skipif(
    not (DATA_DIR / "bpe8k.json").is_file(), reason=f"no real data in {DATA_DIR} (SLAP_DATA_DIR)"
)


def _special(tokenizer: Tokenizer, special: tuple[str, ...]) -> None:
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])


def byte_tokenizer(
    special: tuple[str, ...], merges: tuple[tuple[str, str], ...] = (), **names: Any
) -> PreTrainedTokenizerFast:
    """Special tokens first, then one token a byte, then the merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*special, *alphabet, *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    _special(backend, special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """Like LLaMA's: a space is ▁, every text gets one in front, other characters are bytes."""
    letters = [chr(c) for c in range(33, 127)]
    merges = [("▁", letter) for letter in letters]
    tokens = [*LLAMA2, *(f"<0x{b:02X}>" for b in range(256)), "▁", *letters]
    tokens += [a + b for a, b in merges]
    backend = Tokenizer(
        models.BPE(
            {t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    _special(backend, LLAMA2)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def real_tokenizer() -> PreTrainedTokenizerFast:
    """The 8k byte-level BPE that lies beside the real data."""
    return PreTrainedTokenizerFast(tokenizer_file=str(DATA_DIR / "bpe8k.json"))
