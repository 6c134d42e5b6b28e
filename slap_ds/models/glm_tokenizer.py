"""The fast tokenizer of a ChatGLM2, ChatGLM3 or GLM-4 folder, built from its `tokenizer.model`.

    tokenizer.model -> pieces with scores (SentencePiece), or bytes with ranks (tiktoken)
                    -> merges -> tokenizers.Tokenizer -> special tokens, chat template
                    -> check: samples encoded by it and by the plain algorithm must agree

No `sentencepiece`, `tiktoken` or `protobuf` is needed: both files are simple, and are read here.
"""

import base64
import binascii
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from slap_ds.data.glm_templates import GLM_TEMPLATES

Family = Literal["chatglm2", "chatglm3", "glm4"]

SPACE = "▁"
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
# ChatGLM names two of them `sop` and `eop`. As plain words they would be cut out of "sophisticated"
# and "people", so they get GLM-4's names here; the ids are what the model knows.
_MASKS = ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>")
_MEDIA = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
# In the order of their ids, which follow those of the pieces.
SPECIAL: dict[Family, tuple[str, ...]] = {
    "chatglm2": _MASKS,
    "chatglm3": _MASKS + _ROLES,
    "glm4": ("<|endoftext|>", *_MASKS, *_ROLES, *_MEDIA),
}
_GLM4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SAMPLES = (
    "sophisticated people stop at the shop, don't they?  It's 12345 o'clock.",
    "你好，世界！今天天气怎么样？",
    "def f(x):\n    return x ** 2\n\n\tprint(f(3))\r\n",
    "ChatGLM3 是清华技术成果转化的公司智谱 AI 研发的，支持 128K 上下文。",
    "<|user|> [gMASK]<sop></s><unk><0x0A> are only text here",
    "emoji 😀👩‍👩‍👧 and accents: naïve café, Größe, 日本語, русский, العربية",
    "   spaces   before,  between and after   ",
    "aaaaaaaaaaaaa ---------- \n\n\n\n ▁▁",
)

# The types of a SentencePiece piece.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a SentencePiece BPE file says."""

    texts: list[str]
    scores: list[float]
    types: list[int]
    charsmap: bytes  # compiled normalisation rules; empty: none
    prefix_space: bool
    one_space: bool  # runs of spaces become one

    def of_type(self, kind: int) -> list[str]:
        return [text for text, other in zip(self.texts, self.types, strict=True) if other == kind]


def read_sentencepiece(path: Path) -> Pieces:
    """Raises ValueError for a file that is no SentencePiece BPE model."""
    texts: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, Any] = {}
    rules: dict[int, Any] = {}
    try:
        for field, value in _fields(path.read_bytes()):
            if field == 1:
                piece = dict(_fields(value))
                texts.append(piece[1].decode("utf-8"))
                scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])
                types.append(piece.get(3, _NORMAL))
            elif field == 2:
                trainer = dict(_fields(value))
            elif field == 3:
                rules = dict(_fields(value))
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"{path} is truncated or no SentencePiece model: {error}") from None
    if trainer.get(3, 1) != 2:
        raise ValueError(f"{path} is no SentencePiece BPE model: expected ChatGLM's tokenizer.model")
    if len(set(texts)) != len(texts) or _UNUSED in types:
        raise ValueError(f"{path} has double or unused pieces, which no ChatGLM tokenizer has")
    return Pieces(
        texts, scores, types, rules.get(2, b""), bool(rules.get(3, 1)), bool(rules.get(4, 1))
    )


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: numbers for varints, bytes for the rest."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"unknown wire type {kind}")
        size = {1: 8, 5: 4}.get(kind) or varint() if kind != 2 else varint()
        if at + size > len(data):
            raise ValueError(f"a field of {size} bytes goes past the end")
        yield key >> 3, data[at : at + size]
        at += size


def read_ranks(path: Path) -> dict[bytes, int]:
    """A tiktoken file: a line has a token in base64 and its rank. Raises ValueError for another."""
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().split(b"\n"):
            if line.strip():
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
        raise ValueError(f"{path} is no list of tiktoken ranks") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
        raise ValueError(f"{path} is truncated: its {len(ranks)} ranks are not 0, 1, 2, ...")
    return ranks


def sentencepiece_tokenizer(pieces: Pieces) -> Tokenizer:
    """The same encoding as SentencePiece, special tokens apart."""
    ids = {text: i for i, text in enumerate(pieces.texts)}
    tokenizer = Tokenizer(
        BPE(
            ids,
            _piece_merges(pieces),
            unk_token=pieces.of_type(_UNKNOWN)[0],
            fuse_unk=True,
            byte_fallback=bool(pieces.of_type(_BYTE)),
        )
    )
    # Not Metaspace: that would split the text at spaces, and lose pieces with spaces inside.
    steps: list[Any] = []
    if pieces.charsmap:
        steps.append(normalizers.Precompiled(pieces.charsmap))
    if pieces.one_space:
        steps += [normalizers.Replace(Regex(" +"), " "), normalizers.Strip()]
    if pieces.prefix_space:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    if pattern := _whole_pattern(pieces):
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*back, decoders.Strip(" ", 1, 0)] if pieces.prefix_space else back
    )
    return tokenizer
